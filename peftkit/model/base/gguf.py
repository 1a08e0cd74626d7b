"""A GGUF file as a folder of safetensors: converted once, kept in the cache, complete or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftkit import interrupt
from peftkit.errors import Problem, UserError
from peftkit.hub import cache_folder
from peftkit.model.base.locate import Base, check_pin
from peftkit.rundir import publish_folder, refuse_without_room, sha256_of, verify_folder, write_json

_FORMAT = 2  # raise when what is written changes, so that older conversions are not reused


def converted_folder(base: Base, where: str) -> Path:
    """The converted base, made now if it is not there yet.

    Keyed by the file's sha256, so that a changed file is another base. Raises UserError where the file is
    not the pinned one, or is of an architecture that transformers cannot read.
    """
    assert base.path is not None
    digest = sha256_of(base.path)
    if base.kind == "embedded":
        check_pin(base, where)
    folder = cache_folder() / "bases" / f"{base.path.stem}-{digest[:16]}-v{_FORMAT}"
    if not verify_folder(folder, hashes=False):
        return folder
    if folder.exists():
        raise UserError(
            Problem(
                str(folder),
                "; ".join(verify_folder(folder, hashes=False)),
                "a whole conversion",
                "remove this folder: it is made again from the GGUF file",
            )
        )
    try:
        with publish_folder(folder, source=str(base.path), source_sha256=digest) as staging:
            _convert(base.path, staging, where)
            interrupt.stop_if_requested("interrupted while converting the base; nothing is left of it")
    except OSError:
        if verify_folder(folder, hashes=False):
            raise
        # another process was faster: its conversion of the same bytes is as good
    return folder


_PROBE = "It's 12345 things:\n\n  def f(x):\treturn x  # naïve 你好 🎉 DON'T\r\n"
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


def header_config(path: Path, where: str) -> dict[str, Any]:
    """The sizes in a GGUF header under the names of config.json, so that a plan needs no conversion."""
    try:
        import gguf
    except ImportError:
        raise UserError(_no_gguf(where)) from None
    try:
        reader = gguf.GGUFReader(path)
        architecture = str(reader.fields["general.architecture"].contents())
        tokens = reader.fields["tokenizer.ggml.tokens"]
        names = {tensor.name for tensor in reader.tensors}
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise UserError(
            Problem(where, f"{path}, which is not a GGUF model ({error})", "a .gguf file")
        ) from None
    found = {
        ours: reader.fields[f"{architecture}.{theirs}"].contents()
        for ours, theirs in _HEADER_KEYS.items()
        if f"{architecture}.{theirs}" in reader.fields
    }
    return {
        **found,
        "model_type": _MODEL_TYPES.get(architecture, architecture),
        "vocab_size": len(tokens.data),
        "tie_word_embeddings": "output.weight" not in names,
    }


def _no_gguf(where: str) -> Problem:
    return Problem(
        where, "a GGUF base without the gguf package", "an installed gguf", "pip install 'peftkit[gguf]'"
    )


def _convert(path: Path, folder: Path, where: str) -> None:
    """Dequantise to bfloat16 and write weights, configuration and tokenizer.

    `save_pretrained` refuses a model that came from GGUF ("quantized with gguf and is not serializable"),
    so the weights are written from the state dict and the configuration without its quantization entry.
    """
    import torch
    from huggingface_hub import save_torch_state_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
    except ImportError:
        raise UserError(_no_gguf(where)) from None
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
    fix = "make room, or set PEFTKIT_CACHE to a folder on another disk"
    refuse_without_room(folder, num_bytes, what="the converted base", fix=fix)
    save_torch_state_dict(state, folder)
    config = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    write_json(
        folder / "config.json", {**config, "architectures": [type(model).__name__], "dtype": "bfloat16"}
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _check_tokenizer(tokenizer, folder, where)


def _check_tokenizer(tokenizer: Any, folder: Path, where: str) -> None:
    """The saved tokenizer must cut text as the GGUF's: transformers picks its class by the model type."""
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(folder)
    if saved(_PROBE)["input_ids"] != tokenizer(_PROBE)["input_ids"]:
        raise UserError(
            Problem(
                where,
                "a GGUF tokenizer that transformers reloads with other rules",
                "tokens that survive saving",
                "use the model's safetensors folder instead",
            )
        )
