"""What a run was made with: versions, device, platform. No secrets, no environment variables."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from peftkit.data.mask import Tokenized
from peftkit.plan import DeviceFacts

_PACKAGES = (
    "peftkit",
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "safetensors",
    "tokenizers",
)


def versions() -> dict[str, str | None]:
    """Installed versions of what training rests on; None where a package is absent."""
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def data_sha256(rows: Sequence[Tokenized]) -> str:
    """A fingerprint of the tokens and labels that are trained on, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.input_ids, row.labels)).encode())
    return digest.hexdigest()


def environment(device: DeviceFacts, train: Sequence[Tokenized]) -> dict[str, Any]:
    """The content of environment.json."""
    return {
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "device": asdict(device),
        "data_sha256": data_sha256(train),
    }
