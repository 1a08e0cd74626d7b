"""Forks begin where they are told to, see the same batches, and leave nothing behind."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkit.evaluate.step import loss_from_logits
from peftkit.experiments.forks import ForkStart, draw_fork_batches, fork_rate_factor, train_fork, with_learning_rate
from peftkit.model.adapter.attach import attach_adapter, trainable_tensors
from peftkit.train.checkpoint.snapshot import optimizer_state
from tests.conformance.cells import rows_for
from tests.rigs.plans import plan_for
from tests.rigs.tiny import tiny_config, tiny_model

ROWS = rows_for("causal-lm") * 6


@pytest.fixture
def made():
    """(plan, model, its start) of a tiny Llama with LoRA whose B has moved."""
    plan = plan_for(tiny_config("llama").to_dict(), {"name": "lora", "rank": 4, "dropout": 0.1})
    plan = with_learning_rate(
        replace(plan, train=replace(plan.train, micro_batch=2, accumulation=2, batch_size=4)), 1e-2
    )
    model = attach_adapter(tiny_model("llama"), plan, tokenizer=None)
    with torch.no_grad():
        for name, tensor in trainable_tensors(model).items():
            if "lora_B" in name:
                tensor.normal_(0, 0.02)
    return plan, model, start_of(model)


def start_of(model, optimizer=None):
    state = {k: v.clone() for k, v in optimizer_state(model, optimizer)[0].items()} if optimizer else {}
    return ForkStart({n: t.detach().clone() for n, t in trainable_tensors(model).items()}, state)


def batches(plan, num_steps=4):
    return draw_fork_batches(plan, ROWS, num_steps, batch_size=4, seed=7)


def run(model, plan, start, steps):
    forked = train_fork(model, plan, start, steps, pad_id=0, loss=loss_from_logits)
    return forked, {n: t.detach().clone() for n, t in trainable_tensors(model).items()}


def test_a_fork_is_the_same_twice_and_leaves_its_start_and_the_random_state(made):
    plan, model, start = made
    kept = {name: tensor.clone() for name, tensor in start.trained.items()}
    torch.manual_seed(5)
    random = torch.get_rng_state()
    (first, ended), (second, again) = (run(model, plan, start, batches(plan)) for _ in range(2))
    assert first == second
    assert first.is_finite
    assert all(torch.equal(ended[name], again[name]) for name in ended)
    assert any(not torch.equal(ended[name], start.trained[name]) for name in ended)
    assert all(torch.equal(kept[name], start.trained[name]) for name in kept)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(tensor.grad is None for tensor in model.parameters())


def test_accumulated_steps_weigh_every_token_alike(made):
    plan, model, start = made
    whole = replace(plan, train=replace(plan.train, micro_batch=4, accumulation=1))
    still = torch.nn.Dropout(0.0)
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = still
    (pieces, ended), (once, again) = (run(model, one, start, batches(one)) for one in (plan, whole))
    assert pieces.train_loss == pytest.approx(once.train_loss, abs=1e-5)
    assert pieces.num_tokens == once.num_tokens
    assert all(torch.allclose(ended[name], again[name], atol=1e-5) for name in ended)


def test_the_optimizer_goes_on_from_the_state_that_was_kept(made):
    plan, model, start = made
    optimizer = torch.optim.AdamW(trainable_tensors(model).values(), lr=1e-2)
    for tensor in trainable_tensors(model).values():
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    with_state = ForkStart(start.trained, start_of(model, optimizer).optimizer)
    _, fresh = run(model, plan, start, batches(plan))
    _, carried = run(model, plan, with_state, batches(plan))
    assert any(not torch.allclose(fresh[name], carried[name]) for name in fresh)


def test_a_rate_that_leaves_the_road_is_told(made):
    plan, model, start = made
    broken = {n: torch.full_like(t, float("inf")) if "lora_A" in n else t for n, t in start.trained.items()}
    forked, _ = run(model, plan, ForkStart(broken, {}), batches(plan))
    assert not forked.is_finite


def test_batches_are_drawn_alike_and_without_return(made):
    plan, _, _ = made
    steps = draw_fork_batches(plan, ROWS, 5, batch_size=4, seed=7)
    assert steps == draw_fork_batches(plan, ROWS, 5, batch_size=4, seed=7)
    assert [[len(micro) for micro in step] for step in steps] == [[2, 2]] * 5
    assert steps != draw_fork_batches(plan, ROWS, 5, batch_size=4, seed=8)


@given(st.integers(1, 300))
def test_the_rate_goes_up_to_its_peak_and_stays(num_steps):
    rates = [fork_rate_factor(step, num_steps) for step in range(num_steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates == sorted(rates)


def test_what_a_fork_comes_to_is_the_mean_of_its_second_half(made):
    plan, model, start = made
    steps = batches(plan, 2)
    _, last = run(model, plan, start, steps)
    _, first = run(model, plan, start, steps[:1])
    assert any(not torch.equal(last[name], first[name]) for name in last)
    # the second half of two steps is the second step alone; of four, the mean of two
    _, four = run(model, plan, start, batches(plan, 4))
    assert all(bool(tensor.isfinite().all()) for tensor in four.values())
