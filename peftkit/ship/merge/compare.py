"""Is a merged model what was trained? Both are asked, on held-out rows where there are any."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftkit.data.tokens.mask import Tokenized
from peftkit.diagnose.statistics import Interval, Rows, gain
from peftkit.errors import UserError
from peftkit.plan.plan import BasePlan
from peftkit.results.find import Adapter
from peftkit.results.load import Result, load_result
from peftkit.rundir import read_json
from peftkit.ship.merge.decide import DEQUANTIZED, ORIGINAL, Observer, Work, write
from peftkit.ship.merge.fidelity import Fidelity
from peftkit.ship.merge.report import Choice, MergeReport

_MOST_LOST = 0.5  # of what the adapter changes
_MOST_ROWS = 200  # of held-out rows that a loss is measured on


@dataclass(frozen=True)
class Compared:
    """What is compared on: `texts` for logits, `judged` for losses, with the document of each."""

    texts: tuple[Tokenized, ...]
    judged: tuple[Tokenized, ...]

    @classmethod
    def of(cls, work: Work, path: Path, observer: Observer) -> Compared:
        """Held-out rows of the run or of --data; short texts where there are none."""
        from peftkit.model.load import load_tokenizer
        from peftkit.ship.merge.fidelity import prompts

        adapter, data = work.adapters[0], work.options.data
        own = (adapter.folder / "tokenizer_config.json").is_file()
        tokenizer = load_tokenizer(
            str(adapter.folder) if own else adapter.source,
            replace(adapter.base, revision=None) if own else adapter.base,
        )
        texts = tuple(prompts(tokenizer, adapter.base.task))
        if adapter.run is None and data is None:
            return cls(texts, ())
        try:
            found = _held_out(adapter, tokenizer, data, path)
        except UserError as error:
            if data is not None:
                raise
            observer({"event": "notice", "text": f"compared on short texts: {error.problems[0].got}"})
            return cls(texts, ())
        return cls(found[:_MOST_ROWS] or texts, found[:_MOST_ROWS])


def _held_out(adapter: Adapter, tokenizer: Any, data: str | None, path: Path) -> tuple[Tokenized, ...]:
    from peftkit.model.load import stops_of
    from peftkit.results.evaluate import examples_for, refuse_other_data, tokenized

    bare = Result(None, tokenizer, adapter.base.task, adapter.plan, adapter.run, 1, True)
    examples, chosen = examples_for(bare, data, path)
    refuse_other_data(bare, examples)
    writes = adapter.base.task in {"causal-lm", "seq2seq"}
    stops = stops_of(adapter.source, tokenizer) if writes else frozenset()
    rows, _ = tokenized(bare, examples, chosen, stops=stops)
    return tuple(rows)


def verified(
    work: Work,
    made: MergeReport,
    staging: Path,
    compared: Sequence[str],
    rows: Compared,
    observer: Observer,
) -> MergeReport:
    """Compare what is on the disk with base and adapter, and with what the other base would give."""
    from peftkit.ship.merge.fidelity import compare

    if not work.combination.is_plain:
        return _sum_verified(work, made, staging, rows, observer)
    first = work.adapters[0]

    def told(what: str) -> None:
        observer({"event": "phase", "name": "verify", "detail": what})

    told("asking the base with the adapter, as it was trained")
    trained, without = _reference(first, rows)
    told("asking the merged model, read back from the disk")
    got = _asked(staging, first.base, rows)
    fidelity, reference = compare(trained, got, without=without), "what was trained"
    if work.base == ORIGINAL and first.base.quant_type is not None:
        told("asking the original base with the adapter")
        expected, alone = _reference(replace(first, base=replace(first.base, quant_type=None)), rows)
        fidelity = compare(expected, got, without=alone)
        reference = "the original base with the adapter"
    problem = fidelity.problem(_precision(work, first.base))
    made = replace(made, fidelity=fidelity, reference=reference, problem=_or_lost(made, fidelity, problem))
    if len(compared) < 2:
        return made
    said = {work.base: got}
    for base in compared:
        if base not in said:
            told(f"trying the {base} base as well")
            with _beside(staging) as folder:
                write(work, base, folder)
                said[base] = _asked(folder, first.base, rows)
    choices = tuple(
        Choice(base, compare(trained, said[base], without=without)) for base in (DEQUANTIZED, ORIGINAL)
    )
    better = _gain(said[DEQUANTIZED], said[ORIGINAL])
    recommended = ORIGINAL if better.low > 0 else DEQUANTIZED
    return replace(made, choices=choices, recommended=recommended, gain=better)


def _or_lost(made: MergeReport, fidelity: Fidelity, problem: str) -> str:
    """What 4 bits cost is the user's choice, as long as more than half of the adapter is left."""
    if not made.requantized:
        return problem
    if fidelity.effect is not None and not fidelity.kl <= _MOST_LOST * fidelity.effect:
        share = fidelity.kl / max(fidelity.effect, 1e-12)
        return f"in {made.requantized} again {share:.0%} of what the adapter changes is lost"
    return ""


def _sum_verified(
    work: Work, made: MergeReport, staging: Path, rows: Compared, observer: Observer
) -> MergeReport:
    """A sum of LoRA adapters is what PEFT computes with all active; other combinations nobody computes."""
    from peftkit.model.adapter.load import load_weighted
    from peftkit.model.hardware import detect_device
    from peftkit.model.load import load_model, load_tokenizer
    from peftkit.ship.merge.fidelity import compare, outputs

    first = work.adapters[0]
    if not work.is_sum_of_lora:
        return made
    observer({"event": "phase", "name": "verify", "detail": "asking the base with all adapters at once"})
    held = replace(first.base, quant_type=None) if work.base == ORIGINAL else first.base
    model = load_model(first.source, held, device=detect_device().kind)
    model = load_weighted(model, [one.folder for one in work.adapters], work.combination.weights)
    pad_id = load_tokenizer(str(staging), replace(first.base, revision=None)).pad_token_id
    how = {"pad_id": pad_id, "task": first.base.task}
    expected = outputs(model, rows.texts, judged=rows.judged, **how)
    with model.disable_adapter():
        without = outputs(model, rows.texts, **how)
    del model
    gc.collect()
    observer(
        {"event": "phase", "name": "verify", "detail": "asking the merged model, read back from the disk"}
    )
    fidelity = compare(expected, _asked(staging, first.base, rows), without=without)
    problem = fidelity.problem(_precision(work, first.base))
    reference = "the base with all adapters at once"
    return replace(made, fidelity=fidelity, reference=reference, problem=_or_lost(made, fidelity, problem))


def _precision(work: Work, base: BasePlan) -> str:
    """The narrowest type that numbers of the comparison went through."""
    names = {str(o.dtype).removeprefix("torch.") for o in work.plans[work.base].outputs}
    names |= {base.dtype, base.compute_dtype}
    return next((name for name in ("bfloat16", "float16") if name in names), "float32")


def _reference(adapter: Adapter, rows: Compared) -> tuple[Any, Any]:
    """(outputs with the adapter, outputs of its base alone)."""
    from peftkit.model.hardware import detect_device
    from peftkit.ship.merge.fidelity import outputs

    result = load_result(adapter, device=detect_device().kind)
    how = {"pad_id": result.tokenizer.pad_token_id, "task": result.task}
    expected = outputs(result.model, rows.texts, judged=rows.judged, **how)
    with result.model.disable_adapter():
        without = outputs(result.model, rows.texts, **how)
    del result
    gc.collect()
    return expected, without


def _asked(folder: Path, base: BasePlan, rows: Compared) -> Any:
    """What the model in a folder says, loaded as anybody would."""
    from peftkit.model.hardware import detect_device
    from peftkit.model.load import load_model, load_tokenizer
    from peftkit.ship.merge.fidelity import outputs

    plain = replace(base, id=str(folder), revision=None, quant_type=None, overrides={}, labels=())
    config = read_json(folder / "config.json")
    if "quantization_config" in config:  # its other weights stay in the type that they are in
        plain = replace(plain, dtype=str(config.get("dtype") or config.get("torch_dtype") or base.dtype))
    model = load_model(str(folder), plain, device=detect_device().kind)
    tokenizer = load_tokenizer(str(folder), plain)
    found = outputs(model, rows.texts, pad_id=tokenizer.pad_token_id, task=base.task, judged=rows.judged)
    del model
    gc.collect()
    return found


@contextmanager
def _beside(staging: Path) -> Iterator[Path]:
    """A folder on the same disk, gone at the end."""
    with tempfile.TemporaryDirectory(dir=staging.parent, prefix=staging.name) as folder:
        yield Path(folder)


def _gain(before: Any, after: Any) -> Interval:
    """How much lower the second's loss is, paired by row."""
    documents = tuple(range(len(before.losses.sums)))
    one, two = (Rows(each.losses.sums, each.losses.counts, documents) for each in (before, after))
    return gain(one, two)
