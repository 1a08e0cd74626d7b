"""Supervised fine-tuning of causal language models: TRL's SFTTrainer on data that is tokenized already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftkit.model.adapter.attach import in_fp32
from peftkit.plan import Plan
from peftkit.train.arguments import arguments
from peftkit.train.batches import DrawnSet
from peftkit.train.guard import heard_by
from peftkit.train.schedule import restarted


def trainer(
    model: Any,
    plan: Plan,
    tokenizer: Any,
    *,
    train: DrawnSet,
    output_dir: Path,
    callbacks: Sequence[Any],
    optimizer: Any,
) -> Any:
    """An SFTTrainer over what is drawn. A guard among the callbacks hears of each micro-batch."""
    from trl import SFTConfig, SFTTrainer

    saw = heard_by(callbacks)

    class Watched(SFTTrainer):
        """Tells the guard of each micro-batch, and counts packs' tokens: TRL counts wrong without a mask."""

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            rows = inputs.pop("rows")
            self.state.num_input_tokens_seen += int(inputs.pop("num_tokens", 0))
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            saw(rows, loss)
            return loss

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            """The Trainer's own, or the plan's where that begins anew."""
            if plan.train.restart_step:
                self.lr_scheduler = restarted(plan, optimizer or self.optimizer)
                return self.lr_scheduler
            return super().create_scheduler(num_training_steps, optimizer)

    made = Watched(
        model=model,
        args=SFTConfig(
            **arguments(plan, output_dir=output_dir),
            max_length=None,
            packing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        data_collator=train.collator,
        train_dataset=train.dataset,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
    )
    if plan.method.peft is not None:
        in_fp32(model)  # TRL casts adapters over 4-bit bases to bf16, which breaks exact resume too
    return made


def loss(model: Any, batch: Mapping[str, Any], task: str) -> Any:
    """The mean loss of a micro-batch as the trainer works it out, for a model that it has prepared."""
    return model(**batch, use_cache=False, fused_lm_head=True).loss


def summed(model: Any, batch: Mapping[str, Any]) -> Any:
    """Each row's summed loss, for a model that the trainer has prepared: no logits are held."""
    return -model(**batch, use_cache=False, fused_lm_head=True).log_probs.sum(-1)
