import pytest

from peftkit.archs import FAMILIES, shape_from_config
from peftkit.archs.inferred import InspectedLayer, infer_shape, role_of
from tests.rigs.tiny import tiny_config

# Families whose every role can be told by names and shapes.
TOLD = ("llama", "mistral", "qwen3", "gpt2", "gpt_neox", "phi", "phi3", "bloom", "starcoder2", "gemma2")


@pytest.mark.parametrize("model_type", TOLD)
def test_roles_of_known_families_are_found_by_names_and_shapes(model_type):
    import torch
    from transformers import AutoModelForCausalLM

    from peftkit.model.base.unknown_family import list_layers

    config = tiny_config(model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    known = {m.name: m.role for m in shape_from_config(config.to_dict()).modules}
    hidden = shape_from_config(config.to_dict()).dims.hidden
    for layer in list_layers(model):
        if layer.name in known:
            assert role_of(layer, hidden) == known[layer.name], layer.name


@pytest.mark.parametrize("model_type", [f.model_types[0] for f in FAMILIES if "causal-lm" in f.heads])
def test_an_inferred_shape_counts_every_parameter_once(model_type):
    import torch
    from transformers import AutoModelForCausalLM

    from peftkit.model.base.unknown_family import list_layers

    config = tiny_config(model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = {id(module): name for name, module in model.named_modules()}
    shape = infer_shape(
        config.to_dict(),
        list_layers(model),
        task="causal-lm",
        embeddings=names[id(model.get_input_embeddings())],
        head="lm_head",
        tied=False,
    )
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    assert shape.family.inferred


@pytest.mark.parametrize(
    ("name", "d_in", "d_out", "role"),
    [
        ("blocks.0.retention.wq", 64, 64, "q"),
        ("blocks.0.ffn.w2", 128, 64, "down"),
        ("blocks.0.mystery.alpha", 64, 256, "up"),
        ("blocks.0.mystery.beta", 256, 64, "down"),
        ("blocks.0.mystery.gamma", 64, 64, "other"),
        ("blocks.0.moe.gate", 64, 8, "router"),
    ],
)
def test_roles_by_name_then_by_shape(name, d_in, d_out, role):
    assert role_of(InspectedLayer(name, "linear", d_in * d_out, d_in, d_out), 64) == role


def test_nothing_is_claimed_of_what_shapes_cannot_tell():
    layers = [
        InspectedLayer("t.embed", "embedding", 640, 10, 64),
        InspectedLayer("t.l.0.mlp.up", "linear", 8192, 64, 128),
    ]
    shape = infer_shape({"model_type": "x"}, layers, task="causal-lm", embeddings="t.embed", head="h", tied=True)
    assert not shape.family.packs
    assert "prefix" in shape.family.refuses
    assert shape.dims.hidden == 64
