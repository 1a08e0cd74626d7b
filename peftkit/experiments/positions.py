"""Loss by position on held-out rows, and what stretched rotary positions would gain at once."""

from __future__ import annotations

from dataclasses import replace

from peftkit.data.tokens.store import Counts
from peftkit.diagnose.causes import Evidence
from peftkit.diagnose.positions import SpanLosses, Stretch, equal_spans, find_reaches, stretch_factor
from peftkit.diagnose.statistics import HeldOutLosses, paired_gain
from peftkit.experiments.evidence import JudgedState
from peftkit.model.rope import stretched_rope
from peftkit.plan.activations import virtual_tokens
from peftkit.plan.rate import EVAL_COST
from peftkit.train.checkpoint.restore import load_trained
from peftkit.train.training import compute_span_losses

_LONG_SHARE = 0.25  # of the positions of config.json: shorter rows do not get near to where they end


def has_long_rows(state: JudgedState) -> bool:
    """Return whether held-out rows reach into positions that the base may not have been trained to."""
    shape, plan = state.context.facts.model.shape, state.context.plan
    is_plain = shape.positions == "rope" and shape.rope_type == "default" and "rope_scaling" not in plan.base.overrides
    longest = max(row.length for row in state.rows)
    is_long = shape.dims.positions > 0 and longest >= _LONG_SHARE * shape.dims.positions
    return plan.base.task == "causal-lm" and is_plain and is_long


def measure_positions(state: JudgedState, evidence: Evidence) -> Evidence:
    """Measure the loss by position and, where it rises, with stretched positions; add it to the evidence."""
    model, rows, documents, plan = state.model, state.rows, state.documents, state.context.plan
    spans = equal_spans(max(row.length for row in rows))
    cost = EVAL_COST * sum(row.length for row in rows)
    if cost > state.budget.left:
        return evidence.without("positions")
    state.announce("positions")
    load_trained(model, state.trained)

    def measure() -> list[SpanLosses]:
        losses = compute_span_losses(model, rows, plan, spans, pad_id=state.pad_id, prepared=state.is_prepared)
        state.budget.spent_tokens += cost
        return [
            SpanLosses(*span, HeldOutLosses(one.sums, one.counts, documents))
            for span, one in zip(spans, losses, strict=True)
        ]

    before = measure()
    reaches = find_reaches(before)
    if not reaches:
        return replace(evidence, stretch=Stretch())
    if len(reaches) * cost > state.budget.left:
        return evidence.without("positions")
    long_rows = [i for i, row in enumerate(rows) if row.length > reaches[0]]

    def of_long_rows(spans: list[SpanLosses]) -> HeldOutLosses:
        sums = tuple(sum(span.rows.sums[i] for span in spans) for i in long_rows)
        counts = tuple(sum(span.rows.counts[i] for span in spans) for i in long_rows)
        return HeldOutLosses(sums, counts, tuple(documents[i] for i in long_rows))

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    tries = []
    # of all rows, since what is advised has to take them
    prepared = state.context.prepared
    longest = max(int(Counts.of(side).tokens.max()) for side in (prepared.train, prepared.eval)) + virtual_tokens(plan)
    for reach in reaches:
        factor = stretch_factor(longest, reach)
        if factor is None:
            continue
        with stretched_rope(base, {"kind": "yarn", "factor": factor, "trained": reach}) as can_stretch:
            after = measure() if can_stretch else before
        losses = tuple(
            (one.start, one.end, one.rows.mean, other.rows.mean)
            for one, other in zip(before, after, strict=True)
            if any(one.rows.counts)
        )
        gain = paired_gain(of_long_rows(before), of_long_rows(after))
        tries.append(Stretch(reach, longest, factor, gain, losses))
    return replace(evidence, stretch=max(tries, key=lambda one: one.gain.mean if one.gain else 0.0, default=Stretch()))
