"""The data check of a recipe: rows read, tokenized as in training, shown and checked, without weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peftkit.data.gate.duplicates import SIMILARITY_SAMPLE
from peftkit.data.gate.finding import CheckInputs
from peftkit.data.gate.report import DataReport, Totals, histogram
from peftkit.data.gate.samples import Sample, make_sample
from peftkit.data.rows.examples import Examples
from peftkit.data.rows.ingest import ingest
from peftkit.data.rows.scan_text import has_secret
from peftkit.data.tokens.lengths import count_lengths, longest_sides
from peftkit.data.tokens.mask import Tokenized
from peftkit.data.tokens.prepare import TokenizedData, tokenize_examples
from peftkit.errors import Problem, UserError
from peftkit.model.hardware import detect_device_without_torch
from peftkit.model.load import load_tokenizer, read_stop_ids, resolve_source, special_tokens
from peftkit.objectives import OBJECTIVES
from peftkit.plan import DataFacts, Facts, Plan, make_plan
from peftkit.plan.packing import best_sampling
from peftkit.plan.throughput import estimate_cost
from peftkit.prepare.calibration import read_calibration
from peftkit.prepare.facts import data_facts, find_base, model_facts, text_facts, with_converted_config
from peftkit.prepare.vocabulary import require_tokens
from peftkit.recipe import LoadedRecipe
from peftkit.units import join_names

_SAMPLES_PER_SPLIT = 3  # of each set
_MAX_SAMPLE_TRIES = 20  # rows, where some hold secrets
_SHOWN_DECISIONS = ("data.", "train.packing", "train.sampling")


@dataclass(frozen=True)
class PreparedData:
    """The data as training will see it, the plan for the remaining rows, and the report of the data gate."""

    facts: Facts
    plan: Plan
    tokenizer: Any
    prepared: TokenizedData
    report: DataReport
    chats: bool


def check_data(loaded: LoadedRecipe, *, full: bool = False) -> DataReport:
    """Return the report on a recipe's data. Failed checks are in the report and raise nothing.

    Raises UserError for a recipe, base or source that cannot be read, and where no row is left to train on.
    """
    base = find_base(loaded)
    source = resolve_source(base, loaded.where(("base", "id")), need_weights=False)
    examples = ingest(loaded.recipe.data, seed=loaded.recipe.seed, where=loaded.where)
    model = model_facts(loaded, with_converted_config(base, source), examples)
    facts = Facts(detect_device_without_torch(), model, None)
    return prepare_data(loaded, facts, examples, source, full=full, to_train=False).report


def prepare_data(
    loaded: LoadedRecipe, facts: Facts, examples: Examples, source: str, *, full: bool = False, to_train: bool = True
) -> PreparedData:
    """Tokenize the examples, plan for the rows that remain, and run the checks of the data gate."""
    from peftkit.data.gate.checks import run_checks
    from peftkit.data.tokens.store import Counts, is_weighted

    task = facts.model.shape.task
    facts = replace(facts, data=data_facts(examples, task))
    plan = make_plan(loaded, facts, to_train=to_train)
    tokenizer = load_tokenizer(source, plan.base)
    if plan.method.token_rows:
        require_tokens(loaded, plan, load_tokenizer(source, replace(plan.base, new_tokens={})).get_vocab())
    if tokenizer.eos_token is None and plan.data.format != "text" and OBJECTIVES[task].generates_answers:
        names = special_tokens(tokenizer)
        fix = f"name the token that ends an answer: data.chat.end_token: {names[0] if names else '...'}"
        got = "a tokenizer without an end-of-sequence (EOS) token"
        if names[1:]:
            fix += f" (it also has {join_names(names[1:], 6)})"
        raise UserError(Problem(f"base {plan.base.id}", got, "one: without it a model never learns to stop", fix))
    stops = read_stop_ids(source, tokenizer)
    prepared = tokenize_examples(examples, tokenizer, plan.data, task=task, labels=plan.base.labels, stops=stops)
    rows = DataFacts(
        num_train=len(prepared.train),
        num_eval=len(prepared.eval),
        format=plan.data.format,
        labels=plan.base.labels,
        lengths=count_lengths(prepared.train, task, plan.data.max_length),
        longest_eval=longest_sides(count_lengths(prepared.eval, task)),
        weighted=is_weighted(prepared.train),
        unused=tuple(examples.unused),
    )
    facts = replace(facts, data=rows, text=text_facts(tokenizer, prepared))
    plan = make_plan(loaded, facts, to_train=to_train)
    data = CheckInputs(examples, prepared, plan, tokenizer, facts, stops, full)
    is_chat = prepared.style.source != "none" or bool(examples.train[0].messages)
    lengths = Counts.of(prepared.train).tokens.tolist()
    samples = [*_pick_samples(prepared.train, "train", data), *_pick_samples(prepared.eval, "eval", data)]
    is_full_scan = data.full or max(len(examples.train), len(examples.eval)) <= SIMILARITY_SAMPLE
    sorted_lengths = sorted(lengths)
    speeds: Mapping[str, float] = read_calibration().speeds.get(data.facts.device.name, {})
    work = estimate_cost(data.facts.model.shape, plan, data.facts, speeds, None)
    train, row_lengths = plan.train, data.facts.data.lengths if data.facts.data else None
    if train.packing and row_lengths is not None and row_lengths.packs is not None:
        packs = row_lengths.packs
        fill = row_lengths.num_tokens / (packs.num * packs.room)
        batching = f"{packs.num:,} packs of {packs.room:,} tokens, {fill:.1%} full; {train.batch_size} a step"
    else:
        sampling, shares = best_sampling(plan, data.facts)
        message = f"{train.batch_size} rows a step, {train.micro_batch} at a time"
        batching = (
            f"{message}, {sampling}: about {shares[sampling]:.0%} padding" if shares else f"{message}: no padding"
        )
    totals = Totals(
        format=plan.data.format,
        num_train=len(prepared.train),
        num_eval=len(prepared.eval),
        num_tokens=prepared.num_tokens,
        num_learnt=prepared.num_learnt,
        longest=sorted_lengths[-1],
        median=sorted_lengths[len(sorted_lengths) // 2],
        batching=batching,
        num_steps=plan.train.num_steps,
        tokens_per_second=work.tokens_per_second,
        seconds=work.seconds,
    )
    report = DataReport(
        totals=totals,
        histogram=histogram(lengths),
        decisions=tuple(
            (d.key, ", ".join(d.value) if isinstance(d.value, list) else str(d.value), d.reason)
            for d in plan.decisions
            if d.reason and d.key.startswith(_SHOWN_DECISIONS)
        ),
        samples=tuple(samples),
        findings=run_checks(data, plan.data.waive),
        sampled="every row" if is_full_scan else f"a sample of {SIMILARITY_SAMPLE:,} rows; --full checks all rows",
    )
    return PreparedData(facts, plan, tokenizer, prepared, report, is_chat)


def _pick_samples(rows: Sequence[Tokenized], name: str, data: CheckInputs) -> Iterator[Sample]:
    """Yield the first rows and one from the middle, skipping those that hold a secret."""
    base, num_samples = data.plan.base, 0
    for index in dict.fromkeys((0, 1, len(rows) // 2, *range(2, _MAX_SAMPLE_TRIES))):
        if num_samples == _SAMPLES_PER_SPLIT or index >= len(rows):
            continue
        sample = make_sample(rows[index], name, data.tokenizer, task=base.task, labels=base.labels)
        if not has_secret("".join(piece.text for piece in sample.pieces)):
            num_samples += 1
            yield sample
