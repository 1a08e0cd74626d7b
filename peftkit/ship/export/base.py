"""What all exports share: their options, their outcome, and a whole model to read from."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.plan import read_plan
from peftkit.results.find import is_away, refuse_damaged, run_of
from peftkit.rundir import MANIFEST, RunDir
from peftkit.rundir.files import TEMPORARY
from peftkit.ship.merge.merge import MergeOptions, merge
from peftkit.ship.merge.report import read_report
from peftkit.units import html_table, show_bytes

Observer = Callable[[dict[str, Any]], None]
# option -> the targets that it has an effect on
_FOR: dict[str, tuple[str, ...]] = {
    "engine": ("adapter",),
    "dtype": ("safetensors", "gguf", "ollama"),
    "pre": ("gguf", "ollama"),
    "lora": ("gguf", "ollama"),
    "base": ("safetensors", "gguf", "ollama"),
    "data": ("safetensors", "gguf", "ollama"),
    "force": ("safetensors", "gguf", "ollama"),
    "repo": ("hub",),
    "public": ("hub",),
    "revision": ("hub",),
}
_FLAGS = {"engine": "--for"}


@dataclass(frozen=True)
class ExportOptions:
    """What to export, and how.

    `to` is adapter, safetensors, gguf, ollama or hub, `out` a new folder (hub: none). `engine` is vllm.
    `dtype` is that of the weights, `base`, `base_model`, `data` and `force` are as in merging. `lora` writes
    the adapter alone as GGUF, `pre` names its pre-tokenizer. `repo` is where the hub gets it, private unless
    `public`, on the branch `revision`.
    """

    to: str
    out: str | None = None
    engine: str | None = None
    dtype: str | None = None
    base: str | None = None
    base_model: str | None = None
    data: str | None = None
    force: bool = False
    lora: bool = False
    pre: str | None = None
    repo: str | None = None
    public: bool = False
    revision: str | None = None

    def without_effect(self) -> list[Problem]:
        """Options that this target does not have, and what it needs."""
        found = []
        for name, targets in _FOR.items():
            value = getattr(self, name)
            if value and self.to not in targets:
                flag = _FLAGS.get(name, f"--{name}")
                got = f"{value} with --to {self.to}" if value is not True else f"given with --to {self.to}"
                found.append(Problem(flag, got, f"--to {' or '.join(targets)}", "leave it out"))
        if self.lora:
            for name in ("dtype", "pre", "base", "data", "force"):
                if getattr(self, name):
                    got = f"{getattr(self, name)} with --lora"
                    found.append(Problem(f"--{name}", got, "a whole model", "leave it out"))
        if self.to == "hub" and not self.repo:
            found.append(Problem("--repo", "nothing", "OWNER/NAME on the hub"))
        if self.to == "hub" and self.out:
            found.append(Problem("--out", f"{self.out} with --to hub", "no folder", "leave it out"))
        if self.to != "hub" and not self.out:
            found.append(Problem("--out", "nothing", "a new folder"))
        return found

    def refuse_merging(self) -> None:
        """Raises UserError for options of a merge, where the model is whole already."""
        given = {
            "--base": self.base,
            "--data": self.data,
            "--base-model": self.base_model,
            "--force": self.force,
        }
        wrong = [
            Problem(flag, f"{value} with a model that is whole", "a run with an adapter", "leave it out")
            for flag, value in given.items()
            if value
        ]
        if wrong:
            raise UserError(wrong)

    def merging(self, dtype: str | None) -> MergeOptions:
        """How the model is merged on the way."""
        return MergeOptions(
            base=self.base or "auto",
            base_model=self.base_model,
            dtype=dtype,
            data=self.data,
            force=self.force,
        )


@dataclass(frozen=True)
class Exported:
    """What was written: `where` is a folder or an address, `files` with their bytes, and what to know."""

    where: str
    files: tuple[tuple[str, int], ...]
    said: tuple[str, ...] = ()
    merge: Mapping[str, Any] | None = None  # merge_report.json, where something was merged

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) for a table."""
        found = [(name, show_bytes(size)) for name, size in self.files]
        if self.merge and self.merge.get("kl") is not None:
            text = f"KL {self.merge['kl']:.3g} nats, same top token {self.merge['top1_agreement']:.2%}"
            found.append(("merged, against what was trained", text))
        return found

    def _repr_html_(self) -> str:
        return html_table([*self.rows(), *((text, "") for text in self.said)])


def files_in(folder: Path) -> tuple[tuple[str, int], ...]:
    """Names and bytes of a folder's files."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple((path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths)


def whole_model(path: Path, options: ExportOptions | None = None) -> Path | None:
    """The folder of a model that is whole already: a full fine-tune's, a merged one; None for adapters.

    With `options`, those that merging alone has are refused for a model that is whole.
    """
    folder = _whole(path)
    if folder is not None and options is not None:
        options.refuse_merging()
    return folder


def _whole(path: Path) -> Path | None:
    place = run_of(path)
    if is_away(path):
        return None
    if (place / "plan.json").is_file():
        run = RunDir.open(place)
        if read_plan(run).method.peft is not None:
            return None
        if not run.model.is_dir():
            fix = f"go on with it: peftkit resume {path}"
            raise UserError(Problem(str(path), "a run without a result", "a finished run", fix))
        refuse_damaged(run.model)
        return run.model
    if (path / "config.json").is_file():
        if (path / MANIFEST).is_file():
            refuse_damaged(path)
        return path
    return None


@contextmanager
def dense(
    path: Path, near: Path, options: MergeOptions, observer: Observer
) -> Iterator[tuple[Path, Mapping[str, Any] | None]]:
    """(folder of a whole model, its merge report): one that is there, or merged beside `near` for now."""
    folder = whole_model(path)
    if folder is not None:
        yield folder, read_report(folder)
        return
    near.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=near.parent, prefix=f"{TEMPORARY}{near.name}-") as place:
        made = Path(place) / near.name
        merge([path], made, options, observer=observer)
        yield made, read_report(made)
