"""Encoder-decoders, classifiers and models of no known family: transformers' own trainers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peftkit.data.mask import IGNORED, Tokenized
from peftkit.evaluate.losses import collate, inputs_of, summed_loss
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
    """A Seq2SeqTrainer or Trainer over tokenized datasets. `collator` is for what is not done here: packs.

    The loss is worked out here from the logits: the Trainer divides a model's own loss by the accumulation or
    not, depending on whether the model's signature takes loss arguments, which says nothing of what it does.
    """
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

    assert collator is None, "the plan packs for the trainer of language models only"
    seq2seq = plan.base.task == "seq2seq"
    made, configured = (Seq2SeqTrainer, Seq2SeqTrainingArguments) if seq2seq else (Trainer, TrainingArguments)

    def collated(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        tokenized = [
            Tokenized(list(row["input_ids"]), list(row["labels"]), "", row.get("weights")) for row in rows
        ]
        batch = collate(tokenized, tokenizer.pad_token_id, task=plan.base.task)
        rest: dict[str, Any] = {key: batch[key] for key in batch.keys() & {"labels", "weights"}}
        return {**inputs_of(model, batch, plan.base.task), **rest}

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None, weights: Any = None) -> Any:
        total = summed_loss(outputs.logits, labels, plan.base.task, weights)
        return total / (labels.ne(IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)

    class Weighing(made):  # type: ignore[misc, valid-type]
        """The trainer, which hands a batch's weights to the loss: by itself it knows only labels."""

        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            self.compute_loss_func = partial(loss, weights=inputs.pop("weights", None))
            return super().compute_loss(model, inputs, *rest, **named)

    return Weighing(
        model=model,
        args=configured(
            **arguments(plan, output_dir=output_dir),
            include_num_input_tokens_seen="non_padding",
        ),
        data_collator=collated,
        compute_loss_func=loss,
        train_dataset=train,
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
