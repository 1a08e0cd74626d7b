"""Classification of tokens: the mean cross entropy of one tag per word, at its first token."""

from peftkit.objectives.base import Objective, TrainerSpec

OBJECTIVE = Objective(
    name="token-classification",
    summary="one tag per word",
    task="token-classification",
    formats=("token-classification",),
    metrics=("entity_f1", "accuracy"),
    trainer=TrainerSpec(
        "transformers.Trainer", "transformers.TrainingArguments", {"include_num_input_tokens_seen": "non_padding"}
    ),
)
