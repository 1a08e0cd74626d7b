"""Where peftkit keeps what can be made or fetched again: converted bases, traces, remote files."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$PEFTKIT_CACHE, else the user's cache folder."""
    given = os.environ.get("PEFTKIT_CACHE")
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(given) if given else Path(root) / "peftkit"
