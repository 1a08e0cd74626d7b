"""The diagnosis' part of a plan: what is judged, when a run pauses for it, and how far it may escalate."""

from __future__ import annotations

from peftkit.errors import UserError
from peftkit.methods import Method
from peftkit.methods.lora import CHANGES_BASE, LoraOptions
from peftkit.plan.decisions import Decisions
from peftkit.plan.devices import device_of
from peftkit.plan.facts import Facts
from peftkit.plan.plan import DiagnosePlan, EvaluatePlan, TrainPlan

FIRST_LOOK = 0.04  # of the steps: early, so that few are spent in the small configuration
FEW_STEPS = 100  # below, an early look sees too little of the run
_PLAIN_ADAM = ("adamw_torch", "adamw_torch_fused")


def cannot_grow(options: object, method: Method, train: TrainPlan) -> str:
    """Why an adapter cannot be grown in the run; empty where it can."""
    if not isinstance(options, LoraOptions):
        return f"{method.name} has no rank: the next method, LoRA, is recommended instead"
    if options.init in CHANGES_BASE:
        return f"init {options.init} is defined by its start, which growing would change"
    if options.lr_ratio is not None:
        return "LoRA+ gives B a rate of its own, which a restart does not keep"
    if train.optimizer not in _PLAIN_ADAM:
        return f"the states of {train.optimizer} cannot be grown"
    return ""


def diagnose_plan(
    d: Decisions, facts: Facts, method: Method, train: TrainPlan, evaluate: EvaluatePlan, *, precision: str
) -> DiagnosePlan:
    """What the recipe wants of diagnosis, as far as method, data and device allow it."""
    wanted = d.loaded.recipe.diagnose
    escalate = _escalate(d, facts, method, train)
    target = wanted.target
    if target is not None and target.metric not in {"eval_loss", evaluate.metric}:
        d.refuse(
            "diagnose.target.metric",
            f"{target.metric}, which is not measured",
            "eval_loss, or what evaluate.metric says",
            f"set evaluate.metric: {target.metric}",
        )
    d.keep("diagnose.target", target.model_dump() if target else None)
    if wanted.reference is not None:
        d.keep("diagnose.reference", wanted.reference)
        if not isinstance(d.loaded.recipe.method, LoraOptions):
            got = f"full with {method.name}"
            d.refuse("diagnose.reference", got, "method lora", "only adapted weights can be compared with it")
        elif facts.device.kind != "cuda" and train.autocast is None and precision != "float32":
            got = f"full with weights of {precision}"
            d.refuse("diagnose.reference", got, "fp32, or a GPU", "set train.precision: fp32")
        elif method.quantized:
            fix = (
                "leave it out, or diagnose the same recipe with method lora on a smaller model of the family"
            )
            d.refuse("diagnose.reference", f"full with {method.name}", "no reference over a 4-bit base", fix)
    bounds = wanted.bounds
    for name, value in bounds.model_dump().items():
        d.keep(f"diagnose.bounds.{name}", value)
    return DiagnosePlan(
        escalate=escalate,
        metric=target.metric if target else "eval_loss",
        target=target.value if target else None,
        reference=wanted.reference,
        max_rank=bounds.max_rank,
        max_trainable=bounds.max_trainable,
        max_memory_bytes=_memory(d, bounds.max_memory, facts),
        max_escalations=bounds.max_escalations,
        compute_share=bounds.compute,
        look_steps=_looks(d, escalate, train),
    )


def _escalate(d: Decisions, facts: Facts, method: Method, train: TrainPlan) -> str:
    wanted = d.loaded.recipe.diagnose.escalate
    if wanted == "off":
        return str(d.keep("diagnose.escalate", wanted))
    has_rows = d.loaded.recipe.data.eval and (facts.data is None or facts.data.num_eval > 0)
    if not has_rows:
        d.decide("diagnose.escalate", "off", "no held-out rows to judge by: set data.eval: 5%")
        return "off"
    why = cannot_grow(d.loaded.recipe.method, method, train) if wanted == "auto" else ""
    if why:
        d.decide("diagnose.escalate", "recommend", why)
        return "recommend"
    return str(d.keep("diagnose.escalate", wanted))


def _looks(d: Decisions, escalate: str, train: TrainPlan) -> tuple[int, ...]:
    """Early, while a growth still costs nothing; the end of a run is looked at anyway."""
    steps = train.num_steps or 0
    if escalate != "auto":
        return ()
    if steps < FEW_STEPS:
        d.decide("diagnose.looks", [steps], f"fewer than {FEW_STEPS} steps: only the end is looked at")
        return ()
    first = max(train.num_warmup_steps + 1, round(FIRST_LOOK * steps))
    d.decide("diagnose.looks", [first, steps], "early, where growing costs no steps, and the end")
    return (first,)


def _memory(d: Decisions, text: str | None, facts: Facts) -> int | None:
    """A size in bytes; None where the device's own memory is the bound."""
    if text is None:
        return None
    try:
        return device_of(text, facts.device, where=d.where("diagnose.bounds.max_memory"))[0].memory_bytes
    except UserError as error:
        d.problems.extend(error.problems)
        return None
