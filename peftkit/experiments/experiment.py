"""An experiment on a training: judge its quality and search for the cause, within a token budget.

`diagnose/causes.py` decides what is measured next and what it means; this module measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from transformers import set_seed

from peftkit.diagnose.causes import RATE_FACTOR, Arm, Diagnosis, Evidence, Measurement, measure_or_conclude
from peftkit.diagnose.escalation import SMALL_RANK, Rung
from peftkit.diagnose.quality import EvaluationPoint, Quality, assess_quality
from peftkit.diagnose.statistics import (
    HeldOutLosses,
    Interval,
    paired_gain,
    recorded_rows,
    split_documents,
    wilson_interval,
)
from peftkit.evaluate.dependence import swap_questions
from peftkit.evaluate.scores import compute_metrics
from peftkit.experiments.candidate import Candidate, adapter_rank, choose_rung, plan_candidate, rate_to_try
from peftkit.experiments.dependence import measure_dependence
from peftkit.experiments.evidence import (
    MASK_CHECKS,
    JudgedState,
    TokenBudget,
    describe_masked_ends,
    document_ids,
    find_untrained_tokens,
    linear_modules,
    sample_numbers,
    update_pace,
)
from peftkit.experiments.forks import ForkStart, draw_fork_batches, train_fork, with_learning_rate
from peftkit.experiments.gradients import STREAMS, GradientProbe
from peftkit.experiments.positions import has_long_rows, measure_positions
from peftkit.experiments.reference import gap_to_full_finetuning
from peftkit.experiments.rewrap import needs_reload, unwrap_base
from peftkit.model.adapter.attach import attach_adapter, trainable_tensors, with_plain_init
from peftkit.model.adapter.grow import GrownCheckpoint, adapted_weights, grow_adapter
from peftkit.plan import Plan
from peftkit.plan.packing import mean_row_tokens
from peftkit.plan.rate import EVAL_COST
from peftkit.prepare.context import RunContext
from peftkit.rundir.events import ForkEvent, PhaseEvent
from peftkit.train.batches import eva_batches
from peftkit.train.checkpoint.restore import load_trained
from peftkit.train.checkpoint.snapshot import Tensors
from peftkit.train.trainer import training_loss
from peftkit.train.training import compute_row_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SIGNALS_SHARE = 1 / 6  # of a look's budget: what all signals together may take
_STREAM_ROWS = (8, 64)  # in each of three streams
_NUM_FORKS = 3
_MIDWAY_SHARE = 0.5  # of the budget that is left: what a look in mid-run may take
_BUDGET_MARGIN = 0.95  # of what is left: rows that are drawn may be longer than the mean
_MIN_FORK_STEPS = 4  # of a fork: fewer say nothing
_FORK_ROWS = (24, 200)  # held-out rows that decide, as many as a fifth of a fork's cost pays for


@dataclass
class Experiment:
    """An experiment on one state of a training. `model` may be rewrapped while a candidate is tried."""

    context: RunContext
    model: Any
    start: ForkStart
    step: int
    evaluations: Sequence[EvaluationPoint]
    at_end: bool  # the run is over: a growth then restarts the schedule and the optimizer
    num_divergences: int
    train_loss: float | None
    has_questions: bool = True
    clipped_share: float = 0.0
    spent_share: float = 0.0  # of the run's tokens, by earlier looks
    budget: TokenBudget = field(init=False)
    rung: Rung | None = None
    candidate: Candidate | None = None
    grown: GrownCheckpoint | None = None
    new_start: Tensors = field(default_factory=dict)  # of a new adapter of the run's plan
    rewrapped_for: Literal["", "candidate", "start over"] = ""  # the fork whose adapter the model has now
    is_reloaded: bool = False  # on a base that no trainer has prepared
    state_rows: HeldOutLosses | None = None  # losses of the deciding rows, once measured
    _reporting_start: HeldOutLosses | None = None
    reference_gap: Interval | None = None  # the reference, where one was asked for
    reference_overhead: float = 0.0
    metric_interval: Interval | None = None
    _num_fork_steps: int | None = None
    directions: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)  # of each fork
    ends: dict[str, Tensors] = field(default_factory=dict)  # what each fork came to

    def __post_init__(self) -> None:
        plan, prepared = self.plan, self.context.prepared
        tokens = mean_row_tokens(plan, self.context.facts) * plan.train.batch_size * (plan.train.num_steps or 1)
        share = plan.diagnose.compute_share
        left = share - self.spent_share
        self.budget = TokenBudget(tokens, left if self.at_end else _MIDWAY_SHARE * left)
        self.numbers = recorded_rows(len(prepared.eval))
        self.held_out = [prepared.eval[i] for i in self.numbers]
        self.documents = document_ids(self.held_out)
        self.half, reporting = split_documents(self.documents)  # by all of it quality is judged, at no cost
        limit = self.num_evaluated_rows()
        self.deciding, self.reporting = sample_numbers(self.half, limit), sample_numbers(reporting, limit)

    @property
    def plan(self) -> Plan:
        return self.context.plan

    @property
    def pad_id(self) -> int:
        return int(self.context.tokenizer.pad_token_id)

    @property
    def judged_state(self) -> JudgedState:
        """The state, and the rows that decide."""
        rows = [self.held_out[i] for i in self.deciding]
        documents = tuple(self.documents[i] for i in self.deciding)
        is_prepared, trained = not self.is_reloaded, dict(self.start.trained)
        return JudgedState(
            self.context, self.model, trained, rows, documents, self.budget, is_prepared, announce=self._announce
        )

    @property
    def is_evaluated(self) -> bool:
        """Return whether the run was evaluated at this step."""
        return bool(self.evaluations) and self.evaluations[-1].step == self.step

    @property
    def step_tokens(self) -> float:
        """Return the tokens of one optimizer step."""
        return self.budget.run_tokens / (self.plan.train.num_steps or 1)

    def num_evaluated_rows(self) -> int:
        """Return the number of held-out rows on which a fork is judged."""
        per_row = EVAL_COST * sum(row.length for row in self.held_out) / len(self.held_out)
        affordable = int(0.2 * self.budget.share * self.budget.run_tokens / _NUM_FORKS / per_row)
        return max(_FORK_ROWS[0], min(_FORK_ROWS[1], affordable))

    def state_losses(self, numbers: Sequence[int]) -> HeldOutLosses:
        """Return losses of some held-out rows in the judged state, from its evaluation or measured now."""
        if self.is_evaluated:
            return self.evaluations[-1].rows.of(numbers)
        load_trained(self.model, self.start.trained)
        return self._losses(self.model, self.plan, numbers)

    def _losses(self, model: PreTrainedModel, plan: Plan, numbers: Sequence[int]) -> HeldOutLosses:
        """Measure losses of some held-out rows, charged to the budget."""
        rows = [self.held_out[i] for i in numbers]
        losses = compute_row_losses(model, rows, plan, pad_id=self.pad_id, prepared=not self.is_reloaded)
        self.budget.spent_tokens += EVAL_COST * sum(row.length for row in rows)
        return HeldOutLosses(losses.sums, losses.counts, tuple(self.documents[i] for i in numbers))

    def judge_quality(self) -> Quality:
        """Judge the quality by the run's evaluations, or by one made now where there are none."""
        if not self.evaluations:
            all_losses = self._losses(self.model, self.plan, range(len(self.held_out)))
            self.evaluations = [EvaluationPoint(self.step, 0.0, all_losses)]
        evaluations = [replace(evaluation, rows=evaluation.rows.of(self.half)) for evaluation in self.evaluations]
        num_looks = len(self.plan.diagnose.look_steps) + 1
        target = self.plan.diagnose.target
        options, prepared = self.plan.diagnose, self.context.prepared
        if options.target is None or options.metric == "eval_loss":
            target_metric = None
        else:
            if self.metric_interval is None:
                load_trained(self.model, self.start.trained)
                limit = self.plan.evaluate.max_examples
                examples, rows = prepared.eval_examples[:limit], prepared.eval[:limit]
                metrics = compute_metrics(self.model, self.context.tokenizer, self.plan, examples, rows)
                self.budget.spent_tokens += EVAL_COST * sum(row.length for row in rows)
                self.metric_interval = wilson_interval(metrics.scores[options.metric], metrics.num_examples)
            target_metric = self.metric_interval
        return assess_quality(
            evaluations,
            target=target,
            reference_gain=self.reference_gap,
            metric_interval=target_metric,
            looks=num_looks,
        )

    def compare_with_reference(self) -> None:
        """Compare with the reference where the recipe asks for it; its cost is accounted separately."""
        if self.plan.diagnose.reference is None or self.reference_gap is not None or not self.at_end:
            return
        self.context.emit(PhaseEvent(name="diagnosis", detail="the reference: full training of the adapted weights"))
        rows = [self.held_out[i] for i in self.deciding]
        held_out = self.state_losses(self.deciding)
        self.reference_gap, tokens = gap_to_full_finetuning(
            self.context, self.model, held_out, rows, pad_id=self.pad_id
        )
        self.reference_overhead = tokens / self.budget.run_tokens

    @property
    def is_rewrapped(self) -> bool:
        """Return whether the model has another adapter than the run's."""
        return bool(self.rewrapped_for)

    @property
    def wrapped_plan(self) -> Plan:
        """Return the plan by which the model is wrapped now."""
        if self.rewrapped_for == "candidate" and self.candidate is not None and self.candidate.plan is not None:
            return self.candidate.plan
        return self.plan

    # what is measured

    def look(
        self, policy: Callable[[Evidence], Measurement | Diagnosis] = measure_or_conclude
    ) -> tuple[Evidence, Diagnosis]:
        """Measure what the evidence calls for until it names a cause."""
        self.compare_with_reference()
        evidence = self.initial_evidence()
        while isinstance(decision := policy(evidence), str):
            if decision == "signals":
                evidence = self._measure_signals(evidence)
            elif decision == "positions":
                evidence = measure_positions(self.judged_state, evidence)
            elif decision == "dependence":
                evidence = measure_dependence(self.judged_state, evidence)
            else:
                evidence = self._run_fork(evidence, decision)
        return evidence, decision

    def initial_evidence(self) -> Evidence:
        """Return the evidence that costs nothing: evaluations, events, and findings of the data gate."""
        quality = self.judge_quality()
        first = self.evaluations[0] if self.evaluations else None
        findings = self.context.prepared_data.report.findings
        masks = [f"{f.check}: {f.said}" for f in findings if f.status == "waived" and f.check in MASK_CHECKS]
        masks += describe_masked_ends(self.held_out)
        self.state_rows = self.state_losses(self.deciding)
        return Evidence(
            quality,
            self.state_rows,
            mask_findings=tuple(masks),
            num_divergences=self.num_divergences,
            train_loss=self.train_loss,
            start_loss=first.rows.of(self.deciding).mean if first and first.step == 0 else None,
            has_questions=self.has_questions and bool(swap_questions(self.held_out[:50])[0]),
            has_long_rows=has_long_rows(self.judged_state),
            progress=self.step / (self.plan.train.num_steps or 1),
            update_pace=None if self.at_end else update_pace(self.plan, self.model, self.start.trained, self.step),
        )

    def _announce(self, measurement: Measurement) -> None:
        """Emit the phase of a measurement."""
        self.context.emit(PhaseEvent(name="diagnosis", detail=_PHASE_DETAILS[measurement]))

    def _measure_signals(self, evidence: Evidence) -> Evidence:
        """Measure gradient signals of all layers, and plan the candidate that they suggest."""
        train = self.context.prepared.train
        mean_length = self.context.prepared.num_tokens / len(train)
        affordable_rows = int(_SIGNALS_SHARE * self.budget.share * self.budget.run_tokens / 3 / mean_length)
        num_rows = max(_STREAM_ROWS[0], min(_STREAM_ROWS[1], affordable_rows, len(train) // 2))
        if 3 * num_rows * mean_length > self.budget.left:
            return evidence.without("signals")
        self._announce("signals")
        load_trained(self.model, self.start.trained)

        order = np.random.default_rng([self.plan.seed, self.step]).permutation(len(train))[: 2 * num_rows]
        held_out = [self.held_out[i] for i in self.deciding[:num_rows]]
        streams = dict(
            zip(
                STREAMS,
                ([train[int(i)] for i in order[:num_rows]], [train[int(i)] for i in order[num_rows:]], held_out),
                strict=True,
            )
        )
        probe = GradientProbe(self.model, self.plan, linear_modules(self.context, self.model), self.pad_id)
        signals = probe.look(streams)
        self.budget.spent_tokens += probe.num_tokens
        self.directions = {m.name: probe.sketches[m.name].directions() for m in signals.modules}
        evidence = replace(evidence, signals=signals)
        # with the rung that the signals name, as far as the recipe's bounds allow one
        untrained = find_untrained_tokens(self.model, self.context.tokenizer, train)
        self.rung = choose_rung(
            self.context, signals, loss=evidence.rows.mean, early=not self.at_end, untrained_tokens=untrained
        )
        if self.rung is None:
            return evidence
        self.candidate = plan_candidate(self.context, self.rung)
        cause = self.rung.cause if self.candidate.plan is not None else ""
        return replace(evidence, candidate=cause, is_small=adapter_rank(self.plan) <= SMALL_RANK)

    def _run_fork(self, evidence: Evidence, name: Measurement) -> Evidence:
        """Train a fork, judge it on the deciding rows, and add it to the evidence."""
        steps = self.num_fork_steps() if self.plan.method.peft is not None else 0  # whole models are not copied
        if steps < _MIN_FORK_STEPS or self.budget.left < self.fork_tokens(steps):
            return evidence.without(name)
        self._announce(name)
        batches = draw_fork_batches(
            self.plan, self.context.prepared.train, steps, batch_size=self.fork_batch_size, seed=self.step
        )
        rate, model, start, plan = self.plan.train.learning_rate, self.model, self.start, self.plan
        if name == "candidate":
            model, start, plan = self.attach_candidate()
            rate = plan.train.learning_rate
        elif name == "start over":
            model, start = self._attach_new_adapter()
            rate = rate_to_try(self.context, lower=True)
        elif name == "rate up" and not self.at_end:
            rate = rate_to_try(self.context, lower=False)
        elif name != "continue":
            rate = rate * RATE_FACTOR if name == "rate up" else rate / RATE_FACTOR
        # smaller batches are noisier: their rate is smaller by the root (Malladi et al. 2022)
        rate_scale = math.sqrt(self.fork_batch_size / self.plan.train.batch_size)
        result = train_fork(
            model,
            with_learning_rate(plan, rate * rate_scale),
            start,
            batches,
            pad_id=self.pad_id,
            loss=training_loss(plan, fused=not self.is_reloaded),
        )
        self.budget.spent_tokens += result.num_tokens
        rows = self._losses(model, plan, self.deciding) if result.is_finite else None
        self.rates[name] = rate
        self.ends[name] = {n: t.detach().cpu().clone() for n, t in trainable_tensors(model).items()}
        arm = Arm(name, rate, steps, result.train_loss, rows)
        fork_gain = paired_gain(evidence.rows, arm.rows) if arm.rows is not None else None
        self.context.emit(
            ForkEvent(
                step=self.step,
                name=arm.name,
                learning_rate=arm.learning_rate,
                num_steps=arm.num_steps,
                train_loss=arm.train_loss,
                loss=arm.rows.mean if arm.rows is not None else None,
                gain=fork_gain.json_values if fork_gain is not None else None,
            )
        )
        return replace(evidence, arms={**evidence.arms, name: arm})

    @property
    def fork_batch_size(self) -> int:
        """Return the rows per step of a fork: a quarter of the run's, for four times as many steps."""
        return max(1, self.plan.train.batch_size // 4)

    def num_fork_steps(self) -> int:
        """Return the steps of each fork, computed once: its share of the budget that is left.

        steps = (_BUDGET_MARGIN * remaining / _NUM_FORKS - evaluation tokens) / tokens per step.
        """
        if self._num_fork_steps is None:
            num_evaluations = 1 + 1 / _NUM_FORKS  # after each fork, and once for the report
            evaluation_tokens = num_evaluations * EVAL_COST * sum(self.held_out[i].length for i in self.deciding)
            tokens_per_step = self.step_tokens * self.fork_batch_size / self.plan.train.batch_size
            self._num_fork_steps = int(
                (_BUDGET_MARGIN * self.budget.left / _NUM_FORKS - evaluation_tokens) / tokens_per_step
            )
        return self._num_fork_steps

    def fork_tokens(self, steps: int) -> float:
        """Return the tokens that a fork of `steps` takes, with its evaluation."""
        training_tokens = steps * self.step_tokens * self.fork_batch_size / self.plan.train.batch_size
        return training_tokens + EVAL_COST * sum(self.held_out[i].length for i in self.deciding)

    def expected_gain(self, arm: str) -> Interval | None:
        """Return the gain of a fork on the reporting rows, which took no part in the decision."""
        if arm not in self.ends or not self.reporting or (self.is_rewrapped and arm != self.rewrapped_for):
            return None
        before = self.state_losses(self.reporting) if not self.is_rewrapped else self._reporting_start
        if before is None:
            return None
        load_trained(self.model, self.ends[arm])
        return paired_gain(before, self._losses(self.model, self.wrapped_plan, self.reporting))

    def attach_candidate(self) -> tuple[Any, ForkStart, Plan]:
        """Attach the candidate's adapter, initialised to compute the same as the old one."""
        assert self.candidate is not None and self.candidate.plan is not None
        old_scales = adapted_weights(self.model)
        model = self._rewrap("candidate", with_plain_init(self.candidate.plan))
        grown_weights = adapted_weights(model)
        adapted_names = {layer.weight for layer in grown_weights.values()}
        self.grown = grow_adapter(
            self.start.trained,
            self.start.optimizer,
            trainable_tensors(model),
            old=old_scales,
            new=grown_weights,
            directions={name: rows for name, rows in self.directions.items() if name in adapted_names},
        )
        optimizer_state = {} if self.at_end else self.grown.optimizer
        return model, ForkStart(self.grown.trained, optimizer_state), self.candidate.plan

    def _attach_new_adapter(self) -> tuple[Any, ForkStart]:
        """Attach a new adapter of the run's plan, as before the first step."""
        batches = eva_batches(self.plan, self.context.prepared.train, pad_id=self.pad_id)
        model = self._rewrap("start over", self.plan, eva_batches=batches)
        self.new_start = {name: tensor.detach().clone() for name, tensor in trainable_tensors(model).items()}
        return model, ForkStart(self.new_start, {})

    def _rewrap(self, arm: Literal["candidate", "start over"], plan: Plan, **options: Any) -> Any:
        """Wrap the base with the adapter of a plan, as `model`."""
        if self.reporting and self.is_evaluated:
            self._reporting_start = self.evaluations[-1].rows.of(self.reporting)
        self.rewrapped_for, self.is_reloaded = arm, needs_reload(self.plan)
        # the same new rows, and the same head where it is loaded anew, if a look that was killed is made again
        set_seed(self.plan.seed)
        base = unwrap_base(self.context, self.model)
        set_seed(self.plan.seed)
        self.model = attach_adapter(base, plan, self.context.tokenizer, **options)
        return self.model


_PHASE_DETAILS: Mapping[str, str] = {
    "signals": "gradient signals of all layers",
    "positions": "the loss by position",
    "dependence": "whether answers depend on their questions",
    "continue": "a fork with unchanged settings",
    "rate up": "a fork at a higher learning rate",
    "rate down": "a fork at a lower learning rate",
    "candidate": "a fork with a larger adapter",
    "start over": "a fork of a new adapter at a lower learning rate",
}
