"""Checks over counted rows: the message, the severity and the fix of each, one table row per check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from peftkit.data.gate.finding import CheckInputs, DataFinding, Status, finding_from_counts, show_share
from peftkit.objectives import OBJECTIVES


@dataclass(frozen=True)
class CountedCheck:
    """The messages and thresholds of one counted check: it warns below `fails_from` (a share), then fails."""

    good: str
    bad: str
    fix: str
    fails_from: float = 0.0  # share of the rows; above 1 it never fails
    templated: bool = False  # fails only where a template writes markers: elsewhere they are the user's own
    only_for: Literal["", "chats", "preferences", "answers"] = ""  # the rows that it is about


_NEVER = 2.0
COUNTED_CHECKS: dict[str, CountedCheck] = {
    "malformed-rows": CountedCheck("every row can be read", "rows that cannot be read", "fix the file"),
    "encoding": CountedCheck(
        "all text is UTF-8", "rows that are not UTF-8", "name the file's encoding, or convert it to UTF-8"
    ),
    "missing-fields": CountedCheck(
        "every row has its fields", "rows without a field, or with the wrong kind", "fix the rows or map columns"
    ),
    "empty-answers": CountedCheck(
        "no answer is empty", "rows with an empty answer", "give an answer, or remove the rows"
    ),
    "roles": CountedCheck(
        "turns are in order",
        "rows with turns out of order",
        "alternate user and assistant turns, a system turn only first, an answer last",
        only_for="chats",
    ),
    "repairs": CountedCheck(
        "no chat had to be repaired",
        "chats whose turns were put in order",
        "look at a few of them; data.chat.repair: off refuses them",
        _NEVER,
        only_for="chats",
    ),
    "rated-answers": CountedCheck(
        "no answer is rated",
        "rows whose answer is rated, good or bad",
        "keep the good answers and remove the column; where it rates nothing, name data.format",
    ),
    "media": CountedCheck(
        "no pictures, sound or video", "rows with media, which text alone does not hold", "remove them"
    ),
    "chosen-equals-rejected": CountedCheck(
        "chosen and rejected answers differ",
        "rows whose answers are the same",
        "remove the rows",
        only_for="preferences",
    ),
    "secrets": CountedCheck(
        "no keys or tokens were found", "rows with what looks like a secret", "remove it, and revoke it"
    ),
    "emails": CountedCheck(
        "no e-mail addresses were found",
        "rows with an e-mail address",
        "replace addresses: a model may repeat them",
        _NEVER,
    ),
    "control-characters": CountedCheck(
        "no control characters", "rows with control characters", "strip them when you build the data", _NEVER
    ),
    "mojibake": CountedCheck(
        "no text was decoded wrongly",
        "rows whose text was decoded wrongly on the way",
        "decode the source as UTF-8",
        0.05,
    ),
    "special-tokens": CountedCheck(
        "no special token in the text",
        "rows whose text contains a special token",
        "remove it: it would be tokenized as the special token",
    ),
    "foreign-markers": CountedCheck(
        "no other model's markers in the text",
        "rows with the markers of another chat template in their text",
        "give the turns as messages: the template writes the markers",
        0.5,
        templated=True,
    ),
    "template": CountedCheck(
        "every turn is in the rendered text",
        "rows from which the template drops something",
        "use a template that fits: data.chat.template",
        only_for="chats",
    ),
    "reasoning": CountedCheck(
        "the template keeps the reasoning",
        "rows whose reasoning the template drops",
        "set data.chat.thinking: drop, or use another template",
        _NEVER,
        only_for="chats",
    ),
    "unknown-tokens": CountedCheck(
        "no unknown tokens", "rows with unknown tokens", "use a base whose tokenizer covers the text", 0.1
    ),
    "double-bos": CountedCheck(
        "no row has two start tokens",
        "rows with two start tokens",
        "the template writes one and the text another: remove one",
    ),
    "masked-rows": CountedCheck(
        "every row has tokens in the loss",
        "rows without tokens in the loss",
        "see data.mask, data.truncation and train.max_length; waived, they are left out",
    ),
    "end-token": CountedCheck(
        "every answer ends in an end token",
        "rows whose answer does not end in an end token",
        "use a chat template that ends turns: without it the model never stops",
        only_for="answers",
    ),
}


def checks() -> dict[str, Callable[[CheckInputs], DataFinding]]:
    """Return the check function of each counted check, by name."""
    return {name: _make_check(name, kind) for name, kind in COUNTED_CHECKS.items()}


def _make_check(name: str, kind: CountedCheck) -> Callable[[CheckInputs], DataFinding]:
    def check_rows(data: CheckInputs) -> DataFinding:
        counted = data.tally.of(name)
        applies = {
            "": True,
            "chats": data.prepared.style.source != "none",
            "preferences": data.examples.format == "preference",
            "answers": OBJECTIVES[data.facts.model.shape.task].generates_answers,
        }
        if not counted.count:
            is_about = applies[kind.only_for]
            return DataFinding(name, "pass", kind.good) if is_about else DataFinding(name, "n/a", f"no {kind.only_for}")
        total = data.num_rows
        fails = counted.count >= kind.fails_from * total
        if kind.templated and data.prepared.style.source == "none":
            fails = False
        status: Status = "fail" if fails else "warn"
        return finding_from_counts(name, status, counted, f"{kind.bad}: {show_share(counted.count, total)}", kind.fix)

    return check_rows
