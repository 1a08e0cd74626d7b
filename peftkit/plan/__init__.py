"""Everything decided, by a pure function of recipe and facts."""

from peftkit.plan.facts import DataFacts, DeviceFacts, Facts, ModelFacts
from peftkit.plan.plan import Decision, Plan
from peftkit.plan.resolve import make_plan

__all__ = ["DataFacts", "Decision", "DeviceFacts", "Facts", "ModelFacts", "Plan", "make_plan"]
