"""From recipe and facts to a plan: a pure function. Each decision carries its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from peftkit.archs import family_of
from peftkit.errors import Problem, UserError
from peftkit.methods import METHODS, Method, TokenRows
from peftkit.methods.lora import LoraOptions
from peftkit.plan.facts import Facts
from peftkit.plan.plan import (
    BasePlan,
    DataPlan,
    Decision,
    EvaluatePlan,
    MethodPlan,
    Plan,
    TrainPlan,
)
from peftkit.plan.targets import resolve_targets, targeted, unmatched
from peftkit.recipe import LoadedRecipe, check

_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_EVALS_PER_RUN = 5


@dataclass
class _Decisions:
    """Collects decisions and problems while the plan is made."""

    loaded: LoadedRecipe
    made: list[Decision] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def keep(self, dotted: str, value: Any, decided: Any = None, reason: str = "") -> Any:
        """Record `value` as written or default; where it is "auto" or None, record `decided` instead."""
        source = self.loaded.source(tuple(dotted.split(".")))
        if (value is None or value == "auto") and decided is not None:
            self.made.append(Decision(dotted, decided, "decided", reason))
            return decided
        self.made.append(Decision(dotted, value, str(source) if source else "default"))
        return value

    def where(self, dotted: str) -> str:
        return self.loaded.where(tuple(dotted.split(".")))

    def refuse(self, dotted: str, got: str, expected: str, fix: str = "") -> None:
        self.problems.append(Problem(self.where(dotted), got, expected, fix))


def _precision(d: _Decisions, facts: Facts, method: Method) -> tuple[str, str | None]:
    """The dtype of the base's weights, and autocast."""
    wanted, device = d.loaded.recipe.train.precision, facts.device
    if wanted == "bf16" and device.kind == "cuda" and not device.supports_bf16:
        d.refuse(
            "train.precision",
            f"bf16 on {device.name}",
            "a precision that the device has",
            "this GPU has no bf16 units: use fp16 or auto",
        )
    if wanted == "fp16" and device.kind != "cuda":
        d.refuse(
            "train.precision", f"fp16 on {device.kind}", "fp32, bf16 or auto", "fp16 training needs a GPU"
        )
    if device.supports_bf16 and device.kind == "cuda":
        best, why = "bf16", f"{device.name} computes bf16 fast, with the range of fp32"
    elif device.kind == "cuda":
        best, why = "fp16", f"{device.name} has no bf16"
    else:
        best, why = "fp32", f"on {device.kind} it is exact and was measured faster than bf16 (docs/design.md)"
    precision = d.keep("train.precision", wanted, best, why)
    autocast = precision if device.kind == "cuda" and precision != "fp32" else None
    if method.trains_base and (wanted == "auto" or precision == "fp16"):
        return "float32", autocast  # small updates vanish in 16-bit weights
    return _TORCH_NAMES[precision], autocast


def _base(d: _Decisions, facts: Facts, method: Method) -> tuple[BasePlan, str | None]:
    recipe = d.loaded.recipe
    d.keep("base.id", recipe.base.id)
    if recipe.base.revision is not None:
        d.keep("base.revision", recipe.base.revision)
    if recipe.base.trust_remote_code:
        d.keep("base.trust_remote_code", True, reason="code that comes with the model will run")
    if method.quantized and not facts.device.has_bitsandbytes:
        d.refuse(
            "method.name",
            "qlora without bitsandbytes",
            "an installed bitsandbytes",
            "pip install 'peftkit[qlora]', or use method lora",
        )
    if method.quantized and facts.device.kind == "mps":
        d.refuse("method.name", "qlora on mps", "a CUDA GPU or a CPU", "use method lora")
    dtype, autocast = _precision(d, facts, method)
    quant = (recipe.method.quant_type, recipe.method.double_quant) if method.quantized else (None, False)  # type: ignore[union-attr]
    return BasePlan(
        id=recipe.base.id,
        kind=facts.model.kind,
        revision=recipe.base.revision,
        trust_remote_code=recipe.base.trust_remote_code,
        dtype=dtype,
        quant_type=quant[0],
        double_quant=quant[1],
        compute_dtype=dtype,
    ), autocast


def _targets(d: _Decisions, facts: Facts, method: Method) -> tuple[str, ...] | str:
    wanted = getattr(d.loaded.recipe.method, "targets", None)
    family = family_of(facts.model.model_type or "")
    if wanted is None:
        return ()
    if wanted == "auto":
        decided, reason = method.default_targets(family)
        if not decided:
            d.refuse("method.targets", "auto", "module names", reason)
        d.keep("method.targets", wanted, decided if isinstance(decided, str) else list(decided), reason)
        return decided
    if family is None:
        if wanted == "all-linear":
            return str(d.keep("method.targets", wanted))
        items = [wanted] if isinstance(wanted, str) else wanted
        if "attention" in items:
            d.refuse(
                "method.targets",
                "attention",
                "module names",
                f"the family {facts.model.model_type!r} is not known here: name its modules",
            )
        d.keep("method.targets", items)
        return tuple(items)
    names, problems = resolve_targets(wanted, family, d.where("method.targets"))
    if facts.model.shape is not None:
        full = [module.name for module in facts.model.shape.modules]
        numbered = [name for name in names if any(part.isdigit() for part in name.split("."))]
        problems += unmatched(full, numbered, d.where("method.targets"))
    d.problems.extend(problems)
    d.keep("method.targets", list(names))
    return names


def _feedforward(d: _Decisions, targets: tuple[str, ...] | str) -> None:
    """IA3 scales inputs only of modules that are targeted; PEFT would drop the others without a word."""
    if isinstance(targets, str):
        return  # all linear layers of an unknown family: proven once the model is loaded
    for name in getattr(d.loaded.recipe.method, "feedforward", None) or ():
        if not any(target == name or target.endswith(f".{name}") for target in targets):
            d.refuse(
                "method.feedforward",
                f"{name!r}, which is not among the targets",
                f"one of {', '.join(targets)}",
                f"add {name} to method.targets",
            )


def _method(d: _Decisions, facts: Facts, method: Method) -> MethodPlan:
    options, shape = d.loaded.recipe.method, facts.model.shape
    targets = _targets(d, facts, method)
    _feedforward(d, targets)
    d.keep("method.name", method.name)
    shown = {"name", "targets", "alpha"}
    for name in type(options).model_fields:
        if name not in shown:
            d.keep(f"method.{name}", getattr(options, name))
    rows: tuple[str, ...] = ()
    if isinstance(options, LoraOptions):
        d.keep("method.alpha", options.alpha, options.scale_alpha, "2 x rank")
        rows = tuple(
            dict.fromkeys(
                token for item in options.also_train if isinstance(item, TokenRows) for token in item.tokens
            )
        )
        if options.also_train and shape is None and any(isinstance(i, str) for i in options.also_train):
            d.refuse(
                "method.also_train",
                "embeddings, head or norms",
                "a known family",
                f"the family {facts.model.model_type!r} is not known here",
            )
    counted = None
    if shape is not None and not d.problems:
        counted = method.count(options, shape, targeted(shape.modules, targets))
    return MethodPlan(
        name=method.name,
        peft=method.peft(options, shape, targets),
        target_modules=targets,
        token_rows=rows,
        lr_ratio=getattr(options, "lr_ratio", None),
        trainable_by_role=counted,
        num_parameters=shape.num_parameters if shape else None,
    )


def _data(d: _Decisions, facts: Facts) -> DataPlan:
    data, train = d.loaded.recipe.data, d.loaded.recipe.train
    shape = facts.model.shape
    d.keep("data.train", data.train)
    d.keep("data.eval", data.eval)
    d.keep("data.columns", dict(data.columns))
    found = facts.data.format if facts.data else None
    kind = d.keep("data.format", data.format, found, "from the columns of the data")
    mask = data.mask
    if kind == "text" and mask != "all" and d.loaded.source(("data", "mask")) and data.format == "auto":
        d.refuse(
            "data.mask", f"{mask} on raw text", "all", "raw text has no completion: every token is learnt"
        )
    if kind == "text" and d.loaded.recipe.evaluate.metric is not None:
        d.refuse("evaluate.metric", "a metric on raw text", "null", "raw text has no answer to compare with")
    if data.eval and facts.data and facts.data.num_eval == 0:
        d.made.append(Decision("data.eval", None, "decided", "too few different rows to hold any out"))
    if kind == "text":
        mask = "all"
        d.made.append(Decision("data.mask", "all", "decided", "raw text: every token is learnt"))
    else:
        d.keep("data.mask", data.mask)
    truncation = d.keep("data.truncation", data.truncation, "drop", "a cut answer teaches to stop early")
    max_length = d.keep("train.max_length", train.max_length)
    if shape is not None and shape.dims.positions and max_length > shape.dims.positions:
        d.refuse(
            "train.max_length",
            str(max_length),
            f"at most {shape.dims.positions}",
            "the model was trained on no more positions",
        )
    return DataPlan(
        train=tuple(data.train),
        eval=data.eval,
        format=str(kind),
        columns=dict(data.columns),
        mask=mask,
        truncation=str(truncation),
        max_length=max_length,
    )


def _batch(d: _Decisions, facts: Facts) -> tuple[int, int]:
    """Examples per step and per forward pass."""
    train = d.loaded.recipe.train
    rows = facts.data.num_train if facts.data else None
    micro_given = train.micro_batch if isinstance(train.micro_batch, int) else 1
    default = 16 if rows is None else max(1, min(16, rows))
    default = max(micro_given, default - default % micro_given)
    batch = d.keep("train.batch_size", train.batch_size, default, "16 examples per step, or all there are")
    micro = d.keep("train.micro_batch", train.micro_batch, 1, "the smallest: no memory model chooses it yet")
    return batch, micro


def _steps(d: _Decisions, facts: Facts, batch: int) -> int | None:
    train = d.loaded.recipe.train
    rows = facts.data.num_train if facts.data else None
    if train.max_steps is not None:
        return int(d.keep("train.max_steps", train.max_steps))
    d.keep("train.epochs", train.epochs)
    if rows is None:
        return None
    steps = max(1, math.ceil(math.ceil(rows / batch) * train.epochs))
    d.made.append(
        Decision(
            "train.max_steps",
            steps,
            "decided",
            f"{train.epochs:g} epochs of {rows} rows in batches of {batch}",
        )
    )
    return steps


def _train(d: _Decisions, facts: Facts, method: Method, autocast: str | None) -> TrainPlan:
    train, shape = d.loaded.recipe.train, facts.model.shape
    rate, why = method.learning_rate(shape.num_parameters if shape else 8_000_000_000)
    batch, micro = _batch(d, facts)
    steps = _steps(d, facts, batch)
    learning_rate = d.keep("train.learning_rate", train.learning_rate, rate, why)
    d.keep("train.schedule.kind", train.schedule.kind)
    d.keep("train.schedule.warmup", train.schedule.warmup)
    on_gpu = facts.device.kind == "cuda"
    plus = getattr(d.loaded.recipe.method, "lr_ratio", None) is not None  # LoRA+ builds a plain AdamW
    optimizer = d.keep(
        "train.optimizer",
        train.optimizer,
        "adamw_torch_fused" if on_gpu and not plus else "adamw_torch",
        "fused on a GPU" if on_gpu and not plus else "plain AdamW",
    )
    if ("bnb" in optimizer or "paged" in optimizer) and not on_gpu:
        d.refuse("train.optimizer", f"{optimizer} on {facts.device.kind}", "auto", "it needs a CUDA GPU")
    if ("bnb" in optimizer or "paged" in optimizer) and not facts.device.has_bitsandbytes:
        d.refuse(
            "train.optimizer",
            f"{optimizer} without bitsandbytes",
            "an installed bitsandbytes",
            "pip install 'peftkit[qlora]', or leave it at auto",
        )
    checkpointing = d.keep(
        "train.gradient_checkpointing",
        train.gradient_checkpointing,
        on_gpu and method.allows_checkpointing,
        "saves activation memory"
        if on_gpu and method.allows_checkpointing
        else "not possible with this method"
        if not method.allows_checkpointing
        else "host memory is ample",
    )
    d.keep("train.max_grad_norm", train.max_grad_norm)
    d.keep("train.weight_decay", train.weight_decay)
    every = max(1, math.ceil((steps or 100) / _EVALS_PER_RUN))
    eval_steps = d.keep(
        "train.eval_steps", train.eval_steps, every, f"{_EVALS_PER_RUN} evaluations in the run"
    )
    saves = d.keep("train.checkpoint_steps", train.checkpoint_steps, eval_steps, "with each evaluation")
    stopping = train.early_stopping
    d.keep("train.early_stopping", stopping.model_dump() if stopping else None)
    return TrainPlan(
        num_steps=steps,
        # the first step of a warm-up has rate 0, so a single step must have none
        num_warmup_steps=min(math.ceil((steps or 0) * train.schedule.warmup), max(0, (steps or 0) - 1)),
        learning_rate=learning_rate,
        schedule=train.schedule.kind,
        max_grad_norm=train.max_grad_norm,
        weight_decay=train.weight_decay,
        optimizer=optimizer,
        batch_size=batch,
        micro_batch=micro,
        accumulation=max(1, batch // micro),
        gradient_checkpointing=checkpointing,
        autocast=autocast,
        eval_steps=eval_steps,
        checkpoint_steps=saves,
        patience=stopping.patience if stopping else None,
        min_delta=stopping.min_delta if stopping else 0.0,
    )


def make_plan(loaded: LoadedRecipe, facts: Facts) -> Plan:
    """Decide everything. Raises UserError with every conflict between recipe, device, model and data."""
    recipe = loaded.recipe
    d = _Decisions(loaded)
    d.problems.extend(check(loaded))
    method = METHODS[recipe.method.name]
    base, autocast = _base(d, facts, method)
    method_plan = _method(d, facts, method)
    data = _data(d, facts)
    train = _train(d, facts, method, autocast)
    for name in ("metric", "max_examples", "max_new_tokens"):
        d.keep(f"evaluate.{name}", getattr(recipe.evaluate, name))
    d.keep("task", recipe.task, "causal-lm", "the only task so far")
    d.keep("seed", recipe.seed)
    if d.problems:
        raise UserError(d.problems)
    return Plan(
        base=base,
        method=method_plan,
        data=data,
        train=train,
        device=facts.device.kind,
        seed=recipe.seed,
        evaluate=EvaluatePlan(
            recipe.evaluate.metric, recipe.evaluate.max_examples, recipe.evaluate.max_new_tokens
        ),
        decisions=tuple(d.made),
    )
