"""Ranks that die, are stopped, or differ: named, told once, and gone on from to the same bytes."""

import os
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import yaml

import peftkit
from peftkit.plan import read_plan
from peftkit.rundir import RunDir
from tests.launch.test_equal import METHODS, ROOT, recipes


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a recipe with dropout, so that the random numbers of each rank count."""
    folder = tmp_path_factory.mktemp("stops")
    recipe = recipes(folder)["lora"]
    recipe["method"] = {**METHODS["lora"], "dropout": 0.2}
    recipe["train"] = {**recipe["train"], "max_steps": 40, "checkpoint_steps": 5}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def command(place, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {"args": [sys.executable, "-m", "peftkit", *arguments], "cwd": place, "env": environment, "text": True}


def run(place, *arguments):
    return subprocess.run(**command(place, *arguments), capture_output=True, timeout=300, check=False)


def stopped_at(place, step, act, *arguments, kind="step"):
    """Start a command, act on it once so many events of a kind are there, and return (exit code, stderr)."""
    process = subprocess.Popen(**command(place, *arguments), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    events = place / arguments[arguments.index("--out") + 1] / "events.jsonl"
    deadline = time.monotonic() + 240
    while (events.read_text() if events.exists() else "").count(f'"event": "{kind}"') < step:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.02)
    act(process)
    _, said = process.communicate(timeout=240)
    return process.returncode, said


def rank_process(launcher, rank):
    [found] = [
        child
        for child in psutil.Process(launcher.pid).children(recursive=True)
        if child.environ().get("RANK") == str(rank)
    ]
    return found


@pytest.fixture(scope="module")
def whole(place):
    result = run(place, "finetune", "recipe.yaml", "--out", "whole", "--gpus", "2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("optimizer steps") == 1, "one of the processes talks"
    assert result.stderr.count("step 40: evaluation loss") == 1
    return (place / "whole/adapter/adapter_model.safetensors").read_bytes()


def test_a_killed_rank_is_named_and_the_run_goes_on_to_the_same_bytes(place, whole):
    rank, out = 1, "killed"
    arguments = ("finetune", "recipe.yaml", "--out", out, "--gpus", "2")
    code, said = stopped_at(place, 13, lambda process: rank_process(process, rank).kill(), *arguments)
    assert code == 1
    assert f"rank {rank} of 2 (process " in said
    assert f"was ended by SIGKILL; continue with: peftkit resume {out}" in said
    assert "Traceback" not in said
    shutil.copytree(place / out, place / f"{out}-alone")
    result = run(place, "resume", out)
    assert result.returncode == 0, result.stderr
    assert (place / out / "adapter/adapter_model.safetensors").read_bytes() == whole
    events = RunDir(place / out).events()
    assert [event.step for event in events if event["event"] == "resume"] == [10]
    assert not list((place / out).rglob("*.bin")) and not list((place / out).rglob("*.pt"))

    result = run(place, "resume", f"{out}-alone", "--gpus", "1")
    assert result.returncode == 0, result.stderr
    assert "began with 2 processes and goes on with 1" in result.stderr
    assert read_plan(RunDir(place / f"{out}-alone")).ranks.num == 1
    evals = [[e for e in RunDir(place / name).events() if e["event"] == "eval"] for name in (out, f"{out}-alone")]
    losses = [{event.step: event.loss for event in of_run} for of_run in evals]
    assert losses[0][0] == losses[1][0] and losses[1][40] == pytest.approx(losses[0][40], rel=0.2)


@pytest.mark.slow
def test_a_lead_that_dies_while_the_others_wait_for_it_is_named(place):
    settings = ("evaluate.metric=exact_match", "evaluate.max_new_tokens=400", "--out", "waited-for", "--gpus", "2")
    arguments = ("finetune", "recipe.yaml", *settings)
    code, said = stopped_at(place, 1, lambda process: rank_process(process, 0).kill(), *arguments, kind="preflight")
    assert code == 1 and "rank 0 of 2 (process " in said and "was ended by SIGKILL" in said


@pytest.mark.slow
def test_another_number_of_processes_goes_on_though_the_recipe_says_one(place, whole):
    arguments = ("finetune", "recipe.yaml", "--out", "more", "--gpus", "2")
    stopped_at(place, 12, lambda process: process.send_signal(15), *arguments)
    result = run(place, "resume", "more", "--gpus", "4")
    assert result.returncode == 0, result.stderr
    assert "began with 2 processes and goes on with 4" in result.stderr
    assert read_plan(RunDir(place / "more")).ranks.num == 4
    assert run(place, "diagnose", "more", "--anew").returncode == 0, "in one process"


@pytest.mark.slow
def test_a_signal_to_any_stops_all_at_one_step(place, whole):
    arguments = ("finetune", "recipe.yaml", "--out", "stopped", "--gpus", "2")
    code, said = stopped_at(place, 7, lambda process: rank_process(process, 1).terminate(), *arguments)
    assert code == 143, said
    assert said.count("Continue with: peftkit resume") == 1
    step = RunDir(place / "stopped").checkpoint_steps()[-1]
    assert f"stopped with a checkpoint at step {step}" in said
    assert run(place, "resume", "stopped").returncode == 0
    assert (place / "stopped/adapter/adapter_model.safetensors").read_bytes() == whole


@pytest.mark.slow
def test_a_dead_rank_is_replaced_as_often_as_the_recipe_says(place, whole):
    arguments = ("finetune", "recipe.yaml", "devices.restarts=1", "--out", "again", "--gpus", "2")
    code, said = stopped_at(place, 8, lambda process: rank_process(process, 1).kill(), *arguments)
    assert code == 0, said
    assert "was ended by SIGKILL" in said and "resuming, 0 restarts left" in said
    assert (place / "again/adapter/adapter_model.safetensors").read_bytes() == whole


@pytest.mark.slow
def test_a_run_of_two_is_made_again_by_two_and_a_dict_trains_on_ranks_too(place, whole):
    result = run(place, "reproduce", "whole")
    assert result.returncode == 0 and "equal byte for byte" in result.stdout, result.stderr
    recipe = yaml.safe_load((place / "recipe.yaml").read_text())
    seen = []
    summary = peftkit.finetune({**recipe, "devices": {"count": 2}}, out=place / "dict", observer=seen.append)
    assert (summary.result / "adapter_model.safetensors").read_bytes() == whole
    assert [event.step for event in seen if event["event"] == "step"] == list(range(1, 41))


@pytest.mark.slow
def test_torchrun_makes_one_run_of_the_planned_batch(place, whole):
    """Once two runs were made, each of half the rows at twice the batch."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "peftkit"]
    options = command(place)
    options["args"] = [*torchrun, "finetune", "recipe.yaml"]
    result = subprocess.run(**options, capture_output=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    [made] = (place / "runs").iterdir()
    assert read_plan(RunDir(made)).train.batch_size == 8
    assert (made / "adapter/adapter_model.safetensors").read_bytes() == whole


@pytest.mark.slow
def test_mistakes_are_told_once(place):
    (place / "empty.jsonl").write_text("")
    result = run(place, "finetune", "recipe.yaml", f"data.train={place}/empty.jsonl", "--out", "bad", "--gpus", "2")
    assert result.returncode == 2 and result.stderr.count("to fix") == 1
    assert not (place / "bad").exists()
    options = command(place)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = place / "differ.py"
    script.write_text(
        "import os, sys\nfrom peftkit.cli import main\n"
        "sys.exit(main(['finetune', 'recipe.yaml', '--out', 'differ', f'seed={os.environ[\"RANK\"]}']))\n"
    )
    options["args"] = [*torchrun, str(script)]
    result = subprocess.run(**options, capture_output=True, timeout=300, check=False)
    assert "rank 1" in result.stderr and "recipe other than rank 0's" in result.stderr
    assert result.returncode != 0
    assert not (place / "differ/adapter").exists()
