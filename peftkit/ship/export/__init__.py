"""Export: what was trained in the form that somebody else reads. A target is a file here and a line below."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peftkit import interrupt
from peftkit.errors import Problem, UserError, did_you_mean
from peftkit.rundir.disk import problems_told
from peftkit.ship.export import adapter, hub, ollama, safetensors
from peftkit.ship.export.base import Exported, ExportOptions, Observer
from peftkit.ship.export.gguf.target import export as export_gguf

TARGETS: dict[str, Callable[[Path, ExportOptions, Observer], Exported]] = {
    "adapter": adapter.export,
    "safetensors": safetensors.export,
    "gguf": export_gguf,
    "ollama": ollama.export,
    "hub": hub.export,
}


def export(path: Path, options: ExportOptions, observer: Observer = lambda event: None) -> Exported:
    """Write or push what `options` ask for. Raises UserError for the user's to mend.

    What is merged on the way is compared with what was trained, as by `merge`, with the same consequences.
    """
    if options.to not in TARGETS:
        expected = ", ".join(TARGETS)
        raise UserError(Problem("--to", options.to, expected, did_you_mean(options.to, list(TARGETS))))
    if problems := options.without_effect():
        raise UserError(problems)
    with interrupt.listening(), problems_told(Path(options.out or ".")):
        return TARGETS[options.to](path, options, observer)


__all__ = ["TARGETS", "ExportOptions", "Exported", "export"]
