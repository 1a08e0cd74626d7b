"""One look at a training: its quality is judged, and the cause sought, by what the budget lets it measure.

What is measured next, and what it means, is decided in `diagnose/causes.py`; here it is done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peftkit.diagnose.causes import RATE_FACTOR, Arm, Evidence, Finding, Wanted, look_further
from peftkit.diagnose.escalation import SMALL_RANK, Rung, next_rung
from peftkit.diagnose.quality import Evaluation, Quality, judge
from peftkit.diagnose.statistics import Interval, Rows, gain, judged, proportion, split
from peftkit.evaluate.dependence import swapped
from peftkit.evaluate.scores import measure
from peftkit.experiments.candidate import Candidate, candidate_of
from peftkit.experiments.evidence import (
    MASK_CHECKS,
    Budget,
    documents_of,
    drawn,
    linear_modules,
    masked_ends,
    untrained_tokens,
)
from peftkit.experiments.forks import Start, at_rate, draw, fork
from peftkit.experiments.gradients import STREAMS, Looker
from peftkit.experiments.reference import behind
from peftkit.model.adapter.attach import attach, plain_start, trainable_tensors
from peftkit.model.adapter.grow import Grown, grow, scales
from peftkit.plan import Plan
from peftkit.plan.packing import mean_tokens
from peftkit.prepare.context import Stage
from peftkit.train.checkpoint.restore import load_trained
from peftkit.train.checkpoint.snapshot import Tensors
from peftkit.train.objectives import supervised
from peftkit.train.training import losses_of, objective

_SIGNALS = 1 / 6  # of a look's budget: what all signals together may take
_STREAM_ROWS = (8, 64)  # in each of three streams
_ARMS = 3
_EARLY = 0.5  # of the budget: what an early look may take
_MARGIN = 0.95  # of what is left: rows that are drawn may be longer than the mean
_FEWEST_STEPS = 4  # of a fork: fewer say nothing
_FORK_ROWS = (24, 200)  # held-out rows that decide, as many as a fifth of a fork's cost pays for
_EVAL_COST = 1 / 3  # of a token that is trained on: no backward


@dataclass
class Study:
    """A look at the state of a training. `model` may be wrapped anew while a candidate is tried."""

    stage: Stage
    model: Any
    start: Start
    step: int
    evaluations: Sequence[Evaluation]
    departures: int
    train_loss: float | None
    asks: bool = True
    clipped_share: float = 0.0
    spent: float = 0.0  # of the run's tokens, by earlier looks
    budget: Budget = field(init=False)
    rung: Rung | None = None
    candidate: Candidate | None = None
    grown: Grown | None = None
    is_rewrapped: bool = False
    is_reloaded: bool = False  # on a base that no trainer has prepared
    _reported_before: Rows | None = None
    behind: Interval | None = None  # the reference, where one was asked for
    reference_overhead: float = 0.0
    scored: Interval | None = None
    _fork_steps: int | None = None
    directions: dict[str, Any] = field(default_factory=dict)
    ends: dict[str, Tensors] = field(default_factory=dict)  # what each fork came to

    def __post_init__(self) -> None:
        plan, prepared = self.plan, self.stage.prepared
        tokens = mean_tokens(plan, self.stage.facts) * plan.train.batch_size * (plan.train.num_steps or 1)
        share = plan.diagnose.compute_share
        self.budget = Budget(tokens, share - self.spent if self.at_end else _EARLY * share)
        self.numbers = judged(len(prepared.eval))
        self.held = [prepared.eval[i] for i in self.numbers]
        self.documents = documents_of(self.held)
        self.half, reporting = split(self.documents)  # by all of it quality is judged, at no cost
        limit = self.evaluated_rows()
        self.deciding, self.reporting = drawn(self.half, limit), drawn(reporting, limit)

    @property
    def plan(self) -> Plan:
        return self.stage.plan

    @property
    def pad_id(self) -> int:
        return int(self.stage.tokenizer.pad_token_id)

    @property
    def at_end(self) -> bool:
        """Whether the run is over: a growth then restarts the schedule, and the optimizer with it."""
        return self.step not in self.plan.diagnose.look_steps

    @property
    def step_tokens(self) -> float:
        """Of one optimizer step."""
        return self.budget.run_tokens / (self.plan.train.num_steps or 1)

    def evaluated_rows(self) -> int:
        """How many held-out rows judge a fork."""
        per_row = _EVAL_COST * sum(row.length for row in self.held) / len(self.held)
        affordable = int(0.2 * self.budget.share * self.budget.run_tokens / _ARMS / per_row)
        return max(_FORK_ROWS[0], min(_FORK_ROWS[1], affordable))

    def state_rows(self, numbers: Sequence[int]) -> Rows:
        """Losses of some held-out rows in the state that is judged: as evaluated, or measured now."""
        if self.evaluations and self.evaluations[-1].step == self.step:
            return self.evaluations[-1].rows.of(numbers)
        load_trained(self.model, self.start.trained)
        return self._losses(self.model, self.plan, numbers)

    def _losses(self, model: Any, plan: Plan, numbers: Sequence[int]) -> Rows:
        """Losses of some held-out rows, on the budget."""
        rows = [self.held[i] for i in numbers]
        losses = losses_of(model, rows, plan, pad_id=self.pad_id, prepared=not self.is_reloaded)
        self.budget.spent_tokens += _EVAL_COST * sum(row.length for row in rows)
        return Rows(losses.sums, losses.counts, tuple(self.documents[i] for i in numbers))

    def first_quality(self) -> Quality:
        """The quality by the evaluations, or by one that is made now where nobody saw the run."""
        if not self.evaluations:
            everything = self._losses(self.model, self.plan, range(len(self.held)))
            self.evaluations = [Evaluation(self.step, 0.0, everything)]
        every = [replace(one, rows=one.rows.of(self.half)) for one in self.evaluations]
        looks = len(self.plan.diagnose.look_steps) + 1
        target = self.plan.diagnose.target
        return judge(every, target=target, behind=self.behind, scored=self._scored(), looks=looks)

    def _scored(self) -> Interval | None:
        """The metric of a target that is not the loss, in the state that is judged."""
        wanted, prepared = self.plan.diagnose, self.stage.prepared
        if wanted.target is None or wanted.metric == "eval_loss":
            return None
        if self.scored is None:
            load_trained(self.model, self.start.trained)
            limit = self.plan.evaluate.max_examples
            examples, rows = prepared.eval_examples[:limit], prepared.eval[:limit]
            measured = measure(self.model, self.stage.tokenizer, self.plan, examples, rows)
            self.budget.spent_tokens += _EVAL_COST * sum(row.length for row in rows)
            self.scored = proportion(measured.scores[wanted.metric], measured.num_examples)
        return self.scored

    def compare_with_reference(self) -> None:
        """What the recipe asks for beside the looking itself: it is billed apart."""
        if self.plan.diagnose.reference is None or self.behind is not None or not self.at_end:
            return
        self.stage.emit(
            "phase", name="diagnosis", detail="the adapted weights themselves, trained for a while"
        )
        rows = [self.held[i] for i in self.deciding]
        held = self.state_rows(self.deciding)
        self.behind, tokens = behind(self.stage, self.model, held, rows, pad_id=self.pad_id)
        self.reference_overhead = tokens / self.budget.run_tokens

    @property
    def wrapped(self) -> Plan:
        """The plan by which the model is wrapped now."""
        if self.is_rewrapped and self.candidate is not None and self.candidate.plan is not None:
            return self.candidate.plan
        return self.plan

    # what is measured

    def look(
        self, further: Callable[[Evidence], Wanted | Finding] = look_further
    ) -> tuple[Evidence, Finding]:
        """Measure what the evidence asks for until it names a cause."""
        self.compare_with_reference()
        evidence = self.first_evidence()
        while isinstance(wanted := further(evidence), str):
            evidence = self._measured(evidence, wanted)
        return evidence, wanted

    def first_evidence(self) -> Evidence:
        """What costs nothing: evaluations, events, and what the data gate said."""
        quality = self.first_quality()
        first = self.evaluations[0] if self.evaluations else None
        findings = self.stage.looked.report.findings
        masks = [f"{f.check}: {f.said}" for f in findings if f.status == "waived" and f.check in MASK_CHECKS]
        masks += masked_ends(self.held)
        return Evidence(
            quality,
            self.state_rows(self.deciding),
            masks=tuple(masks),
            num_departures=self.departures,
            train_loss=self.train_loss,
            start_loss=first.rows.of(self.deciding).mean if first and first.step == 0 else None,
            asks=self.asks and bool(swapped(self.held[:50])[0]),
        )

    def _measured(self, evidence: Evidence, wanted: Wanted) -> Evidence:
        if wanted == "signals":
            return self._signals(evidence)
        if wanted == "dependence":
            return self._dependence(evidence)
        return self._arm(evidence, wanted)

    def _say(self, wanted: Wanted) -> None:
        self.stage.emit("phase", name="diagnosis", detail=_SAID[wanted])

    def _signals(self, evidence: Evidence) -> Evidence:
        train = self.stage.prepared.train
        mean = self.stage.prepared.num_tokens / len(train)
        room = int(_SIGNALS * self.budget.share * self.budget.run_tokens / 3 / mean)
        size = max(_STREAM_ROWS[0], min(_STREAM_ROWS[1], room, len(train) // 2))
        if 3 * size * mean > self.budget.left:
            return _without(evidence, "signals")
        self._say("signals")
        load_trained(self.model, self.start.trained)
        import numpy as np

        chosen = np.random.default_rng([self.plan.seed, self.step]).permutation(len(train))[: 2 * size]
        held = [self.held[i] for i in self.deciding[:size]]
        streams = dict(
            zip(
                STREAMS,
                ([train[int(i)] for i in chosen[:size]], [train[int(i)] for i in chosen[size:]], held),
                strict=True,
            )
        )
        looker = Looker(self.model, self.plan, linear_modules(self.stage, self.model), self.pad_id)
        signals = looker.look(streams)
        self.budget.spent_tokens += looker.num_tokens
        self.directions = {m.name: looker.sketches[m.name].directions() for m in signals.modules}
        evidence = replace(evidence, signals=signals)
        return self._with_candidate(evidence)

    def _with_candidate(self, evidence: Evidence) -> Evidence:
        """With the rung that the signals name, as far as the recipe's bounds allow one."""
        assert evidence.signals is not None
        spec = self.plan.method.peft
        rank = int(spec.arguments.get("r", 0)) if spec is not None and spec.class_name == "LoraConfig" else 0
        if rank:
            roles = {module.role for module in self.stage.facts.model.shape.modules}
            adapted = tuple(role for role in self.plan.method.trainable_by_role or {} if role in roles)
            self.rung = next_rung(
                evidence.signals,
                rank=rank,
                adapted=adapted,
                max_rank=self.plan.diagnose.max_rank,
                num_learnt=self.stage.prepared.num_learnt,
                loss=evidence.rows.mean,
                early=not self.at_end,
                untrained=untrained_tokens(self.model, self.stage.tokenizer, self.stage.prepared.train),
            )
        if self.rung is None:
            return evidence
        self.candidate = candidate_of(self.stage, self.rung)
        cause = self.rung.cause if self.candidate.plan is not None else ""
        return replace(evidence, candidate=cause, is_small=rank <= SMALL_RANK)

    def _dependence(self, evidence: Evidence) -> Evidence:
        rows = [self.held[i] for i in self.deciding]
        numbers, others = swapped(rows)
        if not numbers:
            return replace(evidence, asks=False)
        cost = _EVAL_COST * sum(row.length for row in others)
        if cost > self.budget.left:
            return _without(evidence, "dependence")
        self._say("dependence")
        load_trained(self.model, self.start.trained)
        found = losses_of(self.model, others, self.plan, pad_id=self.pad_id)
        self.budget.spent_tokens += cost
        own = evidence.rows.of(numbers)
        # the first token of an answer is predicted by the question's last one in both
        return replace(evidence, dependence=gain(Rows(found.sums, found.counts, own.documents), own))

    def _arm(self, evidence: Evidence, name: Wanted) -> Evidence:
        steps = self.fork_steps() if self.plan.method.peft is not None else 0  # whole models are not copied
        if steps < _FEWEST_STEPS or self.budget.left < self.fork_tokens(steps):
            return _without(evidence, name)
        self._say(name)
        batches = draw(
            self.plan, self.stage.prepared.train, steps, batch_size=self.fork_batch, seed=self.step
        )
        rate, model, start, plan = self.plan.train.learning_rate, self.model, self.start, self.plan
        if name == "candidate":
            model, start, plan = self._grow()
            rate = plan.train.learning_rate
        elif name != "continue":
            rate = rate * RATE_FACTOR if name == "rate up" else rate / RATE_FACTOR
        # smaller batches are noisier: their rate is smaller by the root (Malladi et al. 2022)
        smaller = math.sqrt(self.fork_batch / self.plan.train.batch_size)
        forked = fork(
            model,
            at_rate(plan, rate * smaller),
            start,
            batches,
            pad_id=self.pad_id,
            loss=supervised.loss if self.is_reloaded else objective(plan).loss,
        )
        self.budget.spent_tokens += forked.num_tokens
        rows = self._losses(model, plan, self.deciding) if forked.is_finite else None
        self.ends[name] = {n: t.detach().cpu().clone() for n, t in trainable_tensors(model).items()}
        arm = Arm(name, rate, steps, forked.train_loss, rows)
        self._tell(evidence, arm)
        return replace(evidence, arms={**evidence.arms, name: arm})

    @property
    def fork_batch(self) -> int:
        """Rows of a fork's step: a quarter of the run's, so that there are four times as many steps."""
        return max(1, self.plan.train.batch_size // 4)

    def fork_steps(self) -> int:
        """How long each fork is: what the budget gives to all of them, divided."""
        if self._fork_steps is None:
            judging = 1 + 1 / _ARMS  # after each fork, and once for the report
            judged_tokens = judging * _EVAL_COST * sum(self.held[i].length for i in self.deciding)
            tokens = self.step_tokens * self.fork_batch / self.plan.train.batch_size
            self._fork_steps = int((_MARGIN * self.budget.left / _ARMS - judged_tokens) / tokens)
        return self._fork_steps

    def fork_tokens(self, steps: int) -> float:
        """What a fork of so many steps takes, with its evaluation."""
        trained = steps * self.step_tokens * self.fork_batch / self.plan.train.batch_size
        return trained + _EVAL_COST * sum(self.held[i].length for i in self.deciding)

    def expected_gain(self, arm: str) -> Interval | None:
        """What an arm brought on the rows that decided nothing, which are looked at here alone."""
        if arm not in self.ends or not self.reporting or (self.is_rewrapped and arm != "candidate"):
            return None
        before = self.state_rows(self.reporting) if not self.is_rewrapped else self._reported_before
        if before is None:
            return None
        load_trained(self.model, self.ends[arm])
        return gain(before, self._losses(self.model, self.wrapped, self.reporting))

    def _grow(self) -> tuple[Any, Start, Plan]:
        """The model with the candidate's adapter, which computes what the old one did."""
        assert self.candidate is not None and self.candidate.plan is not None
        from transformers import set_seed

        if self.reporting and self.evaluations and self.evaluations[-1].step == self.step:
            self._reported_before = self.evaluations[-1].rows.of(self.reporting)
        before = scales(self.model)
        self.is_rewrapped, self.is_reloaded = True, needs_reload(self.plan)
        base = bare(self.stage, self.model)
        set_seed(self.plan.seed)  # the same new rows where a look that was killed is made again
        model = self.model = attach(base, plain_start(self.candidate.plan), self.stage.tokenizer)
        known = {adapted.weight for adapted in scales(model).values()}
        self.grown = grow(
            self.start.trained,
            self.start.optimizer,
            trainable_tensors(model),
            old=before,
            new=scales(model),
            rows={name: rows for name, rows in self.directions.items() if name in known},
        )
        kept = {} if self.at_end else self.grown.optimizer
        return model, Start(self.grown.trained, kept), self.candidate.plan

    def _tell(self, evidence: Evidence, arm: Arm) -> None:
        against = gain(evidence.rows, arm.rows) if arm.rows is not None else None
        self.stage.emit(
            "fork",
            step=self.step,
            name=arm.name,
            learning_rate=arm.learning_rate,
            num_steps=arm.num_steps,
            train_loss=arm.train_loss,
            loss=arm.rows.mean if arm.rows is not None else None,
            gain=against.plain if against is not None else None,
        )


def needs_reload(plan: Plan) -> bool:
    """Whether unwrapping a model does not give its base back."""
    spec = plan.method.peft
    return spec is not None and bool(spec.arguments.get("modules_to_save") or plan.method.target_parameters)


def bare(stage: Stage, model: Any) -> Any:
    """The base of a wrapped model: the one in memory, or loaded anew where unwrapping does not give it back.

    PEFT's `unload` leaves trained copies in place of `modules_to_save`, and parameters that it has wrapped in
    another order, which would nest the next wrappers the other way round.
    """
    if needs_reload(stage.plan):
        from peftkit.model.load import load_model

        return load_model(stage.source, stage.plan.base, device=stage.plan.device)
    return model.unload()


_SAID: Mapping[str, str] = {
    "signals": "what the gradients of all layers want",
    "dependence": "whether answers depend on their questions",
    "continue": "a fork that goes on as before",
    "rate up": "a fork at three times the rate",
    "rate down": "a fork at a third of the rate",
    "candidate": "a fork with a larger adapter",
}


def _without(evidence: Evidence, name: str) -> Evidence:
    return replace(evidence, unaffordable=evidence.unaffordable | {name})
