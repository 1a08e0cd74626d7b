"""Base and tokenizer, loaded as the plan says: safetensors only, one device, no surprises."""

from __future__ import annotations

from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.model.gguf import converted_folder
from peftkit.model.locate import Base
from peftkit.model.quantize import after_loading, quantization_config
from peftkit.plan.plan import BasePlan


def loadable(base: Base, where: str) -> str:
    """What `from_pretrained` takes: a hub id, or a folder (GGUF files are converted first)."""
    if base.kind in {"gguf", "embedded"}:
        return str(converted_folder(base, where))
    return base.id if base.path is None else str(base.path)


def load_tokenizer(source: str, plan: BasePlan) -> Any:
    """The tokenizer. Raises UserError where the base brings none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=plan.revision, trust_remote_code=plan.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(
            Problem(
                f"base {plan.id}", f"no tokenizer ({_first_line(error)})", "a tokenizer beside the weights"
            )
        ) from error
    if tokenizer.eos_token is None:
        raise UserError(
            Problem(
                f"base {plan.id}",
                "a tokenizer without an end token",
                "an end token",
                "without one the model never learns to stop",
            )
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # labels are masked by position, so the end stays learnt
    return tokenizer


def load_model(source: str, plan: BasePlan, *, device: str) -> Any:
    """The base with its weights. Raises UserError where it cannot be loaded."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, told = AutoModelForCausalLM.from_pretrained(
            source,
            output_loading_info=True,
            revision=plan.revision,
            trust_remote_code=plan.trust_remote_code,
            use_safetensors=True,
            dtype=getattr(torch, plan.dtype),
            device_map={"": 0 if device == "cuda" else device},
            quantization_config=quantization_config(plan),
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            Problem(
                f"base {plan.id}",
                f"a model that cannot be loaded ({_first_line(error)})",
                "a causal language model with safetensors weights",
            )
        ) from error
    missing = sorted(told["missing_keys"])
    if missing:
        raise UserError(
            Problem(
                f"base {plan.id}",
                f"weights without {len(missing)} tensors (for example {missing[0]})",
                "all of the model's weights",
                "transformers would start them from random numbers",
            )
        )
    after_loading(model)
    return model


def eos_ids(model: Any, tokenizer: Any) -> list[int]:
    """Token ids that end an answer: the generation config's and the tokenizer's."""
    known = model.generation_config.eos_token_id
    ids = known if isinstance(known, list) else [known] if known is not None else []
    return list(dict.fromkeys([*ids, tokenizer.eos_token_id]))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
