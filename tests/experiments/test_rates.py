"""The learning rate is found by forks of the start, whatever kills the search, and leaves no trace but itself."""

import pytest
import torch
from safetensors.torch import load_file

import peftkit
from peftkit.plan.plan import read_plan
from peftkit.rundir import RunDir
from tests.conftest import TINY_LLAMA, write_jsonl

WORDS = ("alpha", "beta", "gamma", "delta", "kappa", "sigma")


def recipe(tmp_path, method="lora", **train):
    rows = [
        {"prompt": f"say {WORDS[i % 6]} and {WORDS[i // 6 % 6]} ({i}): ", "completion": f"{WORDS[i // 6 % 6]} {i % 6}"}
        for i in range(240)
    ]
    settings = {
        "max_steps": 360,
        "batch_size": 4,
        "micro_batch": 4,
        "max_length": 64,
        "eval_steps": 180,
        "checkpoint_steps": 20,
    }
    return {
        "base": str(TINY_LLAMA),
        "method": method,
        "data": {"train": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "eval": "20%"},
        "train": {**settings, **train},
        "diagnose": {"escalate": "off"},
    }


def events(run, kind):
    return [event for event in RunDir(run).events() if event["event"] == kind]


class Stop(Exception):
    """Where a test stops a run."""


def train(recipe, run, *, until=("checkpoint", 2), start=peftkit.finetune):
    """Train until an event of a kind was seen so many times; the first checkpoint is that of step 0."""
    kind, number = until
    seen = 0

    def observe(event):
        nonlocal seen
        seen += event["event"] == kind
        if seen == number:
            raise Stop

    with pytest.raises(Stop):
        start(recipe, observer=observe, **({} if start is peftkit.resume_run else {"out": run}))


def trained(run):
    return load_file(run / "checkpoints" / "step-000020" / "trained.safetensors")


def same_bytes(one, other):
    ours, theirs = trained(one), trained(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_found_rate_trains_the_same_bytes_as_a_given_one_and_stands_in_the_plan(tmp_path):
    run, given = tmp_path / "found", tmp_path / "given"
    train(recipe(tmp_path), run)
    forks, [found] = events(run, "rate_fork"), events(run, "rate_found")
    assert len(forks) == 3 and {fork["num_steps"] for fork in forks} == {4}
    assert 0 < found["overhead"] <= 0.05
    plan = read_plan(RunDir(run))
    assert plan.train.rate_search is None and plan.train.learning_rate == found["learning_rate"]
    [decision] = [one for one in plan.decisions if one.key == "train.learning_rate"]
    assert decision.reason == found["text"]
    assert len(events(run, "parameters")) == len(events(run, "preflight")) == 1

    train(recipe(tmp_path, learning_rate=found["learning_rate"]), given)
    assert not events(given, "rate_fork")
    assert same_bytes(run, given)


def test_a_search_that_is_killed_goes_on_and_ends_in_the_same_bytes(tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "killed"
    train(recipe(tmp_path), whole)
    train(recipe(tmp_path), run, until=("rate_fork", 2))
    assert read_plan(RunDir(run)).train.rate_search is not None
    train(run, run, until=("rate_found", 1), start=peftkit.resume_run)  # after the last fork, before the plan
    assert read_plan(RunDir(run)).train.rate_search is not None
    train(run, run, start=peftkit.resume_run)
    rates = [[fork["learning_rate"] for fork in events(one, "rate_fork")] for one in (run, whole)]
    assert rates[0] == rates[1]
    assert same_bytes(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    ["qlora", "ia3", "vera", "oft", "prefix", "prompt", "ln", {"name": "lora", "dora": True, "also_train": ["head"]}],
    ids=str,
)
def test_every_method_with_an_adapter_is_searched_and_begins_anew(method, tmp_path):
    run, given = tmp_path / "found", tmp_path / "given"
    train(recipe(tmp_path, method), run)
    [found] = events(run, "rate_found")
    train(recipe(tmp_path, method, learning_rate=found["learning_rate"]), given)
    assert same_bytes(run, given)


def test_a_base_that_is_below_the_target_is_not_searched(tmp_path):
    source = recipe(tmp_path)
    source["diagnose"] = {"target": {"metric": "eval_loss", "value": 50.0}}
    train(source, tmp_path / "run", until=("rate_found", 1))
    [found] = events(tmp_path / "run", "rate_found")
    assert not events(tmp_path / "run", "rate_fork")
    assert found["learning_rate"] == found["usual"] and "below the target" in found["text"]
