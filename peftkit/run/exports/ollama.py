"""For Ollama: GGUF with a Modelfile that names template, stop tokens and context length."""

from __future__ import annotations

import shlex
from pathlib import Path

from peftkit.errors import Problem, UserError
from peftkit.run.card import write_card
from peftkit.run.exports.base import Exported, ExportOptions, Observer, files_in
from peftkit.run.exports.gguf import write_gguf
from peftkit.run.place import new_folder
from peftkit.rundir import publish_folder


def export(path: Path, options: ExportOptions, observer: Observer) -> Exported:
    """A folder for `ollama create NAME -f Modelfile`. Raises UserError as the GGUF export does."""
    from peftkit.ship.ollama import write_modelfile

    if options.lora:
        got, fix = "an adapter alone", "leave out --lora: the merged model is what Ollama runs everywhere"
        raise UserError(Problem("--lora", got, "a whole model", fix))
    out = new_folder(str(options.out))
    with publish_folder(out) as staging:

        def modelfile(gguf: Path, folder: Path) -> None:
            write_modelfile(gguf, staging / "Modelfile", folder=folder, name=out.name)

        report, notes = write_gguf(path, staging, out, options, observer, beside=modelfile)
        write_card(staging, path, name=out.name, layout="gguf", merge_report=report)
    name = shlex.quote(out.name)
    said = f"cd {shlex.quote(str(out))} && ollama create {name} -f Modelfile && ollama run {name}"
    return Exported(str(out), files_in(out), (*notes, said), report)
