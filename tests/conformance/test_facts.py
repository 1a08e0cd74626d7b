"""Facts that a family's entry states, measured on tiny models."""

import pytest
import torch

from peftkit.archs import FAMILIES, family_of
from tests.tiny import VOCAB, tiny_model

DECODERS = [t for family in FAMILIES for t in family.model_types if "causal-lm" in family.heads]
FIRST, SECOND = 9, 7


def documents():
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randint(3, VOCAB, (1, FIRST), generator=generator),
        torch.randint(3, VOCAB, (1, SECOND), generator=generator),
    )


def packed_gap(model):
    """How far the second of two packed documents is from the same document alone; None where it is refused.

    Packed as TRL packs: one row, positions that start anew, no attention mask, no cache.
    """
    first, second = documents()
    positions = torch.cat([torch.arange(FIRST), torch.arange(SECOND)])[None]
    with torch.no_grad():
        alone = model(input_ids=second, position_ids=torch.arange(SECOND)[None]).logits
        try:
            both = torch.cat([first, second], 1)
            packed = model(input_ids=both, position_ids=positions, use_cache=False).logits
        except (ValueError, RuntimeError, NotImplementedError):
            return None
    return float((packed[:, FIRST:] - alone).abs().max())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", DECODERS)
def test_packed_documents_stay_apart_where_the_family_says_so(model_type):
    gap = packed_gap(tiny_model(model_type))
    apart = gap is not None and gap < 1e-3
    assert family_of(model_type).packs == apart, f"gap {gap}"


def step_gap(model, num_rows):
    """How far decoding step by step is from reading the whole, for so many rows at once."""
    ids = torch.cat([documents()[0]] * num_rows)
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
