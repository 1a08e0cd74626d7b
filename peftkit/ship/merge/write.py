"""The merge itself: a plan's tensors computed and written one at a time, each from a stretch of a file.

At any moment there are in memory one weight, what is added to it, and the factors that this comes from.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from peftkit import interrupt
from peftkit.errors import PeftkitError, Problem, UserError
from peftkit.model.meta.layout import Place
from peftkit.model.quantize import packed_4bit, quantization_config, through_4bit
from peftkit.plan.plan import BasePlan
from peftkit.rundir import write_json
from peftkit.ship.files.tensors import INDEX, SINGLE, Entry, Writer, index_of, is_finite
from peftkit.ship.merge.combine import Combination, combined
from peftkit.ship.merge.deltas import Read, merged
from peftkit.ship.merge.plan import MergePlan, Output

Progress = Callable[[int, int], None]  # bytes written, bytes to write
_PIECES = 8  # tensors that a weight in 4-bit is stored as, at most
_KEPT_FACTORS = 4  # of fused experts: two pairs, asked for again by every expert
_KEPT_STACKS = 2  # parameters of a layer's experts that go through 4-bit as one


@dataclass(frozen=True)
class Sources:
    """Where numbers come from: the base's plan, and the tensors of each adapter's file.

    `requantize` writes what training held in 4-bit in 4-bit again.
    """

    base: BasePlan
    adapters: Sequence[Mapping[str, Entry]]
    combination: Combination
    requantize: bool = False


def write_merged(plan: MergePlan, sources: Sources, folder: Path, *, progress: Progress) -> None:
    """Write weights, index and configuration into a folder that is there and empty.

    Raises UserError for a file that is damaged, and what the disk raises.
    """
    reads = [_reader(tensors) for tensors in sources.adapters]
    if not sources.combination.is_plain:
        self_check(plan, reads, sources.combination)
    weights = _Weights(plan, sources)
    done, written = 0, {}
    for name, outputs in plan.files().items():
        names = [output.name for output in outputs for _ in range(_PIECES if sources.requantize else 1)]
        with Writer(folder / name, names) as writer:
            for output in outputs:
                interrupt.stop_if_requested("interrupted while merging; nothing is left of it")
                for key, tensor in _pieces(output, _value(output, sources, reads, weights), sources):
                    writer.put(key, tensor)
                done += output.num_bytes
                progress(done, plan.num_bytes)
        written[name] = writer.written
    if list(written) != [SINGLE]:
        write_json(folder / INDEX, index_of(written))
    config = dict(plan.config)
    if sources.requantize:
        config["quantization_config"] = quantization_config(sources.base).to_dict()
    write_json(folder / "config.json", config)


def self_check(plan: MergePlan, reads: Sequence[Read], how: Combination) -> None:
    """Raises PeftkitError unless each adapter alone, of weight 1 and whole, is given back as it is.

    On one weight of each: the arithmetic is the same for all.
    """
    alone = replace(how, weights=(1.0,), density=1.0)
    for number, read in enumerate(reads):
        output = next((o for o in plan.outputs if o.edits[number] and o.source is not None), None)
        if output is None or output.source is None:
            continue
        place = output.place or Place(output.name)
        own, weight = output.edits[number], output.source.read()
        plain = merged(weight.float().clone(), own, read, place=place, dtype=torch.float32)
        through = combined(weight.float(), [own], [read], alone, place=place, dtype=torch.float32)
        if not torch.allclose(plain, through, rtol=1e-5, atol=1e-6):
            raise PeftkitError(f"{how.how} does not give {output.name} back for one adapter of weight 1")


def _pieces(output: Output, value: torch.Tensor, sources: Sources) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor as it is written: itself, or its codes in 4-bit with their scales."""
    if sources.requantize and output.is_4bit:
        held = value.to(getattr(torch, sources.base.dtype))
        packed = packed_4bit(held, sources.base, turned=output.turned)
        yield from ((f"{output.name}{key}", tensor) for key, tensor in packed.items())
    else:
        yield output.name, value


def _reader(tensors: Mapping[str, Entry]) -> Read:
    """Reads tensors of an adapter's file; the last few are kept."""
    kept: OrderedDict[str, torch.Tensor] = OrderedDict()

    def read(name: str) -> torch.Tensor:
        if name not in kept:
            kept[name] = tensors[name].read()
            while len(kept) > _KEPT_FACTORS:
                kept.popitem(last=False)
        kept.move_to_end(name)
        return kept[name]

    return read


def _value(output: Output, sources: Sources, reads: Sequence[Read], weights: _Weights) -> torch.Tensor:
    place, weight = output.place or Place(output.name), weights.read(output)
    value = (
        combined(weight, output.edits, reads, sources.combination, place=place, dtype=output.dtype)
        if len(reads) > 1 or not sources.combination.is_plain
        else merged(weight, output.edits[0], reads[0], place=place, dtype=output.dtype)
    )
    if tuple(value.shape) != output.shape:
        raise PeftkitError(f"{output.name} came out as {tuple(value.shape)}, not {output.shape}")
    # one adapter's numbers are finite, and what they come to is compared; others are looked at here
    if not sources.combination.is_plain and any(output.edits) and not is_finite(value):
        got, fix = f"{output.name} with numbers that are not finite", "smaller weights, or --dtype float32"
        raise UserError(Problem("merge", got, f"numbers that {output.dtype} holds", fix))
    return value


def _replaced(output: Output) -> bool:
    """Whether nothing of the base's own tensor is left."""
    return len(output.edits) == 1 and bool(output.edits[0]) and output.edits[0][0].kind == "whole"


class _Weights:
    """The base's weights as training saw them, read into two buffers in turn: one is written meanwhile.

    Experts that lie apart on disk are put through 4-bit as the one parameter that they are in the model.
    """

    def __init__(self, plan: MergePlan, sources: Sources) -> None:
        self._base, self._is_plain = sources.base, sources.combination.is_plain
        self._parts: dict[str, list[Output]] = {}
        for output in plan.outputs:
            if output.in_4bit and output.place is not None and output.place.expert is not None:
                self._parts.setdefault(output.place.parameter, []).append(output)
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()
        largest = max((o.source.num_bytes for o in plan.outputs if o.source is not None), default=0)
        self._buffers = [torch.empty(largest, dtype=torch.uint8) for _ in range(2)]

    def read(self, output: Output) -> torch.Tensor:
        """A tensor of the files. It may be written to, and lasts until the next but one is read."""
        if output.source is None:
            return torch.zeros(output.shape, dtype=output.dtype)
        if self._is_plain and _replaced(output):
            return torch.empty(0)
        if output.in_4bit:
            return self._through_4bit(output)
        self._buffers.reverse()
        return output.source.read(into=self._buffers[0])

    def _through_4bit(self, output: Output) -> torch.Tensor:
        assert output.source is not None and output.place is not None
        held = getattr(torch, self._base.dtype)
        place = output.place
        if place.expert is None:
            return through_4bit(output.source.read().to(held), self._base, turned=output.turned)
        if place.parameter not in self._kept:
            self._kept[place.parameter] = through_4bit(self._stack(place.parameter), self._base, turned=False)
            while len(self._kept) > _KEPT_STACKS:
                self._kept.popitem(last=False)
        return _part(self._kept[place.parameter], place).clone()

    def _stack(self, parameter: str) -> torch.Tensor:
        """All experts, fused as in the model."""
        outputs = self._parts[parameter]
        one = outputs[0]
        assert one.place is not None and one.source is not None
        shape = list(one.source.shape)
        shape[one.place.axis] *= one.place.num_parts
        whole = torch.empty((one.place.num_experts, *shape), dtype=getattr(torch, self._base.dtype))
        for output in outputs:
            assert output.place is not None and output.source is not None
            _part(whole, output.place).copy_(output.source.read())
        return whole


def _part(whole: torch.Tensor, place: Place) -> torch.Tensor:
    assert place.expert is not None
    size = whole.shape[1 + place.axis] // place.num_parts
    return whole[place.expert].narrow(place.axis, place.part * size, size)
