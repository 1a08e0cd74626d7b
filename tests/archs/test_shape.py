"""Closed-form shapes against published totals and against real (tiny) models built by transformers."""

import pytest

from peftkit.archs import EMBEDDED, FAMILIES, KNOWN, family_of, shape_from_config
from tests.tiny import tiny_config

PUBLISHED_TOTALS = {
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "google/gemma-2-9b": 9_241_705_984,
    "microsoft/phi-2": 2_779_683_840,
}


def test_known_models_have_their_published_totals():
    assert {
        name: shape_from_config(config).num_parameters for name, config in KNOWN.items()
    } == PUBLISHED_TOTALS
    assert shape_from_config(EMBEDDED["smollm2-135m-instruct"].config).num_parameters == 134_515_008


@pytest.mark.parametrize("model_type", [t for family in FAMILIES for t in family.model_types])
def test_shapes_equal_those_of_the_real_model(model_type):
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = shape_from_config(config.to_dict())
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in {"Linear", "Conv1D"}
    }
    linears = {
        name: module for name, module in linears.items() if module is not model.get_output_embeddings()
    }
    assert {m.name for m in shape.modules} == set(linears)
    for module in shape.modules:
        real = linears[module.name]
        assert module.num_parameters == sum(p.numel() for p in real.parameters())
        sides = (
            tuple(real.weight.shape) if type(real).__name__ == "Conv1D" else tuple(real.weight.shape)[::-1]
        )
        assert (module.d_in, module.d_out) == sides


def test_unknown_family_has_no_shape_and_missing_sizes_are_told():
    assert family_of("retnet") is None
    assert shape_from_config({"model_type": "retnet"}) is None
    with pytest.raises(KeyError, match="without hidden size"):
        shape_from_config({"model_type": "llama", "vocab_size": 10})
