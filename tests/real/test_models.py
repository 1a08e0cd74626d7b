"""Models as they are published: quantized checkpoints, mixtures, wrappers, new attention."""

import json

import pytest
import torch
import transformers

import peftkit
from peftkit.archs import KNOWN, shape_from_config
from peftkit.archs.held import held_format, way_out
from peftkit.cli import main
from peftkit.errors import UserError
from tests.rigs.tiny import TINY, tiny_config

HELD = {
    "AWQ": ({"quant_method": "awq", "bits": 4, "group_size": 128}, "AWQ 4-bit", 4),
    "GPTQ": ({"quant_method": "gptq", "bits": 8}, "GPTQ 8-bit", 8),
    "FP8": ({"quant_method": "fp8", "fmt": "e4m3"}, "FP8", 8),
    "MXFP4": ({"quant_method": "mxfp4"}, "MXFP4", 4),
    "bnb 4-bit": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "bitsandbytes 4-bit (nf4)",
        4,
    ),
    "bnb 8-bit": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8-bit", 8),
    "w8a8": (
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}},
        "compressed-tensors 8-bit",
        8,
    ),
    "ModelOpt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "ModelOpt NVFP4", 4),
    "MLX": ({"group_size": 64, "bits": 4}, "MLX 4-bit", 4),
    "another": ({"quant_method": "hqq", "bits": 3}, "HQQ 3-bit", 3),
}
LLAMA = {
    **{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64},
    **{"max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
}


def folder_of(tmp_path, config):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", HELD)
def test_a_quantized_checkpoint_is_named_and_refused_before_the_data_is_read(name, tmp_path):
    settings, said, bits = HELD[name]
    config = {**LLAMA, "quantization_config": settings}
    assert (held_format(config).name, held_format(config).bits) == (said, bits)
    folder = folder_of(tmp_path, config)
    inspection = dict(peftkit.inspect_model(folder).rows())
    assert inspection["held as"].startswith(f"{said}, about ")
    recipe = {"base": str(folder), "method": "lora", "data": {"train": str(tmp_path / "absent.jsonl")}}
    for function in (peftkit.make_plan, peftkit.finetune):
        with pytest.raises(UserError) as caught:
            function(recipe)
        [problem] = caught.value.problems
        assert said in problem.got
        assert problem.fix


def test_what_modelopt_writes_beside_the_configuration_is_read(tmp_path):
    folder = folder_of(tmp_path, LLAMA)
    (folder / "hf_quant_config.json").write_text(
        '{"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}'
    )
    assert dict(peftkit.inspect_model(folder).rows())["held as"].startswith("ModelOpt FP8, about ")


@pytest.mark.parametrize(
    ("model", "plain"),
    [
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "Qwen2.5-7B-Instruct"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen2.5-7B-Instruct"),
        ("unsloth/Llama-3.2-1B-bnb-4bit", "Llama-3.2-1B"),
        ("RedHatAI/Qwen2.5-7B-quantized.w8a8", "Qwen2.5-7B"),
        ("mlx-community/Qwen2.5-7B-Instruct-4bit", "Qwen2.5-7B-Instruct"),
        ("hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4", "Meta-Llama-3.1-8B-Instruct"),
        ("x/Qwen3-8B-4bit-AWQ", "Qwen3-8B"),
        ("mlx-community/Qwen3-8B-4bit-DWQ", "Qwen3-8B"),
        ("x/Qwen3-8B-int4-AutoRound", "Qwen3-8B"),
    ],
)
def test_the_repository_that_it_was_made_from_is_named(model, plain):
    text = way_out(model, held_format({"quantization_config": {"quant_method": "awq"}}))
    assert text.endswith(f"such as {plain}")


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": [4]}}}},
        {"quant_method": "awq", "bits": "4" * 5000},
    ],
    ids=["a list", "a huge number"],
)
def test_bits_that_are_no_number_are_unknown(settings):
    assert held_format({"quantization_config": settings}).bits == 0


def test_plain_weights_are_not_held_as_anything():
    assert held_format(LLAMA) is None
    assert held_format({**LLAMA, "text_config": {"hidden_size": 4}}) is None


SMALL = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96},
    **{"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "tie_word_embeddings": False},
}
MODELS = {
    "ERNIE's moe_k": (
        {**SMALL, "model_type": "ernie4_5_moe", "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 16},
        6 / 8,
    ),
    "GLM-4.5": (
        {
            **{**SMALL, "model_type": "glm4_moe", "n_routed_experts": 8, "num_experts_per_tok": 2},
            **{"moe_intermediate_size": 16, "first_k_dense_replace": 1},
        },
        6 / 8,
    ),
    "Nemotron-3's latent experts": (
        {
            **{**SMALL, "model_type": "nemotron_h", "layers_block_type": ["mamba", "moe", "attention", "moe"]},
            **{"num_hidden_layers": 4, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_latent_size": 16},
            **{"moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 40, "mamba_num_heads": 4},
            **{"mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "conv_kernel": 4},
        },
        6 / 8,
    ),
}


def built(config):
    """The model on the meta device, by transformers alone."""
    values = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            transformers.CONFIG_MAPPING[config["model_type"]](**values)
        )


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_active_ones_are_those_of_the_model(name, tmp_path):
    config, idle_share = MODELS[name]
    inspection = peftkit.inspect_model(folder_of(tmp_path, config))
    parameters = dict(built(config).named_parameters())
    assert inspection.num_parameters == sum(tensor.numel() for tensor in parameters.values())
    routed = sum(t.numel() for n, t in parameters.items() if ".experts." in n and "shared" not in n)
    assert routed > 0
    assert inspection.num_active == inspection.num_parameters - round(routed * idle_share)


def test_a_wrapper_s_text_sizes_are_those_of_its_text_part(tmp_path):
    text = {**SMALL, "model_type": "llama4_text", "num_local_experts": 4, "num_experts_per_tok": 1}
    text |= {"intermediate_size_mlp": 64, "moe_layers": [0, 1]}
    config = {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"], "text_config": text}
    inspection = peftkit.inspect_model(folder_of(tmp_path, config))
    assert (inspection.heads, inspection.kv_heads, inspection.head_dim) == (4, 2, 8)
    assert inspection.num_active < inspection.num_parameters


def test_an_indexer_is_not_adapted_and_latent_attention_is_attention(tmp_path):
    config = {
        **{**SMALL, "model_type": "deepseek_v32", "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8},
        **{"qk_nope_head_dim": 8, "v_head_dim": 8, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4},
        **{"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
    }
    inspection = peftkit.inspect_model(folder_of(tmp_path, config))
    assert inspection.attention == "MLA"
    [lora] = [method for method in inspection.methods if method.name == "lora"]
    assert "q_b_proj" in lora.note
    assert "wk" not in lora.note.split(", ")


def test_code_beside_a_model_that_transformers_has_is_not_needed(tmp_path):
    config = {**MODELS["ERNIE's moe_k"][0], "auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    assert peftkit.inspect_model(folder_of(tmp_path, config)).model_type == "ernie4_5_moe"


def test_an_unknown_encoder_decoder_is_one(tmp_path):
    side = {**SMALL, "model_type": "t5_gemma_module", "sliding_window": 16}
    config = {"model_type": "t5gemma", "is_encoder_decoder": True, "encoder": side, "decoder": side, "vocab_size": 96}
    assert peftkit.inspect_model(folder_of(tmp_path, config)).task == "seq2seq"


def test_a_key_that_looks_like_a_size_and_that_no_table_reads_is_told(tmp_path, capsys):
    folder = folder_of(tmp_path, {**LLAMA, "hyper_latent_size": 16})
    [note] = [note for note in peftkit.inspect_model(folder).mind if "hyper_latent_size" in note]
    assert "peftkit plan --trace compares" in note
    assert main(["plan", str(folder), "--length", "64", "--gpu", "8GiB"]) == 0
    assert "hyper_latent_size" in " ".join(capsys.readouterr().out.split())


def test_the_keys_of_known_models_are_read_or_of_no_shape():
    found = {}
    for name, config in [*KNOWN.items(), *((t, json.loads(tiny_config(t).to_json_string())) for t in TINY)]:
        shape = shape_from_config(config)
        if shape is not None and shape.unread_keys:
            found[name] = shape.unread_keys
    assert found == {}
