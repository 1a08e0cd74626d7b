"""Closed-form shapes against published totals and against real (tiny) models built by transformers."""

import pytest

from peftkit.archs import EMBEDDED, FAMILIES, KNOWN, family_of, shape_from_config
from peftkit.archs.known import TOTALS
from tests.rigs.tiny import LABELS, tiny_config

CASES = [(t, task) for family in FAMILIES for t in family.model_types for task in family.heads]


@pytest.mark.parametrize("name", KNOWN)
def test_known_models_have_their_published_totals(name):
    assert shape_from_config(KNOWN[name]).num_parameters == TOTALS[name]


def test_embedded_models_are_counted():
    assert shape_from_config(EMBEDDED["smollm2-135m-instruct"].config).num_parameters == 134_515_008


def real_linears(model):
    """Linear layers inside the blocks, and 3-D parameters of experts."""
    found = {
        name: sum(p.numel() for p in module.parameters(recurse=False))
        for name, module in model.named_modules()
        if type(module).__name__ in {"Linear", "Conv1D", "FalconLinear"}
        and any(part.isdigit() for part in name.split("."))
        and "adapter_list" not in name
    }
    experts = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 3 and ".experts." in name}
    return {**found, **experts}


@pytest.mark.parametrize(("model_type", "task"), CASES)
def test_shapes_equal_those_of_the_real_model(model_type, task):
    import torch
    import transformers

    from peftkit.model.base.unknown_family import AUTO_CLASSES

    config = tiny_config(model_type)
    with torch.device("meta"):
        model = getattr(transformers, AUTO_CLASSES[task]).from_config(config)
    shape = shape_from_config({**config.to_dict(), "num_labels": LABELS}, task=task)
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    linears = real_linears(model)
    if model_type == "zamba2":  # its shared block shows under every layer that uses it
        linears = {n: num for n, num in linears.items() if not n.startswith("model.layers.2.shared")}
    assert {m.name: m.num_parameters for m in shape.modules} == linears
    modules = dict(model.named_modules())
    for module in shape.modules:
        if not module.in_experts:
            weight = modules[module.name].weight
            sides = weight.shape if type(modules[module.name]).__name__ == "Conv1D" else weight.shape[::-1]
            assert (module.d_in, module.d_out) == tuple(sides)
    for tensor in shape.tensors:
        if tensor.role == "norms":
            assert sum(p.numel() for p in modules[tensor.name].parameters()) == tensor.num_parameters


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size"])
@pytest.mark.parametrize("value", [None, 0, -4, "many", 2**50, True, 1.5])
def test_missing_and_absurd_sizes_are_told(key, value):
    config = {**KNOWN["meta-llama/Llama-3.1-8B"], key: value}
    with pytest.raises((KeyError, ValueError, TypeError)):
        shape_from_config(config)


def test_unknown_family_has_no_shape_and_a_missing_head_is_told():
    assert family_of("retnet") is None
    assert shape_from_config({"model_type": "retnet"}) is None
    with pytest.raises(ValueError, match="T5 has no classification head"):
        shape_from_config(KNOWN["google-t5/t5-base"], task="classification")


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("meta-llama/Llama-3.1-8B", "GQA"),
        ("meta-llama/Llama-2-7b-hf", "MHA"),
        ("tiiuae/falcon-7b", "MQA"),
        ("deepseek-ai/DeepSeek-V3", "MLA"),
        ("state-spaces/mamba-130m-hf", "none"),
        ("ai21labs/Jamba-v0.1", "GQA + state"),
        ("google-bert/bert-base-uncased", "MHA"),
    ],
)
def test_attention_kinds(name, attention):
    assert shape_from_config(KNOWN[name]).attention == attention


def test_key_value_cache_of_llama_8b_is_the_known_number():
    """32 layers x 2 x 8 heads x 128: 128 KiB a token in bf16."""
    assert shape_from_config(KNOWN["meta-llama/Llama-3.1-8B"]).cache_per_token * 2 == 131_072


def test_every_layer_has_a_known_role_and_a_unique_type():
    from peftkit.archs import ROLES

    types = [t for family in FAMILIES for t in family.model_types]
    assert len(types) == len(set(types))
    for family in FAMILIES:
        assert set(family.roles) <= set(ROLES), family.name


@pytest.mark.parametrize("model_type", [t for family in FAMILIES for t in family.model_types])
def test_keys_that_a_config_leaves_out_have_the_defaults_of_transformers(model_type):
    """Older hub files lack keys; transformers fills them in, and so must the family's entry."""
    from tests.rigs.tiny import TINY

    sparse = shape_from_config({**TINY[model_type], "model_type": model_type})
    whole = shape_from_config(tiny_config(model_type, num_labels=2).to_dict())
    assert (sparse.num_parameters, sparse.tied_embeddings) == (whole.num_parameters, whole.tied_embeddings)


ABSURD = {
    "mixtral": {"num_experts_per_tok": "two"},
    "nemotron_h": {"layers_block_type": ["mamba", "foo", "attention", "moe"]},
    "zamba2": {"layers_block_type": "abc"},
    "qwen3_next": {"layer_types": ["foo", "bar"]},
    "llama": {"num_key_value_heads": 3},
    "qwen2": {"hidden_size": 65},
    "gemma": {"tie_word_embeddings": "false"},
    "granite": {"attention_bias": "false"},
    "mistral": {"num_hidden_layers": 2**30},
    "phi": {"rope_parameters": "yarn"},
    "jamba": {"num_experts_per_tok": -3},
}


@pytest.mark.parametrize("model_type", ABSURD)
def test_absurd_values_are_told_not_read_as_something(model_type):
    from tests.rigs.tiny import TINY

    config = {**TINY[model_type], "model_type": model_type}
    assert shape_from_config(config)
    with pytest.raises(ValueError, match=r"\w"):
        shape_from_config({**config, **ABSURD[model_type]})


@pytest.mark.parametrize("model_type", ["mistral", "gemma2", "gemma3_text", "gpt_oss", "cohere2", "llama"])
def test_the_cache_of_sliding_windows_is_what_generation_keeps(model_type):
    import torch
    from transformers import AutoModelForCausalLM

    window = {"sliding_window": 16} if model_type != "llama" else {}
    config = tiny_config(model_type, num_hidden_layers=6, **window)
    model = AutoModelForCausalLM.from_config(config).eval()
    length = 60
    ids = torch.randint(3, 256, (1, length))
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    shape = shape_from_config(config.to_dict())
    told = shape.cache_at(length + 1)
    # a window keeps one token less than it is wide: the one that is read now is the last
    slack = shape.num_windowed * shape.cache_per_token // shape.num_cached_layers
    assert told - slack == kept
    assert shape.num_windowed == sum("Sliding" in type(layer).__name__ for layer in cache.layers)


def test_positions_follow_from_the_configuration():
    falcon = KNOWN["tiiuae/falcon-7b"]
    assert shape_from_config(falcon).positions == "rope"
    assert shape_from_config({**falcon, "alibi": True}).positions == "alibi"
    roberta = shape_from_config(KNOWN["FacebookAI/roberta-base"])
    assert roberta.dims.positions == 512
    assert shape_from_config(KNOWN["openai/gpt-oss-20b"]).rope_type == "yarn"
