"""A push to the hub: an adapter with its card, or a folder that was merged or exported before."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from peftkit.errors import Problem, UserError
from peftkit.run.adapter import is_away, run_of
from peftkit.run.exports import adapter
from peftkit.run.exports.base import Exported, ExportOptions, Observer, files_in, whole_model
from peftkit.ship.card import is_hub_id
from peftkit.ship.hub import push


def export(path: Path, options: ExportOptions, observer: Observer) -> Exported:
    """One commit with everything. Raises UserError where the hub refuses, or nothing is there to push."""
    if not is_hub_id(options.repo) or str(options.repo).count("/") != 1:
        raise UserError(Problem("--repo", str(options.repo), "OWNER/NAME on the hub"))
    whole = whole_model(path)
    if whole is not None:
        return _pushed(whole, options, observer)
    if is_away(path) or (run_of(path) / "plan.json").is_file():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / str(options.repo).rsplit("/", 1)[-1]
            adapter.export(path, replace(options, to="adapter", out=str(folder)), observer)
            return _pushed(folder, options, observer)
    if path.is_dir() and any(path.glob("*.gguf")):
        return _pushed(path, options, observer)
    expected = "a run, an adapter, a merged or an exported folder"
    raise UserError(Problem(str(path), "nothing that can be pushed", expected))


def _pushed(folder: Path, options: ExportOptions, observer: Observer) -> Exported:
    assert options.repo is not None

    def tell(text: str) -> None:
        observer({"event": "notice", "text": text})

    where = push(folder, options.repo, private=not options.public, revision=options.revision, tell=tell)
    return Exported(where, files_in(folder))
