"""Encoder-decoders, classifiers and models of no known family: transformers' own trainers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    class WithOurLoss(made):  # type: ignore[misc, valid-type]
        """The trainer with the loss of `summed_loss`, over the number of labels that are learnt."""

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels, weights = inputs.pop("labels"), inputs.pop("weights", None)
            outputs = model(**inputs)
            total = summed_loss(outputs.logits, labels, plan.base.task, weights)
            value = total / (labels.ne(IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)
            return (value, outputs) if return_outputs else value

    return WithOurLoss(
        model=model,
        args=configured(
            **arguments(plan, output_dir=output_dir),
            include_num_input_tokens_seen="non_padding",
        ),
        data_collator=collated,
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
