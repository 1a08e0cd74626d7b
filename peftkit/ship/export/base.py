"""Shared by all export targets: options, outcome, and the full model that they read from."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.model.adapter.edits import read_edits, refuse_unmergeable
from peftkit.model.adapter.load import ADAPTER_WEIGHTS
from peftkit.model.adapter.names import NEVER_IN_NAMES, rename_fix
from peftkit.model.meta.skeleton import meta_model
from peftkit.plan import read_plan
from peftkit.results.find import Adapter, is_standalone_adapter, refuse_damaged, run_folder
from peftkit.rundir import MANIFEST, RunDir
from peftkit.rundir.events import Observer
from peftkit.rundir.files import TEMPORARY_PREFIX
from peftkit.ship.files.tensors import read_all_entries
from peftkit.ship.merge.merge import MergeOptions, merge
from peftkit.ship.merge.report import read_merge_report
from peftkit.units import html_table, show_bytes

# option -> the targets that it has an effect on
_OPTION_TARGETS: dict[str, tuple[str, ...]] = {
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
_FLAG_NAMES = {"engine": "--for"}


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    `to` is adapter, safetensors, gguf, ollama or hub, `out` a new folder (hub: none). `engine` is vllm.
    `dtype` is that of the weights, `base`, `base_model`, `data` and `force` are as in merging. `lora` writes
    the adapter alone as GGUF, `pre` names its pre-tokenizer. `repo` is the hub repository, private unless
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

    def problems(self) -> list[Problem]:
        """Return the problems: options that the target does not have, and required ones that are missing."""
        problems = []
        for name, targets in _OPTION_TARGETS.items():
            value = getattr(self, name)
            if value and self.to not in targets:
                flag = _FLAG_NAMES.get(name, f"--{name}")
                got = f"{value} with --to {self.to}" if value is not True else f"given with --to {self.to}"
                problems.append(Problem(flag, got, f"--to {' or '.join(targets)}", "leave it out"))
        if self.lora:
            for name in ("dtype", "pre", "base", "data", "force"):
                if getattr(self, name):
                    got = f"{getattr(self, name)} with --lora"
                    problems.append(Problem(f"--{name}", got, "an export of the full model", "leave it out"))
        if self.to == "hub" and not self.repo:
            problems.append(Problem("--repo", "nothing", "OWNER/NAME on the hub"))
        if self.to == "hub" and self.out:
            problems.append(Problem("--out", f"{self.out} with --to hub", "no folder", "leave it out"))
        if self.to != "hub" and not self.out:
            problems.append(Problem("--out", "nothing", "a new folder"))
        return problems

    def refuse_merge_options(self) -> None:
        """Raise UserError for merge options given with a full model."""
        merge_flags = {"--base": self.base, "--data": self.data, "--base-model": self.base_model, "--force": self.force}
        problems = [
            Problem(flag, f"{value} with a full model", "a run with an adapter", "leave it out")
            for flag, value in merge_flags.items()
            if value
        ]
        if problems:
            raise UserError(problems)

    def merge_options(self, dtype: str | None) -> MergeOptions:
        """Return the options of the merge on the way, with weights of `dtype`."""
        return MergeOptions(
            base=self.base or "auto", base_model=self.base_model, dtype=dtype, data=self.data, force=self.force
        )


@dataclass(frozen=True)
class Exported:
    """Outcome of an export: `where` is a folder or an address, `files` are (name, bytes), plus notes."""

    where: str
    files: tuple[tuple[str, int], ...]
    said: tuple[str, ...] = ()
    merge: Mapping[str, Any] | None = None  # merge_report.json, where something was merged

    def rows(self) -> list[tuple[str, str]]:
        """Return (label, value) rows for a table."""
        found = [(name, show_bytes(size)) for name, size in self.files]
        if self.merge and self.merge.get("kl") is not None:
            text = f"KL {self.merge['kl']:.3g} nats, same top token {self.merge['top1_agreement']:.2%}"
            found.append(("merged, against the trained model", text))
        return found

    def _repr_html_(self) -> str:
        return html_table([*self.rows(), *((text, "") for text in self.said)])


def file_sizes(folder: Path) -> tuple[tuple[str, int], ...]:
    """Return (name, bytes) of every file in a folder, sorted by path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple((path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths)


def full_model_folder(path: Path, options: ExportOptions | None = None) -> Path | None:
    """Return the folder of a full model (a full fine-tune or a merged model); None for adapters.

    With `options`, raises UserError for merge options given with a full model, and always for a run without
    a result and for damaged files.
    """
    folder_of_run = run_folder(path)
    if is_standalone_adapter(path):
        folder = None
    elif (folder_of_run / "plan.json").is_file():
        run = RunDir.open(folder_of_run)
        if read_plan(run).method.peft is not None:
            folder = None
        else:
            if not run.model.is_dir():
                fix = f"finish it first: peftkit resume {path}"
                raise UserError(Problem(str(path), "a run without a result", "a finished run", fix))
            refuse_damaged(run.model)
            folder = run.model
    elif (path / "config.json").is_file():
        if (path / MANIFEST).is_file():
            refuse_damaged(path)
        folder = path
    else:
        folder = None
    if folder is not None and options is not None:
        options.refuse_merge_options()
    return folder


@contextmanager
def open_full_model(
    path: Path, out: Path, options: MergeOptions, observer: Observer
) -> Iterator[tuple[Path, Mapping[str, Any] | None]]:
    """Yield (folder, merge report) of a full model: an existing one, or a merge in a folder beside `out`."""
    folder = full_model_folder(path)
    if folder is not None:
        yield folder, read_merge_report(folder)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{TEMPORARY_PREFIX}{out.name}-") as temporary:
        merged_folder = Path(temporary) / out.name
        merge([path], merged_folder, options, observer=observer)
        yield merged_folder, read_merge_report(merged_folder)


def refuse_foreign_names(folder: Path) -> None:
    """Raise UserError for tensors under names that PEFT does not load, and for one of A and B without the other."""
    names = set(read_all_entries([folder / ADAPTER_WEIGHTS]))
    foreign = [name for name in sorted(names) if any(old in name for old, _ in NEVER_IN_NAMES)]
    halves = {name: name.replace(".lora_A.", ".lora_B.") for name in names if ".lora_A." in name}
    halves |= {name: name.replace(".lora_B.", ".lora_A.") for name in names if ".lora_B." in name}
    alone = [name for name, other in sorted(halves.items()) if other not in names]
    parts = [(old, new) for old, new in NEVER_IN_NAMES if any(old in name for name in foreign)]
    expected, fix = "names as PEFT saves them", rename_fix(folder, parts)
    problems = [Problem(str(folder), name, expected, fix) for name in foreign[:1]]
    problems += [Problem(str(folder), f"{name} without {halves[name]}", "both factors") for name in alone[:5]]
    if problems:
        raise UserError(problems)


def require_every_tensor(adapter: Adapter) -> None:
    """Raise UserError unless an adapter's file holds each tensor that its base and configuration ask for, and no other.

    Adapters that cannot be merged are left to PEFT.
    """
    try:
        refuse_unmergeable(adapter.folder, adapter.config)
    except UserError:
        return
    else:
        shapes = {name: entry.shape for name, entry in read_all_entries([adapter.folder / ADAPTER_WEIGHTS]).items()}
        read_edits(meta_model(adapter.source, adapter.base), adapter.folder, shapes)
