"""How much answers depend on their own questions, by swapping questions among held-out rows."""

from __future__ import annotations

from dataclasses import replace

from peftkit.diagnose.causes import Evidence
from peftkit.diagnose.statistics import HeldOutLosses, paired_gain
from peftkit.evaluate.dependence import swap_questions
from peftkit.experiments.evidence import JudgedState
from peftkit.plan.rate import EVAL_COST
from peftkit.train.checkpoint.restore import load_trained
from peftkit.train.training import compute_row_losses


def measure_dependence(state: JudgedState, evidence: Evidence) -> Evidence:
    """Measure it on the deciding rows, and add it to the evidence."""
    numbers, swapped_rows = swap_questions(state.rows)
    if not numbers:
        return replace(evidence, has_questions=False)
    cost = EVAL_COST * sum(row.length for row in swapped_rows)
    if cost > state.budget.left:
        return evidence.without("dependence")
    state.announce("dependence")
    load_trained(state.model, state.trained)
    losses = compute_row_losses(state.model, swapped_rows, state.context.plan, pad_id=state.pad_id)
    state.budget.spent_tokens += cost
    own_losses = evidence.rows.of(numbers)
    # the first token of an answer is predicted by the question's last one in both
    swapped_losses = HeldOutLosses(losses.sums, losses.counts, own_losses.documents)
    return replace(evidence, dependence=paired_gain(swapped_losses, own_losses))
