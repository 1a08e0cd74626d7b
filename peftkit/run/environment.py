"""What a run was made with: versions, device, platform. No secrets, no environment variables."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peftkit.data.mask import Tokenized
from peftkit.data.prepare import Prepared
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


def data_sha256(*sets: Sequence[Tokenized]) -> str:
    """A fingerprint of the tokens and labels that are trained on and held out, in order."""
    digest = hashlib.sha256()
    for rows in sets:
        digest.update(f"{len(rows)} rows".encode())
        for row in rows:
            digest.update(repr((row.input_ids, row.labels)).encode())
    return digest.hexdigest()


def base_sha256(source: str) -> str | None:
    """A fingerprint of a local base: its configuration, and size and first MiB of each weights file.

    None for a hub id, which its revision names.
    """
    folder = Path(source)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(2**20))
    return digest.hexdigest()


def fingerprints(source: str, prepared: Prepared) -> dict[str, str | None]:
    """What must be the same when a run goes on."""
    data = prepared.fingerprint or data_sha256(prepared.train, prepared.eval)
    return {"data": data, "base": base_sha256(source)}


def environment(device: DeviceFacts, prints: Mapping[str, str | None]) -> dict[str, Any]:
    """The content of environment.json."""
    return {
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "device": asdict(device),
        "fingerprints": dict(prints),
    }
