"""The arithmetic by hand, in fp64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftkit.model.adapter.edits import Edit
from peftkit.model.meta.layout import Placement
from peftkit.ship.merge.deltas import edit_delta, merge_weight

SIZES = st.integers(1, 7)


def tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@given(SIZES, SIZES, st.integers(1, 4), st.booleans(), st.sampled_from([torch.bfloat16, torch.float32]))
def test_lora(d_out, d_in, rank, transposed, dtype):
    a, b = tensor(rank, d_in), tensor(d_out, rank, seed=1)
    weight = tensor(*((d_in, d_out) if transposed else (d_out, d_in)), seed=2).to(dtype)
    exact = weight.double() + 0.7 * ((b.double() @ a.double()).T if transposed else b.double() @ a.double())
    edit = Edit("lora", {"A": "a", "B": "b"}, 0.7, transposed=transposed)
    got = merge_weight(weight.clone(), (edit,), {"a": a, "b": b}.__getitem__, place=Placement("w"), dtype=dtype)
    assert got.dtype == dtype
    one_rounding = (exact.abs() * 2.0**-8 if dtype == torch.bfloat16 else 0) + 1e-5
    assert bool(((got.double() - exact).abs() <= one_rounding).all())


@given(SIZES, SIZES, st.booleans())
def test_dora_has_the_magnitudes_as_lengths(d_out, d_in, transposed):
    a, b, m = tensor(2, d_in), tensor(d_out, 2, seed=1), tensor(d_out, seed=3).abs() + 0.1
    weight = tensor(*((d_in, d_out) if transposed else (d_out, d_in)), seed=2)
    edit = Edit("dora", {"A": "a", "B": "b", "magnitude": "m"}, 1.0, transposed=transposed)
    read = {"a": a, "b": b, "m": m}.__getitem__
    got = merge_weight(weight, (edit,), read, place=Placement("w"), dtype=torch.float32)
    torch.testing.assert_close(got.norm(dim=0 if transposed else 1), m, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_each_expert_s_part_is_that_of_the_whole(transposed):
    """Files hold gate and up of each expert apart; models hold all as one."""
    num, rank, d_in, d_out = 3, 2, 4, 6
    a, b = tensor(num * rank, d_in), tensor(d_out, rank * num, seed=1)
    edit = Edit("experts", {"A": "a", "B": "b"}, 0.5, transposed=transposed)
    read = {"a": a, "b": b}.__getitem__
    shape = (num, d_in, d_out) if transposed else (num, d_out, d_in)
    whole = edit_delta(edit, read, place=Placement("w"), shape=shape)
    assert whole.shape == shape
    axis = 1 if transposed else 0
    for expert in range(num):
        parts = []
        for part in range(2):
            place = Placement("w", expert=expert, num_experts=num, part=part, num_parts=2, axis=axis)
            parts.append(edit_delta(edit, read, place=place, shape=(3, 4)))
        torch.testing.assert_close(torch.cat(parts, axis), whole[expert])


def test_many_rows_are_added_slice_by_slice():
    from peftkit.ship.merge import deltas

    rows = deltas._SLICE_NUMBERS // 1024 * 2 + 3
    a, b = tensor(5, 1024), tensor(rows, 5, seed=1)
    read = {"a": a, "b": b, "v": tensor(rows, seed=2)}.__getitem__
    weight = tensor(rows, 1024, seed=3).bfloat16()
    for turned in (False, True):
        edit = Edit("lora", {"A": "a", "B": "b"}, 0.3, transposed=turned)
        whole = weight.T.contiguous() if turned else weight
        exact = (whole.float() + ((b @ a).T if turned else b @ a) * 0.3).bfloat16()
        got = merge_weight(whole.clone(), (edit,), read, place=Placement("w"), dtype=torch.bfloat16)
        assert torch.equal(got, exact), "the bits of the whole product"


def test_scales_rows_and_bias():
    weight, v, u = tensor(3, 4), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    read = {"v": v, "u": u, "r": torch.ones(2, 4)}.__getitem__

    def got(weight, *edits):
        return merge_weight(weight.clone(), edits, read, place=Placement("w"), dtype=torch.float32)

    assert torch.equal(got(weight, Edit("scale", {"value": "v"})), weight * v[:, None])
    assert torch.equal(got(weight, Edit("scale", {"value": "u"}, scales_inputs=True)), weight * u)
    assert torch.equal(got(weight.T, Edit("scale", {"value": "v"}, transposed=True)), weight.T * v)
    assert torch.equal(got(v, Edit("scale", {"value": "v"})), v * v)
    assert torch.equal(got(v, Edit("shift", {"value": "v"}, 0.5)), v * 1.5)
    rows = got(weight, Edit("rows", {"value": "r"}, ids=(2, 0)))
    assert torch.equal(rows, torch.stack([torch.ones(4), weight[1], torch.ones(4)]))
