"""Objectives of training. A new one is a file here and a line below."""

from peftkit.objectives import classification, multi_label, seq2seq, sft, token_classification
from peftkit.objectives.base import Objective, TrainerSpec

OBJECTIVES: dict[str, Objective] = {
    module.OBJECTIVE.task: module.OBJECTIVE
    for module in (sft, seq2seq, classification, multi_label, token_classification)
}
# The task that a format of data is for; the other formats suit decoders and encoder-decoders.
FORMAT_TASKS = {name: objective.task for objective in OBJECTIVES.values() for name in objective.formats}

__all__ = ["FORMAT_TASKS", "OBJECTIVES", "Objective", "TrainerSpec"]
