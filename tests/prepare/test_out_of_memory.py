"""A run that really runs out of memory: nothing is lost, and it is told what fits, or it goes on.

The process's address space is limited once the preflight has passed, so that torch's own allocator fails.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peftkit.prepare import out_of_memory
from peftkit.rundir import RunDir, verify_folder
from tests.conftest import ROOT, TINY_LLAMA, chat, write_jsonl

PLACES = dict(out_of_memory._PHASES)
ROOM = 170 * 2**20  # beyond what the process has at the limit's start
RUN = """
import json, resource, sys
import torch
torch.set_num_threads(1)
import peftkit
from peftkit.errors import UserError

recipe, out, at, room = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
seen = []

def observe(event):
    key = f"{event['event']} {event.get('step', '')}".strip()
    if key == at and not seen:
        seen.append(key)
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, -1))

try:
    summary = peftkit.finetune(recipe, out=out, observer=observe)
except UserError as error:
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    print(json.dumps([vars(problem) for problem in error.problems]))
    sys.exit(2)
print(json.dumps({"loss_last": summary.loss_last, "steps": summary.num_steps}))
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's")


@pytest.fixture
def wide(tmp_path):
    """16 rows at once of about 500 tokens: activations of some 400 MB against 3 MB of weights."""
    words = " ".join(["alpha beta gamma delta"] * 30)
    rows = [chat(f"Say {i}", f"{words} {i}") for i in range(48)]
    return {
        "base": str(TINY_LLAMA),
        "method": {"name": "lora", "rank": 4},
        "data": {"train": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "eval": None},
        "train": {
            "max_steps": 6,
            "batch_size": 16,
            "micro_batch": 16,
            "max_length": 512,
            "checkpoint_steps": 2,
            "gradient_checkpointing": False,
            "learning_rate": 1e-3,
        },
    }


def run(recipe, out: Path, at: str, room: int = ROOM):
    command = [sys.executable, "-c", RUN, json.dumps(recipe), str(out), at, str(room)]
    return subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=dict(os.environ),
        timeout=300,
    )


@pytest.mark.slow
def test_a_run_without_memory_stops_whole_and_says_what_fits(wide, tmp_path):
    stopped = run(wide, tmp_path / "run", "checkpoint 2")
    assert stopped.returncode == 2, stopped.stderr
    [problem] = json.loads(stopped.stdout)
    assert "out of memory in step 4" in problem["got"]
    assert "activations" in problem["got"] or "logits" in problem["got"]
    assert "train.micro_batch=8" in problem["fix"]
    left = RunDir(tmp_path / "run")
    assert left.checkpoint_steps() == [2]
    assert verify_folder(left.checkpoint(2)) == []
    assert not left.adapter.exists()
    assert [e["event"] for e in left.events()][-1] == "oom"


@pytest.mark.slow
def test_adapting_goes_on_in_smaller_pieces_to_the_same_loss(wide, tmp_path):
    wide["train"]["on_oom"] = "adapt"
    whole = run(wide, tmp_path / "whole", "never")
    adapted = run(wide, tmp_path / "run", "checkpoint 2")
    assert adapted.returncode == 0, adapted.stderr
    found = RunDir(tmp_path / "run")
    told = [e for e in found.events() if e["event"] == "oom"]
    assert told
    assert told[0]["micro_batch"] == 16 and told[0]["step"] == 2
    plan = json.loads((found.path / "plan.json").read_text())
    assert plan["train"]["micro_batch"] == told[-1]["next_micro_batch"] < 16
    assert plan["train"]["micro_batch"] * plan["train"]["accumulation"] == 16
    assert "ran out of memory" in next(d for d in plan["decisions"] if d["key"] == "train.micro_batch")["reason"]
    assert json.loads(adapted.stdout)["steps"] == 6
    assert json.loads(adapted.stdout)["loss_last"] == pytest.approx(json.loads(whole.stdout)["loss_last"], rel=1e-4)


@pytest.mark.slow
def test_no_memory_before_the_first_step_shows_in_the_preflight(wide, tmp_path):
    stopped = run(wide, tmp_path / "run", "parameters")
    assert stopped.returncode == 2, stopped.stderr
    [problem] = json.loads(stopped.stdout)
    assert "before the first step" in problem["got"]
    assert RunDir(tmp_path / "run").checkpoint_steps() == []


@pytest.mark.parametrize("place", PLACES)
def test_the_place_of_an_error_tells_its_phase(place):
    """And our own places are files that exist: a file that moved would turn its errors into the forward's."""
    if place.startswith("/peftkit/"):
        assert (ROOT / place.removeprefix("/")).is_file()
    with pytest.raises(MemoryError) as raised:
        exec(compile("raise MemoryError", f"/somewhere{place}", "exec"))
    assert out_of_memory.find_shortage(raised.value, step=2, occupied_bytes=1).phase == PLACES[place]
