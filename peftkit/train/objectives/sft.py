"""Supervised fine-tuning of causal language models: TRL's SFTTrainer on data that is tokenized already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftkit.model.adapter import in_fp32
from peftkit.plan import Plan
from peftkit.train.arguments import arguments


def trainer(
    model: Any,
    plan: Plan,
    tokenizer: Any,
    *,
    train: Any,
    collator: Any = None,
    output_dir: Path,
    callbacks: Sequence[Any],
    optimizer: Any,
) -> Any:
    """An SFTTrainer over tokenized datasets with `input_ids` and `labels`, or over what `collator` reads.

    A batch of such may bring `num_tokens`: TRL counts wrong where there is no attention mask.
    """
    from trl import SFTConfig, SFTTrainer

    class Counting(SFTTrainer):
        """Keeps the tokens that a batch says it has, where the Trainer keeps those that it counts."""

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.state.num_input_tokens_seen += int(inputs.pop("num_tokens", 0))
            return super().compute_loss(model, inputs, *args, **kwargs)

    made = Counting(
        model=model,
        args=SFTConfig(
            **arguments(plan, output_dir=output_dir),
            max_length=None,
            packing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        data_collator=collator,
        train_dataset=train,
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
    """The loss summed over what is learnt, for a model that the trainer has prepared: no logits are held."""
    return -model(**batch, use_cache=False, fused_lm_head=True).log_probs.sum()
