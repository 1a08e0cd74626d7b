"""Checks that count rows as they pass: what each means, how bad it is, and how it is mended. One row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peftkit.data.gate.finding import Data, Finding, Status, of_rows, share


@dataclass(frozen=True)
class Kind:
    """How a count becomes a finding: it warns until so large a share of the rows, then it fails."""

    good: str
    bad: str
    fix: str
    fails_from: float = 0.0  # share of the rows; above 1 it never fails
    templated: bool = False  # fails only where a template writes markers: elsewhere they are the user's own


_NEVER = 2.0
KINDS: dict[str, Kind] = {
    "malformed-rows": Kind("every row can be read", "rows that cannot be read", "mend the file"),
    "encoding": Kind("all text is UTF-8", "rows that are not UTF-8", "convert the file to UTF-8"),
    "missing-fields": Kind(
        "every row has its fields",
        "rows without a field, or with the wrong kind",
        "mend the rows or map columns",
    ),
    "empty-answers": Kind(
        "every answer says something", "rows with an empty answer", "give an answer, or take the rows out"
    ),
    "roles": Kind(
        "turns are in order",
        "rows with turns out of order",
        "user and assistant take turns, an answer comes last, a system turn first",
    ),
    "chosen-equals-rejected": Kind(
        "chosen and rejected answers differ", "rows whose answers are the same", "take the rows out"
    ),
    "secrets": Kind(
        "no keys or tokens were found", "rows with what looks like a secret", "take it out, and revoke it"
    ),
    "emails": Kind(
        "no e-mail addresses were found",
        "rows with an e-mail address",
        "replace addresses: a model may repeat them",
        _NEVER,
    ),
    "control-characters": Kind(
        "no control characters", "rows with control characters", "strip them when the data is made", _NEVER
    ),
    "mojibake": Kind(
        "no text was decoded wrongly",
        "rows whose text was decoded wrongly on the way",
        "decode the source as UTF-8",
        0.05,
    ),
    "special-tokens": Kind(
        "no special token is typed as text",
        "rows in which people typed a special token",
        "take it out: it would be read as the token itself",
    ),
    "foreign-markers": Kind(
        "no other model's markers in the text",
        "rows with the markers of another chat template in their text",
        "give the turns as messages: the template writes the markers",
        0.5,
        templated=True,
    ),
    "template": Kind(
        "every turn stands in the rendered text",
        "rows of which the template leaves something out",
        "use a template that fits: data.chat.template",
    ),
    "reasoning": Kind(
        "the template keeps the reasoning",
        "rows whose reasoning the template leaves out",
        "set data.chat.thinking: drop, or use another template",
        _NEVER,
    ),
    "unknown-tokens": Kind(
        "the tokenizer knows all text",
        "rows with unknown tokens",
        "use a base whose tokenizer knows the text",
        0.1,
    ),
    "double-bos": Kind(
        "no row starts twice",
        "rows with two start tokens",
        "the template writes one and the text another: take one out",
    ),
    "masked-rows": Kind(
        "something is learnt from every row",
        "rows from which nothing is learnt",
        "see data.mask, data.truncation and train.max_length; waived, they are left out",
    ),
    "end-token": Kind(
        "every answer ends in an end token",
        "rows whose answer does not end in an end token",
        "use a chat template that ends turns: without it the model never stops",
    ),
}


def checks() -> dict[str, Callable[[Data], Finding]]:
    """A function for each kind."""
    return {name: _check(name, kind) for name, kind in KINDS.items()}


def _check(name: str, kind: Kind) -> Callable[[Data], Finding]:
    def look(data: Data) -> Finding:
        noticed = data.tally.of(name)
        if not noticed.count:
            return Finding(name, "pass", kind.good)
        whole = data.num_rows
        fails = noticed.count >= kind.fails_from * whole
        if kind.templated and data.prepared.style.source == "none":
            fails = False
        status: Status = "fail" if fails else "warn"
        return of_rows(name, status, noticed, f"{kind.bad}: {share(noticed.count, whole)}", kind.fix)

    return look
