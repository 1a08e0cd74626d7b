"""GGUF bases: converted once to a safetensors folder in the cache, which is complete or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftkit import interrupt
from peftkit.errors import Problem, UserError
from peftkit.model.base.converted import converted_once
from peftkit.model.base.locate import LocatedBase, check_embedded_sha256
from peftkit.rundir import require_free_space, sha256_of, write_json

_CONVERSION_VERSION = 2  # raise when what is written changes, so that older conversions are not reused


def convert_gguf_base(base: LocatedBase, where: str) -> Path:
    """Return the cached safetensors folder of a GGUF base, converting it first if needed.

    Keyed by the file's sha256, so that a changed file is another base. Raises UserError where the file is not
    the pinned one, or has an architecture that transformers cannot read.
    """
    assert base.path is not None
    digest = sha256_of(base.path)
    if base.kind == "embedded":
        check_embedded_sha256(base, where)
    path, place = base.path, f"bases/{base.path.stem}-{digest[:16]}-v{_CONVERSION_VERSION}"
    return converted_once(
        place, lambda folder: _convert_file(path, folder, where), source=str(path), source_sha256=digest
    )


_TOKENIZER_PROBE = "It's 12345 things:\n\n  def f(x):\treturn x  # naïve 你好 🎉 DON'T\r\n"
_HEADER_KEYS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "head_dim": "attention.key_length",
}
_MODEL_TYPES = {"gemma3": "gemma3_text", "gptneox": "gpt_neox"}  # where GGUF's name differs from ours


def read_header_config(path: Path, where: str) -> dict[str, Any]:
    """Read the sizes in a GGUF header as config.json fields, so that a plan needs no conversion.

    Raises UserError for a file that is not GGUF, or without the gguf package.
    """
    try:
        import gguf
    except ImportError:
        raise UserError(_missing_gguf_package(where)) from None
    try:
        reader = gguf.GGUFReader(path)
        architecture = str(reader.fields["general.architecture"].contents())
        tokens = reader.fields["tokenizer.ggml.tokens"]
        names = {tensor.name for tensor in reader.tensors}
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise UserError(Problem(where, f"{path}, which is not a GGUF model ({error})", "a .gguf file")) from None
    sizes = {
        config_key: reader.fields[f"{architecture}.{header_key}"].contents()
        for config_key, header_key in _HEADER_KEYS.items()
        if f"{architecture}.{header_key}" in reader.fields
    }
    return {
        **sizes,
        "model_type": _MODEL_TYPES.get(architecture, architecture),
        "vocab_size": len(tokens.data),
        "tie_word_embeddings": "output.weight" not in names,
    }


def _missing_gguf_package(where: str) -> Problem:
    return Problem(where, "a GGUF base without the gguf package", "an installed gguf", "pip install 'peftkit[gguf]'")


def _convert_file(path: Path, folder: Path, where: str) -> None:
    """Dequantize a GGUF file to bfloat16 and write weights, configuration and tokenizer.

    `save_pretrained` refuses a model that came from GGUF ("quantized with gguf and is not serializable"), so
    the weights are written from the state dict, the configuration without its quantization entry. Raises
    UserError where transformers cannot read the file or cannot save its tokenizer.
    """
    import torch
    from huggingface_hub import save_torch_state_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    except ImportError:
        raise UserError(_missing_gguf_package(where)) from None
    except (ValueError, NotImplementedError, KeyError, TypeError, OSError) as error:
        raise UserError(
            Problem(
                where,
                f"{path.name}, which transformers cannot read ({error})",
                "a GGUF file of a supported architecture",
                "use the model's safetensors folder instead",
            )
        ) from error
    interrupt.stop_if_requested("interrupted while converting the base; nothing is left of it")
    state = model.state_dict()
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    fix = "free disk space, or set PEFTKIT_CACHE to a folder on another disk"
    require_free_space(folder, num_bytes, what="the converted base", fix=fix)
    save_torch_state_dict(state, folder)
    config = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    write_json(folder / "config.json", {**config, "architectures": [type(model).__name__], "dtype": "bfloat16"})
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # AutoTokenizer picks a class by the model type, which may split text otherwise than the GGUF's own
    reloaded = AutoTokenizer.from_pretrained(folder)
    if reloaded(_TOKENIZER_PROBE)["input_ids"] != tokenizer(_TOKENIZER_PROBE)["input_ids"]:
        raise UserError(
            Problem(
                where,
                "a GGUF tokenizer that splits text differently once saved by transformers",
                "the same tokens after saving",
                "use the model's safetensors folder instead",
            )
        )
