"""Rank and scale of a module are those of PEFT's own layers."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftkit.model.adapter.edits import lora_rank_and_scale
from tests.rigs.tiny import tiny_model

KEYS = ("q_proj", r"0\..*k_proj", "^model.layers.1.self_attn.v_proj", r".*\.1\.self_attn\..*", "layers.0.mlp.up_proj")


@pytest.mark.parametrize("rslora", [False, True])
@given(
    ranks=st.dictionaries(st.sampled_from(KEYS), st.integers(1, 9), max_size=4),
    alphas=st.dictionaries(st.sampled_from(KEYS), st.integers(1, 40), max_size=4),
)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_module_has_the_scale_that_peft_gives_it(
    rslora: bool, ranks: dict[str, int], alphas: dict[str, int], tmp_path: Path
) -> None:
    config = peft.LoraConfig(
        r=6, lora_alpha=10, target_modules="all-linear", rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora
    )
    config.save_pretrained(tmp_path)  # sorts the patterns: where two match, another may win than in memory
    with torch.device("meta"):
        model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig.from_pretrained(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    seen = 0
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            assert lora_rank_and_scale(saved, name) == (module.r["default"], pytest.approx(module.scaling["default"]))
            seen += 1
    assert seen == 14
