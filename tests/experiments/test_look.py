"""Verdicts on real runs, growth in them, and what a kill, a rollback and plain PEFT make of it."""

import copy
import os
import shutil
import signal
import statistics
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

import peftkit
from peftkit.errors import Interrupted, UserError
from peftkit.plan import read_plan
from peftkit.recipe import load
from peftkit.rundir import RunDir, verify_folder
from tests.conftest import TINY_LLAMA, chat, write_jsonl

WORDS = ("alpha", "beta", "gamma", "delta")


def narrow_recipe(folder):
    """q and v at rank 2 on a task that wants more, with a target that is out of reach and room to look."""
    rows = [chat(f"Say {WORDS[i * 7 % 4]} number {i}", f"{WORDS[i * 7 % 4]} {WORDS[i * 7 % 4]}") for i in range(200)]
    return {
        "base": str(TINY_LLAMA),
        "method": {"name": "lora", "rank": 2, "targets": ["q", "v"], "dropout": 0.1},
        "data": {
            "train": str(write_jsonl(folder / "rows.jsonl", rows)),
            "eval": "30%",
            "waive": ["near-leakage", "near-duplicates"],
        },
        "train": {"max_steps": 100, "batch_size": 4, "micro_batch": 4, "max_length": 64, "learning_rate": 3e-3},
        "diagnose": {"target": {"value": 0.001}, "bounds": {"compute": "90%"}},
    }


@pytest.fixture
def narrow(tmp_path):
    return narrow_recipe(tmp_path)


def weights(summary):
    [file] = summary.result.glob("*model.safetensors")
    return file.read_bytes()


def of(path, name):
    return [event for event in RunDir(path).events() if event["event"] == name]


def test_a_verdict_changes_nothing_of_what_is_trained(narrow, tmp_path):
    narrow["train"]["max_steps"] = 40
    looked = peftkit.finetune(narrow, out=tmp_path / "looked")
    blind = peftkit.finetune({**narrow, "diagnose": {"escalate": "off"}}, out=tmp_path / "blind")
    assert weights(looked) == weights(blind)
    [verdict] = of(tmp_path / "looked", "verdict")
    assert verdict["state"] == "lagging"
    assert {fork["name"] for fork in of(tmp_path / "looked", "fork")} >= {"continue", "candidate"}
    assert of(tmp_path / "blind", "verdict") == []
    assert not (tmp_path / "blind" / "next-recipe.yaml").exists()
    again = peftkit.diagnose_run(tmp_path / "looked")
    assert (again.cause, again.overhead) == (verdict["cause"], verdict["overhead"])
    assert again.overhead <= 0.9


def test_the_next_recipe_is_ready_and_says_what_changed(narrow, tmp_path):
    peftkit.finetune(narrow, ["train.max_steps=24"], out=tmp_path / "run")
    [verdict] = of(tmp_path / "run", "verdict")
    text = (tmp_path / "run" / "next-recipe.yaml").read_text()
    assert verdict["cause"] in text
    assert "# was " in text
    before, after = load(tmp_path / "run" / "resolved.yaml"), load(tmp_path / "run" / "next-recipe.yaml")
    changed = load(before.recipe, verdict["action"]["overrides"])
    assert after.recipe.model_dump(exclude={"train": {"epochs"}}) == changed.recipe.model_dump(
        exclude={"train": {"epochs"}}
    )
    assert peftkit.make_plan(tmp_path / "run" / "next-recipe.yaml").train.num_steps


@pytest.fixture(scope="module")
def grown_run(tmp_path_factory):
    place = tmp_path_factory.mktemp("grown")
    recipe = narrow_recipe(place)
    recipe["diagnose"]["escalate"] = "auto"
    return recipe, place / "grown", peftkit.finetune(recipe, out=place / "grown")


@pytest.fixture
def grown(grown_run):
    """A run in `auto`, trained once; its recipe, to change, and its folder, to read."""
    return copy.deepcopy(grown_run[0]), *grown_run[1:]


def test_a_run_grows_early_and_what_it_made_is_plain_peft(grown):
    _, path, summary = grown
    [growth] = [event for event in of(path, "growth") if event["step"] < 50]
    assert growth["cause"] == "target modules"
    plan = read_plan(RunDir(path))
    assert next(one.step for one in plan.growths if one.kept) == growth["step"]
    assert summary.num_trainable == plan.method.num_trainable > 3584
    assert verify_folder(path / "adapter") == []
    base = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, path / "adapter")
    assert torch.isfinite(model(input_ids=torch.tensor([[5, 6, 7]])).logits).all()
    assert sum(event["overhead"] for event in of(path, "verdict")) <= 0.9, "looks share the budget"
    losses = {event["step"]: event["loss"] for event in of(path, "step")}
    step = growth["step"]
    before, after = (statistics.median(losses[step + n] for n in span) for span in (range(-3, 1), range(1, 5)))
    assert abs(after - before) < 1.0, "the function did not jump"


def stopping_at(step):
    def observe(event):
        if event["event"] == "step" and event["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return observe


def test_a_grown_run_resumes_to_the_same_bytes(grown, tmp_path):
    source, _, whole = grown
    with pytest.raises(Interrupted):
        peftkit.finetune(source, out=tmp_path / "cut", observer=stopping_at(40))
    assert read_plan(RunDir(tmp_path / "cut")).growths
    resumed = peftkit.resume_run(tmp_path / "cut")
    assert weights(resumed) == weights(whole)
    assert resumed.eval_loss_after == whole.eval_loss_after


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before it counts", "after it counts"])
def test_a_kill_in_the_middle_of_a_growth_loses_nothing(moment, grown, tmp_path, monkeypatch):
    from peftkit.experiments import growth as escalate

    source, _, whole = grown
    name = {"before it counts": "write_sealed", "after it counts": "apply_growths"}[moment]
    real, calls = getattr(escalate, name), []

    def killed(*arguments):
        calls.append(arguments)
        if name == "apply_growths" or str(arguments[0]).endswith("killed/plan.json"):
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(escalate, name, killed)
        with pytest.raises(KeyboardInterrupt):
            peftkit.finetune(source, out=tmp_path / "killed")
    assert calls
    assert weights(peftkit.resume_run(tmp_path / "killed")) == weights(whole)


@pytest.mark.slow
def test_a_growth_that_does_not_pay_is_taken_back(narrow, tmp_path, monkeypatch):
    """At the end of the run, with what it brought judged as noise."""
    from peftkit.experiments import look as diagnose

    narrow["train"].update(max_steps=60, learning_rate=1e-2)
    narrow["diagnose"]["escalate"] = "auto"
    real = diagnose.paired_gain

    def worthless(before, after, **more):
        found = real(before, after, **more)
        return type(found)(found.mean, -1.0, 1.0, found.num_documents)

    monkeypatch.setattr(diagnose, "paired_gain", worthless)
    summary = peftkit.finetune(narrow, out=tmp_path / "run")
    plan = read_plan(RunDir(tmp_path / "run"))
    assert [growth.kept for growth in plan.growths] == [False]
    assert of(tmp_path / "run", "growth_taken_back")
    assert max(event["step"] for event in of(tmp_path / "run", "step")) == 60 + 30, "it was tried"
    assert summary.num_steps == 60
    assert not (tmp_path / "run" / "next-recipe.yaml").exists()
    assert of(tmp_path / "run", "done")[0]["published_step"] <= 60
    blind = peftkit.finetune({**narrow, "diagnose": {"escalate": "off"}}, out=tmp_path / "blind")
    assert weights(summary) == weights(blind)


@pytest.mark.slow
def test_a_reference_says_whether_a_narrow_adapter_lags(narrow, tmp_path):
    """Training the weights of q and v themselves is no better than rank 2 here, or it is: by numbers."""
    narrow["train"]["max_steps"] = 24
    narrow["diagnose"] = {"reference": "full", "bounds": {"compute": "1%"}}
    looked = peftkit.finetune(narrow, out=tmp_path / "looked")
    blind = peftkit.finetune({**narrow, "diagnose": {"escalate": "off"}}, out=tmp_path / "blind")
    assert weights(looked) == weights(blind), "the base was put back"
    verdict = peftkit.diagnose_run(tmp_path / "looked")
    behind = verdict.numbers["behind"]
    assert verdict.state == (
        "lagging" if behind["low"] > 0 and behind["mean"] > 0.01 * verdict.loss.mean else "not lagging"
    )
    assert verdict.reference_overhead > verdict.overhead
    assert "for the reference" in dict(verdict.rows())["diagnosis cost"]


def test_an_adapter_from_elsewhere_with_its_recipe(narrow, tmp_path):
    narrow["train"]["max_steps"] = 24
    summary = peftkit.finetune({**narrow, "diagnose": {"escalate": "off"}}, out=tmp_path / "run")
    shutil.copytree(summary.result, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "manifest.json").unlink(missing_ok=True)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(narrow))
    with pytest.raises(UserError, match="the recipe that describes it"):
        peftkit.diagnose_run(tmp_path / "elsewhere")
    verdict = peftkit.diagnose_run(tmp_path / "elsewhere", recipe=recipe)
    assert verdict.state == "lagging"
    assert verdict.loss.mean == pytest.approx(summary.eval_loss_after, abs=0.5)
    with pytest.raises(UserError, match="other tensors than the recipe's"):
        peftkit.diagnose_run(tmp_path / "elsewhere", recipe=recipe, overrides=["method.rank=4"], out=tmp_path / "other")


def test_what_cannot_be_judged_is_said(recipe, tmp_path):
    recipe["data"]["eval"] = None
    recipe["train"].pop("eval_steps")
    peftkit.finetune(recipe, out=tmp_path / "run")
    with pytest.raises(UserError, match="no held-out rows"):
        peftkit.diagnose_run(tmp_path / "run")
    with pytest.raises(UserError, match="no run and no adapter"):
        peftkit.diagnose_run(tmp_path)


@pytest.mark.slow
def test_a_run_whose_base_changed_is_refused(narrow, tmp_path):
    shutil.copytree(TINY_LLAMA, tmp_path / "base")
    narrow["train"]["max_steps"], narrow["base"] = 8, str(tmp_path / "base")
    peftkit.finetune(narrow, out=tmp_path / "run")
    file = tmp_path / "base" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(UserError, match="base that changed"):
        peftkit.diagnose_run(tmp_path / "run", anew=True)


@pytest.mark.parametrize("method", ["prefix", "ia3"])
def test_methods_without_a_rank_are_shown_the_next_one(method, recipe, narrow, tmp_path):
    recipe |= {"method": method, "data": narrow["data"], "diagnose": {"target": {"value": 0.001}}}
    peftkit.finetune(recipe, out=tmp_path / "run")
    action = peftkit.diagnose_run(tmp_path / "run").action
    assert "try lora" in action.said
    assert action.cost.num_trainable > 0
    assert load(tmp_path / "run" / "next-recipe.yaml").recipe.method.name == "lora"


def test_a_look_that_runs_out_of_memory_costs_the_verdict_and_not_the_run(narrow, tmp_path, monkeypatch):
    from peftkit.experiments import experiment as study

    def full(*arguments, **named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    narrow["train"]["max_steps"] = 40
    blind = peftkit.finetune({**narrow, "diagnose": {"escalate": "off"}}, out=tmp_path / "blind")
    monkeypatch.setattr(study, "train_fork", full)
    looked = peftkit.finetune(narrow, out=tmp_path / "looked")
    assert looked.verdict.cause == "undecided"
    assert "memory" in looked.verdict.said
    assert weights(looked) == weights(blind)


@pytest.mark.slow
@pytest.mark.failing_look
def test_a_look_that_fails_costs_the_verdict_and_is_told(narrow, tmp_path, monkeypatch):
    from peftkit.experiments import experiment as study

    def broken(*arguments, **named):
        raise RuntimeError("the base was unwrapped, and then this")

    narrow["train"]["max_steps"] = 40
    blind = peftkit.finetune({**narrow, "diagnose": {"escalate": "off"}}, out=tmp_path / "blind")
    monkeypatch.setattr(study, "grow_adapter", broken)
    looked = peftkit.finetune(narrow, out=tmp_path / "looked")
    assert looked.verdict.cause == "undecided"
    assert "and then this" in looked.verdict.said
    assert any("please report it" in event["text"] for event in of(tmp_path / "looked", "warning"))
    assert weights(looked) == weights(blind)


@pytest.mark.slow
def test_a_run_never_ends_at_a_look_that_it_comes_to_again(grown, tmp_path):
    """The checkpoints of after the look are gone: it is trained through, and looked at once."""
    source, _, _ = grown
    with pytest.raises(Interrupted):
        peftkit.finetune(source, out=tmp_path / "cut", observer=stopping_at(30))
    shutil.rmtree(tmp_path / "cut" / "checkpoints")
    summary = peftkit.resume_run(tmp_path / "cut")
    assert summary.num_steps >= 100


def test_a_verdict_is_of_the_whole_file_in_whatever_order(narrow, tmp_path):
    rows = [chat(f"Say {WORDS[i % 4]} number {i}", f"{WORDS[i % 4]} {WORDS[i % 4]}") for i in range(60)]
    hard = [chat(f"Say {i}", f"zebra {i * 7919} quartz") for i in range(60)]
    narrow["data"]["eval"] = str(write_jsonl(tmp_path / "eval.jsonl", rows + hard))
    narrow["data"]["waive"] += ["leakage"]
    narrow["train"]["max_steps"] = 24
    narrow["diagnose"] = {"target": {"value": 4.0}, "bounds": {"compute": "1%"}}
    summary = peftkit.finetune(narrow, out=tmp_path / "run")
    assert summary.verdict.loss.mean == pytest.approx(summary.eval_loss_after, rel=0.15)


@pytest.mark.slow
def test_a_rollback_to_before_a_growth_takes_it_back(grown, tmp_path, monkeypatch):
    """Nothing that was grown is left to go back to: the run goes on as it was before."""
    from peftkit.train.guard import Diverged, StepGuard

    source, _, _ = grown
    real, left = StepGuard.check_step, [1]

    def judge(self, step, *arguments, **named):
        grown_now = self.plan.growths and self.plan.growths[-1].kept
        if left and grown_now and step > self.plan.growths[-1].step:
            left.pop()
            shutil.rmtree(tmp_path / "run" / "checkpoints")
            raise Diverged("planted", first_step=step)
        return real(self, step, *arguments, **named)

    monkeypatch.setattr(StepGuard, "check_step", judge)
    summary = peftkit.finetune(source, out=tmp_path / "run")
    plan = read_plan(RunDir(tmp_path / "run"))
    assert not left
    assert not plan.growths[0].kept
    assert of(tmp_path / "run", "growth_taken_back")[0]["text"] == "planted"
    assert summary.num_steps >= 100
    rates = [event["learning_rate"] for event in of(tmp_path / "run", "step") if event["step"] == 40]
    assert all(rate > 0 for rate in rates)


@pytest.mark.slow
def test_bounds_that_forbid_every_rung_are_told(narrow, tmp_path):
    narrow["train"]["max_steps"] = 40
    narrow["diagnose"]["bounds"] |= {"max_trainable": 3600}
    peftkit.finetune(narrow, out=tmp_path / "run")
    verdict = peftkit.diagnose_run(tmp_path / "run")
    assert verdict.cause not in {"target modules", "rank"}
    assert "candidate" not in verdict.numbers["arms"]
    assert verdict.numbers["refused"].endswith("more than 3,600")


def rate_recipe(narrow, rate):
    narrow["method"] = {"name": "lora", "rank": 8}
    narrow["train"].update(max_steps=200, learning_rate=rate)
    narrow["diagnose"] = {"escalate": "auto", "bounds": {"compute": "40%"}}
    return narrow


@pytest.fixture(scope="module")
def restarted_run(tmp_path_factory):
    place = tmp_path_factory.mktemp("restarted")
    recipe = rate_recipe(narrow_recipe(place), 0.3)
    return recipe, place / "run", peftkit.finetune(recipe, out=place / "run")


def test_a_rate_that_is_far_too_high_begins_anew(restarted_run):
    _, path, summary = restarted_run
    [growth] = of(path, "growth")
    plan = read_plan(RunDir(path))
    assert growth["cause"] == "learning rate too high"
    assert growth["step"] == plan.diagnose.look_steps[0]
    assert growth["learning_rate"] == plan.train.learning_rate < 0.3 / 2
    assert of(path, "growth_kept")[0]["step"] == plan.diagnose.look_steps[1]
    rates = {event["step"]: event["learning_rate"] for event in of(path, "step")}
    assert max(rate for step, rate in rates.items() if step > growth["step"]) <= plan.train.learning_rate
    assert summary.num_steps == 200, "the run is no longer for it"
    assert summary.eval_loss_after < 0.8 * summary.eval_loss_before
    assert "learning rate too high" in summary.growths[0]
    decision = next(one for one in plan.decisions if one.key == "train.learning_rate")
    assert decision.value == plan.train.learning_rate
    assert "a new adapter" in decision.reason


@pytest.mark.slow
@pytest.mark.parametrize("step", [12, 60])
def test_a_run_that_began_anew_resumes_to_the_same_bytes(step, restarted_run, tmp_path):
    recipe, _, whole = restarted_run
    with pytest.raises(Interrupted):
        peftkit.finetune(recipe, out=tmp_path / "cut", observer=stopping_at(step))
    assert weights(peftkit.resume_run(tmp_path / "cut")) == weights(whole)


@pytest.mark.slow
def test_a_rate_that_is_far_too_low_is_raised(narrow, tmp_path):
    recipe = rate_recipe(narrow, 2e-5)
    summary = peftkit.finetune(recipe, out=tmp_path / "run")
    [growth, *_] = of(tmp_path / "run", "growth")
    assert growth["cause"] == "learning rate too low"
    assert growth["step"] == read_plan(RunDir(tmp_path / "run")).diagnose.look_steps[1]
    assert growth["learning_rate"] > 6e-5
    fixed = peftkit.finetune({**recipe, "diagnose": {"escalate": "off"}}, out=tmp_path / "fixed")
    assert summary.eval_loss_after < fixed.eval_loss_after - 0.2


@pytest.mark.slow
def test_a_change_that_did_not_pay_is_taken_back_at_the_next_look(narrow, tmp_path, monkeypatch):
    """The run goes on from where it was made, by the plan of before, and ends as if nothing had been."""
    from peftkit.experiments import look

    recipe = rate_recipe(narrow, 2e-5)
    real = look.paired_gain

    def worthless(before, after, **more):
        found = real(before, after, **more)
        return type(found)(found.mean, -1.0, 1.0, found.num_documents)

    monkeypatch.setattr(look, "paired_gain", worthless)
    summary = peftkit.finetune(recipe, out=tmp_path / "run")
    [taken] = of(tmp_path / "run", "growth_taken_back")
    plan = read_plan(RunDir(tmp_path / "run"))
    assert [growth.kept for growth in plan.growths] == [False]
    assert taken["step"] == plan.diagnose.look_steps[2]
    assert plan.train.learning_rate == 2e-5
    monkeypatch.undo()
    blind = peftkit.finetune({**recipe, "diagnose": {"escalate": "off"}}, out=tmp_path / "blind")
    assert weights(summary) == weights(blind)


def test_bad_steps_are_answered_by_rate_warm_up_clip_and_rows(narrow, tmp_path, monkeypatch):
    """Three steps are called spikes; what is then advised stands in the next recipe, which is accepted."""
    from peftkit.train.guard import LossHistory

    real, bad_steps = LossHistory.explain_spike, iter([True] * 3)

    def spiking(self, loss):
        return "planted" if len(self.losses) > 20 and next(bad_steps, False) else real(self, loss)

    monkeypatch.setattr(LossHistory, "explain_spike", spiking)
    narrow["train"].update(max_steps=40, max_grad_norm=5.0, schedule={"warmup": 0.0})
    summary = peftkit.finetune(narrow, out=tmp_path / "run")
    assert summary.verdict.cause == "unstable"
    assert set(summary.verdict.action.overrides) == {
        "train.learning_rate=0.001",
        "train.schedule.warmup=10%",
        "train.max_grad_norm=1",
    }
    after = load(tmp_path / "run" / "next-recipe.yaml").recipe.train
    assert (after.schedule.warmup, after.max_grad_norm, after.learning_rate) == (0.1, 1.0, 0.001)
    rows = Counter(row for spike in of(tmp_path / "run", "spike") for row in spike["rows"])
    for row, num in rows.items():
        assert (f"{row} ({num} times)" in summary.verdict.action.said) == (num > 1)


@pytest.mark.slow
def test_rows_beyond_what_the_base_was_trained_to_are_stretched(tmp_path):
    """The tiny base claims 512 positions and was trained to fewer: what is advised mends the held-out loss."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    text = "\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in files)
    rows = [{"text": text[start : start + 1400]} for start in range(0, 150 * 1400, 1400)]
    recipe = {
        "base": str(TINY_LLAMA),
        "method": {"name": "lora", "rank": 2, "targets": ["v"]},
        "data": {
            "train": str(write_jsonl(tmp_path / "rows.jsonl", rows)),
            "eval": "40%",
            "waive": ["near-leakage", "leakage", "near-duplicates"],
        },
        "train": {"max_steps": 30, "batch_size": 2, "micro_batch": 2, "max_length": 512, "learning_rate": 1e-4},
        "diagnose": {"bounds": {"compute": "99%"}},
    }
    before = peftkit.finetune(recipe, out=tmp_path / "before")
    assert before.verdict.cause == "positions"
    stretch = before.verdict.numbers["positions"]
    assert 64 <= stretch["reach"] <= 256
    assert stretch["losses"][-1][3] < stretch["losses"][-1][2] - 0.3, "the last positions gain most"
    next_recipe = tmp_path / "before" / "next-recipe.yaml"
    assert load(next_recipe).recipe.base.rope_scaling.trained == stretch["reach"]
    after = peftkit.finetune(next_recipe, out=tmp_path / "after")
    assert after.eval_loss_after < before.eval_loss_after - 0.2


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["growing", "taking back"])
def test_a_kill_around_a_change_leads_to_the_same_bytes(moment, narrow, tmp_path, monkeypatch):
    """Between plan.json, which counts, and the verdict: what was changed is still judged, and no look is made twice."""
    from peftkit.experiments import look

    recipe = rate_recipe(narrow, 2e-5)
    if moment == "taking back":
        real_gain = look.paired_gain

        def worthless(before, after, **more):
            found = real_gain(before, after, **more)
            return type(found)(found.mean, -1.0, 1.0, found.num_documents)

        monkeypatch.setattr(look, "paired_gain", worthless)
    whole = peftkit.finetune(recipe, out=tmp_path / "whole")
    name = {"growing": "write_growth", "taking back": "take_back_growth"}[moment]
    real = getattr(look, name)

    def killed(*arguments, **named):
        real(*arguments, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(look, name, killed)
        peftkit.finetune(recipe, out=tmp_path / "cut")
    resumed = peftkit.resume_run(tmp_path / "cut")
    assert weights(resumed) == weights(whole)
    plans = [read_plan(RunDir(tmp_path / name)) for name in ("whole", "cut")]
    assert plans[0].growths == plans[1].growths
    assert [e["step"] for e in of(tmp_path / "cut", "growth_kept")] == [
        e["step"] for e in of(tmp_path / "whole", "growth_kept")
    ]
