"""Supervised fine-tuning of causal language models: TRL's SFTTrainer on data that is tokenized already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftkit.plan import Plan

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def arguments(plan: Plan, *, output_dir: Path) -> Any:
    """trl.SFTConfig for a plan. The Trainer saves nothing: its checkpoints hold pickles and can be cut."""
    from trl import SFTConfig

    train = plan.train
    assert train.num_steps is not None
    return SFTConfig(
        output_dir=str(output_dir),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=plan.device == "cpu",
        bf16=train.autocast == "bf16",
        fp16=train.autocast == "fp16",
        max_steps=train.num_steps,
        warmup_steps=train.num_warmup_steps,
        lr_scheduler_type=_SCHEDULES[train.schedule],
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        optim=train.optimizer,
        max_grad_norm=train.max_grad_norm,
        per_device_train_batch_size=train.micro_batch,
        gradient_accumulation_steps=train.accumulation,
        gradient_checkpointing=train.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if train.gradient_checkpointing else None,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN is told as NaN, not as the mean of the others
        eval_strategy="no",  # ours weighs every token alike and draws no random numbers
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=plan.device == "cuda",
        seed=plan.seed,
        data_seed=plan.seed,
    )


def trainer(
    model: Any,
    plan: Plan,
    tokenizer: Any,
    *,
    train: Any,
    output_dir: Path,
    callbacks: Sequence[Any],
    optimizer: Any,
) -> Any:
    """An SFTTrainer over tokenized datasets with `input_ids` and `labels`."""
    import torch
    from transformers import PrinterCallback
    from trl import SFTTrainer

    made = SFTTrainer(
        model=model,
        args=arguments(plan, output_dir=output_dir),
        train_dataset=train,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
    )
    made.remove_callback(PrinterCallback)  # our own events are shown instead
    if plan.method.peft is not None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                # TRL casts adapters over 4-bit bases to bf16, which loses small updates and exact resume
                parameter.data = parameter.data.to(torch.float32)
    return made
