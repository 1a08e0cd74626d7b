"""The data gate of a recipe: read, tokenized as in training, shown and judged, without any weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peftkit.data.gate.duplicates import SAMPLE
from peftkit.data.gate.finding import Data
from peftkit.data.gate.report import DataReport, Totals, histogram
from peftkit.data.gate.samples import Sample
from peftkit.data.rows.examples import Examples
from peftkit.data.rows.ingest import ingest
from peftkit.data.tokens.lengths import counted, longest
from peftkit.data.tokens.mask import Tokenized
from peftkit.data.tokens.prepare import Prepared, prepare
from peftkit.plan import DataFacts, Facts, Plan, make_plan
from peftkit.plan.packing import best_sampling
from peftkit.plan.throughput import work_of
from peftkit.prepare.calibration import read_calibration
from peftkit.prepare.facts import converted, data_facts, find_base, model_facts, text_facts
from peftkit.recipe import LoadedRecipe

_SAMPLES = 3  # of each set
_TRIED = 20  # rows, where some hold secrets
_SHOWN_DECISIONS = ("data.", "train.packing", "train.sampling")


@dataclass(frozen=True)
class Looked:
    """Data as training will see it, the plan for the rows that are left, and what the gate says."""

    facts: Facts
    plan: Plan
    tokenizer: Any
    prepared: Prepared
    report: DataReport
    chats: bool


def check_data(loaded: LoadedRecipe, *, full: bool = False) -> DataReport:
    """The report on a recipe's data. Nothing is raised for rows: failed checks say it.

    Raises UserError for a recipe, base or source that cannot be had, and where no row is left to learn from.
    """
    from peftkit.model.hardware import detect_device_light
    from peftkit.model.load import loadable

    base = find_base(loaded)
    source = loadable(base, loaded.where(("base", "id")))
    examples = ingest(loaded.recipe.data, seed=loaded.recipe.seed, where=loaded.where)
    model = model_facts(loaded, converted(base, source), examples)
    facts = Facts(detect_device_light(), model, None)
    return look(loaded, facts, examples, source, full=full, to_train=False).report


def look(
    loaded: LoadedRecipe,
    facts: Facts,
    examples: Examples,
    source: str,
    *,
    full: bool = False,
    to_train: bool = True,
) -> Looked:
    """Tokenize what was read, plan for the rows that are left, and judge them."""
    from peftkit.data.tokens.store import is_weighted
    from peftkit.model.load import load_tokenizer, stops_of

    task = facts.model.shape.task
    facts = replace(facts, data=data_facts(examples, task))
    plan = make_plan(loaded, facts, to_train=to_train)
    tokenizer = load_tokenizer(source, plan.base)
    stops = stops_of(source, tokenizer)
    prepared = prepare(examples, tokenizer, plan.data, task=task, labels=plan.base.labels, stops=stops)
    rows = DataFacts(
        num_train=len(prepared.train),
        num_eval=len(prepared.eval),
        format=plan.data.format,
        labels=plan.base.labels,
        lengths=counted(prepared.train, task, plan.data.max_length),
        longest_eval=longest(counted(prepared.eval, task)),
        weighted=is_weighted(prepared.train),
    )
    facts = replace(facts, data=rows, text=text_facts(tokenizer, prepared))
    plan = make_plan(loaded, facts, to_train=to_train)
    data = Data(examples, prepared, plan, tokenizer, facts, stops, full)
    chats = prepared.style.source != "none" or bool(examples.train[0].messages)
    return Looked(facts, plan, tokenizer, prepared, _report(data), chats)


def _report(data: Data) -> DataReport:
    """What the gate says of data that is prepared."""
    from peftkit.data.gate.checks import judge
    from peftkit.data.tokens.store import Counts

    examples, prepared, plan = data.examples, data.prepared, data.plan
    lengths = Counts.of(prepared.train).tokens.tolist()
    samples = [*_samples(prepared.train, "train", data), *_samples(prepared.eval, "eval", data)]
    small = data.full or max(len(examples.train), len(examples.eval)) <= SAMPLE
    return DataReport(
        totals=_totals(prepared, plan, data.facts, sorted(lengths)),
        histogram=histogram(lengths),
        decisions=tuple(
            (d.key, ", ".join(d.value) if isinstance(d.value, list) else str(d.value), d.reason)
            for d in plan.decisions
            if d.reason and d.key.startswith(_SHOWN_DECISIONS)
        ),
        samples=tuple(samples),
        findings=judge(data, plan.data.waive),
        sampled="every row" if small else f"a sample of {SAMPLE:,} rows; --full looks at all",
    )


def _samples(rows: Sequence[Tokenized], name: str, data: Data) -> Iterator[Sample]:
    """The first rows, and one from the middle; those that hold a secret are passed over."""
    from peftkit.data.gate.samples import sample_of
    from peftkit.data.rows.scan_text import has_secret

    base, num = data.plan.base, 0
    for place in dict.fromkeys((0, 1, len(rows) // 2, *range(2, _TRIED))):
        if num == _SAMPLES or place >= len(rows):
            continue
        sample = sample_of(rows[place], name, data.tokenizer, task=base.task, labels=base.labels)
        if not has_secret("".join(piece.text for piece in sample.pieces)):
            num += 1
            yield sample


def _totals(prepared: Prepared, plan: Plan, facts: Facts, ordered: list[int]) -> Totals:
    speeds: Mapping[str, float] = read_calibration().speeds.get(facts.device.name, {})
    work = work_of(facts.model.shape, plan, facts, speeds, None)
    return Totals(
        format=plan.data.format,
        num_train=len(prepared.train),
        num_eval=len(prepared.eval),
        num_tokens=prepared.num_tokens,
        num_learnt=prepared.num_learnt,
        longest=ordered[-1],
        median=ordered[len(ordered) // 2],
        batching=_batching(plan, facts),
        num_steps=plan.train.num_steps,
        tokens_per_second=work.tokens_per_second,
        seconds=work.seconds,
    )


def _batching(plan: Plan, facts: Facts) -> str:
    """How rows are put together, and how much of it is padding."""
    train, lengths = plan.train, facts.data.lengths if facts.data else None
    if train.packing and lengths is not None and lengths.packs is not None:
        packs = lengths.packs
        full = lengths.num_tokens / (packs.num * packs.room)
        return f"{packs.num:,} packs of {packs.room:,} tokens, {full:.1%} full; {train.batch_size} a step"
    sampling, shares = best_sampling(plan, facts)
    told = f"{train.batch_size} rows a step, {train.micro_batch} at a time"
    return f"{told}, {sampling}: about {shares[sampling]:.0%} padding" if shares else f"{told}: no padding"
