"""The comparison that decides whether a merge is kept."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkit.data.tokens.mask import Tokenized
from peftkit.ship.merge.fidelity import ModelOutputs, compute_outputs, kl_divergences, measure_fidelity
from tests.rigs.tiny import tiny_model


def said(logits, num_texts=1):
    return ModelOutputs(torch.as_tensor(logits, dtype=torch.float32), num_texts, None)


@given(st.lists(st.lists(st.floats(-5, 5), min_size=4, max_size=4), min_size=1, max_size=5))
def test_divergence_is_none_from_oneself_and_by_hand(rows):
    first = torch.tensor(rows, dtype=torch.float32)
    assert float(kl_divergences(first, first).max()) == 0
    second = first.flip(0).roll(1, dims=1)
    a, b = first.double().softmax(-1), second.double().softmax(-1)
    expected = (a * (a / b).log()).sum(-1)
    torch.testing.assert_close(kl_divergences(first, second), expected.clamp(min=0), rtol=1e-6, atol=1e-9)


def test_an_erased_adapter_is_a_problem_and_rounding_is_none():
    generator = torch.Generator().manual_seed(0)
    alone = torch.randn(50, 40, generator=generator)
    trained = alone + 0.3 * torch.randn(50, 40, generator=generator)
    close = trained + 1e-3 * torch.randn(50, 40, generator=generator)
    erased = measure_fidelity(said(trained), said(alone), base_outputs=said(alone))
    assert "more than the 0.005" in erased.problem("bfloat16") and erased.problem("float32")
    rounded = measure_fidelity(said(trained), said(close), base_outputs=said(alone))
    assert rounded.problem("bfloat16") == "" and rounded.effect > 100 * rounded.kl
    half = measure_fidelity(said(trained), said(trained * 0.9 + alone * 0.1), base_outputs=said(alone))
    assert half.problem("float32")


def test_a_light_adapter_that_is_lost_is_a_problem_though_the_distance_is_small():
    generator = torch.Generator().manual_seed(0)
    alone = torch.randn(50, 40, generator=generator)
    trained = alone + 0.08 * torch.randn(50, 40, generator=generator)
    lost = measure_fidelity(said(trained), said(alone), base_outputs=said(alone))
    assert 1e-3 < lost.kl < 5e-3, "below what rounding may cause"
    assert "of what the adapter changes" in lost.problem("bfloat16")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_a_problem(value):
    logits = torch.zeros(3, 4)
    broken = logits.clone()
    broken[1, 2] = value
    assert measure_fidelity(said(logits), said(broken)).problem("bfloat16")


def test_outputs_of_a_model_are_its_logits_on_real_tokens():
    model = tiny_model("llama")
    rows = [Tokenized([5, 6, 7], [5, 6, 7], "a"), Tokenized([8, 9], [8, 9], "b")]
    found = compute_outputs(model, rows, loss_rows=rows, pad_id=0, task="causal-lm")
    assert found.num_texts == 2 and len(found.logits) == 5, "padding is left out"
    with torch.no_grad():
        expected = model(torch.tensor([[8, 9]])).logits[0]
    assert any(torch.allclose(found.logits[i], expected[0], atol=1e-5) for i in range(5))
    assert found.losses is not None and found.losses.counts == (2, 1)
