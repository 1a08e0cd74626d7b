"""Cells to measure quality on: two tiny decoders and an encoder, each with tasks that it does not know.

    intents   a message to a bank -> its intent in words, one of 77 (BANKING77)
    sums      a question of GSM8K -> the working of its answer
    plays     Shakespeare, raw text          code      Python's standard library, raw text
    classes   a message to a bank -> its intent, as a class

The first base is the tests' own, pretrained on Python source; the second is that of the diagnosis suite, pretrained on
Shakespeare and GSM8K's questions. What a base was pretrained on is no task of it.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks" / "diagnosis"))

from suite import read_results  # noqa: E402
from tiny_model import base_folder, data_folder  # noqa: E402

NUM_TRAIN, NUM_EVAL = 4000, 240
EMBEDDED = {"minilm": "embedded:all-minilm-l6-v2", "smollm2": "embedded:smollm2-135m-instruct"}
_WINDOW = 160  # characters of raw text in a row
Row = dict[str, str]


@dataclass(frozen=True)
class Cell:
    """A base and a task."""

    base: str
    task: str

    @property
    def key(self) -> str:
        return f"{self.base} {self.task}"


CELLS = (
    *(Cell("python", task) for task in ("intents", "sums", "plays", "classes")),
    *(Cell("plays", task) for task in ("intents", "sums", "code")),
    Cell("minilm", "classes"),
)


def base_of(cell: Cell, data: Path) -> str:
    """Return the base as a recipe names it."""
    if cell.base in EMBEDDED:
        return EMBEDDED[cell.base]
    return str(ROOT / "tests" / "assets" / "tiny-llama" if cell.base == "python" else base_folder(data))


def rows_of(task: str, data: Path) -> tuple[list[Row], list[Row]]:
    """Return (rows to train on, rows held out), shuffled once and for all; none is in both."""
    if task in {"intents", "classes"}:
        sides = [_messages(data / "banking77" / f"{name}.csv", task) for name in ("train", "test")]
    elif task == "sums":
        sides = [_workings(data / "gsm8k" / f"{name}.jsonl") for name in ("train", "test")]
    else:
        text = (data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8") if task == "plays" else _source()
        cut = int(len(text) * 0.9)
        sides = [
            [{"text": part[i : i + _WINDOW]} for i in range(0, len(part) - _WINDOW, _WINDOW)]
            for part in (text[:cut], text[cut:])
        ]
    for side in sides:
        random.Random(0).shuffle(side)
    known = {json.dumps(row) for row in sides[0]}
    return sides[0][:NUM_TRAIN], [row for row in sides[1] if json.dumps(row) not in known][:NUM_EVAL]


def _messages(path: Path, task: str) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if len(row["text"]) < 140]
    if task == "classes":
        return [{"text": row["text"].strip(), "label": row["category"]} for row in rows]
    return [
        {"prompt": f"{row['text'].strip()}\nIntent:", "completion": " " + row["category"].replace("_", " ")}
        for row in rows
    ]


def _workings(path: Path) -> list[Row]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        {"prompt": row["question"][-90:] + "\n", "completion": row["answer"].partition("\n####")[0][:110]}
        for row in rows
    ]


def _source() -> str:
    """Return Python source of the standard library that is plain text, a megabyte of it."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.Random(0).shuffle(files)
    return "\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)[:1_000_000]


def source_rows(*, window: int) -> list[Row]:
    """Return rows of `window` characters of Python source, shuffled once and for all."""
    text = _source()
    rows = [{"text": text[start : start + window]} for start in range(0, len(text) - window, window)]
    random.Random(0).shuffle(rows)
    return rows


def options(description: str, *, results: Path, cells: str = "") -> argparse.ArgumentParser:
    """Return the options that these benchmarks share."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--data", help="folder of the data sets")
    parser.add_argument("--cells", default=cells, help="separated by commas")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--results", type=Path, default=results)
    return parser


def train_all(
    train: Callable[..., dict[str, Any]], waiting: Iterable[tuple[str, tuple[Any, ...]]], asked: argparse.Namespace
) -> list[dict[str, Any]]:
    """Train what the results file lacks of `waiting`, (key, arguments of `train`), and return its lines.

    `train` gets a folder, which is gone afterwards, its arguments and the folder of the data; it runs in one of several
    processes.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    data = data_folder(asked.data)
    base_folder(data)
    made = {line["key"] for line in read_results(asked.results)}
    missing = [(key, arguments) for key, arguments in waiting if key not in made]
    print(f"{len(missing)} trainings to go", flush=True)
    with ProcessPoolExecutor(asked.workers) as pool:
        for future in as_completed([pool.submit(train_one, train, key, arguments, data) for key, arguments in missing]):
            line = future.result()
            with asked.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{line['key']}: {line['loss']:.4f} ({line['seconds']:.0f} s)", flush=True)
    return read_results(asked.results)


def train_one(train: Callable[..., dict[str, Any]], key: str, arguments: tuple[Any, ...], data: Path) -> dict[str, Any]:
    """Train once, in one thread and in a folder of its own. Returns the line of the results file."""
    import torch

    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="peftkit-quality-", ignore_cleanup_errors=True) as folder:
        line = train(Path(folder), *arguments, data)
    return {"key": key, **line, "seconds": round(time.perf_counter() - started, 1)}


def recipe_of(cell: Cell, folder: Path, data: Path, *, steps: int, batch: int, seed: int) -> dict[str, Any]:
    """Return a recipe with nothing but base, method, data and the size of the run."""
    train, held_out = rows_of(cell.task, data)
    for name, rows in (("train", train), ("eval", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {
        "base": base_of(cell, data),
        "method": {"name": "lora"},
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), "waive": ["near-leakage"]},
        "train": {
            "max_steps": steps,
            "batch_size": batch,
            "micro_batch": batch,
            "max_length": 128,
            "eval_steps": steps,
            "checkpoint_steps": steps,
            "packing": False,
        },
        "evaluate": {"metric": None},
        "diagnose": {"escalate": "off"},
        "seed": seed,
    }
