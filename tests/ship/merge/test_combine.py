"""Several adapters as one change: sums are exact, one comes back as it is, and drawing is repeatable."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkit.errors import UserError
from peftkit.model.adapter.edits import Edit
from peftkit.model.meta.layout import Placement
from peftkit.ship.merge.combine import Combination, dare, make_combination, merge_combined, ties
from peftkit.ship.merge.deltas import merge_weight

PLACE = Placement("w")


def adapter(seed, rank=2, scale=0.5, shape=(6, 8)):
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "a": torch.randn(rank, shape[1], generator=generator),
        "b": torch.randn(shape[0], rank, generator=generator),
        "m": torch.rand(shape[0], generator=generator) + 0.5,
        "v": torch.rand(shape[1], generator=generator) + 0.5,
        "w": torch.randn(shape, generator=generator),
    }
    pair = {"A": "a", "B": "b"}
    edits = {
        "lora": (Edit("lora", pair, scale),),
        "dora": (Edit("dora", {**pair, "magnitude": "m"}, scale),),
        "ia3": (Edit("scale", {"value": "v"}, scales_inputs=True),),
        "whole": (Edit("whole", {"value": "w"}),),
    }
    return tensors, edits


KINDS = ("lora", "dora", "ia3", "whole")
WEIGHT = torch.randn(6, 8, generator=torch.Generator().manual_seed(9))


def together(parts, how, weight=WEIGHT):
    edits = [edits[kind] for (_, edits), kind in parts]
    reads = [tensors.__getitem__ for (tensors, _), _ in parts]
    return merge_combined(weight.clone(), edits, reads, how, place=PLACE, dtype=weight.dtype)


@pytest.mark.parametrize("how", [Combination(), Combination(how="ties", density=1), Combination(how="dare", density=1)])
@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_of_weight_one_comes_back(kind, how):
    tensors, edits = adapter(1)
    alone = merge_weight(WEIGHT.clone(), edits[kind], tensors.__getitem__, place=PLACE, dtype=torch.float32)
    torch.testing.assert_close(together([((tensors, edits), kind)], how), alone, rtol=0, atol=1e-6)


@given(st.sampled_from(KINDS), st.sampled_from(KINDS), st.floats(-2, 2), st.floats(-2, 2))
def test_a_sum_is_the_sum_of_the_changes(first, second, one, two):
    parts = [(adapter(1), first), (adapter(2, rank=3), second)]
    changes = [together([part], Combination()).double() - WEIGHT.double() for part in parts]
    expected = WEIGHT.double() + one * changes[0] + two * changes[1]
    got = together(parts, Combination((one, two)))
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5)


def test_an_adapter_that_leaves_a_weight_alone_adds_nothing():
    tensors, edits = adapter(1)
    got = merge_combined(
        WEIGHT.clone(),
        [edits["lora"], ()],
        [tensors.__getitem__, {}.__getitem__],
        Combination((1.0, 5.0)),
        place=PLACE,
        dtype=torch.float32,
    )
    alone = merge_weight(WEIGHT.clone(), edits["lora"], tensors.__getitem__, place=PLACE, dtype=torch.float32)
    torch.testing.assert_close(got, alone, rtol=0, atol=1e-6)


def test_ties_by_hand():
    """Yadav et al. 2023, figure 1: the sign with the larger total wins, and what has it is averaged."""
    one, two = torch.tensor([3.0, -1.0, 0.0, 2.0]), torch.tensor([-1.0, -3.0, 4.0, 0.0])
    assert ties([one, two]).tolist() == [3.0, -2.0, 4.0, 2.0]
    assert ties([one]).tolist() == one.tolist()
    parts = [(adapter(1), "lora"), (adapter(2), "lora")]
    trimmed = together(parts, Combination((1.0, 1.0), how="ties", density=0.25)) - WEIGHT
    assert 12 <= int((trimmed.abs() > 1e-6).sum()) <= 24, "a quarter of 48 from each"


@given(st.floats(0.05, 1), st.integers(0, 1000))
def test_dare_keeps_the_mean_and_draws_the_same_again(density, seed):
    delta = torch.ones(100, 100)
    how = Combination(how="dare", density=density, seed=seed)
    first, second = dare(delta, how, seed), dare(delta, how, seed)
    assert torch.equal(first, second)
    assert abs(float(first.mean()) - 1) < 6 * (1 / density - 1) ** 0.5 / 100 + 1e-6
    assert set(first.unique().tolist()) <= {0.0, float(torch.tensor(1.0) / density)}


def test_dare_draws_otherwise_for_other_weights_adapters_and_seeds():
    parts = [(adapter(1), "lora"), (adapter(1), "lora")]

    def drawn(seed):
        return together(parts, Combination((1.0, 1.0), how="dare", density=0.5, seed=seed)) - WEIGHT

    assert not torch.equal(drawn(0), drawn(1))
    assert torch.equal(drawn(1), drawn(1))
    single = together(parts[:1], Combination(how="dare", density=0.5, seed=0)) - WEIGHT
    assert not torch.allclose(drawn(0), 2 * single), "both adapters would drop the same numbers"


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"weights": (1.0,), "num": 2}, "1 for 2 adapters"),
        ({"weights": (0.0, 1.0), "num": 2}, "none zero"),
        ({"weights": (float("nan"),), "num": 1}, "finite"),
        ({"weights": None, "num": 1, "how": "mean"}, "sum, ties, dare"),
        ({"weights": None, "num": 1, "density": 0.0}, "above 0"),
    ],
)
def test_what_is_no_combination_is_refused(given_, said):
    how = {"how": "sum", "density": 0.5, "seed": 0, **given_}
    with pytest.raises(UserError, match=said):
        make_combination(how.pop("weights"), how.pop("num"), **how)
