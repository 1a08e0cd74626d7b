"""From recipe and facts to a plan: a pure function. Each decision carries its reason."""

from __future__ import annotations

import math
from dataclasses import replace

from peftkit.archs import Family, ModelShape
from peftkit.errors import UserError
from peftkit.methods import METHODS, Method
from peftkit.methods.qlora import QloraOptions
from peftkit.plan.advice import advice
from peftkit.plan.data import data_plan, rope_overrides
from peftkit.plan.decisions import Decisions
from peftkit.plan.diagnosis import diagnose_plan
from peftkit.plan.facts import Facts
from peftkit.plan.fit import Free, choose, longest_batch
from peftkit.plan.memory import closed_form
from peftkit.plan.method import LOW_COVERAGE, coverage, largest_rest, method_plan
from peftkit.plan.packing import Rows, choose_rows, choose_sampling
from peftkit.plan.plan import BasePlan, EvaluatePlan, Plan, TrainPlan
from peftkit.plan.targets import select
from peftkit.plan.task import FORMAT_TASKS, METRICS, metric_of
from peftkit.plan.throughput import kernels_text, missing_kernels
from peftkit.recipe import LoadedRecipe, check

_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_EVALS_PER_RUN = 5


def _precision(d: Decisions, facts: Facts, method: Method) -> tuple[str, str | None]:
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


def _base(d: Decisions, facts: Facts, method: Method) -> tuple[BasePlan, str | None]:
    recipe, shape = d.loaded.recipe, facts.model.shape
    d.keep("base.id", recipe.base.id)
    if recipe.base.revision is not None:
        d.keep("base.revision", recipe.base.revision)
    if recipe.base.trust_remote_code:
        d.keep("base.trust_remote_code", True)
    dtype, autocast = _precision(d, facts, method)
    skip, experts = _four_bit(d, facts, method) if method.quantized else ((), ())
    overrides = {**shape.family.overrides, **rope_overrides(d, shape)}
    missing = missing_kernels(shape)
    if missing:
        d.decide("base.kernels", "plain torch", kernels_text(missing))
    for key, value in shape.family.overrides.items():
        d.decide(f"base.config.{key}", value, next(t for t in shape.family.mind if key in t))
    attention = _attention(d, shape)
    plain = plain_base(
        shape, id=recipe.base.id, kind=facts.model.kind, revision=recipe.base.revision, dtype=dtype
    )
    quantized = recipe.method if isinstance(recipe.method, QloraOptions) else None
    return replace(
        plain,
        trust_remote_code=recipe.base.trust_remote_code,
        quant_type=quantized.quant_type if quantized else None,
        double_quant=bool(quantized and quantized.double_quant),
        labels=facts.data.labels if facts.data else (),
        skip_4bit=skip,
        experts_4bit=experts,
        overrides=overrides,
        attention=attention,
    ), autocast


def _attention(d: Decisions, shape: ModelShape) -> str | None:
    """How attention is computed: fused where transformers can."""
    wanted, family = d.loaded.recipe.base.attention, shape.family
    if family.inferred or not family.has_attention:
        what = "no known family" if family.inferred else f"{family.name}, which has no attention"
        if wanted != "auto":
            d.refuse("base.attention", f"{wanted} for {what}", "auto")
        return None
    best, why = (
        ("sdpa", "fused kernels: the scores of all pairs are never held")
        if family.fused_attention
        else ("eager", f"transformers has no fused attention for {family.name}")
    )
    if wanted == "sdpa" and best != "sdpa":
        d.refuse("base.attention", f"sdpa for {family.name}", "eager or auto", why)
    return str(d.keep("base.attention", wanted, best, why))


def plain_base(shape: ModelShape, *, id: str, kind: str, revision: str | None, dtype: str) -> BasePlan:
    """How a base is loaded as it is: unquantized, with what its family asks for."""
    return BasePlan(
        id=id,
        kind=kind,
        revision=revision,
        trust_remote_code=False,
        dtype=dtype,
        quant_type=None,
        double_quant=False,
        compute_dtype=dtype,
        task=shape.task,
        labels=(),
        inferred=shape.family.inferred,
        head_modules=shape.family.heads[shape.task].modules,
        skip_4bit=(),
        experts_4bit=(),
        overrides=dict(shape.family.overrides),
        attention=None,
    )


def _four_bit(d: Decisions, facts: Facts, method: Method) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(modules kept out of 4-bit, fused experts put into it); says how much of the model 4-bit covers."""
    shape, device = facts.model.shape, facts.device
    if not device.has_bitsandbytes:
        d.refuse(
            "method.name",
            "qlora without bitsandbytes",
            "an installed bitsandbytes",
            "pip install 'peftkit[qlora]', or use method lora",
        )
    if device.kind == "mps":
        d.refuse("method.name", "qlora on mps", "a CUDA GPU or a CPU", "use method lora")
    share = coverage(shape)
    text = "linear layers and fused experts; the rest stays as it is"
    if share < LOW_COVERAGE:
        text = f"little: most of this model is {largest_rest(shape)}, which 4-bit does not hold"
    d.decide("base.in_4bit", f"{100 * share:.1f} %", text)
    head = tuple(tensor.name for tensor in shape.tensors if tensor.role == "head")
    skip = (*shape.family.skip_4bit, *(head or (shape.family.head,)))
    if shape.family.skip_4bit:
        d.decide(
            "base.kept_out_of_4bit", list(skip), "this family reads these weights in a way that 4-bit breaks"
        )
    experts = select([m for m in shape.modules if m.in_experts], shape, as_parameters=True).parameters
    return skip, experts


def _evaluate(d: Decisions, facts: Facts, method: Method) -> EvaluatePlan:
    """The metric, and how answers are generated where the family needs care."""
    wanted, shape = d.loaded.recipe.evaluate, facts.model.shape
    family = shape.family
    metric = d.keep("evaluate.metric", wanted.metric, *metric_of(shape.task))
    if metric in {"auto", "none"}:
        metric = None
    if metric is not None and metric not in METRICS[shape.task]:
        known = ", ".join(METRICS[shape.task])
        d.refuse("evaluate.metric", f"{metric} for {shape.task}", f"one of {known}")
    if metric is not None and facts.data and facts.data.format == "text":
        d.refuse("evaluate.metric", "a metric on raw text", "null", "raw text has no answer to compare with")
    if shape.task in FORMAT_TASKS.values() and d.loaded.source(("evaluate", "max_new_tokens")):
        d.refuse(
            "evaluate.max_new_tokens", f"a length for {shape.task}", "nothing", "a classifier writes nothing"
        )
    for name in ("max_examples", "max_new_tokens"):
        d.keep(f"evaluate.{name}", getattr(wanted, name))
    batch, use_cache = how_to_generate(family, virtual_tokens=method.virtual_tokens)
    if not family.batches_generation:
        d.decide(
            "evaluate.generation_batch", 1, f"cached decoding of several prompts is wrong on {family.name}"
        )
    if not use_cache:
        d.decide("evaluate.use_cache", False, f"PEFT would prepend the prompt at every step on {family.name}")
    return EvaluatePlan(metric, wanted.max_examples, wanted.max_new_tokens, batch, use_cache)


def how_to_generate(family: Family, *, virtual_tokens: bool) -> tuple[int, bool]:
    """(prompts answered at once, whether with a cache) that give right answers."""
    return 20 if family.batches_generation else 1, family.cached_prompts or not virtual_tokens


def _batch(d: Decisions, facts: Facts, method: Method, max_length: int) -> tuple[Rows, int]:
    """The trainer's rows, examples or packs, and how many of them make a forward pass."""
    train = d.loaded.recipe.train
    rows = facts.data.num_train if facts.data else None
    micro_given = train.micro_batch if isinstance(train.micro_batch, int) and train.packing is not True else 1
    default = 16 if rows is None else max(1, min(16, rows))
    default = max(micro_given, default - default % micro_given)
    batch = d.keep("train.batch_size", train.batch_size, default, "16 examples per step, or all there are")
    chosen = choose_rows(d, facts, method, max_length, batch)
    if train.micro_batch == "auto":
        return chosen, 1  # chosen by memory, once everything else is decided
    return chosen, d.keep("train.micro_batch", train.micro_batch)


def _steps(d: Decisions, rows: Rows) -> int | None:
    train = d.loaded.recipe.train
    if train.max_steps is not None:
        return int(d.keep("train.max_steps", train.max_steps))
    d.keep("train.epochs", train.epochs)
    if rows.num is None:
        return None
    steps = max(1, math.ceil(math.ceil(rows.num / rows.batch_size) * train.epochs))
    named = "packs" if rows.packing else "rows"
    reason = f"{train.epochs:g} epochs of {rows.num} {named} in batches of {rows.batch_size}"
    d.decide("train.max_steps", steps, reason)
    return steps


def _checkpointing(d: Decisions) -> str:
    """Which layers forget their activations and work them out again."""
    wanted = d.loaded.recipe.train.gradient_checkpointing
    if wanted != "auto":
        return str(
            d.keep(
                "train.gradient_checkpointing",
                ("full" if wanted else "none") if isinstance(wanted, bool) else wanted,
            )
        )
    return "none"  # chosen by memory, once everything else is decided


def _train(d: Decisions, facts: Facts, method: Method, autocast: str | None, max_length: int) -> TrainPlan:
    train, shape = d.loaded.recipe.train, facts.model.shape
    rate, why = method.learning_rate(shape.num_parameters)
    rows, micro = _batch(d, facts, method, max_length)
    steps = _steps(d, rows)
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
    checkpointing = _checkpointing(d)
    d.keep("train.max_grad_norm", train.max_grad_norm)
    d.keep("train.weight_decay", train.weight_decay)
    every = max(1, math.ceil((steps or 100) / _EVALS_PER_RUN))
    eval_steps = d.keep(
        "train.eval_steps", train.eval_steps, every, f"{_EVALS_PER_RUN} evaluations in the run"
    )
    why = (
        "with each evaluation"
        if eval_steps <= every
        else f"{_EVALS_PER_RUN} in the run, so that a kill loses no more"
    )
    saves = d.keep("train.checkpoint_steps", train.checkpoint_steps, min(eval_steps, every), why)
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
        batch_size=rows.batch_size,
        micro_batch=micro,
        accumulation=max(1, rows.batch_size // micro),
        gradient_checkpointing=checkpointing,
        autocast=autocast,
        eval_steps=eval_steps,
        checkpoint_steps=saves,
        patience=stopping.patience if stopping else None,
        min_delta=stopping.min_delta if stopping else 0.0,
        on_oom=train.on_oom,
        on_spike=train.on_spike,
        packing=rows.packing,
    )


def make_plan(loaded: LoadedRecipe, facts: Facts, *, to_train: bool = True) -> Plan:
    """Decide everything. Raises UserError with every conflict between recipe, device, model and data.

    Without `to_train`, data that nothing can train on yet is planned for as well: to be looked at.
    """
    recipe = loaded.recipe
    d = Decisions(loaded, to_train)
    d.problems.extend(check(loaded))
    method = METHODS[recipe.method.name]
    d.keep("task", recipe.task, facts.model.shape.task, "what this family and this data are for")
    base, autocast = _base(d, facts, method)
    data = data_plan(d, facts)
    train = _train(d, facts, method, autocast, data.max_length)
    evaluate = _evaluate(d, facts, method)
    chosen = method_plan(d, facts.model.shape, train.num_steps)
    d.keep("seed", recipe.seed)
    d.keep("train.on_spike", recipe.train.on_spike)
    d.keep("train.on_oom", recipe.train.on_oom)
    d.keep("devices.price_per_hour", recipe.devices.price_per_hour)
    diagnose = diagnose_plan(d, facts, method, train, evaluate, precision=base.dtype)
    if d.problems:
        raise UserError(d.problems)
    plan = Plan(
        base=base,
        method=chosen,
        data=data,
        train=train,
        device=facts.device.kind,
        seed=recipe.seed,
        evaluate=evaluate,
        diagnose=diagnose,
        decisions=(),
    )
    plan = choose_sampling(d, _settle(d, plan, facts, method), facts)
    batch = longest_batch(plan, facts)
    memory = closed_form(facts.model.shape, plan, batch)
    plan = replace(plan, batch=batch, memory=memory)
    return replace(plan, decisions=(*d.made, *advice(plan, facts)))


def _settle(d: Decisions, plan: Plan, facts: Facts, method: Method) -> Plan:
    """Choose by memory what the recipe leaves open: pieces of a batch, and recomputation."""
    train = d.loaded.recipe.train
    smaller_states = facts.device.kind == "cuda" and facts.device.has_bitsandbytes
    free = Free(
        micro_batch=train.micro_batch == "auto",
        checkpointing=train.gradient_checkpointing == "auto",
        optimizer=train.optimizer == "auto" and smaller_states and plan.method.lr_ratio is None,
    )
    if not (free.micro_batch or free.checkpointing or free.optimizer):
        return plan
    usual = plan.train.optimizer
    plan, why = choose(plan, facts, free, checkpoints=method.allows_checkpointing)
    if free.micro_batch:
        d.keep("train.micro_batch", "auto", plan.train.micro_batch, why)
        named = "packs" if plan.train.packing else "examples"
        times = f"{plan.train.batch_size} {named} in passes of {plan.train.micro_batch}"
        d.decide("train.accumulation", plan.train.accumulation, times)
    if plan.train.optimizer != usual:
        d.revise("train.optimizer", plan.train.optimizer, f"states of {usual} do not fit; {why}")
    if free.checkpointing:
        reason = why if method.allows_checkpointing else "not possible with this method"
        d.keep("train.gradient_checkpointing", "auto", plan.train.gradient_checkpointing, reason)
    return plan
