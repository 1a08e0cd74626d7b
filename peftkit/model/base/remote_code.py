"""Checks of code that comes with a model: allowed from a local folder or a pinned commit only.

A branch or a tag may hold other code tomorrow, and an `auto_map` may name code of another repository, which
no revision pins: transformers would download its newest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from peftkit.errors import Problem, UserError
from peftkit.hub import hub_is_reachable
from peftkit.plan.plan import BasePlan
from peftkit.recipe.paths import is_commit

_CONFIG_FILES = ("config.json", "tokenizer_config.json")


def require_pinned_commit(model: str, revision: str | None, *, where: str, remedy: str) -> None:
    """Raise UserError where unpinned code of a hub model would run; `remedy` completes the fix."""
    if not Path(model).exists() and not model.startswith("embedded:") and not is_commit(revision):
        got = f"code of {model} at {f'revision {revision!r}' if revision else 'no revision'}"
        fix = f"read that commit's code, then {remedy}; or use a local folder"
        raise UserError(Problem(where, got, "a pinned commit: 40 hex digits", fix))


def _code_references(auto_map: object) -> Iterator[str]:
    """Yield the class references of an auto_map: texts, lists of texts, or a dict of them."""
    if isinstance(auto_map, str):
        yield auto_map
    elif isinstance(auto_map, Mapping | list | tuple):
        for value in auto_map.values() if isinstance(auto_map, Mapping) else auto_map:
            yield from _code_references(value)


def refuse_foreign_code(config: Mapping[str, object], model: str, where: str) -> None:
    """Raise UserError where a configuration names code of another repository, or outside its folder."""
    for reference in _code_references(config.get("auto_map")):
        owner, separator, name = reference.rpartition("--")
        if (separator and owner != model) or ".." in name or name.startswith(("/", "\\", "~")):
            got = f"{model}, whose auto_map names code elsewhere ({reference})"
            fix = "copy model and code into one folder, read the code, and use that folder"
            raise UserError(Problem(where, got, "code in the model's own folder", fix))


def check_remote_code(source: str, plan: BasePlan) -> None:
    """Run both checks on a model that is about to be loaded; does nothing where its code is not trusted."""
    if not plan.trust_remote_code:
        return
    where = f"base {plan.id}"
    require_pinned_commit(source, plan.revision, where=where, remedy="set base.revision: COMMIT")
    for name in _CONFIG_FILES:
        file = find_model_file(source, name, plan.revision)
        if file is None:
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            continue  # told by who reads it for what it says
        if isinstance(content, dict):
            refuse_foreign_code(content, source, where)


def find_model_file(source: str, name: str, revision: str | None) -> Path | None:
    """Return a file of a model, from its folder or through the hub's cache; None where it has none."""
    if Path(source).is_dir():
        return Path(source) / name if (Path(source) / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, name, revision=revision, local_files_only=not hub_is_reachable()))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return None
