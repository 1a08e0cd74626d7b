"""The environment of a run: versions, device, command, fingerprints. No secrets or environment variables."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.data.tokens.mask import Tokenized
from peftkit.data.tokens.prepare import TokenizedData
from peftkit.data.tokens.tokenize import tokenizer_sha256
from peftkit.model.base.identity import base_identity, changed_parts
from peftkit.plan import DeviceFacts
from peftkit.plan.plan import BasePlan
from peftkit.prepare.start import start_sha256
from peftkit.recipe import LoadedRecipe
from peftkit.recipe.document import dump_text
from peftkit.secrets import redact

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    """Return the installed versions of the packages that training uses; None where one is absent."""
    package_versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            package_versions[name] = version(name)
        except PackageNotFoundError:
            package_versions[name] = None
    return package_versions


def data_sha256(*sets: Sequence[Tokenized]) -> str:
    """Compute the SHA-256 of the tokens, labels and weights of training and held-out rows, in order."""
    digest = hashlib.sha256()
    for rows in sets:
        digest.update(f"{len(rows)} rows".encode())
        for row in rows:
            digest.update(repr((row.input_ids, row.labels, row.weights)).encode())
    return digest.hexdigest()


def recipe_sha256(loaded: LoadedRecipe) -> str:
    """Compute the SHA-256 of the content of a recipe, whatever its layout."""
    return hashlib.sha256(resolved_text(loaded).encode()).hexdigest()


def resolved_text(loaded: LoadedRecipe) -> str:
    """Return the content of resolved.yaml: after extends and overrides, without defaults and secrets."""
    return redact(dump_text(loaded.recipe.model_dump(mode="json", exclude_unset=True)))


def fingerprints(
    loaded: LoadedRecipe, source: str, base: BasePlan, tokenizer: PreTrainedTokenizerBase, prepared: TokenizedData
) -> dict[str, Any]:
    """Return what must be equal on resume: recipe, data, base, tokenizer and template, versions."""
    template = str(tokenizer.chat_template or "")
    return {
        "recipe": recipe_sha256(loaded),
        "start_from": start_sha256(loaded),
        "data": prepared.fingerprint or data_sha256(prepared.train, prepared.eval),
        "base": base_identity(source, base),
        "tokenizer": tokenizer_sha256(tokenizer),
        "template": hashlib.sha256(template.encode()).hexdigest(),
        "versions": versions(),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit of a folder's repository and its number of changed files; None outside of one."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(folder), *arguments]
        try:
            process = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return process.stdout.strip()

    commit = git("rev-parse", "HEAD")
    if not commit:
        return None
    status = git("status", "--porcelain", "--", ".")
    return {"commit": commit, "changed_files": len(status.splitlines()) if status is not None else None}


def environment(device: DeviceFacts, run_fingerprints: dict[str, Any], loaded: LoadedRecipe) -> dict[str, Any]:
    """Return the content of environment.json."""
    return {
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "recipe_folder": git_state(Path(loaded.name).absolute().parent),
        "seed": loaded.recipe.seed,
        "device": asdict(device),
        "fingerprints": run_fingerprints,
    }


def find_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Return what differs between two fingerprints, by the name under which it can be allowed."""
    changes = {}
    for key in ("recipe", "data", "tokenizer"):
        if before[key] != now[key]:
            changes[key] = f"sha256 {before[key][:8]} then, {now[key][:8]} now"
    start, start_now = before.get("start_from"), now.get("start_from")
    if start and start_now and start != start_now:  # where it is gone, the checkpoint has what was made of it
        changes["start_from"] = f"sha256 {start[:8]} then, {start_now[:8]} now"
    if changed_fields := changed_parts(before["base"], now["base"]):
        changes["base"] = f"other {' and '.join(changed_fields)}"
    changed_versions = [
        f"{name} {before['versions'].get(name)} then, {version} now"
        for name, version in now["versions"].items()
        if before["versions"].get(name) != version
    ]
    if changed_versions:
        changes["versions"] = "; ".join(changed_versions)
    return changes
