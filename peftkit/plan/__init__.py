"""The plan: everything decided, as a pure function of recipe and facts."""

from peftkit.plan.facts import DataFacts, DeviceFacts, Facts, Lengths, ModelFacts, PackLengths, RowLengths, TextFacts
from peftkit.plan.plan import Batch, Decision, Memory, Peak, Plan, read_plan
from peftkit.plan.resolve import make_plan

__all__ = [
    "Batch",
    "DataFacts",
    "Decision",
    "DeviceFacts",
    "Facts",
    "Lengths",
    "Memory",
    "ModelFacts",
    "PackLengths",
    "Peak",
    "Plan",
    "RowLengths",
    "TextFacts",
    "make_plan",
    "read_plan",
]
