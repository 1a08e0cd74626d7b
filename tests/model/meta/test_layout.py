"""Where tensors of the files stand in the model, proven by loading them."""

import pytest
import torch
from safetensors.torch import load_file

from peftkit.model.meta.layout import Placement, place_tensors, tied_parameters
from peftkit.model.meta.skeleton import meta_model, read_base_layout
from tests.rigs.adapters import base_plan, load
from tests.rigs.tiny import tiny_model


def saved(model_type, folder, **changes):
    model = tiny_model(model_type, **changes)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "model_type", sorted({"llama", "gpt2", "mixtral", "qwen3_moe", "gpt_neox", "bloom", "mamba", "gemma3_text"})
)
def test_every_tensor_stands_where_loading_puts_it(model_type, tmp_path):
    base = saved(model_type, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    found = place_tensors(meta_model(str(base), base_plan(base)), tensors)
    state = load(base, "causal-lm").state_dict()
    assert found.keys() == tensors.keys()
    for name, place in found.items():
        assert place.is_plain, name
        whole = state[place.parameter]
        if place.expert is not None:
            assert place.num_experts == len(whole)
            size = whole.shape[1 + place.axis] // place.num_parts
            whole = whole[place.expert].narrow(place.axis, place.part * size, size)
        assert torch.equal(whole, tensors[name]), name


def test_old_names_without_the_prefix_are_found(tmp_path):
    base = saved("gpt2", tmp_path / "base")
    model = meta_model(str(base), base_plan(base))
    assert place_tensors(model, ["h.0.attn.c_attn.weight"]) == {
        "h.0.attn.c_attn.weight": Placement("transformer.h.0.attn.c_attn.weight")
    }
    assert place_tensors(model, ["h.0.attn.masked_bias", "nonsense"]) == {}


def test_ties(tmp_path):
    base = saved("llama", tmp_path / "base", tie_word_embeddings=True)
    model = meta_model(str(base), base_plan(base))
    pair = ("model.embed_tokens.weight", "lm_head.weight")
    assert tied_parameters(model) == dict.fromkeys(pair, pair)
    other = saved("llama", tmp_path / "other", tie_word_embeddings=False)
    assert tied_parameters(meta_model(str(other), base_plan(other))) == {}


def test_a_resized_vocabulary_is_in_shapes_and_configuration(tmp_path):
    base = saved("llama", tmp_path / "base")
    names = load_file(base / "model.safetensors")
    found = read_base_layout(str(base), base_plan(base), base, names, vocabulary=300)
    assert found.shapes["model.embed_tokens.weight"][0] == 300
    assert found.config["vocab_size"] == 300 and found.config["architectures"] == ["LlamaForCausalLM"]


def test_layers_in_4_bit_are_those_that_loading_makes(tmp_path):
    from dataclasses import replace

    from bitsandbytes.nn import Linear4bit

    from peftkit.model.load import load_model

    for model_type in ("llama", "gpt2"):
        base = saved(model_type, tmp_path / model_type)
        plan = replace(base_plan(base), quant_type="nf4", double_quant=True, skip_4bit=("lm_head",))
        names = load_file(base / "model.safetensors")
        found = read_base_layout(str(base), plan, base, names).in_4bit
        model = load_model(str(base), plan, device="cpu")
        layers = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, Linear4bit)}
        assert set(found) == layers and set(found.values()) == {model_type == "gpt2"}
