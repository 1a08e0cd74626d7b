"""Facts that a family's entry states, measured on tiny models."""

import pytest
import torch

from peftkit.archs import FAMILIES, family_of
from tests.rigs.tiny import VOCAB, tiny_model

FIRST = 9


def document():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, VOCAB, (1, FIRST), generator=generator)


def step_gap(model, num_rows):
    """How far decoding step by step is from reading the whole, for so many rows at once."""
    ids = torch.cat([document()] * num_rows)
    ids[1:] = ids[1:].flip(1)
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, -1]
        start = model(input_ids=ids[:, :-1], use_cache=True)
        state = {"state": start.state} if hasattr(start, "state") else {}
        step = model(input_ids=ids[:, -1:], use_cache=True, **state).logits[:, -1]
    return float((whole - step).abs().max())


@pytest.mark.filterwarnings("ignore")
def test_rwkv_decodes_one_prompt_right_and_two_wrong():
    """Once two are right, set batches_generation."""
    model = tiny_model("rwkv")
    assert step_gap(model, 1) < 1e-4
    assert step_gap(model, 2) > 1e-2
    assert not family_of("rwkv").batches_generation


def test_experts_of_every_mixture_are_three_dimensional():
    for family in FAMILIES:
        if family.has_experts:
            model = tiny_model(family.model_types[0])
            shapes = [p.ndim for name, p in model.named_parameters() if ".experts." in name]
            assert 3 in shapes, family.name
