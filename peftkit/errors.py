"""Errors that say how to fix them: where, got, expected, fix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from peftkit.secrets import redact


@dataclass(frozen=True)
class Problem:
    """One problem to fix. `where` names file, line and key as far as they are known."""

    where: str
    got: str
    expected: str
    fix: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: got {self.got}, expected {self.expected}"
        return redact(f"{text}; {self.fix}" if self.fix else text)


class PeftkitError(Exception):
    """Base class of all errors that peftkit raises on purpose; `exit_code` is the CLI's exit status."""

    exit_code = 1
    is_heard = False  # of another process that trains along, which tells the user itself


class UserError(PeftkitError):
    """Problems that the user can fix. Carries every problem that was detected, not only the first."""

    exit_code = 2

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class Interrupted(PeftkitError):
    """A stop by a signal at a safe point. `exit_code` is 130 (SIGINT) or 143 (SIGTERM)."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(redact(message))


def nearest(word: str, candidates: Sequence[str], *, count: int = 1) -> list[str]:
    """Return the candidates most similar to `word`, best first; an empty list if none is similar."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    matches = get_close_matches(word.lower(), by_lower, n=count, cutoff=0.6)
    return [by_lower[name] for name in matches]


def did_you_mean(word: str, candidates: Sequence[str]) -> str:
    """Return a sentence that suggests the nearest candidate, or lists all of them."""
    suggestions = nearest(word, candidates)
    return f"did you mean {suggestions[0]}?" if suggestions else f"known: {', '.join(sorted(candidates))}"


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error, for quoting in a message; its type where it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
