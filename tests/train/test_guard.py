"""What is a spike, what is none, and what a step that is not finite leaves behind."""

import math
import random
import statistics
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.errors import UserError
from peftkit.train.guard import MAX_SKIPPED_STEPS, MEDIAN_WINDOW, MIN_MEDIAN_LOSSES, Diverged, LossHistory, StepGuard
from tests.rigs.plans import cpu_plan


def told(losses):
    """Steps (from 1) at which a training with these losses is called to have a spike."""
    vitals, found = LossHistory(), []
    for step, loss in enumerate(losses, start=1):
        if vitals.explain_spike(loss):
            found.append(step)
        else:
            vitals.note(loss)
    return found


@settings(max_examples=200)
@given(st.integers(0, 2**32), st.floats(0.02, 0.3), st.floats(0.1, 3.0))
def test_noise_is_never_a_spike(seed, noise, end):
    """A loss that falls from 4 and varies by up to a third of itself, as small batches do (one deviation)."""
    chance = random.Random(seed)
    losses = [(end + (4 - end) * math.exp(-step / 60)) * math.exp(chance.gauss(0, noise)) for step in range(300)]
    assert told(losses) == []


@given(st.integers(0, 2**32), st.integers(60, 200))
def test_a_loss_back_where_it_began_is_one(seed, at):
    chance = random.Random(seed)
    losses = [0.5 + 3.5 * math.exp(-step / 10) + chance.gauss(0, 0.02) for step in range(at)]
    assert told([*losses, 4.5])[-1:] == [at + 1]


def test_rows_that_are_hard_in_a_memorised_set_are_none():
    """Most steps near 0, one in ten far above it: no departure, though many deviations away."""
    losses = [3.0] * MIN_MEDIAN_LOSSES + ([0.01] * 9 + [0.9]) * 20
    assert told(losses) == []


def test_a_training_that_leaves_at_once_and_one_that_climbs_slowly_are_seen():
    assert told([2.0, 1.9, 2.1, 11.0, 11.0, 11.0]) == [4, 5, 6]
    assert told([7.0, 9.0, 12.0, 6.0, 4.0]) == []
    chance = random.Random(0)
    falling = [1.0 + 3 * math.exp(-step / 10) + chance.gauss(0, 0.1) for step in range(80)]
    climbing = [1.0 + step * 5 / 100 + chance.gauss(0, 0.1) for step in range(100)]
    assert told(falling) == []
    assert told([*falling, *climbing]), "the median climbs with it, the lowest one does not"


def test_what_is_remembered_is_bounded():
    vitals = LossHistory()
    for _ in range(1000):
        vitals.note(1.0)
    assert len(vitals.losses) == MEDIAN_WINDOW
    assert vitals.start_loss == statistics.median([1.0])


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))
        self.other = torch.nn.Parameter(torch.ones(4))


def guard_of(events, **train):
    plan = cpu_plan()
    plan = replace(plan, train=replace(plan.train, **train))
    return StepGuard(plan, events.append, LossHistory(), lambda n: [f"row {i}" for i in n])


def one_step(guard, model, optimizer, *, loss, gradient, step):
    guard.on_step_begin(None, None, None)
    for number, value in enumerate(loss):
        guard.add_loss(torch.tensor([10 * number, 10 * number + 1]), torch.tensor(value))
    for parameter in model.parameters():
        parameter.grad = torch.full((4,), gradient)
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    guard.on_pre_optimizer_step(None, None, None, model=model)
    optimizer.step()
    guard.check_step(step, norm, learning_rate=0.1, model=model)


@pytest.mark.parametrize("gradient", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_step_that_is_not_finite_changes_nothing(gradient, kind):
    events, model = [], Model()
    guard, optimizer = guard_of(events), None
    optimizer = kind(model.parameters(), lr=0.1)
    one_step(guard, model, optimizer, loss=[1.0, 1.0], gradient=0.5, step=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {k: v.clone() for k, v in optimizer.state.get(model.weight, {}).items() if torch.is_tensor(v)}
    one_step(guard, model, optimizer, loss=[1.0, 1.0], gradient=gradient, step=2)
    if gradient != 3e38:  # its norm is infinite: clipped to zero it is finite, and told all the same
        assert guard.skipped
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert all(torch.equal(optimizer.state[model.weight][k], v) for k, v in state.items())
    assert all(bool(tensor.isfinite().all()) for tensor in model.parameters())
    [event] = events
    assert (event.kind, event.step, event.num_in_a_row) == ("spike", 2, 1)
    assert ("the step was skipped" in event.text) == guard.skipped
    assert ("clipped to zero" in event.text) == (gradient == 3e38)
    assert not guard.last_step_ok
    one_step(guard, model, optimizer, loss=[1.0], gradient=0.5, step=3)
    assert guard.last_step_ok


def test_the_rows_of_the_bad_micro_batch_are_named():
    events, model = [], Model()
    guard = guard_of(events)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    one_step(guard, model, optimizer, loss=[1.0, math.nan, 1.0], gradient=1.0, step=1)
    assert events[0].rows == ["row 10", "row 11"]
    assert "a loss of nan" in events[0].text


def test_each_choice_of_on_spike():
    def bad_steps(number, **train):
        events, model = [], Model()
        guard = guard_of(events, **train)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(1, number + 1):
            one_step(guard, model, optimizer, loss=[math.nan], gradient=1.0, step=step)
        return len(events)

    assert bad_steps(2, on_spike="rollback") == 2
    with pytest.raises(Diverged) as caught:
        bad_steps(3, on_spike="rollback")
    assert caught.value.first_step == 1
    with pytest.raises(UserError, match=r"step 1: a loss of nan.*row 0, row 1"):
        bad_steps(1, on_spike="stop")
    assert bad_steps(MAX_SKIPPED_STEPS - 1, on_spike="skip") == MAX_SKIPPED_STEPS - 1
    with pytest.raises(UserError, match="lower the learning rate"):
        bad_steps(MAX_SKIPPED_STEPS, on_spike="skip")


def test_a_lasting_rise_is_told_and_taken_where_only_skipping_is_wanted():
    events, model = [], Model()
    guard = guard_of(events, on_spike="skip")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, 200):
        one_step(guard, model, optimizer, loss=[1.0 if step < 50 else 9.0], gradient=0.5, step=step)
        assert guard.last_step_ok, "a checkpoint is always allowed"
    assert events, "it is told"


def test_the_loss_scale_of_fp16_may_look_for_its_place():
    events, model = [], Model()
    guard = guard_of(events, autocast="fp16")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, MAX_SKIPPED_STEPS):
        one_step(guard, model, optimizer, loss=[1.0], gradient=math.inf, step=step)
    assert events == [] and guard.last_step_ok
    one_step(guard, model, optimizer, loss=[1.0], gradient=math.inf, step=MAX_SKIPPED_STEPS)
    assert [event.kind for event in events] == ["spike"], "it finds none"
    one_step(guard, model, optimizer, loss=[math.nan], gradient=1.0, step=MAX_SKIPPED_STEPS + 1)
    assert len(events) == 2, "a loss that is not finite is no matter of the scale"


def test_what_does_not_move_is_told_and_nothing_moving_stops():
    events, model = [], Model()
    guard = guard_of(events)
    guard.on_train_begin(None, None, None, model=model)
    optimizer = torch.optim.SGD([model.weight], lr=0.1)
    for step in range(1, 5):
        one_step(guard, model, optimizer, loss=[1.0], gradient=1.0, step=step)
    [event] = events
    assert event.kind == "warning" and "1 trained tensors have not moved by step 3 (for example other" in event.text
    guard = guard_of(events)
    guard.on_train_begin(None, None, None, model=model)
    still = torch.optim.SGD(model.parameters(), lr=1e-12)
    with pytest.raises(UserError, match="2 trained tensors that have not moved by step 3"):
        for step in range(1, 5):
            one_step(guard, model, still, loss=[1.0], gradient=1.0, step=step)
