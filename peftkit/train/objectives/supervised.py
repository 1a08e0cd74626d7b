"""Encoder-decoders and classifiers: transformers' own trainers on data that is tokenized already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftkit.data.mask import Tokenized
from peftkit.evaluate.losses import collate
from peftkit.plan import Plan
from peftkit.train.arguments import arguments


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
    """A Seq2SeqTrainer or Trainer over tokenized datasets; the loss is the model's own for its task."""
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

    seq2seq = plan.base.task == "seq2seq"
    made, configured = (Seq2SeqTrainer, Seq2SeqTrainingArguments) if seq2seq else (Trainer, TrainingArguments)

    def collated(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        tokenized = [Tokenized(list(row["input_ids"]), list(row["labels"]), "") for row in rows]
        return collate(tokenized, tokenizer.pad_token_id, task=plan.base.task)

    return made(
        model=model,
        args=configured(
            **arguments(plan, output_dir=output_dir),
            include_num_input_tokens_seen="non_padding",
            remove_unused_columns=False,
        ),
        data_collator=collated,
        train_dataset=train,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
    )
