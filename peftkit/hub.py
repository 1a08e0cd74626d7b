"""Reachability of the model hub, probed briefly (its own clients retry for half a minute), and the cache folder."""

from __future__ import annotations

import os
import socket
import time
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit


def hub_is_offline() -> bool:
    """Return True if HF_HUB_OFFLINE forbids requests to the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "") not in {"", "0"}


def probe_hub() -> bool:
    """Return True if requests are allowed and the hub accepts a connection within 3 s."""
    if hub_is_offline():
        return False
    has_proxy = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        with socket.create_connection((address.hostname or "", port), timeout=3):
            return True
    except OSError:
        return has_proxy  # through a proxy, only the client can tell


def hub_is_reachable() -> bool:
    """Return `probe_hub()`, cached for a minute: an unreachable hub costs seconds per probe."""
    return not hub_is_offline() and _probe_in_minute(int(time.monotonic() // 60))


@lru_cache(maxsize=1)
def _probe_in_minute(minute: int) -> bool:
    return probe_hub()


def cache_folder() -> Path:
    """Return $PEFTKIT_CACHE, or peftkit's folder in the user's cache directory."""
    override = os.environ.get("PEFTKIT_CACHE")
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(override) if override else Path(root) / "peftkit"
