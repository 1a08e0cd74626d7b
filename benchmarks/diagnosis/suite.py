"""Whether a diagnosis names the cause that was planted.

    python benchmarks/diagnosis/suite.py --data FOLDER [--tasks intents] [--only rank,labels] [--seeds 0,1,2]
        [--workers 2] [--act] [--results FILE]

Every cell (task x fault x seed) trains a run and has it diagnosed. A finished cell is one line of the results
file, and is not made again. `--act` also trains, for the first seed, what the verdict advises and every other
single action, which gives the regret. Printed at the end: causes planted and found, false escalations and
overhead, apart for the seeds that thresholds were tuned on and for those that report.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from faults import ACTIONS, FAULTS, HEALTHY, Draft, healthy
from tasks import TASKS, load_task
from tiny_model import base_folder, data_folder

from peftkit.diagnose.causes import CAPACITY, Cause

RESULTS = Path(__file__).parent.parent / "results" / "diagnosis_cells.jsonl"
TUNED_ON = (0, 1, 2, 3, 4)  # seeds that thresholds may have been tuned on; the others report


@dataclass(frozen=True)
class Cell:
    """One run to diagnose; with an action, the run that follows from it."""

    task: str
    fault: str
    seed: int
    action: str = ""

    @property
    def key(self) -> str:
        """Its name in the results file."""
        return "/".join(filter(None, (self.task, self.fault, str(self.seed), self.action)))


def verdict_of(run_path: Path) -> dict[str, Any]:
    """What the diagnosis says of a run: state, cause, action, overhead, and all else that it tells."""
    from peftkit.api import diagnose_run

    return json.loads(json.dumps(diagnose_run(run_path).to_json()))


def draft_of(cell: Cell, data: Path, base: Path, *, tiny_steps: int = 0) -> Draft:
    """The run of a cell, with its fault and its action; `tiny_steps` makes it short, to try things out."""
    draft = FAULTS[cell.fault].change(healthy(load_task(cell.task, data), base=base, seed=cell.seed))
    if cell.action:
        draft = ACTIONS[cell.action](draft)
    if tiny_steps:
        draft = draft.having(train__max_steps=tiny_steps, train__eval_steps=max(1, tiny_steps // 3))
    return draft


def run_cell(cell: Cell, data: Path, base: Path, tiny_steps: int = 0, *, diagnosed: bool = True) -> dict[str, Any]:
    """Train a cell in a folder that is gone afterwards. Returns its line of the results file.

    What follows from an action is not diagnosed again.
    """
    import torch

    from peftkit.api import finetune
    from peftkit.errors import Interrupted

    torch.set_num_threads(1)
    fault, started = FAULTS[cell.fault], time.perf_counter()
    line: dict[str, Any] = {"key": cell.key, **asdict(cell), "expected": fault.cause}
    folder = Path(tempfile.mkdtemp(prefix="peftkit-diagnosis-"))
    try:
        draft = draft_of(cell, data, base, tiny_steps=tiny_steps)
        target = {"metric": "eval_loss", "value": target_of(cell)}
        looks = diagnosed and not cell.action
        diagnose = {"escalate": "recommend", "target": target} if looks else {"escalate": "off"}
        draft = draft.having(diagnose=diagnose)
        summary = finetune(draft.write(folder), out=folder / "run")
        line |= {
            "loss_before": summary.eval_loss_before,
            "loss": summary.eval_loss_after,
            "loss_train": summary.loss_last,
            "target": target["value"],
            "reached": (summary.eval_loss_after or 0.0) <= target["value"],
            "curve": eval_losses(folder / "run"),
            "loss_of_answers": answer_loss(folder / "run", base, draft),
            "train_seconds": round(summary.train_seconds, 1),
        }
        if looks:
            asked = time.perf_counter()
            line["verdict"] = verdict_of(folder / "run")
            line["verdict_seconds"] = round(time.perf_counter() - asked, 2)
    except Interrupted:
        raise  # not a finding: the cell is made again
    except Exception as error:  # noqa: BLE001  a run that fails is a finding, and the others go on
        line["error"] = f"{type(error).__name__}: {error}"[:500]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {**line, "seconds": round(time.perf_counter() - started, 1)}


def target_of(cell: Cell) -> float:
    """The loss that a cell's run has to reach: its own where the answers are other tokens."""
    tuned = HEALTHY[cell.task]
    return tuned.target_of_new_tokens if cell.fault == "embeddings" else tuned.target


def answer_loss(run: Path, base: Path, draft: Draft) -> float:
    """Nats per token of the held-out answers and their end, whatever the run itself learnt and measured."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter").eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in draft.held_out:
            asked = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
            answered = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
            ids = [*asked, *answered, tokenizer.eos_token_id]
            labels = [-100] * len(asked) + ids[len(asked) :]
            loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
            total, count = total + loss.item() * (len(answered) + 1), count + len(answered) + 1
    return round(total / count, 4)


def eval_losses(run: Path) -> list[float]:
    """The evaluation losses of a run, first to last."""
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    events = [event for event in map(json.loads, lines) if event["event"] == "eval"]
    return [round(event["loss"], 4) for event in events]


def run_cells(
    cells: Iterable[Cell], *, results: Path, workers: int, data: Path, tiny_steps: int = 0, diagnosed: bool = True
) -> None:
    """Make the cells that are not in the results file yet, and add a line for each."""
    made = {line["key"] for line in read_results(results)}
    waiting = [cell for cell in cells if cell.key not in made]
    base = base_folder(data)
    results.parent.mkdir(parents=True, exist_ok=True)
    print(f"{len(waiting)} cells to make, {len(made)} there", flush=True)
    with ProcessPoolExecutor(workers) as pool:
        futures = [pool.submit(run_cell, cell, data, base, tiny_steps, diagnosed=diagnosed) for cell in waiting]
        for number, future in enumerate(as_completed(futures), start=1):
            line = future.result()
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            found = (line.get("verdict") or {}).get("cause")
            told = line.get("error") or f"loss {line['loss']:.3f} (target {line['target']:.3f})"
            print(f"{number}/{len(waiting)} {line['key']}: {told}; found {found}", flush=True)


def read_results(path: Path) -> list[dict[str, Any]]:
    """The finished cells; a line that a kill cut off is none."""
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def act(cell: Cell, action: str) -> Cell:
    """The same run with an action taken."""
    return Cell(cell.task, cell.fault, cell.seed, action)


# ------------------------------------------------------------------------------------------------ the tables


def cause_of(line: dict[str, Any]) -> str:
    """The cause that a cell's verdict names, `none` where it sees no lag."""
    return (line.get("verdict") or {}).get("cause") or "none"


def confusion(lines: Sequence[dict[str, Any]]) -> Counter[tuple[str, str]]:
    """(planted, found) -> cells."""
    return Counter((line["expected"], cause_of(line)) for line in lines)


def false_escalations(lines: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """(verdicts that ask for capacity, cells) among those where capacity is not the cause."""
    others = [line for line in lines if line["expected"] not in CAPACITY]
    return sum(cause_of(line) in CAPACITY for line in others), len(others)


def print_tables(title: str, lines: Sequence[dict[str, Any]]) -> None:
    """What was planted and found, in words and numbers."""
    lines = [line for line in lines if not line["action"] and "error" not in line]
    if not lines:
        return
    counts = confusion(lines)
    right = sum(number for (planted, found), number in counts.items() if planted == found)
    print(f"\n{title}: {right} of {len(lines)} causes right")
    for planted in get_args(Cause):
        found = {cause: number for (one, cause), number in counts.items() if one == planted}
        if found:
            told = ", ".join(f"{cause} {number}" for cause, number in sorted(found.items()))
            print(f"  {planted:30} -> {told}")
    wrong, others = false_escalations(lines)
    print(f"  capacity asked for where it is not the cause: {wrong} of {others}")
    shares = [line["verdict"]["overhead"] for line in lines if line["verdict"].get("overhead") is not None]
    if shares:
        print(f"  overhead: mean {sum(shares) / len(shares):.1%}, most {max(shares):.1%}")


def print_regret(lines: Sequence[dict[str, Any]]) -> None:
    """Loss after the advised action, against the best single action."""
    acted: dict[str, dict[str, float]] = {}
    for line in lines:
        if line["action"] and "error" not in line:
            acted.setdefault(f"{line['task']}/{line['fault']}/{line['seed']}", {})[line["action"]] = line["loss"]
    for line in lines:
        losses = acted.get(line["key"])
        if losses is None or line["action"] or "error" in line:
            continue
        losses = {"nothing": line["loss"], **losses}
        best = min(losses, key=losses.__getitem__)
        advised = action_for(line)
        regret = losses.get(advised, line["loss"]) - losses[best]
        print(f"  {line['key']}: advised {advised}, best {best} ({losses[best]:.3f}), regret {regret:.3f}")


ADVICE = {  # what a cause asks for, among the actions
    "learning rate too high": "lr /3",
    "learning rate too low": "lr x3",
    "too few steps": "steps x2",
    "target modules": "all-linear",
    "rank": "rank x4",
    "embeddings or head": "embeddings",
    "unstable": "lr /3",
}
REGRET_ACTIONS = ("lr x3", "lr /3", "steps x2", "all-linear", "rank x4", "embeddings")


def action_for(line: dict[str, Any]) -> str:
    """The action that a verdict's cause asks for."""
    return ADVICE.get(cause_of(line), "nothing")


def one_thread_each() -> None:
    """Workers with several threads would wait for each other."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def words(text: str) -> list[str]:
    """The words between commas."""
    return [word for word in text.split(",") if word]


def main() -> int:
    """Make the cells and print the tables."""
    one_thread_each()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder of the data sets")
    parser.add_argument("--tasks", type=words, default=list(TASKS))
    parser.add_argument("--only", type=words, default=list(FAULTS), help="faults, by name")
    parser.add_argument("--seeds", type=words, default=["0", "1", "2"])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--act", action="store_true", help="also every single action, for the first seed")
    parser.add_argument("--tiny-steps", type=int, default=0, help="steps of every run, to try things out")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    seeds = [int(seed) for seed in asked.seeds]
    cells = [Cell(task, fault, seed) for seed in seeds for fault in asked.only for task in asked.tasks]
    if asked.act:
        first = [cell for cell in cells if cell.seed == seeds[0]]
        cells += [act(cell, action) for cell in first for action in REGRET_ACTIONS]
    data = data_folder(asked.data)
    run_cells(cells, results=asked.results, workers=asked.workers, data=data, tiny_steps=asked.tiny_steps)
    lines = read_results(asked.results)
    print_tables("tuned on", [line for line in lines if line["seed"] in TUNED_ON])
    print_tables("reported", [line for line in lines if line["seed"] not in TUNED_ON])
    if asked.act:
        print("\nregret")
        print_regret(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
