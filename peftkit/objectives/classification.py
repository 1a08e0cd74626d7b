"""Classification of texts: the mean cross entropy of one class per row."""

from peftkit.objectives.base import Objective, TrainerSpec

OBJECTIVE = Objective(
    name="classification",
    summary="one class per text",
    task="classification",
    formats=("classification",),
    metrics=("accuracy", "macro_f1"),
    trainer=TrainerSpec(
        "transformers.Trainer", "transformers.TrainingArguments", {"include_num_input_tokens_seen": "non_padding"}
    ),
)
