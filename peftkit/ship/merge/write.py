"""Execution of a merge plan: tensors computed and written one at a time, each read from a slice of a file.

In memory at any moment: one weight, what is added to it, and the factors of that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from peftkit import interrupt
from peftkit.errors import PeftkitError, Problem, UserError
from peftkit.model.meta.layout import Placement
from peftkit.model.quantize import build_quantization_config, pack_4bit, round_trip_4bit
from peftkit.plan.plan import BasePlan
from peftkit.rundir import write_json
from peftkit.ship.files.tensors import INDEX_FILE, SINGLE_FILE, SafetensorsWriter, TensorEntry, is_finite, shard_index
from peftkit.ship.merge.combine import Combination, merge_combined
from peftkit.ship.merge.deltas import TensorReader, merge_weight
from peftkit.ship.merge.plan import MergePlan, OutputTensor

ProgressCallback = Callable[[int, int], None]  # bytes written, bytes to write
_MAX_4BIT_TENSORS = 8  # tensors that a weight in 4-bit is stored as, at most
_CACHED_FACTORS = 4  # of fused experts: two pairs, asked for again by every expert
_CACHED_STACKS = 2  # parameters of a layer's experts that go through 4-bit as one


@dataclass(frozen=True)
class MergeSources:
    """Inputs of a merge: the base's plan, each adapter's tensors, and how adapters are combined.

    `requantize` writes what training held in 4-bit in 4-bit again.
    """

    base: BasePlan
    adapters: Sequence[Mapping[str, TensorEntry]]
    combination: Combination
    requantize: bool = False


def write_merged(plan: MergePlan, sources: MergeSources, folder: Path, *, progress: ProgressCallback) -> None:
    """Write weights, index and configuration into a folder that exists and is empty.

    Raises UserError for a damaged file, and what the disk raises.
    """
    reads = [_cached_reader(tensors) for tensors in sources.adapters]
    if not sources.combination.is_plain:
        check_combination_identity(plan, reads, sources.combination)
    weights = _BaseWeights(plan, sources)
    num_written, tensor_bytes = 0, {}
    for name, outputs in plan.files().items():
        names = [output.name for output in outputs for _ in range(_MAX_4BIT_TENSORS if sources.requantize else 1)]
        with SafetensorsWriter(folder / name, names) as writer:
            for output in outputs:
                interrupt.stop_if_requested("interrupted while merging; nothing is left of it")
                for key, tensor in _stored_tensors(output, _compute_output(output, sources, reads, weights), sources):
                    writer.put(key, tensor)
                num_written += output.num_bytes
                progress(num_written, plan.num_bytes)
        tensor_bytes[name] = writer.written
    if list(tensor_bytes) != [SINGLE_FILE]:
        write_json(folder / INDEX_FILE, shard_index(tensor_bytes))
    config = dict(plan.config)
    if sources.requantize and (quantization := build_quantization_config(sources.base)):
        config["quantization_config"] = quantization.to_dict()
    write_json(folder / "config.json", config)


def check_combination_identity(plan: MergePlan, reads: Sequence[TensorReader], combination: Combination) -> None:
    """Raise PeftkitError unless each adapter alone, with weight 1 and density 1, comes back unchanged.

    Checked on one weight per adapter: the arithmetic is the same for all.
    """
    single = replace(combination, weights=(1.0,), density=1.0)
    for index, read in enumerate(reads):
        output = next((o for o in plan.outputs if o.edits[index] and o.source is not None), None)
        if output is None or output.source is None:
            continue
        place = output.place or Placement(output.name)
        adapter_edits, weight = output.edits[index], output.source.read()
        merged_weight = merge_weight(weight.float().clone(), adapter_edits, read, place=place, dtype=torch.float32)
        combined_weight = merge_combined(
            weight.float(), [adapter_edits], [read], single, place=place, dtype=torch.float32
        )
        if not torch.allclose(merged_weight, combined_weight, rtol=1e-5, atol=1e-6):
            raise PeftkitError(f"{combination.how} does not reproduce {output.name} for one adapter of weight 1")


def _stored_tensors(
    output: OutputTensor, value: torch.Tensor, sources: MergeSources
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a tensor as it is written: itself, or its codes in 4-bit with their scales."""
    if sources.requantize and output.is_4bit:
        dense = value.to(getattr(torch, sources.base.dtype))
        packed = pack_4bit(dense, sources.base, transposed=output.is_transposed_4bit)
        yield from ((f"{output.name}{key}", tensor) for key, tensor in packed.items())
    else:
        yield output.name, value


def _cached_reader(tensors: Mapping[str, TensorEntry]) -> TensorReader:
    """Return a reader of an adapter's tensors that caches the last few."""
    cache: OrderedDict[str, torch.Tensor] = OrderedDict()

    def read(name: str) -> torch.Tensor:
        if name not in cache:
            cache[name] = tensors[name].read()
            while len(cache) > _CACHED_FACTORS:
                cache.popitem(last=False)
        cache.move_to_end(name)
        return cache[name]

    return read


def _compute_output(
    output: OutputTensor, sources: MergeSources, reads: Sequence[TensorReader], weights: _BaseWeights
) -> torch.Tensor:
    """Compute one tensor of the plan. Raises UserError where a combination is not finite in its dtype."""
    place, weight = output.place or Placement(output.name), weights.read(output)
    value = (
        merge_combined(weight, output.edits, reads, sources.combination, place=place, dtype=output.dtype)
        if len(reads) > 1 or not sources.combination.is_plain
        else merge_weight(weight, output.edits[0], reads[0], place=place, dtype=output.dtype)
    )
    if tuple(value.shape) != output.shape:
        raise PeftkitError(f"{output.name} came out as {tuple(value.shape)}, not {output.shape}")
    # one adapter's numbers are finite, and what they come to is compared; others are looked at here
    if not sources.combination.is_plain and any(output.edits) and not is_finite(value):
        got, fix = f"{output.name} with numbers that are not finite", "smaller weights, or --dtype float32"
        raise UserError(Problem("merge", got, f"finite numbers in {output.dtype}", fix))
    return value


class _BaseWeights:
    """Base weights as training saw them, read into two buffers in turn: one is written meanwhile.

    Experts stored apart on disk go through 4-bit as the one fused parameter that they are in the model.
    """

    def __init__(self, plan: MergePlan, sources: MergeSources) -> None:
        self._base, self._is_plain = sources.base, sources.combination.is_plain
        self._expert_outputs: dict[str, list[OutputTensor]] = {}
        for output in plan.outputs:
            if output.in_4bit and output.place is not None and output.place.expert is not None:
                self._expert_outputs.setdefault(output.place.parameter, []).append(output)
        self._fused_cache: OrderedDict[str, torch.Tensor] = OrderedDict()
        largest = max((o.source.num_bytes for o in plan.outputs if o.source is not None), default=0)
        self._buffers = [torch.empty(largest, dtype=torch.uint8) for _ in range(2)]

    def read(self, output: OutputTensor) -> torch.Tensor:
        """Return a base tensor. It may be overwritten, and lasts until the next but one is read."""
        if output.source is None:
            return torch.zeros(output.shape, dtype=output.dtype)
        if self._is_plain and (len(output.edits) == 1 and bool(output.edits[0]) and output.edits[0][0].kind == "whole"):
            return torch.empty(0)
        if output.in_4bit:
            assert output.source is not None and output.place is not None
            base_dtype = getattr(torch, self._base.dtype)
            place = output.place
            if place.expert is None:
                return round_trip_4bit(
                    output.source.read().to(base_dtype), self._base, transposed=output.is_transposed_4bit
                )
            if place.parameter not in self._fused_cache:
                # all experts of the parameter, fused as in the model
                outputs = self._expert_outputs[place.parameter]
                first_output = outputs[0]
                assert first_output.place is not None and first_output.source is not None
                shape = list(first_output.source.shape)
                shape[first_output.place.axis] *= first_output.place.num_parts
                fused = torch.empty((first_output.place.num_experts, *shape), dtype=getattr(torch, self._base.dtype))
                for fused_output in outputs:
                    assert fused_output.place is not None and fused_output.source is not None
                    _expert_part(fused, fused_output.place).copy_(fused_output.source.read())
                self._fused_cache[place.parameter] = round_trip_4bit(fused, self._base, transposed=False)
                while len(self._fused_cache) > _CACHED_STACKS:
                    self._fused_cache.popitem(last=False)
            return _expert_part(self._fused_cache[place.parameter], place).clone()
        self._buffers.reverse()
        return output.source.read(into=self._buffers[0])


def _expert_part(fused: torch.Tensor, place: Placement) -> torch.Tensor:
    """Return the view of one expert's part in a fused tensor (num_experts, ., .)."""
    assert place.expert is not None
    size = fused.shape[1 + place.axis] // place.num_parts
    return fused[place.expert].narrow(place.axis, place.part * size, size)
