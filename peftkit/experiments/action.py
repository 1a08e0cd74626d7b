"""The action for a cause: changes of the recipe, with what they gain and cost."""

from __future__ import annotations

from collections import Counter

from peftkit.diagnose.causes import CAPACITY, RATE_FACTOR, Diagnosis, Evidence
from peftkit.diagnose.verdict import Action
from peftkit.experiments.candidate import next_method
from peftkit.experiments.experiment import Experiment
from peftkit.plan.activations import virtual_tokens
from peftkit.plan.packing import MAX_EPOCHS, num_epochs
from peftkit.rundir.events import SpikeEvent, of_type

MORE_STEPS = 0.5  # of the run: what "more steps" recommends, and what a growth at the end goes on for
_STABLE_WARMUP, _STABLE_NORM = 0.1, 1.0  # a longer warm-up and a lower clip only, where steps were bad
_MAX_SHOWN_ROWS = 3


def choose_action(experiment: Experiment, evidence: Evidence, finding: Diagnosis) -> Action:
    """Choose the action for a cause, with its overrides, expected gain and cost."""
    plan, cause = experiment.plan, finding.cause
    gain = experiment.expected_gain(finding.arm) if finding.arm else None
    action = Action("nothing")
    if cause in CAPACITY and (candidate := experiment.candidate) is not None:
        cost = candidate.cost(experiment.context)
        action = Action("grow the adapter", candidate.overrides, gain, cost)
    elif cause in {"learning rate too low", "learning rate too high"}:
        arm = evidence.arms.get(finding.arm)
        rate = arm.learning_rate if arm else plan.train.learning_rate / RATE_FACTOR
        action = Action(f"train at a rate of {rate:g}", (f"train.learning_rate={rate:.6g}",), gain)
    elif cause == "unstable":
        action = _stabilise(experiment)
    elif cause == "positions" and (stretch := evidence.stretch) is not None:
        scaling = f"{{kind: yarn, factor: {stretch.factor}, trained: {stretch.reach}}}"
        said = f"stretch the rotary positions, which lowers the loss of longer rows by {stretch.gain} at once"
        overrides = [f"base.rope_scaling={scaling}"]
        if plan.data.max_length > stretch.factor * (stretch.reach or 1) - virtual_tokens(plan):  # no row is that long
            overrides.append(f"train.max_length={stretch.longest - virtual_tokens(plan)}")
        action = Action(said, tuple(overrides))
    elif cause == "too few steps":
        steps = round((plan.train.num_steps or 0) * (1 + MORE_STEPS))
        epochs = num_epochs(plan, experiment.context.facts) * (1 + MORE_STEPS)
        action = Action(f"train for {steps} steps", (f"train.max_steps={steps}",), gain)
        if epochs > MAX_EPOCHS:
            said = f"more data; {steps} steps would show each row {epochs:.0f} times, and it would be memorised"
            action = Action(said, (), gain)
    elif cause == "data: overfitting":
        best = min(experiment.evaluations, key=lambda one: one.rows.mean)
        said = "more or cleaner data; with this data, stop where the held-out loss was best"
        action = Action(said, (f"train.max_steps={best.step}",) if 0 < best.step < experiment.step else ())
    elif cause == "data: labels or masks broken":
        action = Action("check the trained tokens: peftkit check RECIPE; more training or rank fixes nothing")
    elif cause == "undecided":
        action = _ask_for_more(experiment, evidence)
    elif evidence.quality.state == "not lagging" and plan.diagnose.target is not None:
        action = Action("nothing: the target is reached")
    return action


def _stabilise(experiment: Experiment) -> Action:
    """Return a lower rate, a longer warm-up and a lower clip, and name the rows that most bad steps had in common."""
    train, schedule = experiment.plan.train, experiment.context.loaded.recipe.train.schedule
    num_steps = train.num_steps or 0
    # each rollback has halved it
    rate = min(train.learning_rate, train.learning_rate * 2 ** len(train.rollbacks) / RATE_FACTOR)
    overrides, said = [f"train.learning_rate={rate:.6g}"], [f"train at a rate of {rate:g}"]
    if train.num_warmup_steps < _STABLE_WARMUP / 2 * num_steps:
        steps = round(_STABLE_WARMUP * num_steps)
        in_steps = schedule.warmup_steps is not None
        overrides.append(f"train.schedule.warmup_steps={steps}" if in_steps else "train.schedule.warmup=10%")
        said.append("warm up for 10 % of the steps")
    if train.max_grad_norm > _STABLE_NORM:
        overrides.append(f"train.max_grad_norm={_STABLE_NORM:g}")
        said.append(f"clip gradients at {_STABLE_NORM:g}")
    spikes = of_type(experiment.context.run.events(), SpikeEvent)
    rows = Counter(row for spike in spikes for row in spike.rows if not row.startswith("and "))
    repeated = [f"{row} ({num} times)" for row, num in rows.most_common(_MAX_SHOWN_ROWS) if num > 1]
    if repeated:
        said.append(f"inspect the rows of several bad steps: {', '.join(repeated)}")
    return Action("; ".join(said), tuple(overrides))


def _ask_for_more(experiment: Experiment, evidence: Evidence) -> Action:
    """Return what would let an undecided diagnosis decide."""
    if not evidence.quality.loss.has_enough_documents:
        return Action("hold out more rows: data.eval, as a larger share or a file")
    if alternative := next_method(experiment.context):
        overrides, cost = alternative
        return Action(f"{experiment.plan.method.name} has no rank to raise: try lora", overrides, None, cost)
    if experiment.candidate is not None and experiment.candidate.refusal:
        return Action(f"the next larger adapter is not allowed: {experiment.candidate.refusal}")
    if experiment.plan.method.peft is None:
        return Action("full fine-tuning is not tried in forks: try a smaller and a larger learning rate")
    return Action("raise diagnose.bounds.compute, or set a target or a reference to judge by")
