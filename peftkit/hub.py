"""Whether the model hub can be reached, asked once and briefly: its clients would retry for half a minute."""

from __future__ import annotations

import os
import time
from functools import lru_cache
from pathlib import Path


def hub_is_off() -> bool:
    """Whether HF_HUB_OFFLINE forbids to ask the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "") not in {"", "0"}


def hub_answers() -> bool:
    """Whether the hub may be asked and takes a connection."""
    import socket
    from urllib.parse import urlsplit

    if hub_is_off():
        return False
    proxied = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        with socket.create_connection((address.hostname or "", port), timeout=3):
            return True
    except OSError:
        return proxied  # through a proxy, only the client can tell


def hub_is_there() -> bool:
    """`hub_answers`, asked once a minute for all files: where nobody answers, that takes seconds."""
    return not hub_is_off() and _answers_in(int(time.monotonic() // 60))


@lru_cache(maxsize=1)
def _answers_in(minute: int) -> bool:
    return hub_answers()


def cache_folder() -> Path:
    """$PEFTKIT_CACHE, else the user's cache folder."""
    given = os.environ.get("PEFTKIT_CACHE")
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(given) if given else Path(root) / "peftkit"
