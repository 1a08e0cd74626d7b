"""The log of decisions and problems while a plan is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peftkit.errors import Problem
from peftkit.plan.plan import Decision
from peftkit.recipe import LoadedRecipe


@dataclass
class DecisionLog:
    """Decisions and problems, in the order in which they are made.

    Without `to_train` data is only inspected.
    """

    loaded: LoadedRecipe
    to_train: bool = True
    made: list[Decision] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def record(self, dotted: str, value: object, choice: object = None, reason: str = "") -> Any:
        """Record `value` with its source; if it is "auto" or None, record `choice` instead. Return it."""
        source = self.loaded.source(tuple(dotted.split(".")))
        if (value is None or value == "auto") and choice is not None:
            self.made.append(Decision(dotted, choice, "decided", reason))
            return choice
        self.made.append(Decision(dotted, value, str(source) if source else "default"))
        return value

    def decide(self, dotted: str, value: object, reason: str) -> None:
        """Record a value that follows from the model or the data rather than from the recipe."""
        self.made.append(Decision(dotted, value, "decided", reason))

    def revise(self, dotted: str, value: object, reason: str) -> None:
        """Replace an earlier decision on the same key."""
        self.made = [decision for decision in self.made if decision.key != dotted]
        self.decide(dotted, value, reason)

    def where(self, dotted: str) -> str:
        """Return file, line and key, for messages."""
        return self.loaded.where(tuple(dotted.split(".")))

    def refuse(self, dotted: str, got: str, expected: str, fix: str = "") -> None:
        """Record a problem with a key."""
        self.problems.append(Problem(self.where(dotted), got, expected, fix))
