"""Rotary positions stretched in a loaded model are those of a model loaded with them."""

from dataclasses import replace

import pytest
import torch

from peftkit.model.load import load_model
from peftkit.model.rope import stretched_rope
from tests.conftest import save_tiny
from tests.rigs.plans import plan_for

IDS = torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("scaling", ["yarn", "linear"])
def test_stretched_positions_are_those_of_loading(kind, scaling, tmp_path):
    folder, config = save_tiny(tmp_path, kind)
    plan = replace(plan_for(config, "lora").base, id=str(folder))
    stretch = {"kind": scaling, "factor": 4.0, "trained": 16}
    plain = load_model(str(folder), plan, device="cpu")
    before = logits(plain)
    loaded = load_model(str(folder), replace(plan, overrides={"rope_scaling": stretch}), device="cpu")
    with stretched_rope(plain, stretch) as can_stretch:
        assert can_stretch
        assert torch.equal(logits(plain), logits(loaded))
        assert not torch.allclose(logits(plain), before)
    assert torch.equal(logits(plain), before)


def test_learned_positions_cannot_be_stretched(tmp_path):
    folder, config = save_tiny(tmp_path, "gpt2")
    model = load_model(str(folder), replace(plan_for(config, "lora").base, id=str(folder)), device="cpu")
    with stretched_rope(model, {"kind": "linear", "factor": 2.0, "trained": 16}) as can_stretch:
        assert not can_stretch
