"""Adapters of every kind on tiny bases, made by PEFT itself, with an effect that shows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONV = ["c_attn", "c_proj", "c_fc"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
PATTERNS = {
    "use_rslora": True,
    "rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 2},
    "alpha_pattern": {"v_proj": 3},
}
IA3 = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}


@dataclass(frozen=True)
class Flavour:
    """PEFT's configuration by class and arguments, on a family; `peft_is_wrong` where its own merge is."""

    model_type: str
    arguments: dict[str, Any]
    class_name: str = "LoraConfig"
    base: dict[str, Any] | None = None
    task: str = "causal-lm"
    peft_is_wrong: bool = False
    unties: bool = False


def _lora(model_type: str = "llama", targets: list[str] = LINEAR, **more: Any) -> Flavour:
    own = {key: more.pop(key) for key in ("base", "task", "peft_is_wrong", "unties") if key in more}
    return Flavour(model_type, {"r": 4, "target_modules": targets, **more}, **own)


TIED = {"tie_word_embeddings": True}
FLAVOURS = {
    "lora": _lora(),
    "rslora with patterns": _lora(**PATTERNS),
    "dora": _lora(use_dora=True),
    "lora with bias": _lora("qwen2", ["q_proj", "v_proj"], lora_bias=True),
    "lora of phi": _lora("phi", ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]),
    "lora of neox": _lora("gpt_neox", ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
    "lora of falcon": _lora("falcon", ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
    "lora of bloom": _lora("bloom", ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
    "lora of gemma": _lora("gemma", LINEAR),
    "lora of mamba": _lora("mamba", ["in_proj", "x_proj"]),
    "lora of t5": _lora("t5", ["q", "v", "wi", "wo"], task="seq2seq"),
    "lora of gpt2": _lora("gpt2", CONV, fan_in_fan_out=True),
    "dora of gpt2": _lora("gpt2", CONV, fan_in_fan_out=True, use_dora=True),
    "head and embeddings whole": _lora(modules_to_save=["lm_head", "embed_tokens"]),
    "norms whole": _lora(targets=["q_proj"], modules_to_save=["norm", "input_layernorm"]),
    "embeddings": _lora(targets=["q_proj", "embed_tokens"], base={"tie_word_embeddings": False}),
    "embeddings, tied": _lora(targets=["q_proj", "embed_tokens"], base=TIED, peft_is_wrong=True, unties=True),
    "head, tied": _lora(targets=["q_proj", "lm_head"], base=TIED, peft_is_wrong=True, unties=True),
    "embeddings, kept tied": _lora(
        targets=["q_proj", "embed_tokens"], base=TIED, peft_is_wrong=True, ensure_weight_tying=True
    ),
    "embeddings whole, tied": _lora(targets=["q_proj"], modules_to_save=["embed_tokens"], base=TIED, unties=True),
    "embeddings whole, kept tied": _lora(
        targets=["q_proj"], modules_to_save=["embed_tokens"], base=TIED, ensure_weight_tying=True
    ),
    "head whole, tied": _lora(targets=["q_proj"], modules_to_save=["lm_head"], base=TIED, unties=True),
    "rows of tokens": _lora(
        targets=["q_proj"], trainable_token_indices={"embed_tokens": [3, 7]}, base={"tie_word_embeddings": False}
    ),
    "rows of tokens, tied": _lora(targets=["q_proj"], trainable_token_indices={"embed_tokens": [3, 7]}, base=TIED),
    "experts of qwen3": _lora("qwen3_moe", ["q_proj"], target_parameters=EXPERTS),
    "experts of mixtral": _lora("mixtral", ["q_proj"], target_parameters=EXPERTS),
    "ia3": Flavour("llama", IA3, "IA3Config"),
    "ia3 with bias": Flavour("qwen2", IA3, "IA3Config"),
    "ia3 of gpt2": Flavour(
        "gpt2",
        {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"], "fan_in_fan_out": True},
        "IA3Config",
    ),
    "norms tuned": Flavour("llama", {"target_modules": ["norm", "input_layernorm"]}, "LNTuningConfig"),
    "adalora": Flavour(
        "llama",
        {"target_modules": LINEAR, "init_r": 4, "target_r": 2, "total_step": 9, "tinit": 1, "tfinal": 1},
        "AdaLoraConfig",
    ),
    "vera": Flavour("llama", {"target_modules": LINEAR, "r": 8}, "VeraConfig"),
}
_TASKS = {"causal-lm": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}


def make(flavour: Flavour, folder: Path, dtype: str = "float32") -> tuple[Path, Path]:
    """(base, adapter) as folders."""
    import peft
    import torch

    from tests.rigs.tiny import tiny_model

    torch.manual_seed(0)
    model = tiny_model(flavour.model_type, flavour.task, **(flavour.base or {}))
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder / "base")
    config = getattr(peft, flavour.class_name)(task_type=_TASKS[flavour.task], **flavour.arguments)
    wrapped = peft.get_peft_model(model, config)
    stir(wrapped)
    wrapped.peft_config["default"].base_model_name_or_path = str(folder / "base")
    wrapped.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def stir(wrapped: Any, size: float = 0.05) -> None:
    """Move everything that is trained, in place: PEFT ties some by sharing memory."""
    import torch

    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and ".ranknum." not in name:
                parameter.add_(size * torch.randn(parameter.shape))


def base_plan(folder: Path, dtype: str = "float32", task: str = "causal-lm") -> Any:
    """How the base is held, unquantized."""
    from peftkit.archs import shape_from_config
    from peftkit.plan.resolve import unquantized_base

    shape = shape_from_config(json.loads((folder / "config.json").read_text()), task=task)
    assert shape is not None
    return unquantized_base(shape, id=str(folder), kind="folder", revision=None, dtype=dtype)


def merge(base: Path, adapter: Path, out: Path, plan: Any, **how: Any) -> Any:
    """Write the merged model into `out`. Returns the plan of the merge."""
    from peftkit.model.adapter.edits import read_edits
    from peftkit.model.meta.skeleton import meta_model, read_base_layout
    from peftkit.ship.files.tensors import read_all_entries, safetensors_files
    from peftkit.ship.merge.combine import Combination
    from peftkit.ship.merge.plan import plan_merge
    from peftkit.ship.merge.write import MergeSources, write_merged

    weights = read_all_entries(safetensors_files(base))
    tensors = read_all_entries([adapter / "adapter_model.safetensors"])
    bones = read_base_layout(str(base), plan, base, weights)
    edits = read_edits(meta_model(str(base), plan), adapter, {name: e.shape for name, e in tensors.items()})
    made = plan_merge(weights, bones, [(edits, tensors)], **how)
    out.mkdir()
    write_merged(made, MergeSources(plan, [tensors], Combination()), out, progress=lambda done, total: None)
    return made


def inputs(model: Any, task: str) -> dict[str, Any]:
    """Some tokens."""
    import torch

    ids = torch.randint(0, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :5]} if task == "seq2seq" else {})}


def load(folder: Path, task: str, dtype: str = "float32") -> Any:
    """A model as anybody would load it."""
    import torch
    import transformers

    from peftkit.model.base.unknown_family import AUTO_CLASSES

    auto = getattr(transformers, AUTO_CLASSES[task])
    return auto.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def load_adapted(base: Path, adapter: Path, task: str, dtype: str = "float32") -> Any:
    """A base with its adapter, in plain PEFT."""
    import peft

    return peft.PeftModel.from_pretrained(load(base, task, dtype), adapter).eval()
