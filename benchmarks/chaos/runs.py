"""Runs that are killed, stopped, starved and damaged, and what became of each.

    python benchmarks/chaos/runs.py [--quick] [--only NAME ...]

Kills at every write point and at 200 random moments, a signal in each phase, no room at each write point,
every file of a checkpoint damaged in every way, 2,000 changed run directories. Each victim is then gone on
with, and must end with the very adapter of a run that nothing hurt, nothing half-written left behind.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.common import RESULTS, write_result
from tests.conftest import TINY_LLAMA
from tests.rigs.chaos.nursery import Nursery
from tests.rigs.chaos.scenes import DAMAGES, Scenes, files_of, mutated, recipe_at

Case = tuple[str, Callable[[Scenes], str | None]]
PHASES = ("phase base", "phase data", "data", "phase model", "parameters", "preflight")
TRAINING = ("step", "eval", "checkpoint", "memory", "phase publish")
WORKERS = 2


def gguf_recipe(place: Path) -> dict:
    """The tiny model as a GGUF file, which a run converts first."""
    from transformers import AutoModelForCausalLM

    from tests.rigs.tiny_gguf import write_gguf

    model = AutoModelForCausalLM.from_pretrained(TINY_LLAMA)
    path = write_gguf(place / "tiny.gguf", model, "llama", TINY_LLAMA / "tokenizer.json")
    return {**recipe_at(place), "base": str(path)}


def kill_points(scenes: Scenes, every: int) -> Iterable[Case]:
    for point in range(1, scenes.num_points + 1, every):
        yield f"point {point}", lambda found, point=point: found.killed_at(point)


def kill_moments(scenes: Scenes, number: int, **more: object) -> Iterable[Case]:
    chance = random.Random(0)
    for count in range(number):
        seconds = chance.uniform(0, 1.02 * scenes.seconds)
        where = {key: f"{value}-{count}" for key, value in more.items()}
        yield f"{seconds:.3f} s", lambda found, s=seconds, w=where: found.killed_after(s, **w)


def signals() -> Iterable[Case]:
    for how in ("SIGTERM", "SIGINT"):
        for event in (*PHASES, *TRAINING):
            step = 5 if event in {"step", "eval"} else 0
            yield f"{how} at {event}", lambda found, e=event, h=how, s=step: found.terminated(e, h, s)


def no_room(scenes: Scenes, every: int) -> Iterable[Case]:
    for point in range(1, scenes.num_points + 1, every):
        yield f"ENOSPC at {point}", lambda found, p=point: found.without_room("ENOSPC", p, p)
    for point in range(1, scenes.num_points + 1, 5 * every):
        yield f"EDQUOT from {point} on", lambda found, p=point: found.without_room("EDQUOT", p, 10**9)
        yield f"ENOSPC for 30 from {point}", lambda found, p=point: found.without_room("ENOSPC", p, p + 30)
    for size in (1_000, 3_000, 10_000, 50_000, 100_000, 200_000, 400_000):
        yield f"no file over {size} bytes", lambda found, s=size: found.with_small_files(s)


def damages(stopped: Path) -> Iterable[Case]:
    for file in files_of(stopped):
        for damage in DAMAGES:
            name = f"{file} {damage.__name__}"
            yield name, lambda found, f=file, d=damage: found.damaged(stopped, f, d)


def changes(place: Path, stopped: Path, number: int) -> Iterable[Case]:
    """A byte, a range, a file or a folder of a run directory changed at random."""
    chance = random.Random(1)

    def change(folder: Path, seed: int) -> None:
        chosen = random.Random(seed)
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in _FREE)
        path = chosen.choice(files)
        data = bytearray(path.read_bytes())
        how = chosen.choice(["flip", "cut", "grow", "zero", "garbage", "swap", "gone"])
        place_ = chosen.randrange(len(data))
        if how == "flip":
            data[place_] ^= 1 << chosen.randrange(8)
        elif how == "cut":
            del data[place_:]
        elif how == "grow":
            data += chosen.randbytes(chosen.randint(1, 100))
        elif how == "zero":
            data[place_ : place_ + 64] = bytes(b ^ 0xFF for b in data[place_ : place_ + 64])
        elif how == "garbage":
            data[:] = chosen.randbytes(len(data) or 1)
        elif how == "swap":
            data.reverse()
        path.unlink() if how == "gone" else path.write_bytes(data)

    for _ in range(number):
        seed = chance.randrange(2**32)
        yield f"seed {seed}", lambda _, s=seed: mutated(place, stopped, lambda f: change(f, s))


# of these nothing is kept to compare with: the lock, and the log, of which whole lines may go unnoticed
_FREE = {"run.lock", "events.jsonl"}


def hurt(name: str, cases: list[Case], pool: list[Scenes]) -> dict:
    """Run cases on all nurseries; the outcome as a row."""
    failed: list[str] = []
    started, lock, free = time.monotonic(), threading.Lock(), list(pool)

    def one(case: Case) -> None:
        with lock:
            scenes = free.pop()
        try:
            fault = case[1](scenes)
        except Exception as error:  # noqa: BLE001  a case that breaks is a failed one
            fault = repr(error)
        with lock:
            free.append(scenes)
            if fault is not None:
                failed.append(f"{case[0]}: {fault}")
                print(f"  {name}, {case[0]}: {fault}", flush=True)

    with ThreadPoolExecutor(len(pool)) as threads:
        list(threads.map(one, cases))
    seconds = time.monotonic() - started
    print(f"{name:42} {len(cases):6} {len(cases) - len(failed):6} {seconds:8.0f} s", flush=True)
    return {"name": name, "cases": len(cases), "held": len(cases) - len(failed), "failed": failed[:20]}


def _with_earlier(rows: list[dict]) -> list[dict]:
    """These rows, and those of an earlier run that `--only` left out."""
    file = RESULTS / "chaos.json"
    earlier = json.loads(file.read_text())["rows"] if file.exists() else []
    names = [row["name"] for row in rows]
    return [row for row in earlier if row["name"] not in names] + rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a tenth of all")
    parser.add_argument("--only", nargs="*", default=[])
    given = parser.parse_args()
    every = 10 if given.quick else 1
    with tempfile.TemporaryDirectory() as folder:
        pool, converting = [], []
        for number in range(WORKERS):
            place = Path(folder) / str(number)
            place.mkdir()
            nursery = Nursery()
            pool.append(Scenes.at(place, nursery))
            (place / "gguf").mkdir()
            converting.append(Scenes.at(place / "gguf", nursery, gguf_recipe(place / "gguf")))
        stopped = pool[0].stopped_run()
        own = Path(folder) / "changed"
        own.mkdir()
        fresh = {"cache": Path(folder) / "fresh"}  # nothing converted or tokenized yet
        table: list[tuple[str, list[Case], list[Scenes]]] = [
            ("killed at every write point", list(kill_points(pool[0], every)), pool),
            ("killed at random moments", list(kill_moments(pool[0], 160 // every)), pool),
            (
                "killed at random moments, converting",
                list(kill_moments(converting[0], 40 // every, **fresh)),
                converting,
            ),
            ("SIGTERM and SIGINT in each phase", list(signals()), pool),
            ("no room at every write point", list(no_room(pool[0], every)), pool),
            ("every file of a checkpoint damaged", list(damages(stopped)), pool[:1]),
            ("run directories changed at random", list(changes(own, stopped, 2000 // every)), pool[:1]),
        ]
        print(f"{'':42} {'cases':>6} {'held':>6} {'took':>10}")
        rows = [hurt(*row) for row in table if not given.only or any(one in row[0] for one in given.only)]
        for scenes in pool:
            scenes.nursery.close()
    if not given.quick:
        write_result("chaos", {"write_points": pool[0].num_points, "rows": _with_earlier(rows)})
    sys.exit(any(row["failed"] for row in rows))


if __name__ == "__main__":
    main()
