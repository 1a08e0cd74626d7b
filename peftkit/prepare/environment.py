"""What a run was made with: versions, device, command, fingerprints. No secrets, no environment variables."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peftkit.data.tokens.mask import Tokenized
from peftkit.data.tokens.prepare import Prepared
from peftkit.model.base.identity import base_identity
from peftkit.plan import DeviceFacts
from peftkit.plan.plan import BasePlan
from peftkit.recipe import LoadedRecipe
from peftkit.recipe.document import dump_text
from peftkit.secrets import redact

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
            digest.update(repr((row.input_ids, row.labels, row.weights)).encode())
    return digest.hexdigest()


def recipe_sha256(loaded: LoadedRecipe) -> str:
    """A fingerprint of what the recipe says, whatever its layout."""
    return hashlib.sha256(resolved_text(loaded).encode()).hexdigest()


def resolved_text(loaded: LoadedRecipe) -> str:
    """The content of resolved.yaml: the recipe after extends and overrides, without defaults and secrets."""
    return redact(dump_text(loaded.recipe.model_dump(mode="json", exclude_unset=True)))


def fingerprints(
    loaded: LoadedRecipe, source: str, base: BasePlan, tokenizer: Any, prepared: Prepared
) -> dict[str, Any]:
    """What must be the same when a run goes on: recipe, data, base, tokenizer and template, versions."""
    from peftkit.data.tokens.tokenize import tokenizer_sha256

    template = str(tokenizer.chat_template or "")
    return {
        "recipe": recipe_sha256(loaded),
        "data": prepared.fingerprint or data_sha256(prepared.train, prepared.eval),
        "base": base_identity(source, base),
        "tokenizer": tokenizer_sha256(tokenizer),
        "template": hashlib.sha256(template.encode()).hexdigest(),
        "versions": versions(),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit of a folder's repository and whether it has changes; None where it is in none."""

    def ask(*words: str) -> str | None:
        command = ["git", "-C", str(folder), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit = ask("rev-parse", "HEAD")
    if not commit:
        return None
    changed = ask("status", "--porcelain", "--", ".")
    return {"commit": commit, "changed_files": len(changed.splitlines()) if changed is not None else None}


def environment(device: DeviceFacts, prints: dict[str, Any], loaded: LoadedRecipe) -> dict[str, Any]:
    """The content of environment.json."""
    return {
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "recipe_folder": git_state(Path(loaded.name).absolute().parent),
        "seed": loaded.recipe.seed,
        "device": asdict(device),
        "fingerprints": prints,
    }
