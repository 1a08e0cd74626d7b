"""Names of an adapter's tensors that wrappers of other trainers changed, and what makes them PEFT's again."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from pathlib import Path

_MAX_RENAMES = 3
# what torch.compile, PEFT's own modules, two wrappers and the text part of a vision model put into names
NEVER_IN_NAMES = (("_orig_mod.", ""), (".default.", "."))  # as PEFT saves them
_KNOWN = (
    *NEVER_IN_NAMES,
    ("base_model.model.base_model.model.", "base_model.model."),
    ("module.base_model.", "base_model."),
    ("model.language_model.model.", "model."),
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("base_model.model.model.", "base_model.model."),
    ("base_model.model.", "base_model.model.model."),
)


def fitting_renames(names: Collection[str], expected: Collection[str]) -> list[tuple[str, str]]:
    """Return what to replace in names so that they are exactly the expected ones; empty where nothing known does."""
    wanted, found = set(expected), list[tuple[str, str]]()
    current = set(names)
    while current != wanted and len(found) < _MAX_RENAMES:
        candidates = {
            pair: renamed
            for pair in _KNOWN
            if len(renamed := {name.replace(*pair, 1) for name in current}) == len(current) and renamed != current
        }
        best = max(candidates, key=lambda pair: len(candidates[pair] & wanted), default=None)
        if best is None or len(candidates[best] & wanted) < len(current & wanted):
            return []
        # without a gain yet, only what PEFT never has in a name goes
        if len(candidates[best] & wanted) == len(current & wanted):
            best = next((pair for pair in NEVER_IN_NAMES if pair in candidates), None)
            if best is None:
                return []
        found.append(best)
        current = candidates[best]
    return found if current == wanted else []


def rename_fix(folder: Path, renames: Sequence[tuple[str, str]]) -> str:
    """Return the command that renames an adapter's tensors; empty without renames."""
    options = " ".join(f"--rename {shlex.quote(f'{old}={new}')}" for old, new in renames)
    return f"its names fit after: peftkit convert {shlex.quote(str(folder))} {options} --out FIXED" if renames else ""
