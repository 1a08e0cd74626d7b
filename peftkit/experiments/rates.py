"""The search for the learning rate before the first step of a run: short decayed forks of its start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftkit.diagnose.rates import RateArm, RateChoice, choose_rate, next_rate
from peftkit.diagnose.statistics import MIN_DOCUMENTS, HeldOutLosses, recorded_rows, split_documents
from peftkit.experiments.evidence import TokenBudget, document_ids, sample_numbers
from peftkit.experiments.forks import ForkStart, draw_fork_batches, train_fork, with_learning_rate
from peftkit.model.adapter.attach import trainable_tensors
from peftkit.plan import Plan
from peftkit.plan.packing import mean_row_tokens
from peftkit.plan.rate import EVAL_COST, JUDGING_ROWS, with_found_rate
from peftkit.prepare.context import RunContext
from peftkit.rundir import write_sealed
from peftkit.rundir.events import PhaseEvent, RateForkEvent, RateFoundEvent, WarningEvent, of_type
from peftkit.train.trainer import training_loss
from peftkit.train.training import compute_row_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def search_learning_rate(context: RunContext, model: PreTrainedModel) -> Plan:
    """Make the forks that the plan asks for, and return the plan with the rate that they name, written to the run.

    `model` is prepared by a trainer, at the start of the run; afterwards its trained tensors are those of a fork.
    Forks that were made before a kill are read from the events, and the same rate comes of it.
    """
    plan, prepared, pad_id = context.plan, context.prepared, int(context.tokenizer.pad_token_id)
    search, num_steps = plan.train.rate_search, plan.train.num_steps
    assert search is not None and num_steps is not None
    context.emit(PhaseEvent(name="diagnosis", detail="the learning rate, by short forks of the start"))
    step_tokens = mean_row_tokens(plan, context.facts) * plan.train.batch_size
    budget = TokenBudget(step_tokens * num_steps, 1.0)
    held_out = [prepared.eval[i] for i in recorded_rows(len(prepared.eval))]
    documents = document_ids(held_out)
    deciding, _ = split_documents(documents)
    numbers = sample_numbers(deciding if len(deciding) >= JUDGING_ROWS else range(len(held_out)), JUDGING_ROWS)
    rows, judged = [held_out[i] for i in numbers], tuple(documents[i] for i in numbers)

    def measure() -> HeldOutLosses:
        losses = compute_row_losses(model, rows, plan, pad_id=pad_id)
        return HeldOutLosses(losses.sums, losses.counts, judged)

    # on the host: the plan's memory knows of no second adapter
    trained = {name: tensor.detach().to("cpu", copy=True) for name, tensor in trainable_tensors(model).items()}
    origin = ForkStart(trained, {})
    start = measure()
    evaluation_tokens = EVAL_COST * sum(row.length for row in rows)
    budget.spent_tokens += evaluation_tokens
    arms: list[RateArm] = []
    for fork in of_type(context.run.events(), RateForkEvent):
        if fork.row_losses is not None and len(fork.row_losses) != len(rows):
            continue  # of other data
        losses = None if fork.row_losses is None else HeldOutLosses(tuple(fork.row_losses), start.counts, judged)
        arms.append(RateArm(fork.learning_rate, losses))
        budget.spent_tokens += fork.num_tokens
    target = plan.diagnose.target if plan.diagnose.metric == "eval_loss" else None
    if len(set(documents)) < MIN_DOCUMENTS:
        choice = RateChoice(search.usual, f"the usual one: fewer than {MIN_DOCUMENTS} held-out documents to judge by")
    elif target is not None and start.mean <= target:
        choice = RateChoice(search.usual, f"the usual one: the base is at {start.mean:.3f}, below the target")
    else:
        batches = draw_fork_batches(
            plan, prepared.train, search.fork_steps, batch_size=plan.train.batch_size, seed=num_steps
        )
        while (rate := next_rate(arms, start, usual=search.usual, max_forks=search.max_forks)) is not None:
            result = train_fork(
                model,
                with_learning_rate(plan, rate),
                origin,
                batches,
                pad_id=pad_id,
                loss=training_loss(plan),
                decayed=True,
            )
            arm = RateArm(rate, measure() if result.is_finite else None)
            arms.append(arm)
            num_tokens = result.num_tokens + evaluation_tokens
            budget.spent_tokens += num_tokens
            context.emit(
                RateForkEvent(
                    learning_rate=rate,
                    num_steps=search.fork_steps,
                    loss=arm.rows.mean if arm.rows else None,
                    row_losses=list(arm.rows.sums) if arm.rows else None,
                    num_tokens=num_tokens,
                )
            )
        choice = choose_rate(
            arms, start, usual=search.usual, fork_steps=search.fork_steps, num_steps=num_steps, is_exact=search.is_exact
        )
    if choice.warns:
        context.emit(WarningEvent(text=f"learning rate: {choice.said}"))
    context.emit(
        RateFoundEvent(
            learning_rate=choice.rate,
            usual=search.usual,
            interval=choice.interval,
            text=choice.said,
            overhead=budget.overhead,
        )
    )
    plan = with_found_rate(plan, choice.rate, choice.said)
    write_sealed(context.run.path / "plan.json", plan.to_json())  # from here on the run has this rate
    return plan
