"""The diagnosis section of a plan: what is judged, when a run pauses for it, how far it may escalate."""

from __future__ import annotations

from peftkit.errors import UserError
from peftkit.methods import Method
from peftkit.methods.lora import BASE_CHANGING_INITS, LoraOptions
from peftkit.plan.decisions import DecisionLog
from peftkit.plan.devices import parse_device
from peftkit.plan.facts import Facts
from peftkit.plan.plan import DiagnosePlan, EvaluatePlan, TrainPlan

# of the steps: early, so that few are spent in the small configuration; then while another rate still pays
LOOK_SHARES = (0.04, 0.15, 0.4)
MIN_STEPS_FOR_EARLY_LOOK = 100  # below, an early look sees too little of the run
MIN_STEPS_FOR_LATER_LOOKS = 200  # below, their forks would be too short
_PLAIN_ADAM = ("adamw_torch", "adamw_torch_fused")


def growth_obstacle(options: object, method: Method, train: TrainPlan) -> str:
    """Return why an adapter cannot be grown in the run; empty if it can."""
    if not isinstance(options, LoraOptions):
        return f"{method.name} has no rank: the next method, LoRA, is recommended instead"
    if options.init in BASE_CHANGING_INITS:
        return f"init {options.init} is defined by its initial weights, which growing the adapter would change"
    if options.lr_ratio is not None:
        return "LoRA+ gives B its own learning rate, which a restart does not keep"
    if train.optimizer not in _PLAIN_ADAM:
        return f"the states of {train.optimizer} cannot be grown"
    return ""


def diagnose_plan(
    d: DecisionLog, facts: Facts, method: Method, train: TrainPlan, evaluate: EvaluatePlan, *, precision: str
) -> DiagnosePlan:
    """Plan the diagnosis that the recipe asks for, as far as method, data and device allow it."""
    options = d.loaded.recipe.diagnose
    escalate: str = options.escalate
    has_rows = d.loaded.recipe.data.eval and (facts.data is None or facts.data.num_eval > 0)
    obstacle = growth_obstacle(d.loaded.recipe.method, method, train)
    if escalate != "off" and not has_rows:
        escalate = "off"
        d.decide("diagnose.escalate", escalate, "no held-out rows to measure quality on: set data.eval: 5%")
    elif escalate == "auto" and obstacle:
        escalate = "recommend"
        d.decide("diagnose.escalate", escalate, obstacle)
    else:
        d.record("diagnose.escalate", escalate)
    target = options.target
    if target is not None and target.metric not in {"eval_loss", evaluate.metric}:
        d.refuse(
            "diagnose.target.metric",
            f"{target.metric}, which is not measured",
            "eval_loss, or what evaluate.metric says",
            f"set evaluate.metric: {target.metric}",
        )
    d.record("diagnose.target", target.model_dump() if target else None)
    if options.reference is not None:
        d.record("diagnose.reference", options.reference)
        if not isinstance(d.loaded.recipe.method, LoraOptions):
            got = f"full with {method.name}"
            d.refuse("diagnose.reference", got, "method lora", "only adapted weights can be compared with it")
        elif facts.device.kind != "cuda" and train.autocast is None and precision != "float32":
            got = f"full with weights of {precision}"
            d.refuse("diagnose.reference", got, "fp32, or a GPU", "set train.precision: fp32")
        elif method.quantized:
            fix = "leave it out, or diagnose the same recipe with method lora on a smaller model of the family"
            d.refuse("diagnose.reference", f"full with {method.name}", "no reference over a 4-bit base", fix)
    bounds = options.bounds
    for name, value in bounds.model_dump().items():
        d.record(f"diagnose.bounds.{name}", value)
    steps = train.num_steps or 0
    looks: tuple[int, ...] = ()
    if escalate != "auto":
        pass  # at the end only
    elif not bounds.compute:
        d.decide("diagnose.looks", [steps], "diagnose.bounds.compute is 0: nothing is measured in mid-run")
    elif steps < MIN_STEPS_FOR_EARLY_LOOK:
        d.decide(
            "diagnose.looks",
            [steps],
            f"fewer than {MIN_STEPS_FOR_EARLY_LOOK} steps: the run is diagnosed only at its end",
        )
    else:
        shares = LOOK_SHARES if steps >= MIN_STEPS_FOR_LATER_LOOKS else LOOK_SHARES[:1]
        looks = tuple(sorted({max(train.num_warmup_steps + 1, round(share * steps)) for share in shares}))
        later = ", while another rate or rank still pays," if len(looks) > 1 else ""
        reason = f"early, when growing the adapter costs no steps{later} and at the end"
        d.decide("diagnose.looks", [*looks, steps], reason)
    memory = None
    if bounds.max_memory is not None:
        try:
            device, _ = parse_device(bounds.max_memory, facts.device, where=d.where("diagnose.bounds.max_memory"))
            memory = device.memory_bytes
        except UserError as error:
            d.problems.extend(error.problems)
    return DiagnosePlan(
        escalate=escalate,
        metric=target.metric if target else "eval_loss",
        target=target.value if target else None,
        reference=options.reference,
        max_rank=bounds.max_rank,
        max_trainable=bounds.max_trainable,
        max_memory_bytes=memory,
        max_escalations=bounds.max_escalations,
        compute_share=bounds.compute,
        look_steps=looks,
    )
