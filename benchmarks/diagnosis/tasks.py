"""Two real tasks that the tiny base does not know and can learn in some 150 steps.

`intents`: a message to a bank (BANKING77) -> its intent in words, one of 16. `working`: a step of a GSM8K
answer up to its calculation -> the calculation, its result, and the rest of the step. Rows are
{"prompt": ..., "completion": ...} of at most 64 tokens; what is held out comes from the official test sets.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tiny_model import read_lines

Row = dict[str, str]
NUM_INTENTS = 16
FEWEST = 90  # messages of an intent
NUM_EVAL = 240
MOST_CHARACTERS = 110  # of a row: some 50 tokens
_STEP = re.compile(r"^(.{8,80}?)\s*<<([0-9.*/+()-]+=[0-9.]+)>>(.{0,40})$")


@dataclass(frozen=True)
class Task:
    """Rows to train on and rows held out. `classes` are the completions, where there are few."""

    name: str
    train: tuple[Row, ...]
    held_out: tuple[Row, ...]
    classes: tuple[str, ...] = ()


def _messages(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if "\n" not in row["text"]]


def _intents(data: Path) -> Task:
    train, held = (_messages(data / "banking77" / f"{name}.csv") for name in ("train", "test"))
    counted = Counter(row["category"] for row in train)
    kept = set(sorted(name for name, number in counted.items() if number >= FEWEST)[:NUM_INTENTS])

    def rows(messages: list[Row]) -> list[Row]:
        return [
            {"prompt": f"{m['text'].strip()}\nIntent:", "completion": " " + m["category"].replace("_", " ")}
            for m in messages
            if m["category"] in kept and len(m["text"]) < MOST_CHARACTERS
        ]

    classes = tuple(sorted(" " + name.replace("_", " ") for name in kept))
    return _task("intents", rows(train), rows(held), classes)


def _working(data: Path) -> Task:
    def rows(path: Path) -> list[Row]:
        found = []
        for problem in read_lines(path):
            for line in problem["answer"].split("\n"):
                step = _STEP.match(line.strip())
                if step and len(line) < MOST_CHARACTERS:
                    said, calculation, rest = step.groups()
                    found.append({"prompt": said, "completion": f" <<{calculation}>>{rest}"})
        return found

    folder = data / "gsm8k"
    return _task("working", rows(folder / "train.jsonl"), rows(folder / "test.jsonl"), ())


def _task(name: str, train: list[Row], held: list[Row], classes: tuple[str, ...]) -> Task:
    """Shuffled once and for all; nothing held out is trained on, and no prompt comes twice."""
    draw = random.Random(0)
    held = list({row["prompt"]: row for row in held}.values())
    known = {row["prompt"] for row in held}
    train = [row for row in {row["prompt"]: row for row in train}.values() if row["prompt"] not in known]
    draw.shuffle(train)
    draw.shuffle(held)
    return Task(name, tuple(train), tuple(held[:NUM_EVAL]), classes)


TASKS = {"intents": _intents, "working": _working}


def load_task(name: str, data: Path) -> Task:
    """A task by name, from the folder of the data sets."""
    return TASKS[name](data)


def write_rows(path: Path, rows: list[Row] | tuple[Row, ...]) -> Path:
    """A .jsonl file of rows."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
