"""The adapter: built by PEFT on the loaded base, counted by role, saved so that plain PEFT loads it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftkit.archs import place_of
from peftkit.errors import PeftkitError, Problem, UserError
from peftkit.methods.lora import CHANGES_BASE
from peftkit.plan.plan import MethodPlan, Plan
from peftkit.plan.targets import unmatched
from peftkit.rundir import publish_folder, verify_folder


def _token_ids(tokenizer: Any, tokens: Iterable[str]) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in tokens if token not in vocabulary]
    if missing:
        raise UserError(
            [
                Problem(
                    "method.also_train tokens",
                    repr(token),
                    "a token of the vocabulary",
                    f"it reads as {tokenizer.tokenize(token)}",
                )
                for token in missing
            ]
        )
    return sorted(vocabulary[token] for token in tokens)


def _check_targets(model: Any, method: MethodPlan) -> None:
    """Every named target must match a module of the real model: PEFT drops those that match nothing."""
    parameters = [name for name, _ in model.named_parameters()]
    modules = [name for name, _ in model.named_modules() if name]
    problems = unmatched(modules, method.target_modules, "method.targets")
    problems += unmatched(parameters, method.target_parameters, "method.targets", what="parameter")
    if problems:
        raise UserError(problems)


PEFT_TASKS = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
}


def _peft_config(model: Any, plan: Plan, tokenizer: Any) -> Any:
    import peft

    spec = plan.method.peft
    assert spec is not None
    arguments = deepcopy(dict(spec.arguments))  # PEFT writes into lists that it is given
    if plan.method.token_rows:
        rows = plan.method.token_rows
        # without a tokenizer (to see shapes) any rows stand for them
        ids = list(range(len(rows))) if tokenizer is None else _token_ids(tokenizer, rows)
        arguments["trainable_token_indices"] = {_embedding_name(model): ids}
    if arguments.get("init_lora_weights") == "eva":
        # rho 1 keeps every rank as planned; PEFT's default would move rank between layers
        arguments["eva_config"] = peft.EvaConfig(rho=1.0)
    return getattr(peft, spec.class_name)(task_type=PEFT_TASKS[plan.base.task], **arguments)


def _embedding_name(model: Any) -> str:
    embedding = model.get_input_embeddings()
    full = next(str(name) for name, module in model.named_modules() if module is embedding)
    return full.rsplit(".", 1)[-1]


def attach(model: Any, plan: Plan, tokenizer: Any, *, eva_batches: Iterable[Mapping[str, Any]] = ()) -> Any:
    """Wrap the base as the plan says; the base itself for full fine-tuning.

    `eva_batches` are tokenized batches for EVA's initialisation, used by no other method. Without a
    `tokenizer` the model has shapes only, and nothing is initialised by data.
    Raises UserError where a target matches no module.
    """
    if plan.method.peft is None:
        model.requires_grad_(True)
        return model
    import peft

    _check_targets(model, plan.method)
    config = _peft_config(model, plan, tokenizer)
    wrapped = peft.get_peft_model(model, config)
    in_fp32(wrapped)
    for name, parameter in wrapped.named_parameters():
        if ".ranknum." in name:  # AdaLoRA's counter of ranks: moving it off the CPU, PEFT makes it trainable
            parameter.requires_grad_(False)
    for active in wrapped.peft_config.values():
        active.base_model_name_or_path = plan.base.id
        active.revision = plan.base.revision
    if plan.method.peft.arguments.get("init_lora_weights") == "eva" and tokenizer is not None:
        peft.initialize_lora_eva_weights(wrapped, eva_batches, show_progress_bar=False)
    return wrapped


def plain_start(plan: Plan) -> Plan:
    """The plan without an initialisation that looks at weights or data: the shapes are the same."""
    spec = plan.method.peft
    if spec is None or "init_lora_weights" not in spec.arguments:
        return plan
    plain = replace(spec, arguments={**spec.arguments, "init_lora_weights": True})
    return replace(plan, method=replace(plan.method, peft=plain))


def in_fp32(model: Any) -> None:
    """Hold what is trained in fp32: small updates vanish in 16-bit weights."""
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def checkpointing(plan: Plan) -> dict[str, Any]:
    """Arguments of transformers' `activation_checkpointing_enable`: every layer, or every second."""
    every = 2 if plan.train.gradient_checkpointing == "selective" else 1
    return {"activation_checkpointing_kwargs": {"use_reentrant": False}, "every_n_layers": every}


def count_parameters(model: Any) -> tuple[int, int]:
    """(trainable, total), as PEFT counts: 4-bit weights as the numbers that they stand for."""
    if hasattr(model, "get_nb_trainable_parameters"):
        trainable, total = model.get_nb_trainable_parameters()
        return int(trainable), int(total)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters())


def trainable_by_role(model: Any, plan: Plan) -> dict[str, int]:
    """Counted trainable parameters by module role, in model order."""
    counts: dict[str, int] = {}
    head = next((n for n, m in model.named_modules() if m is model.get_output_embeddings()), "")
    table = _embedding_name(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            role = _role(name, plan, table=table, head=head.rsplit(".", 1)[-1])
            counts[role] = counts.get(role, 0) + parameter.numel()
    return counts


def _role(name: str, plan: Plan, *, table: str, head: str) -> str:
    """The role of a trained tensor, by its name."""
    place = place_of(f".{name}.")
    found = next((role for module, role in plan.method.roles.items() if f".{module}." in place), None)
    if found is not None:
        return found
    if plan.method.peft is None:
        return "the rest"
    if ".lora_" in name and plan.method.target_parameters:
        return _expert_role(place, plan)
    parts = set(name.split("."))
    if "trainable_tokens" in name:
        return "tokens"
    if "prompt_encoder" in parts:
        return "projection" if "transform" in parts else plan.method.name
    if head in parts or any(f".{module}." in f".{name}" for module in plan.base.head_modules):
        return "head"
    return "embeddings" if table in parts else "norms"


def _expert_role(place: str, plan: Plan) -> str:
    """PEFT nests its wrappers of several parameters of one module: the outermost is the last one named."""
    inner = place.count(".base_layer.")
    experts = [role for module, role in plan.method.roles.items() if role.startswith("experts")]
    return experts[-1 - inner] if inner < len(experts) else experts[0]


def trainable_tensors(model: Any) -> dict[str, Any]:
    """Name -> parameter, for all that is trained, in model order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def wrapped_storages(model: Any) -> list[list[str]]:
    """Names of adapted modules, grouped by the storage of the weight behind them."""
    groups: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if name.endswith("token_adapter"):
            continue  # rows of a tied table: PEFT keeps the tie, and merging is exact
        base = getattr(module, "base_layer", None)
        weight = getattr(base, "weight", None)
        if weight is not None and not hasattr(base, "base_layer") and weight.device.type != "meta":
            groups.setdefault(weight.data_ptr(), []).append(name)
    return list(groups.values())


def non_finite(model: Any) -> list[str]:
    """Names of trained tensors that hold NaN or infinity."""
    return [name for name, tensor in trainable_tensors(model).items() if not bool(tensor.isfinite().all())]


def save_start(model: Any, plan: Plan, folder: Path, *, afresh: bool) -> None:
    """Keep the adapter's start for methods that subtract it from the base (PiSSA, OLoRA).

    One that is not whole is made again, and with `afresh` any: an adapter that is attached anew is the start.
    """
    if not needs_start(plan):
        return
    if folder.exists() and (afresh or verify_folder(folder)):
        folder.replace(tempfile.mkdtemp(dir=folder.parent, prefix=f"left-{folder.name}-"))
    if not folder.exists():
        # PEFT's recipe: the start is saved as an ordinary LoRA, to be subtracted at the end
        model.peft_config["default"].init_lora_weights = True
        with publish_folder(folder) as staging:
            model.save_pretrained(staging, safe_serialization=True)
        model.peft_config["default"].init_lora_weights = plan.method.peft.arguments["init_lora_weights"]  # type: ignore[union-attr]


def needs_start(plan: Plan) -> bool:
    """Whether the adapter only makes sense beside its start."""
    spec = plan.method.peft
    return spec is not None and spec.arguments.get("init_lora_weights") in CHANGES_BASE


def save_result(model: Any, plan: Plan, tokenizer: Any, folder: Path, *, start: Path) -> None:
    """Write what was trained: a PEFT adapter with its tokenizer, or the whole model after full fine-tuning.

    PiSSA and OLoRA adapters are converted to plain LoRA of twice the rank on the untouched base.
    """
    arguments: dict[str, Any] = {}
    if needs_start(plan):
        if faults := verify_folder(start):
            raise PeftkitError(f"what is to be subtracted is not whole: {'; '.join(faults)}")
        arguments["path_initial_model_for_weight_conversion"] = str(start)
    model.save_pretrained(folder, safe_serialization=True, **arguments)
    tokenizer.save_pretrained(folder)
    card = folder / "README.md"
    card.unlink(missing_ok=True)  # PEFT's template of a card: placeholders that say nothing of this run


def build_loraplus_optimizer(model: Any, plan: Plan) -> Any:
    """AdamW with LoRA+'s larger rate for B (Hayou et al. 2024), by PEFT's own builder."""
    import torch
    from peft.optimizers import create_loraplus_optimizer

    assert plan.method.lr_ratio is not None
    return create_loraplus_optimizer(
        model=model,
        optimizer_cls=torch.optim.AdamW,
        lr=plan.train.learning_rate,
        loraplus_lr_ratio=plan.method.lr_ratio,
        loraplus_lr_embedding=plan.train.learning_rate,
        loraplus_weight_decay=plan.train.weight_decay,
    )
