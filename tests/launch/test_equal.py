"""Two processes train what one trains: the same rows in each step, and the same numbers to rounding."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import peftkit
from peftkit.plan import read_plan
from peftkit.rundir import RunDir
from peftkit.rundir.events import EvalEvent, ParametersEvent, StepEvent, ignore_event, of_type
from tests.conftest import TINY_LLAMA, chat, write_jsonl

ROOT = Path(__file__).parents[2]
WORDS = ("alpha", "beta", "gamma", "delta")
METHODS = {
    "lora": {"name": "lora", "rank": 4},
    "qlora": {"name": "qlora", "rank": 4},
    "prefix": {"name": "prefix", "virtual_tokens": 3},
    "ia3": {"name": "ia3"},
    "full": {"name": "full"},
    "adalora": {"name": "adalora", "initial_rank": 4, "rank": 2},
    "lora+": {"name": "lora", "rank": 4, "lr_ratio": 4.0},
    "embeddings": {"name": "lora", "rank": 2, "also_train": ["embeddings"]},
}


def recipes(folder):
    """Rows of very different numbers of trained tokens; 8 a step, in four micro-batches."""
    rows = [chat(f"Say {WORDS[i % 4]} number {i}", " ".join([WORDS[i % 4]] * (1 + 7 * i % 23))) for i in range(60)]
    data = {"train": str(write_jsonl(folder / "chats.jsonl", rows)), "eval": "20%", "waive": ["near-leakage"]}
    train = {"max_steps": 20, "batch_size": 8, "micro_batch": 2, "eval_steps": 10, "max_length": 128}
    common = {"base": str(TINY_LLAMA), "data": data, "diagnose": {"escalate": "off"}}
    made = {name: {**common, "method": method, "train": train} for name, method in METHODS.items()}
    packed = {"packing": True, "micro_batch": 1, "batch_size": 12, "max_steps": None, "epochs": 5.1}
    made["packed"] = {**common, "method": METHODS["lora"], "train": {**train, **packed}}
    passes = {"max_steps": None, "epochs": 3.1}  # whose last step has too few rows for two
    made["passes"] = {**common, "method": METHODS["lora"], "train": {**train, **passes}}
    classes = [{"text": f"{WORDS[i % 3]} " * (1 + 5 * i % 17), "label": WORDS[i % 3]} for i in range(60)]
    of_classes = {**data, "train": str(write_jsonl(folder / "classes.jsonl", classes))}
    made["classes"] = {**common, "data": of_classes, "method": METHODS["lora"], "train": train}
    made["recomputed"] = {**common, "method": METHODS["lora"], "train": {**train, "gradient_checkpointing": True}}
    made["searched"] = {  # a rate that is measured, a metric, and a look at the end, all by the lead
        **common,
        "method": METHODS["lora"],
        "train": {**train, "max_steps": 360, "eval_steps": 360, "schedule": {"kind": "constant"}},
        "evaluate": {"metric": "exact_match", "max_examples": 4},
        "diagnose": {"escalate": "recommend"},
    }
    return made


def run_ranks(jobs, num, folder):
    file = folder / f"jobs-{num}.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num), "--master_port", "0"]
    command += ["--standalone", str(ROOT / "tests" / "rigs" / "ranked.py"), str(file)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def on_two(folder):
    made = recipes(folder)
    jobs = [{"recipe": recipe, "out": str(folder / f"{name}-2")} for name, recipe in made.items()]
    result = run_ranks(jobs, 2, folder)
    assert result.returncode == 0, result.stderr[-4000:]
    return made


def result_tensors(run):
    [file] = [*run.path.glob("adapter/*.safetensors"), *run.path.glob("model/*.safetensors")]
    return load_file(file)


def require_equal(alone, shared, *, num):
    plan = read_plan(shared)
    assert ("passes" in shared.path.name or "packed" in shared.path.name) == (plan.train.num_rows is not None)
    assert (plan.ranks.num, plan.ranks.strategy) == (num, "ddp")
    losses = [[event.loss for event in of_type(run.events(), StepEvent)] for run in (alone, shared)]
    assert len(losses[0]) == len(losses[1]) == plan.train.num_steps
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-5
    evals = [[event.loss for event in of_type(run.events(), EvalEvent)] for run in (alone, shared)]
    assert evals[0][0] == evals[1][0], "the loss before training is the same number"
    assert evals[0] == pytest.approx(evals[1], abs=1e-5)
    [counted, shared_counted] = [of_type(run.events(), ParametersEvent)[0] for run in (alone, shared)]
    assert counted.num_trainable == shared_counted.num_trainable
    mine, theirs = result_tensors(alone), result_tensors(shared)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        if not tensor.numel():
            continue
        # where a gradient is next to nothing Adam's first steps have the sign of rounding
        assert float((tensor - theirs[name]).abs().max()) < 1e-3 * max(1.0, float(tensor.abs().max())), name
        assert float((tensor - theirs[name]).abs().mean()) < 1e-5, name


@pytest.mark.parametrize("name", [*METHODS, "packed", "passes", "classes", "recomputed"])
def test_two_processes_train_as_one(name, on_two, folder):
    peftkit.finetune(on_two[name], out=folder / name, observer=ignore_event)
    require_equal(RunDir(folder / name), RunDir(folder / f"{name}-2"), num=2)


def test_the_lead_searches_judges_and_looks_for_all(on_two, folder):
    events = RunDir(folder / "searched-2").events()
    [found] = [event for event in events if event["event"] == "rate_found"]
    assert read_plan(RunDir(folder / "searched-2")).train.learning_rate == found.learning_rate
    assert [event.when for event in events if event["event"] == "metric"] == ["before", "after"]
    assert [event for event in events if event["event"] == "verdict"]


@pytest.mark.slow
def test_four_processes_train_as_one(folder):
    made = recipes(folder)
    names = ("lora", "qlora", "full")
    result = run_ranks([{"recipe": made[name], "out": str(folder / f"{name}-4")} for name in names], 4, folder)
    assert result.returncode == 0, result.stderr[-4000:]
    for name in names:
        peftkit.finetune(made[name], out=folder / f"{name}-alone", observer=ignore_event)
        require_equal(RunDir(folder / f"{name}-alone"), RunDir(folder / f"{name}-4"), num=4)
