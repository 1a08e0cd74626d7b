"""Escalation against what people do: losses at equal steps, and at equal compute with every sweep paid.

    python benchmarks/diagnosis/escalation.py --data FOLDER [--tasks working] [--seeds 0,1] [--workers 2]

Two tables. `steps`: each final run has the task's steps, and the compute of sweeps, looks and reruns stands
beside it. `compute`: each way gets 1.15 runs in all, so that the arms of a sweep share them. Resumable: a
finished way is one line of the results file.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults import HEALTHY, Draft, healthy
from suite import one_thread_each, read_results, words
from tasks import TASKS, load_task
from tiny_model import base_folder, data_folder

RESULTS = Path(__file__).parent.parent / "results" / "diagnosis_escalation.jsonl"
BUDGET = 1.15  # runs, where all ways have the same compute
START = {"name": "lora", "rank": 8, "targets": ["q", "v"]}  # where peftkit begins


@dataclass(frozen=True)
class Way:
    """One way to a model: a method at learning rates relative to the tuned one, or peftkit's."""

    name: str
    method: dict[str, Any]
    rates: tuple[float, ...] = (1.0,)
    then: str = ""  # "recommend" | "auto"

    @property
    def num_runs(self) -> int:
        """Trainings that it pays for."""
        return len(self.rates) + (self.then == "recommend")


def _lora(rank: int, **more: Any) -> dict[str, Any]:
    return {"name": "lora", "rank": rank, "targets": "all-linear", **more}


WAYS = (
    Way("q,v r16, fixed", {"name": "lora", "rank": 16, "targets": ["q", "v"]}),
    Way("all-linear r16, 3 rates", _lora(16), (1 / 3, 1.0, 3.0)),
    Way("all-linear r64, 3 rates", _lora(64), (1 / 6, 0.5, 1.5)),
    Way("AdaLoRA, 24 to 16", {"name": "adalora", "initial_rank": 24, "rank": 16, "targets": "all-linear"}),
    Way("EVA r16", _lora(16, init="eva")),
    Way("rsLoRA r64", _lora(64, rslora=True, alpha=64), (0.25,)),
    Way("full, 3 rates", {"name": "full"}, (0.05, 0.15, 0.5)),
    Way("peftkit, recommend + rerun", START, then="recommend"),
    Way("peftkit, auto", START, then="auto"),
)


def train(draft: Draft, observer: Callable[[dict[str, Any]], None] = lambda event: None) -> dict[str, Any]:
    """One training, in a folder that is gone afterwards: its best loss, what looking took, what is next."""
    from peftkit.api import finetune
    from peftkit.recipe import load

    folder = Path(tempfile.mkdtemp(prefix="peftkit-escalation-"))
    try:
        summary = finetune(draft.write(folder), out=folder / "run", observer=observer)
        lines = (folder / "run" / "events.jsonl").read_text(encoding="utf-8").splitlines()
        events = [json.loads(line) for line in lines]
        verdicts = [event for event in events if event["event"] == "verdict"]
        following = folder / "run" / "next-recipe.yaml"
        method = load(following).recipe.method.model_dump(exclude_unset=True) if following.exists() else None
        rate = load(following).recipe.train.learning_rate if following.exists() else None
        steps = len([event for event in events if event["event"] == "step"])
        return {
            "loss": summary.eval_loss_after,
            "num_trainable": summary.num_trainable,
            "steps": steps,
            "overhead": sum(event["overhead"] for event in verdicts),
            "causes": [f"{event['step']}: {event['cause']}" for event in verdicts],
            "next": {"method": method, "learning_rate": rate} if verdicts and following.exists() else None,
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def go(task: str, seed: int, way: Way, table: str, data: Path, base: Path) -> dict[str, Any]:
    """A way to its loss, with its compute in runs of the task's own steps."""
    import torch

    torch.set_num_threads(1)
    started, tuned = time.perf_counter(), HEALTHY[task]
    share = BUDGET / way.num_runs if table == "compute" and way.then != "auto" else 1.0
    steps = max(20, round(tuned.steps * share))
    draft = healthy(load_task(task, data), base=base, seed=seed)
    runs = []
    for rate in way.rates:
        one = draft.having(
            method=way.method,
            train__max_steps=steps,
            train__eval_steps=max(1, steps // 6),
            train__learning_rate=tuned.learning_rate * rate,
            diagnose={"escalate": way.then or "off"}
            | ({"target": {"metric": "eval_loss", "value": tuned.target}} if way.then else {}),
        )
        runs.append(train(one))
    if way.then == "recommend" and runs[0]["next"]:
        following = runs[0]["next"]
        again = draft.having(
            method=following["method"],
            train__max_steps=steps,
            train__eval_steps=max(1, steps // 6),
            train__learning_rate=following["learning_rate"],
            diagnose={"escalate": "off"},
        )
        runs.append(train(again))
    compute = sum(run["steps"] / tuned.steps + run["overhead"] * steps / tuned.steps for run in runs)
    best = min(runs, key=lambda run: run["loss"])
    return {
        "key": f"{task}/{seed}/{table}/{way.name}",
        "task": task,
        "seed": seed,
        "table": table,
        "way": way.name,
        "loss": best["loss"],
        "num_trainable": best["num_trainable"],
        "compute": round(compute, 3),
        "runs": runs,
        "seconds": round(time.perf_counter() - started, 1),
    }


def print_tables(lines: Sequence[dict[str, Any]]) -> None:
    """Mean loss over seeds by way, against the best way that is fixed beforehand."""
    for table in ("steps", "compute"):
        for task in TASKS:
            found = {
                way.name: [
                    line for line in lines if (line["task"], line["table"], line["way"]) == (task, table, way.name)
                ]
                for way in WAYS
            }
            means = {name: sum(line["loss"] for line in some) / len(some) for name, some in found.items() if some}
            fixed = [loss for name, loss in means.items() if not name.startswith("peftkit")]
            if not fixed:
                continue
            print(f"\n{task}, equal {table}")
            for name, loss in means.items():
                compute = sum(line["compute"] for line in found[name]) / len(found[name])
                behind = 100 * (loss / min(fixed) - 1)
                size = found[name][0]["num_trainable"]
                print(
                    f"  {name:28} loss {loss:.4f} ({behind:+6.1f} % of the best fixed)  "
                    f"{compute:.2f} runs  {size:,} trainable  seeds {len(found[name])}"
                )


def main() -> int:
    """Make what is missing and print the tables."""
    one_thread_each()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder of the data sets")
    parser.add_argument("--tasks", type=words, default=list(TASKS))
    parser.add_argument("--tables", type=words, default=["steps", "compute"])
    parser.add_argument("--seeds", type=words, default=["0", "1"])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    data = data_folder(asked.data)
    base = base_folder(data)
    made = {line["key"] for line in read_results(asked.results)}
    waiting = [
        (task, int(seed), way, table)
        for table in asked.tables
        for seed in asked.seeds
        for task in asked.tasks
        for way in WAYS
        if f"{task}/{seed}/{table}/{way.name}" not in made
    ]
    print(f"{len(waiting)} ways to go, {len(made)} there", flush=True)
    with ProcessPoolExecutor(asked.workers) as pool:
        futures = [pool.submit(go, *one, data, base) for one in waiting]
        for number, future in enumerate(as_completed(futures), start=1):
            line = future.result()
            with asked.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{number}/{len(waiting)} {line['key']}: {line['loss']:.4f}", flush=True)
    print_tables(read_results(asked.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
