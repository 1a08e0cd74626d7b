"""Trained parameters by ranges of layers: the parts make the whole, for every method."""

import pytest

from peftkit.plan.method import OUTSIDE_LAYERS, SHARED_BY_LAYERS
from tests.rigs.plans import plan_for

LLAMA = {
    "model_type": "llama",
    "vocab_size": 509,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
T5 = {
    "model_type": "t5",
    "vocab_size": 509,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
METHODS = ["full", "lora", "ia3", "prefix", "prompt", "vera", "oft", "ln", "qlora"]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("config", [LLAMA, T5], ids=["llama", "t5"])
def test_the_ranges_sum_up_to_what_is_trained(config, name):
    data_format = "text" if config is LLAMA else "prompt-completion"
    method = plan_for(config, name, data_format=data_format).method
    assert sum(method.trainable_by_layers.values()) == method.num_trainable > 0
    assert (SHARED_BY_LAYERS in method.trainable_by_layers) == (name in {"prefix", "prompt"})  # nothing hides there
    assert min(method.trainable_by_layers.values()) > 0


def test_alike_layers_are_one_range():
    method = plan_for(LLAMA, {"name": "lora", "rank": 2, "also_train": ["embeddings"]}).method
    in_layers = 3 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    assert method.trainable_by_layers == {"model.layers 0-2": in_layers, OUTSIDE_LAYERS: 509 * 64}


def test_layers_of_their_own_kind_break_the_range():
    config = {**LLAMA, "model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}
    whole = plan_for(config, "full").method.trainable_by_layers
    assert set(whole) == {"model.layers 0-2", OUTSIDE_LAYERS}


def test_what_every_layer_shares_is_said():
    assert set(plan_for(LLAMA, {"name": "prefix", "virtual_tokens": 4}).method.trainable_by_layers) == {
        SHARED_BY_LAYERS
    }
