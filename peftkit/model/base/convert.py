"""Pickled weights of a folder or a file as safetensors, in a new folder: `peftkit convert`.

Everything else refuses pickled weights. Reading is left to `unpickle.py`, in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit import interrupt
from peftkit.errors import Problem, UserError
from peftkit.model.base.file_checks import (
    MAX_BYTES,
    PICKLED,
    contained_file,
    pickled_weights,
    plain_names,
    read_json_file,
)
from peftkit.rundir import publish_folder, write_json
from peftkit.units import show_bytes

_COPIED = (".json", ".txt", ".jinja", ".model", ".tiktoken", ".md")  # configuration, tokenizer, card
_INDEX = "pytorch_model.bin.index.json"
_EXPANDS = 4  # times the file: three tied tables are stored once, and written each
_READER = Path(__file__).with_name("unpickle.py")
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "SYSTEMROOT")


@dataclass(frozen=True)
class Converted:
    """What was written. `left` names files that were not taken along: code, and what else is pickled."""

    out: Path
    files: tuple[str, ...]
    num_tensors: int
    num_bytes: int
    left: tuple[str, ...]


def _shards(folder: Path) -> list[str]:
    """The files that hold a folder's weights. Raises UserError where there are none, or an index lies."""
    if (folder / _INDEX).is_file():
        index = read_json_file(folder, _INDEX)
        return plain_names(index, folder / _INDEX, suffixes=PICKLED)
    whole = next((n for n in ("adapter_model.bin", "pytorch_model.bin") if (folder / n).is_file()), None)
    if whole is not None:
        return [whole]
    found = [name for name in pickled_weights(folder) if name.startswith(("pytorch_model", "adapter_model"))]
    if not found:
        expected = "pytorch_model*.bin or adapter_model.bin, or one file named as PATH"
        raise UserError(Problem(str(folder), "a folder without pickled weights that are known", expected))
    return found


def _targets(sources: list[Path]) -> list[str]:
    """How the written files are called: as the library looks for them."""
    if len(sources) > 1:
        return [f"model-{i:05d}-of-{len(sources):05d}.safetensors" for i in range(1, len(sources) + 1)]
    adapter = sources[0].name.startswith("adapter")
    return ["adapter_model.safetensors" if adapter else "model.safetensors"]


def _read(jobs: list[tuple[Path, Path, int]]) -> list[dict[str, Any]]:
    """Let the reader convert files; it sees no secret of the environment. Raises UserError where it stops."""
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    asked = json.dumps([[str(source), str(target), limit] for source, target, limit in jobs])
    with tempfile.TemporaryFile("w+") as asking, tempfile.TemporaryFile("w+") as answer:
        asking.write(asked)
        asking.seek(0)
        command = [sys.executable, "-P", "-W", "ignore", str(_READER)]
        child = subprocess.Popen(
            command, stdin=asking, stdout=answer, stderr=subprocess.PIPE, env=environment, text=True
        )
        try:
            while True:
                try:
                    _, told = child.communicate(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    interrupt.stop_if_requested("interrupted while converting; nothing was written")
        finally:
            child.kill()
        answer.seek(0)
        text = answer.read().strip()
    said = json.loads(text.splitlines()[-1]) if text else {}
    if "made" in said:
        return list(said["made"])
    last = (told.strip().splitlines() or [f"the reader ended with {child.returncode}"])[-1]
    source = said.get("source", str(jobs[0][0]))
    raise UserError(Problem(source, said.get("fault", last[:300]), "pickled tensors and nothing else"))


def _jobs(path: Path, staging: Path) -> list[tuple[Path, Path, int]]:
    sources = [contained_file(path, name) for name in _shards(path)] if path.is_dir() else [path]
    sizes = [source.stat().st_size for source in sources]
    need, free = sum(sizes), shutil.disk_usage(staging).free
    if need > free:
        got = f"{show_bytes(need)} to write, {show_bytes(free)} free"
        raise UserError(Problem(str(staging.parent), got, "room for the weights", "choose another --out"))
    targets = [staging / name for name in _targets(sources)]
    return [(s, t, _EXPANDS * n + 2**20) for s, t, n in zip(sources, targets, sizes, strict=True)]


def _copy_others(folder: Path, staging: Path) -> list[str]:
    """Copy configuration and tokenizer. Returns what stayed: code, what is pickled, and what is too large."""
    left = []
    for path in sorted(folder.iterdir()):
        if path.name.endswith(".index.json") or path.name in {"MANIFEST.json", ".gitattributes"}:
            continue
        small = path.is_file() and path.stat().st_size <= MAX_BYTES["tokenizer.json"]
        if path.suffix in _COPIED and small:
            shutil.copyfile(contained_file(folder, path.name), staging / path.name)
        elif path.is_file():
            left.append(path.name)
    return left


def convert_weights(path: Path, *, out: Path) -> Converted:
    """Write the pickled weights of a folder, or one file, as safetensors into the new folder `out`.

    `out` is complete or absent. Raises UserError for what holds more than tensors, and where `out` exists.
    """
    if not path.exists():
        raise UserError(Problem(str(path), "nothing there", "a folder with pickled weights, or a file"))
    if out.exists():
        raise UserError(Problem("--out", f"{out}, which is there already", "a new folder"))
    if path.is_file() and path.suffix not in PICKLED:
        raise UserError(Problem(str(path), f"a file of kind {path.suffix!r}", f"one of {', '.join(PICKLED)}"))
    with interrupt.listening(), publish_folder(out, source=path.name) as staging:
        jobs = _jobs(path, staging)
        made = _read(jobs)
        names = {name for one in made for name in one["sizes"]}
        num_bytes = sum(size for one in made for size in one["sizes"].values())
        if len(made) > 1:
            placed = [(name, Path(one["target"]).name) for one in made for name in one["sizes"]]
            if len(placed) != len(names):
                raise UserError(Problem(str(path), "tensors that several shards hold", "each of them once"))
            index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(placed))}
            write_json(staging / "model.safetensors.index.json", index)
        left = _copy_others(path, staging) if path.is_dir() else []
        sources = {source.name for source, _, _ in jobs}
    files = tuple(Path(one["target"]).name for one in made)
    return Converted(out, files, len(names), num_bytes, tuple(name for name in left if name not in sources))
