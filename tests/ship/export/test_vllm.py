"""Adapters as vLLM serves them: the same function in plain LoRA, and what cannot be is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file

from peftkit.errors import UserError
from peftkit.model.adapter.edits import read_edits
from peftkit.model.meta.skeleton import meta_model
from peftkit.ship.export.vllm import write_for_vllm
from peftkit.ship.files.tensors import read_all_entries
from tests.rigs.adapters import FLAVOURS, LINEAR, PATTERNS, Flavour, base_plan, inputs, load_adapted, make


def written(base, adapter, out):
    tensors = read_all_entries([adapter / "adapter_model.safetensors"])
    model = meta_model(str(base), base_plan(base))
    parameters = set(model.state_dict())
    edits = read_edits(model, adapter, {name: entry.shape for name, entry in tensors.items()})
    config = json.loads((adapter / "adapter_config.json").read_text())
    out.mkdir()
    return write_for_vllm(adapter, config, edits, tensors, out, parameters=parameters)


SERVED = {
    "plain": Flavour("llama", {"r": 4, "target_modules": LINEAR}),
    "rslora with patterns": Flavour("llama", {"r": 4, "target_modules": LINEAR, **PATTERNS}),
    "some layers": Flavour("llama", {"r": 20, "target_modules": "q_proj|v_proj", "layers_to_transform": [1]}),
    "a head": Flavour("llama", {"r": 4, "target_modules": ["lm_head"]}, base={"tie_word_embeddings": False}),
}
SERVED["some layers"].arguments["target_modules"] = r".*layers\.1\.(self_attn\.(q|v)_proj|mlp\.up_proj)"
del SERVED["some layers"].arguments["layers_to_transform"]


@pytest.mark.parametrize("case", SERVED)
def test_what_is_rewritten_is_the_same_function_in_plain_lora(case, tmp_path):
    base, adapter = make(SERVED[case], tmp_path)
    made = written(base, adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    # what vLLM's PEFTHelper reads: one rank, one scale, no pattern, modules in a list
    assert config["lora_alpha"] == config["r"] == made.rank
    assert not config["use_rslora"] and not config["rank_pattern"] and not config["alpha_pattern"]
    assert isinstance(config["target_modules"], list)
    for name, tensor in tensors.items():
        assert name.startswith("base_model.model.") and name.endswith(("lora_A.weight", "lora_B.weight"))
        assert tensor.shape[0 if "lora_A" in name else 1] == made.rank
    adapted = [load_adapted(base, folder, "causal-lm") for folder in (adapter, tmp_path / "out")]
    asked = inputs(adapted[0], "causal-lm")
    with torch.no_grad():
        one, two = (model(**asked).logits for model in adapted)
        with adapted[0].disable_adapter():
            alone = adapted[0](**asked).logits
    assert float((one - two).abs().max()) < 1e-5 < float((one - alone).abs().max())


def test_what_was_changed_is_told(tmp_path):
    base, adapter = make(SERVED["rslora with patterns"], tmp_path)
    made = written(base, adapter, tmp_path / "out")
    assert "ranks of 2 to 8 are padded with zeros to 8" in made.changes
    assert "rsLoRA is written as plain LoRA" in made.changes
    assert "max-lora-rank" not in made.said
    (tmp_path / "more").mkdir()
    base, adapter = make(SERVED["some layers"], tmp_path / "more")
    made = written(base, adapter, tmp_path / "more" / "out")
    assert "--max-lora-rank 20" in made.said and "the modules are listed by name" in made.changes
    config = json.loads((tmp_path / "more" / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == [
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    ], "layer 0 has modules of these names too"


REFUSED = {
    "dora": "DoRA",
    "lora with bias": "a bias in the adapter",
    "head and embeddings whole": "a fully trained module",
    "embeddings": "an adapter of embeddings",
    "rows of tokens": "trained rows of tokens",
    "experts of qwen3": "an adapter of fused experts",
    "ia3": "IA3",
    "vera": "VeRA",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_rejects_is_refused_with_the_way_out(name, tmp_path):
    base, adapter = make(FLAVOURS[name], tmp_path)
    with pytest.raises(UserError, match=REFUSED[name]) as error:
        written(base, adapter, tmp_path / "out")
    assert "peftkit merge" in error.value.problems[0].fix
    assert list((tmp_path / "out").iterdir()) == []
