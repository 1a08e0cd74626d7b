"""Supervised fine-tuning of causal language models: the mean cross entropy of the tokens in the loss.

L = -1/N sum_t log p(x_t | x_<t), over the N tokens of a step whose label is not masked.
"""

from peftkit.objectives.base import Objective, TrainerSpec

OBJECTIVE = Objective(
    name="sft",
    summary="supervised fine-tuning on prompts and answers, chats or raw text",
    task="causal-lm",
    formats=(),
    metrics=("exact_match", "token_f1"),
    trainer=TrainerSpec(
        "transformers.Trainer", "transformers.TrainingArguments", {"include_num_input_tokens_seen": "non_padding"}
    ),
    fused_trainer=TrainerSpec(
        "trl.SFTTrainer",
        "trl.SFTConfig",
        {"max_length": None, "packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}},
        loss="fused",
    ),
    generates_answers=True,
    health_signs=("dependence on the question",),
)
