"""The names of the checks of data that a recipe may waive. What each looks at stands in `data/gate`."""

from __future__ import annotations

from typing import Literal

CheckName = Literal[
    "malformed-rows",
    "encoding",
    "missing-fields",
    "empty-answers",
    "roles",
    "chosen-equals-rejected",
    "preference-length",
    "secrets",
    "emails",
    "control-characters",
    "mojibake",
    "special-tokens",
    "foreign-markers",
    "duplicates",
    "near-duplicates",
    "leakage",
    "near-leakage",
    "held-out",
    "labels",
    "unseen-labels",
    "languages",
    "lengths",
    "template",
    "reasoning",
    "round-trip",
    "unknown-tokens",
    "double-bos",
    "masked-rows",
    "end-token",
    "end-agreement",
    "pad-token",
    "rows-dropped",
    "cut-answers",
    "vocabulary",
    "enough-data",
]
