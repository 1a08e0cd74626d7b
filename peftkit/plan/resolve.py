"""From recipe and facts to a plan: a pure function. Each decision carries its reason."""

from __future__ import annotations

import math
from dataclasses import replace

from peftkit.archs import Family, ModelShape
from peftkit.errors import UserError
from peftkit.methods import METHODS, Method
from peftkit.methods.base import RunSize
from peftkit.methods.lora import EVA_TOKENS_PER_RANK, LoraOptions, new_tokens
from peftkit.methods.qlora import QloraOptions
from peftkit.objectives import OBJECTIVES
from peftkit.plan.advice import advice
from peftkit.plan.data import data_plan, rope_overrides
from peftkit.plan.decisions import DecisionLog
from peftkit.plan.diagnosis import diagnose_plan
from peftkit.plan.facts import Facts
from peftkit.plan.fit import AutoValues, check_fit, choose_auto_values, longest_batch
from peftkit.plan.memory import closed_form_memory
from peftkit.plan.method import LOW_4BIT_SHARE, largest_role_outside_4bit, method_plan, share_in_4bit
from peftkit.plan.packing import TrainerRows, choose_rows, choose_sampling
from peftkit.plan.parallel import batch_of_ranks, decide_ranks
from peftkit.plan.plan import BasePlan, EvaluatePlan, Plan, RanksPlan, TrainPlan
from peftkit.plan.rank import settled_ranks
from peftkit.plan.rate import decide_learning_rate, plan_rate_search
from peftkit.plan.schedule import resolve_schedule
from peftkit.plan.targets import make_selection
from peftkit.plan.throughput import describe_missing_kernels, missing_kernels
from peftkit.recipe import LoadedRecipe, check_recipe

_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_EVALS_PER_RUN = 5


def _choose_precision(d: DecisionLog, facts: Facts, method: Method) -> tuple[str, str | None]:
    """Choose (the dtype of the base's weights, autocast)."""
    precision_option, device = d.loaded.recipe.train.precision, facts.device
    if precision_option == "bf16" and device.kind == "cuda" and not device.supports_bf16:
        d.refuse(
            "train.precision",
            f"bf16 on {device.name}",
            "a precision that the device has",
            "this GPU has no bf16 units: use fp16 or auto",
        )
    if precision_option == "fp16" and device.kind != "cuda":
        d.refuse("train.precision", f"fp16 on {device.kind}", "fp32, bf16 or auto", "fp16 training needs a GPU")
    if device.supports_bf16 and device.kind == "cuda":
        best, why = "bf16", f"{device.name} computes bf16 fast, with the range of fp32"
    elif device.kind == "cuda":
        best, why = "fp16", f"{device.name} has no bf16"
    else:
        best, why = "fp32", f"on {device.kind} it is exact and was measured faster than bf16 (docs/design.md)"
    precision = d.record("train.precision", precision_option, best, why)
    autocast = precision if device.kind == "cuda" and precision != "fp32" else None
    if method.trains_base and (precision_option == "auto" or precision == "fp16"):
        return "float32", autocast  # small updates vanish in 16-bit weights
    return _TORCH_NAMES[precision], autocast


def _base_plan(d: DecisionLog, facts: Facts, method: Method) -> tuple[BasePlan, str | None]:
    recipe, shape = d.loaded.recipe, facts.model.shape
    d.record("base.id", recipe.base.id)
    if recipe.base.dequantize:
        d.decide("base.dequantize", True, "the quantized checkpoint is converted once to bfloat16, in the cache")
    if recipe.base.revision is not None:
        d.record("base.revision", recipe.base.revision)
    if recipe.base.trust_remote_code:
        d.record("base.trust_remote_code", True)
    dtype, autocast = _choose_precision(d, facts, method)
    skip, experts = _plan_4bit(d, facts) if method.quantized else ((), ())
    overrides = {**shape.family.overrides, **rope_overrides(d, shape)}
    missing_packages = missing_kernels(shape)
    if missing_packages:
        d.decide("base.kernels", "plain torch", describe_missing_kernels(missing_packages))
    for key, value in shape.family.overrides.items():
        d.decide(f"base.config.{key}", value, next(note for note in shape.family.mind if key in note))
    attention_option, family = d.loaded.recipe.base.attention, shape.family
    if family.inferred or not family.has_attention:
        subject = "no known family" if family.inferred else f"{family.name}, which has no attention"
        if attention_option != "auto":
            d.refuse("base.attention", f"{attention_option} for {subject}", "auto")
        attention = None
    else:
        best, why = (
            ("sdpa", "fused kernels: the score matrix is never stored")
            if family.fused_attention
            else ("eager", f"transformers has no fused attention for {family.name}")
        )
        if attention_option == "sdpa" and best != "sdpa":
            d.refuse("base.attention", f"sdpa for {family.name}", "eager or auto", why)
        attention = str(d.record("base.attention", attention_option, best, why))
    unquantized = unquantized_base(
        shape, id=recipe.base.id, kind=facts.model.kind, revision=recipe.base.revision, dtype=dtype
    )
    qlora_options = recipe.method if isinstance(recipe.method, QloraOptions) else None
    return replace(
        unquantized,
        trust_remote_code=recipe.base.trust_remote_code,
        quant_type=qlora_options.quant_type if qlora_options else None,
        double_quant=bool(qlora_options and qlora_options.double_quant),
        labels=facts.data.labels if facts.data else (),
        skip_4bit=skip,
        experts_4bit=experts,
        overrides=overrides,
        attention=attention,
        end_token=recipe.data.chat.end_token,
        new_tokens=new_tokens(recipe.method) if isinstance(recipe.method, LoraOptions) else {},
    ), autocast


def unquantized_base(shape: ModelShape, *, id: str, kind: str, revision: str | None, dtype: str) -> BasePlan:
    """Return the plan of a base as it is: unquantized, with what its family requires."""
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
        head_modules=shape.task_head.modules,
        skip_4bit=(),
        experts_4bit=(),
        overrides=dict(shape.family.overrides),
        attention=None,
    )


def _plan_4bit(d: DecisionLog, facts: Facts) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Choose (modules kept out of 4-bit, fused experts put into it).

    Records how much of the model is stored in 4-bit.
    """
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
    share = share_in_4bit(shape)
    text = "linear layers and fused experts; the rest stays as it is"
    if share < LOW_4BIT_SHARE:
        text = f"little: most of this model is {largest_role_outside_4bit(shape)}, which is not stored in 4-bit"
    d.decide("base.in_4bit", f"{100 * share:.1f} %", text)
    head = tuple(tensor.name for tensor in shape.tensors if tensor.role == "head")
    skip = (*shape.family.skip_4bit, *(head or (shape.family.head,)))
    if shape.family.skip_4bit:
        d.decide("base.kept_out_of_4bit", list(skip), "this family uses these weights in a way that 4-bit breaks")
    experts = make_selection([m for m in shape.modules if m.in_experts], shape, as_parameters=True).parameters
    return skip, experts


def generation_settings(family: Family, *, virtual_tokens: bool) -> tuple[int, bool]:
    """Return (prompts answered at once, whether to use a cache) that give right answers."""
    return 20 if family.batches_generation else 1, family.cached_prompts or not virtual_tokens


def _num_steps(d: DecisionLog, rows: TrainerRows) -> tuple[int | None, int | None]:
    """Return (steps, rows drawn in them where that is not a whole number of batches); None if unknown."""
    train = d.loaded.recipe.train
    if train.max_steps is not None:
        return int(d.record("train.max_steps", train.max_steps)), None
    d.record("train.epochs", train.epochs)
    if rows.num is None:
        return None, None
    num_rows = max(1, math.ceil(rows.num * train.epochs))
    steps, num_last = math.ceil(num_rows / rows.batch_size), num_rows % rows.batch_size
    unit = "packs" if rows.packing else "rows"
    reason = f"{train.epochs:g} epochs of {rows.num} {unit} in batches of {rows.batch_size}"
    d.decide("train.max_steps", steps, f"{reason}, the last of {num_last}" if num_last else reason)
    return steps, num_rows if num_last else None


def _train_plan(
    d: DecisionLog, facts: Facts, method: Method, autocast: str | None, max_length: int, *, ranks: RanksPlan
) -> TrainPlan:
    train = d.loaded.recipe.train
    # the trainer's rows, examples or packs, and how many of them make a forward pass
    num_train = facts.data.num_train if facts.data else None
    fixed_micro_batch = train.micro_batch if isinstance(train.micro_batch, int) and train.packing is not True else 1
    default = 16 if num_train is None else max(1, min(16, num_train))
    default = batch_of_ranks(d, default if train.batch_size == "auto" else train.batch_size, fixed_micro_batch, ranks)
    batch = d.record("train.batch_size", train.batch_size, default, "16 examples per step, or all if there are fewer")
    rows = choose_rows(d, facts, method, max_length, batch, num_ranks=ranks.num)
    micro = 1  # where auto, it is chosen by memory, once everything else is decided
    if train.micro_batch != "auto":
        micro = d.record("train.micro_batch", train.micro_batch)
    steps, num_rows = _num_steps(d, rows)
    size = RunSize(steps, rows.batch_size)
    learning_rate = decide_learning_rate(d, facts, method, size)
    rate_search = plan_rate_search(d, facts, method, usual=learning_rate, size=size, autocast=autocast)
    schedule, num_warmup, schedule_arguments = resolve_schedule(d, steps)
    on_gpu = facts.device.kind == "cuda"
    has_lora_plus = getattr(d.loaded.recipe.method, "lr_ratio", None) is not None  # LoRA+ builds a plain AdamW
    optimizer = d.record(
        "train.optimizer",
        train.optimizer,
        "adamw_torch_fused" if on_gpu and not has_lora_plus else "adamw_torch",
        "fused on a GPU" if on_gpu and not has_lora_plus else "plain AdamW",
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
    checkpointing = "none"  # where auto, it is chosen by memory, once everything else is decided
    level = train.gradient_checkpointing
    if level != "auto":
        checkpointing = {True: "full", False: "none"}[level] if isinstance(level, bool) else level
        d.record("train.gradient_checkpointing", checkpointing)
    d.record("train.max_grad_norm", train.max_grad_norm)
    d.record("train.weight_decay", train.weight_decay)
    if d.record("train.label_smoothing", train.label_smoothing) and facts.model.shape.task == "multi-label":
        d.refuse("train.label_smoothing", f"{train.label_smoothing:g} with multi-label", "0", "each class is yes or no")
    if d.record("train.neftune", train.neftune) is not None and method.virtual_tokens:
        fix = "leave it out: transformers finds no embeddings to add it to behind virtual tokens"
        d.refuse("train.neftune", f"{train.neftune:g} with {method.name}", "none", fix)
    interval = max(1, math.ceil((steps or 100) / _EVALS_PER_RUN))
    eval_steps = d.record("train.eval_steps", train.eval_steps, interval, f"{_EVALS_PER_RUN} evaluations in the run")
    checkpoint_reason = (
        "with each evaluation"
        if eval_steps <= interval
        else f"{_EVALS_PER_RUN} in the run, so that a kill loses no more than that"
    )
    checkpoint_steps = d.record(
        "train.checkpoint_steps", train.checkpoint_steps, min(eval_steps, interval), checkpoint_reason
    )
    early_stopping = train.early_stopping
    d.record("train.early_stopping", early_stopping.model_dump() if early_stopping else None)
    return TrainPlan(
        num_steps=steps,
        num_rows=num_rows,
        num_warmup_steps=num_warmup,
        learning_rate=learning_rate,
        schedule=schedule,
        schedule_arguments=schedule_arguments,
        max_grad_norm=train.max_grad_norm,
        weight_decay=train.weight_decay,
        neftune=train.neftune,
        label_smoothing=train.label_smoothing,
        optimizer=optimizer,
        batch_size=rows.batch_size,
        micro_batch=micro,
        accumulation=max(1, rows.batch_size // micro),
        gradient_checkpointing=checkpointing,
        autocast=autocast,
        eval_steps=eval_steps,
        checkpoint_steps=checkpoint_steps,
        patience=early_stopping.patience if early_stopping else None,
        min_delta=early_stopping.min_delta if early_stopping else 0.0,
        on_oom="stop" if ranks.num > 1 else train.on_oom,
        on_spike=train.on_spike,
        packing=rows.packing,
        rate_search=rate_search,
    )


def make_plan(loaded: LoadedRecipe, facts: Facts, *, to_train: bool = True) -> Plan:
    """Decide everything. Raises UserError with every conflict between recipe, device, model and data.

    Without `to_train`, data that nothing can train on yet is planned for as well, for inspection.
    """
    plans = (
        _plan_settled(settled, facts, reason, to_train=to_train)
        for settled, reason in settled_ranks(loaded, facts.model.shape)
    )
    for plan in plans:
        assert plan.memory is not None
        if check_fit(plan.memory, facts.device).verdict == "fits":
            break
    return plan


def _plan_settled(loaded: LoadedRecipe, facts: Facts, rank_reason: str, *, to_train: bool) -> Plan:
    """Decide everything but the rank, which is settled."""
    recipe = loaded.recipe
    d = DecisionLog(loaded, to_train)
    d.problems.extend(check_recipe(loaded))
    method = METHODS[recipe.method.name]
    d.record("task", recipe.task, facts.model.shape.task, "follows from the model family and the data")
    base, autocast = _base_plan(d, facts, method)
    data = data_plan(d, facts)
    if facts.data and facts.data.unused:
        d.decide("data.unused", list(facts.data.unused), "columns and keys of the data that are not read")
    ranks = decide_ranks(d, facts)
    train = _train_plan(d, facts, method, autocast, data.max_length, ranks=ranks)
    options, shape = d.loaded.recipe.evaluate, facts.model.shape
    family = shape.family
    metric = d.record("evaluate.metric", options.metric, *OBJECTIVES[shape.task].default_metric)
    if metric in {"auto", "none"}:
        metric = None
    if metric is not None and metric not in OBJECTIVES[shape.task].metrics:
        metrics = ", ".join(OBJECTIVES[shape.task].metrics)
        d.refuse("evaluate.metric", f"{metric} for {shape.task}", f"one of {metrics}")
    if metric is not None and facts.data and facts.data.format == "text":
        d.refuse("evaluate.metric", "a metric on raw text", "null", "raw text has no answer to compare with")
    if not OBJECTIVES[shape.task].generates_answers and d.loaded.source(("evaluate", "max_new_tokens")):
        d.refuse("evaluate.max_new_tokens", f"a length for {shape.task}", "nothing", "a classifier generates no text")
    for name in ("max_examples", "max_new_tokens"):
        d.record(f"evaluate.{name}", getattr(options, name))
    batch, use_cache = generation_settings(family, virtual_tokens=method.virtual_tokens)
    if not family.batches_generation:
        d.decide("evaluate.generation_batch", 1, f"cached decoding of several prompts is wrong on {family.name}")
    if not use_cache:
        d.decide("evaluate.use_cache", False, f"PEFT would prepend the prompt at every step on {family.name}")
    evaluate = EvaluatePlan(metric, options.max_examples, options.max_new_tokens, batch, use_cache)
    method_settings = method_plan(d, facts.model.shape, train.num_steps)
    if rank_reason:
        d.revise("method.rank", getattr(recipe.method, "rank", None), rank_reason)
    method_options, lengths = recipe.method, facts.data.lengths if facts.data else None
    if isinstance(method_options, LoraOptions) and method_options.init == "eva" and lengths is not None:
        min_tokens = EVA_TOKENS_PER_RANK * method_options.r
        if lengths.num_tokens < min_tokens:
            got = f"eva at rank {method_options.r} with at most {lengths.num_tokens:,} tokens of training data"
            d.refuse("method.init", got, f"at least {min_tokens:,} tokens", "lower the rank, or use another init")
    d.record("seed", recipe.seed)
    d.record("train.on_spike", recipe.train.on_spike)
    if ranks.num > 1 and recipe.train.on_oom == "adapt":
        d.decide("train.on_oom", "stop", "the other processes cannot be told by one that is out of memory")
    else:
        d.record("train.on_oom", recipe.train.on_oom)
    d.record("devices.price_per_hour", recipe.devices.price_per_hour)
    diagnose = diagnose_plan(d, facts, method, train, evaluate, precision=base.dtype)
    if d.problems:
        raise UserError(d.problems)
    plan = Plan(
        base=base,
        method=method_settings,
        data=data,
        train=train,
        device=facts.device.kind,
        seed=recipe.seed,
        evaluate=evaluate,
        diagnose=diagnose,
        decisions=(),
        ranks=ranks,
    )
    plan = choose_sampling(d, _settle_auto_values(d, plan, facts, method), facts)
    longest = longest_batch(plan, facts)
    memory = closed_form_memory(facts.model.shape, plan, longest)
    plan = replace(plan, batch=longest, memory=memory)
    return replace(plan, decisions=(*d.made, *advice(plan, facts)))


def _settle_auto_values(d: DecisionLog, plan: Plan, facts: Facts, method: Method) -> Plan:
    """Choose by memory what the recipe leaves open: micro-batch, checkpointing, 8-bit optimizer states."""
    train = d.loaded.recipe.train
    can_shrink_states = facts.device.kind == "cuda" and facts.device.has_bitsandbytes
    auto_values = AutoValues(
        micro_batch=train.micro_batch == "auto",
        checkpointing=train.gradient_checkpointing == "auto",
        optimizer=train.optimizer == "auto" and can_shrink_states and plan.method.lr_ratio is None,
    )
    if not (auto_values.micro_batch or auto_values.checkpointing or auto_values.optimizer):
        return plan
    default_optimizer = plan.train.optimizer
    plan, why = choose_auto_values(plan, facts, auto_values, can_recompute=method.allows_checkpointing)
    if auto_values.micro_batch:
        d.record("train.micro_batch", "auto", plan.train.micro_batch, why)
        unit = "packs" if plan.train.packing else "examples"
        passes = f"{plan.train.batch_size} {unit} in passes of {plan.train.micro_batch}"
        d.decide("train.accumulation", plan.train.accumulation, passes)
    if plan.train.optimizer != default_optimizer:
        d.revise("train.optimizer", plan.train.optimizer, f"states of {default_optimizer} do not fit; {why}")
    if auto_values.checkpointing:
        reason = why if method.allows_checkpointing else "not possible with this method"
        d.record("train.gradient_checkpointing", "auto", plan.train.gradient_checkpointing, reason)
    return plan
