"""What is refused of a model, by name and before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from peftkit.errors import UserError
from peftkit.ship.export.gguf import FAMILIES, check_exportable
from peftkit.ship.export.gguf.rope import llama3_factors
from peftkit.ship.export.gguf.source import context_length, read_source
from tests.rigs.tiny import TINY, tiny_config
from tests.ship.export.gguf.models import VOCAB, byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def saved(folder: Path, model_type: str, **changes: Any) -> Path:
    """A folder with a configuration alone: what is refused needs no weights."""
    tiny_config(model_type, **{"vocab_size": VOCAB, **changes}).save_pretrained(folder)
    return folder


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        check_exportable(folder, **{"dtype": "f16", "pre": None, **options})
    return str(error.value)


SCALED = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}
REFUSED = {
    "rope": ("llama", {"rope_parameters": SCALED}, "rope_type dynamic"),
    "rope attention factor": ("qwen2", {"rope_parameters": {**YARN, "attention_factor": 2.0}}, "attention_factor 2.0"),
    "yarn of gemma": ("gemma", {"rope_parameters": YARN}, "rope_type yarn"),
    "partial rotary": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor 0.5",
    ),
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act gelu"),
    "gpt2 activation": ("gpt2", {"activation_function": "relu"}, "activation_function relu"),
    "gpt2 scaling": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    "qwen3 bias": ("qwen3", {"attention_bias": True}, "attention_bias True"),
    "gemma2 scalar": ("gemma2", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar 100"),
    "gemma2 layers": (
        "gemma2",
        {"query_pre_attn_scalar": 16, "layer_types": ["full_attention", "sliding_attention"]},
        "other layer_types",
    ),
    "gemma3 local rope": (
        "gemma3_text",
        {
            "query_pre_attn_scalar": 16,
            "rope_parameters": {"full_attention": LOCAL, "sliding_attention": {**LOCAL, "rope_theta": 5e4}},
        },
        "sliding layers with rope",
    ),
    "gemma untied": ("gemma", {"tie_word_embeddings": False}, "tie_word_embeddings false"),
    "quantized": (
        "llama",
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "quantization_config",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_llama_cpp_computes_differently_is_refused(name: str, tmp_path: Path, tokenizer: Any) -> None:
    model_type, changes, told = REFUSED[name]
    tokenizer.save_pretrained(saved(tmp_path, model_type, **changes))
    said = refusal(tmp_path)
    assert told in said
    assert f"python convert_hf_to_gguf.py {tmp_path} --outfile OUT --outtype f16" in said


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "falcon", "mamba", "cohere2", "gpt_oss"])
def test_other_families_are_refused_by_name(model_type: str, tmp_path: Path) -> None:
    assert f"model_type {model_type}" in refusal(saved(tmp_path, model_type))


def test_longrope_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 64,
    }
    tokenizer.save_pretrained(saved(tmp_path, "phi3", rope_parameters=rope))
    assert "rope_type longrope" in refusal(tmp_path)


def test_all_reasons_come_at_once(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", -1.0)])), eos_token="a")
    unigram.save_pretrained(saved(tmp_path, "llama", hidden_act="gelu", rope_parameters=SCALED))
    said = refusal(tmp_path, dtype="q3_k")
    for part in ("hidden_act gelu", "rope_type dynamic", "did you mean q3", "a Unigram tokenizer"):
        assert part in said


def test_a_missing_tokenizer_is_told(tmp_path: Path) -> None:
    assert "tokenizer" in refusal(saved(tmp_path, "llama"))


def test_a_damaged_tokenizer_is_told(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(saved(tmp_path, "llama"))
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {}}')
    assert "no tokenizer that transformers loads" in refusal(tmp_path)


def test_a_folder_that_is_none_is_told(tmp_path: Path) -> None:
    said = refusal(tmp_path / "nowhere")
    assert "config.json: got no such file" in said
    assert "no tokenizer" in said


def test_a_configuration_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": "many"}))
    assert "refuses" in refusal(tmp_path)


def test_every_row_names_a_family_that_the_tests_know() -> None:
    names = [name for family in FAMILIES for name in family.model_types]
    assert len(names) == len(set(names))
    assert set(names) <= set(TINY)


def test_what_config_json_leaves_out_is_what_transformers_computes(tmp_path: Path) -> None:
    """Published files leave out head_dim, heads of keys, GPT-2's inner size."""
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 8})
    )
    config = read_source(tmp_path).config
    assert (config["head_dim"], config["num_key_value_heads"]) == (16, 4)
    assert AutoConfig.from_pretrained(tmp_path).rms_norm_eps == config["rms_norm_eps"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 8, "n_head": 2, "vocab_size": 8}))
    assert read_source(tmp_path).config["n_inner"] == 32


@pytest.mark.parametrize(
    ("model_type", "changes", "context"),
    [
        ("llama", {}, 128),
        ("mistral", {"sliding_window": 32}, 32),
        ("mistral", {"sliding_window": 4096}, 128),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": False}, 128),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 0}, 32),
        ("gemma3_text", {"sliding_window": 16, "query_pre_attn_scalar": 16}, 128),
        ("gpt2", {}, 128),
    ],
)
def test_the_context_ends_where_the_two_differ(
    model_type: str, changes: dict[str, Any], context: int, tmp_path: Path
) -> None:
    assert context_length(read_source(saved(tmp_path, model_type, **changes))) == context


def test_factors_of_llama3_are_transformers_own(tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = tiny_config("llama", rope_parameters=rope, head_dim=128)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = [5e5 ** (-2 * pair / 128) for pair in range(64)]
    ours = [frequency / factor for frequency, factor in zip(plain, llama3_factors(rope, 128), strict=True)]
    assert ours == pytest.approx(theirs.tolist(), rel=1e-6)
