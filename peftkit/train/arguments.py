"""The Trainer's arguments that follow from a plan, whatever the task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftkit import ranks
from peftkit.model.adapter.attach import checkpointing_arguments
from peftkit.plan import Plan
from peftkit.plan.schedule import SCHEDULE_FREE

_SCHEDULES = {
    **{"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"},
    **{"restarts": "cosine_with_restarts", "wsd": "warmup_stable_decay"},
}


def trainer_arguments(plan: Plan, *, output_dir: Path) -> dict[str, Any]:
    """Return the arguments common to all trainers.

    They save nothing: the Trainer's own checkpoints hold pickles and can be truncated.
    """
    train = plan.train
    assert train.num_steps is not None
    if plan.train.gradient_checkpointing == "none":
        checkpointing = None
    else:
        options = checkpointing_arguments(plan)
        checkpointing = {**options["activation_checkpointing_kwargs"], "every_n_layers": options["every_n_layers"]}
    schedule = "cosine_with_min_lr" if "min_lr_rate" in train.schedule_arguments else _SCHEDULES[train.schedule]
    if train.optimizer == SCHEDULE_FREE:
        schedule = "constant"  # its warm-up is the optimizer's own
    return {
        "output_dir": str(output_dir),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": plan.device == "cpu",
        "bf16": train.autocast == "bf16",
        "fp16": train.autocast == "fp16",
        "max_steps": train.num_steps,
        "warmup_steps": train.num_warmup_steps,
        "lr_scheduler_type": schedule,
        "lr_scheduler_kwargs": dict(train.schedule_arguments),
        "learning_rate": train.learning_rate,
        "weight_decay": train.weight_decay,
        "neftune_noise_alpha": train.neftune,
        "optim": train.optimizer,
        "max_grad_norm": train.max_grad_norm,
        "per_device_train_batch_size": train.micro_batch,
        "gradient_accumulation_steps": train.accumulation // ranks.current().num,  # divisible: the plan saw to it
        "ddp_find_unused_parameters": False,  # the preflight proves that there are none
        "remove_unused_columns": False,
        "gradient_checkpointing": train.gradient_checkpointing != "none",
        "gradient_checkpointing_kwargs": checkpointing,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a NaN is told as NaN, not as the mean of the others
        "eval_strategy": "no",  # ours weighs every token alike and draws no random numbers
        "dataloader_pin_memory": plan.device == "cuda",
        "seed": plan.seed,
        "data_seed": plan.seed,
    }
