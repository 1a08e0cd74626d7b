"""Classification of texts that may be of several classes, or none: the mean binary cross entropy of every class."""

from peftkit.objectives.base import Objective, TrainerSpec

OBJECTIVE = Objective(
    name="multi-label",
    summary="any number of classes per text",
    task="multi-label",
    formats=("multi-label",),
    metrics=("micro_f1", "macro_f1", "exact_match"),
    trainer=TrainerSpec(
        "transformers.Trainer", "transformers.TrainingArguments", {"include_num_input_tokens_seen": "non_padding"}
    ),
)
