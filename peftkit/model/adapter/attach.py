"""The adapter: built by PEFT on the loaded base, counted by role, saved so that plain PEFT loads it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.archs import wildcard_name
from peftkit.errors import PeftkitError, Problem, UserError
from peftkit.methods.lora import BASE_CHANGING_INITS
from peftkit.plan.plan import Plan
from peftkit.plan.targets import unmatched_targets
from peftkit.rundir import publish_folder, verify_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def _token_ids(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str]) -> list[int]:
    """Return the sorted ids of `tokens`. Raises UserError for those outside the vocabulary."""
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


PEFT_TASKS = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "multi-label": "SEQ_CLS",
    "classification": "SEQ_CLS",  # what an adapter of this kind is taken for, where its run is gone
    "token-classification": "TOKEN_CLS",
}


def _embedding_name(model: PreTrainedModel) -> str:
    """Return the last part of the input embedding's module name."""
    embedding = model.get_input_embeddings()
    full_name = next(str(name) for name, module in model.named_modules() if module is embedding)
    return full_name.rsplit(".", 1)[-1]


def attach_adapter(
    model: PreTrainedModel,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    eva_batches: Iterable[Mapping[str, Any]] = (),
) -> PreTrainedModel:
    """Wrap the base in the plan's adapter.

    For full fine-tuning the base itself is returned, with every parameter trainable. `eva_batches` are
    tokenized batches for EVA's initialisation, used by no other method. Without a `tokenizer` only shapes
    matter, and no initialisation from data is run. Raises UserError where a target matches no module.
    """
    if plan.method.peft is None:
        model.requires_grad_(True)
        return model
    import peft

    # PEFT silently drops targets that match nothing
    parameters = [name for name, _ in model.named_parameters()]
    modules = [name for name, _ in model.named_modules() if name]
    problems = unmatched_targets(modules, plan.method.target_modules, "method.targets")
    problems += unmatched_targets(parameters, plan.method.target_parameters, "method.targets", what="parameter")
    if problems:
        raise UserError(problems)
    spec = plan.method.peft
    assert spec is not None
    arguments = deepcopy(dict(spec.arguments))  # PEFT writes into lists that it is given
    if plan.method.token_rows:
        tokens = plan.method.token_rows
        # without a tokenizer (to see shapes) any rows stand for them
        ids = list(range(len(tokens))) if tokenizer is None else _token_ids(tokenizer, tokens)
        arguments["trainable_token_indices"] = {_embedding_name(model): ids}
        head = model.get_output_embeddings()
        if plan.base.new_tokens and head is not None and head.weight is not model.get_input_embeddings().weight:
            added = list(plan.base.new_tokens)
            head_ids = list(range(len(added))) if tokenizer is None else _token_ids(tokenizer, added)
            name = next(str(name) for name, module in model.named_modules() if module is head)
            arguments["trainable_token_indices"][name.rsplit(".", 1)[-1]] = head_ids
    if arguments.get("init_lora_weights") == "eva":
        # rho 1 keeps every rank as planned; PEFT's default would move rank between layers
        arguments["eva_config"] = peft.EvaConfig(rho=1.0)
    config = getattr(peft, spec.class_name)(task_type=PEFT_TASKS[plan.base.task], **arguments)
    peft_model = peft.get_peft_model(model, config)
    cast_trainable_to_fp32(peft_model)
    for name, parameter in peft_model.named_parameters():
        if ".ranknum." in name:  # AdaLoRA's counter of ranks: moving it off the CPU, PEFT makes it trainable
            parameter.requires_grad_(False)
    for peft_config in peft_model.peft_config.values():
        peft_config.base_model_name_or_path = plan.base.id
        peft_config.revision = plan.base.revision
    if plan.method.peft.arguments.get("init_lora_weights") == "eva" and tokenizer is not None:
        peft.initialize_lora_eva_weights(peft_model, eva_batches, show_progress_bar=False)
    return peft_model


def with_plain_init(plan: Plan) -> Plan:
    """Return the plan without an initialisation from weights or data; the shapes are the same."""
    spec = plan.method.peft
    if spec is None or "init_lora_weights" not in spec.arguments:
        return plan
    plain_spec = replace(spec, arguments={**spec.arguments, "init_lora_weights": True})
    return replace(plan, method=replace(plan.method, peft=plain_spec))


def cast_trainable_to_fp32(model: PreTrainedModel) -> None:
    """Cast trainable parameters to fp32, in place: small updates vanish in 16-bit weights."""
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def checkpointing_arguments(plan: Plan) -> dict[str, Any]:
    """Return `activation_checkpointing_enable`'s arguments: every layer, or every second if selective."""
    every_n_layers = 2 if plan.train.gradient_checkpointing == "selective" else 1
    return {"activation_checkpointing_kwargs": {"use_reentrant": False}, "every_n_layers": every_n_layers}


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Count (trainable, total) parameters as PEFT does: a 4-bit weight counts its unquantized numbers."""
    if hasattr(model, "get_nb_trainable_parameters"):
        trainable, total = model.get_nb_trainable_parameters()
        return int(trainable), int(total)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters())


def trainable_by_role(model: PreTrainedModel, plan: Plan) -> dict[str, int]:
    """Count trainable parameters by module role, in model order."""
    counts: dict[str, int] = {}
    head = next(
        (module_name for module_name, module in model.named_modules() if module is model.get_output_embeddings()), ""
    )
    table = _embedding_name(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            role = _role(name, plan, table=table, head=head.rsplit(".", 1)[-1])
            counts[role] = counts.get(role, 0) + parameter.numel()
    return counts


def _role(name: str, plan: Plan, *, table: str, head: str) -> str:
    """Return the role of a trainable tensor, derived from its name."""
    place = wildcard_name(f".{name}.")
    named_role = next((role for module, role in plan.method.roles.items() if f".{module}." in place), None)
    if named_role is not None:
        return f"{named_role}, whole" if ".modules_to_save." in name else named_role
    if plan.method.peft is None:
        return "the rest"
    if ".lora_" in name and plan.method.target_parameters:
        # PEFT nests its wrappers of several parameters of one module: the outermost is the last one named
        inner = place.count(".base_layer.")
        experts = [role for module, role in plan.method.roles.items() if role.startswith("experts")]
        return experts[-1 - inner] if inner < len(experts) else experts[0]
    parts = set(name.split("."))
    if "trainable_tokens" in name:
        return "tokens"
    if "prompt_encoder" in parts:
        return "projection" if "transform" in parts else plan.method.name
    if head in parts or any(f".{module}." in f".{name}" for module in plan.base.head_modules):
        return "head"
    return "embeddings" if table in parts else "norms"


def trainable_tensors(model: PreTrainedModel) -> dict[str, Any]:
    """Return the trainable parameters by name, in model order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def modules_by_storage(model: PreTrainedModel) -> list[list[str]]:
    """Group the names of adapted modules by the storage of their base weight; a group of two is a tie."""
    groups: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if name.endswith("token_adapter"):
            continue  # rows of a tied table: PEFT keeps the tie, and merging is exact
        base = getattr(module, "base_layer", None)
        weight = getattr(base, "weight", None)
        if weight is not None and not hasattr(base, "base_layer") and weight.device.type != "meta":
            groups.setdefault(weight.data_ptr(), []).append(name)
    return list(groups.values())


def non_finite_tensors(model: PreTrainedModel) -> list[str]:
    """Return the names of trainable tensors that contain NaN or infinity."""
    return [name for name, tensor in trainable_tensors(model).items() if not bool(tensor.isfinite().all())]


def save_initial_adapter(model: PreTrainedModel, plan: Plan, folder: Path, *, overwrite: bool) -> None:
    """Save the adapter's initial weights, for methods that subtract them from the base (PiSSA, OLoRA).

    A damaged copy is replaced; with `overwrite` any, because a newly attached adapter is the initial one.
    """
    if not needs_initial_adapter(plan):
        return
    if folder.exists() and (overwrite or verify_folder(folder)):
        folder.replace(tempfile.mkdtemp(dir=folder.parent, prefix=f"left-{folder.name}-"))
    if not folder.exists():
        # PEFT's recipe: the start is saved as an ordinary LoRA, to be subtracted at the end
        model.peft_config["default"].init_lora_weights = True
        with publish_folder(folder) as staging:
            model.save_pretrained(staging, safe_serialization=True)
        model.peft_config["default"].init_lora_weights = plan.method.peft.arguments["init_lora_weights"]  # type: ignore[union-attr]


def needs_initial_adapter(plan: Plan) -> bool:
    """Return whether the initialisation changes the base, so that the initial weights are needed."""
    spec = plan.method.peft
    return spec is not None and spec.arguments.get("init_lora_weights") in BASE_CHANGING_INITS


def save_trained(
    model: PreTrainedModel, plan: Plan, tokenizer: PreTrainedTokenizerBase, folder: Path, *, initial_adapter: Path
) -> None:
    """Save the trained PEFT adapter, or the whole model after full fine-tuning, with the tokenizer.

    PiSSA and OLoRA adapters are converted to plain LoRA of twice the rank on the original base.
    Raises PeftkitError where the saved initial adapter is damaged.
    """
    arguments: dict[str, Any] = {"save_embedding_layers": True} if plan.base.new_tokens else {}
    if needs_initial_adapter(plan):
        if faults := verify_folder(initial_adapter):
            raise PeftkitError(f"the saved initial adapter is damaged: {'; '.join(faults)}")
        arguments["path_initial_model_for_weight_conversion"] = str(initial_adapter)
    model.save_pretrained(folder, safe_serialization=True, **arguments)
    tokenizer.save_pretrained(folder)
    card = folder / "README.md"
    card.unlink(missing_ok=True)  # PEFT's template of a card: placeholders that say nothing of this run


def build_loraplus_optimizer(model: PreTrainedModel, plan: Plan) -> torch.optim.Optimizer:
    """Build AdamW with LoRA+'s larger learning rate for B (Hayou et al. 2024), by PEFT's own builder."""
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
