"""Packed and bucketed training from a recipe to its result, stopped and resumed too."""

from pathlib import Path

import pytest

import peftkit
from peftkit.errors import Interrupted, UserError
from peftkit.plan import read_plan
from peftkit.plan.packing import GROUPED, SHUFFLED
from peftkit.rundir import RunDir
from tests.conftest import chat, write_jsonl
from tests.run.test_resume import stopping_at, weights

WORDS = ("alpha", "beta", "gamma", "delta")


@pytest.fixture
def uneven(recipe, tmp_path):
    """40 chats of 10 to 60 tokens, with dropout, accumulation and evaluation over some epochs."""
    rows = [chat(f"Say {WORDS[i % 4]} number {i}", " ".join([WORDS[i % 4]] * (1 + 7 * i % 23))) for i in range(40)]
    recipe["data"] = {"train": str(write_jsonl(tmp_path / "uneven.jsonl", rows)), "eval": "20%"}
    recipe["method"] = {"name": "lora", "rank": 4, "dropout": 0.2}
    recipe["train"].update(max_steps=12, eval_steps=4, checkpoint_steps=3, max_length=128)
    return recipe


def by_length(recipe):
    recipe["train"].update(batch_size=8, micro_batch=4)
    return recipe


def classes(recipe):
    """Another trainer, which makes its batches itself."""
    rows = [{"text": " ".join([WORDS[i % 3]] * (1 + 5 * i % 17)), "label": WORDS[i % 3]} for i in range(40)]
    write_jsonl(Path(recipe["data"]["train"]), rows)
    return by_length(recipe)


def packed(recipe):
    recipe["train"].update(packing=True, batch_size=8, micro_batch=1)
    return recipe


def events(path, kind):
    return [event for event in RunDir(path).events() if event["event"] == kind]


@pytest.mark.parametrize("how", [by_length, classes, packed])
def test_stopped_and_resumed_equals_uninterrupted(how, uneven, tmp_path):
    source = how(uneven)
    whole = peftkit.finetune(source, out=tmp_path / "whole")
    train = read_plan(RunDir(tmp_path / "whole")).train
    assert (train.packing, train.sampling) == ((True, SHUFFLED) if how is packed else (False, GROUPED))
    with pytest.raises(Interrupted):
        peftkit.finetune(source, out=tmp_path / "cut", observer=stopping_at(7))
    resumed = peftkit.resume_run(tmp_path / "cut")
    assert weights(resumed) == weights(whole)
    assert resumed.eval_loss_after == whole.eval_loss_after
    rates = [event["tokens_per_second"] * event["step_seconds"] for event in events(tmp_path / "cut", "step")]
    assert max(rates) < 8 * 100, "no step has the tokens of those before it"


def test_the_loss_of_packs_is_the_mean_over_their_documents(uneven, tmp_path):
    """All rows in one step, whose adapter starts at nothing: before it, the same rows held out."""
    uneven["method"]["dropout"] = 0.0
    uneven["data"] |= {"eval": uneven["data"]["train"], "waive": ["leakage"]}
    for micro in (1, 2):
        uneven["train"] |= {"packing": True, "batch_size": 40, "micro_batch": micro, "max_steps": 1}
        run = tmp_path / str(micro)
        peftkit.finetune(uneven, out=run)
        plan = read_plan(RunDir(run))
        assert 2 < plan.train.batch_size < 20 and plan.train.micro_batch == micro
        [step], start = events(run, "step"), events(run, "eval")[0]
        assert step["loss"] == pytest.approx(start["loss"], abs=1e-5)
        tokens = step["tokens_per_second"] * step["step_seconds"]
        assert tokens == pytest.approx(events(run, "data")[0]["num_tokens"], rel=0.01)


def test_an_epoch_is_all_packs_and_a_batch_is_about_its_examples(uneven, tmp_path):
    del uneven["train"]["max_steps"]
    uneven["train"] |= {"packing": True, "batch_size": 8, "micro_batch": "auto", "epochs": 2}
    peftkit.finetune(uneven, out=tmp_path / "run")
    plan = read_plan(RunDir(tmp_path / "run"))
    decided = {decision.key: decision for decision in plan.decisions}
    assert decided["train.batch_size"].value == 8
    packs = decided["train.packs_per_step"]
    assert packs.value == plan.train.batch_size
    assert packs.reason.startswith("8 examples are about") and "packs of 128 tokens" in packs.reason
    assert plan.batch.is_packed and 100 < plan.batch.num_tokens <= 128
    assert len(events(tmp_path / "run", "step")) == plan.train.num_steps
    assert events(tmp_path / "run", "memory")


def test_pieces_that_do_not_divide_the_packs_of_a_step_are_refused(uneven, tmp_path):
    uneven["train"] |= {"packing": True, "batch_size": 40, "micro_batch": 13}
    with pytest.raises(UserError, match=r"train\.micro_batch.*13 with .* packs a step.*try micro_batch"):
        peftkit.finetune(uneven, out=tmp_path / "run")
