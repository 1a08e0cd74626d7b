"""Supervised fine-tuning of encoder-decoders: the mean cross entropy of the target's tokens."""

from peftkit.objectives.base import Objective, TrainerSpec

OBJECTIVE = Objective(
    name="seq2seq",
    summary="targets written from inputs by an encoder-decoder",
    task="seq2seq",
    formats=(),
    metrics=("exact_match", "token_f1"),
    trainer=TrainerSpec(
        "transformers.Seq2SeqTrainer",
        "transformers.Seq2SeqTrainingArguments",
        {"include_num_input_tokens_seen": "non_padding"},
    ),
    generates_answers=True,
)
