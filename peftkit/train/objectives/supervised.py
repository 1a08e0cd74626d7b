"""Encoder-decoders, classifiers and models of no known family: transformers' own trainers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peftkit.data.tokens.mask import IGNORED
from peftkit.evaluate.losses import inputs_of, summed_loss
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
    """A Seq2SeqTrainer or Trainer over what is drawn. A guard among the callbacks hears of it.

    The loss is worked out here from the logits: the Trainer divides a model's own loss by the accumulation or
    not, depending on whether the model's signature takes loss arguments, which says nothing of what it does.
    """
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

    saw = heard_by(callbacks)
    seq2seq = plan.base.task == "seq2seq"
    made, configured = (Seq2SeqTrainer, Seq2SeqTrainingArguments) if seq2seq else (Trainer, TrainingArguments)

    def collated(drawn: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = train.collator(drawn)
        beside: dict[str, Any] = {key: batch[key] for key in ("labels", "weights", "rows") if key in batch}
        return {**inputs_of(model, batch, plan.base.task), **beside}

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None, weights: Any = None) -> Any:
        total = summed_loss(outputs.logits, labels, plan.base.task, weights)
        return total / (labels.ne(IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)

    class Watched(made):  # type: ignore[misc, valid-type]
        """Hands a batch's weights to the loss, and tells the guard of each micro-batch."""

        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            numbers = inputs.pop("rows")
            self.compute_loss_func = partial(loss, weights=inputs.pop("weights", None))
            found = super().compute_loss(model, inputs, *rest, **named)
            saw(numbers, found)
            return found

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            """The Trainer's own, or the plan's where that begins anew."""
            if plan.train.restart_step:
                self.lr_scheduler = restarted(plan, optimizer or self.optimizer)
                return self.lr_scheduler
            return super().create_scheduler(num_training_steps, optimizer)

    return Watched(
        model=model,
        args=configured(
            **arguments(plan, output_dir=output_dir),
            include_num_input_tokens_seen="non_padding",
        ),
        data_collator=collated,
        compute_loss_func=loss,
        train_dataset=train.dataset,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
    )


def loss(model: Any, batch: Mapping[str, Any], task: str) -> Any:
    """The mean loss of a micro-batch as the trainer works it out."""
    logits = model(**inputs_of(model, batch, task)).logits
    total = summed_loss(logits, batch["labels"], task, batch.get("weights"))
    return total / batch["labels"].ne(IGNORED).sum().clamp(min=1)


summed = None  # worked out from the logits
