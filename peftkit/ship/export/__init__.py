"""Export targets: one file per target, and one line per target in `TARGETS`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peftkit import interrupt
from peftkit.errors import Problem, UserError, did_you_mean
from peftkit.rundir.disk import explain_disk_errors
from peftkit.rundir.events import Observer, ignore_event
from peftkit.ship.export import adapter, hub, ollama, safetensors
from peftkit.ship.export.base import Exported, ExportOptions
from peftkit.ship.export.gguf.target import export as export_gguf

TARGETS: dict[str, Callable[[Path, ExportOptions, Observer], Exported]] = {
    "adapter": adapter.export,
    "safetensors": safetensors.export,
    "gguf": export_gguf,
    "ollama": ollama.export,
    "hub": hub.export,
}


def export(path: Path, options: ExportOptions, observer: Observer = ignore_event) -> Exported:
    """Write or push what `options` ask for. Raises UserError for problems that the user can fix.

    A merge on the way is compared with the trained model, as by `merge`, with the same consequences.
    """
    if options.to not in TARGETS:
        expected = ", ".join(TARGETS)
        raise UserError(Problem("--to", options.to, expected, did_you_mean(options.to, list(TARGETS))))
    if problems := options.problems():
        raise UserError(problems)
    with interrupt.catch_signals(), explain_disk_errors(Path(options.out or ".")):
        return TARGETS[options.to](path, options, observer)


__all__ = ["TARGETS", "ExportOptions", "Exported", "export"]
