"""Conversion of pickled weights to safetensors in a new folder: `peftkit convert`.

Everything else refuses pickled weights. They are read by `unpickle.py`, in a separate process.
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
    PICKLE_SUFFIXES,
    contained_file,
    pickled_weights,
    read_json_file,
    shard_names,
)
from peftkit.rundir import publish_folder, write_json
from peftkit.units import html_table, show_bytes, show_count

_COPIED_SUFFIXES = (".json", ".txt", ".jinja", ".model", ".tiktoken", ".md")  # configuration, tokenizer, card
_INDEX = "pytorch_model.bin.index.json"
_MAX_EXPANSION = 4  # times the file: three tied tables are stored once, and written each
_READER = Path(__file__).with_name("unpickle.py")
_READER_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "SYSTEMROOT")


@dataclass(frozen=True)
class Converted:
    """The written files. `left` names files that were not copied: code, and other pickled files."""

    out: Path
    files: tuple[str, ...]
    num_tensors: int
    num_bytes: int
    left: tuple[str, ...]

    def rows(self) -> list[tuple[str, str]]:
        """Return (name, value) rows for a table."""
        found = [
            ("tensors", show_count(self.num_tensors)),
            ("size", show_bytes(self.num_bytes)),
            ("written", str(self.out)),
        ]
        return [*found, *(("left behind", name) for name in self.left)]

    def _repr_html_(self) -> str:
        return html_table(self.rows())


def _pickled_shards(folder: Path) -> list[str]:
    """Return the pickled weight files of a folder.

    Raises UserError where there are none, or the index is invalid.
    """
    if (folder / _INDEX).is_file():
        index = read_json_file(folder, _INDEX)
        return shard_names(index, folder / _INDEX, suffixes=PICKLE_SUFFIXES)
    single = next(
        (candidate for candidate in ("adapter_model.bin", "pytorch_model.bin") if (folder / candidate).is_file()), None
    )
    if single is not None:
        return [single]
    names = [name for name in pickled_weights(folder) if name.startswith(("pytorch_model", "adapter_model"))]
    if not names:
        expected = "pytorch_model*.bin or adapter_model.bin, or one file named as PATH"
        raise UserError(Problem(str(folder), "a folder without known pickled weights", expected))
    return names


def _run_reader(jobs: list[tuple[Path, Path, int]]) -> list[dict[str, Any]]:
    """Convert files in the reader process, which gets no secret of the environment.

    Raises UserError where it fails.
    """
    environment = {name: os.environ[name] for name in _READER_ENVIRONMENT if name in os.environ}
    request = json.dumps([[str(source), str(target), limit] for source, target, limit in jobs])
    with tempfile.TemporaryFile("w+") as request_file, tempfile.TemporaryFile("w+") as reply_file:
        request_file.write(request)
        request_file.seek(0)
        command = [sys.executable, "-P", "-W", "ignore", str(_READER)]
        child = subprocess.Popen(
            command, stdin=request_file, stdout=reply_file, stderr=subprocess.PIPE, env=environment, text=True
        )
        try:
            while True:
                try:
                    _, stderr = child.communicate(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    interrupt.stop_if_requested("interrupted while converting; nothing was written")
        finally:
            child.kill()
        reply_file.seek(0)
        text = reply_file.read().strip()
    reply = json.loads(text.splitlines()[-1]) if text else {}
    if "made" in reply:
        return list(reply["made"])
    last_line = (stderr.strip().splitlines() or [f"the reader ended with {child.returncode}"])[-1]
    source = reply.get("source", str(jobs[0][0]))
    raise UserError(Problem(source, reply.get("fault", last_line[:300]), "pickled tensors and nothing else"))


def _copy_metadata(folder: Path, staging: Path) -> list[str]:
    """Copy configuration and tokenizer.

    Returns the names of skipped files: code, pickled and oversized ones.
    """
    skipped = []
    for path in sorted(folder.iterdir()):
        if path.name.endswith(".index.json") or path.name in {"MANIFEST.json", ".gitattributes"}:
            continue
        is_small = path.is_file() and path.stat().st_size <= MAX_BYTES["tokenizer.json"]
        if path.suffix in _COPIED_SUFFIXES and is_small:
            shutil.copyfile(contained_file(folder, path.name), staging / path.name)
        elif path.is_file():
            skipped.append(path.name)
    return skipped


def convert_weights(path: Path, *, out: Path) -> Converted:
    """Convert the pickled weights of a folder, or one file, to safetensors in the new folder `out`.

    `out` is complete or absent. Raises UserError for files that hold more than tensors, and where `out`
    exists.
    """
    if not path.exists():
        raise UserError(Problem(str(path), "no such path", "a folder with pickled weights, or a file"))
    if out.exists():
        raise UserError(Problem("--out", f"{out}, which already exists", "a new folder"))
    if path.is_file() and path.suffix not in PICKLE_SUFFIXES:
        raise UserError(Problem(str(path), f"a file of kind {path.suffix!r}", f"one of {', '.join(PICKLE_SUFFIXES)}"))
    with interrupt.catch_signals(), publish_folder(out, source=path.name) as staging:
        sources = [contained_file(path, name) for name in _pickled_shards(path)] if path.is_dir() else [path]
        sizes = [source.stat().st_size for source in sources]
        needed_bytes, free_bytes = sum(sizes), shutil.disk_usage(staging).free
        if needed_bytes > free_bytes:
            got = f"{show_bytes(needed_bytes)} to write, {show_bytes(free_bytes)} free"
            raise UserError(
                Problem(str(staging.parent), got, "enough disk space for the weights", "choose another --out")
            )
        # as transformers and PEFT look for them
        single_name = "adapter_model" if sources[0].name.startswith("adapter") else "model"
        numbered_names = [f"model-{i:05d}-of-{len(sources):05d}" for i in range(1, len(sources) + 1)]
        names = numbered_names if len(sources) > 1 else [single_name]
        targets = [staging / f"{name}.safetensors" for name in names]
        jobs = [(s, t, _MAX_EXPANSION * n + 2**20) for s, t, n in zip(sources, targets, sizes, strict=True)]
        results = _run_reader(jobs)
        tensor_names = {name for result in results for name in result["sizes"]}
        num_bytes = sum(size for result in results for size in result["sizes"].values())
        if len(results) > 1:
            tensor_files = [(name, Path(result["target"]).name) for result in results for name in result["sizes"]]
            if len(tensor_files) != len(tensor_names):
                raise UserError(Problem(str(path), "tensors that occur in several shards", "each tensor in one shard"))
            index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(tensor_files))}
            write_json(staging / "model.safetensors.index.json", index)
        skipped = _copy_metadata(path, staging) if path.is_dir() else []
        converted_names = {source.name for source, _, _ in jobs}
    files = tuple(Path(result["target"]).name for result in results)
    return Converted(
        out, files, len(tensor_names), num_bytes, tuple(name for name in skipped if name not in converted_names)
    )
