"""Trainings that leave the road: skipped, rolled back or stopped, and nothing broken is ever published."""

import math

import pytest

import peftkit
from peftkit.errors import Interrupted, UserError
from peftkit.rundir import RunDir, read_sealed, verify_folder
from tests.conftest import TINY_LLAMA, chat, write_jsonl
from tests.run.test_resume import stopping_at, weights


@pytest.fixture
def steep(tmp_path):
    """SGD at a mad rate: gradients overflow within five steps, at a quarter of it they do not."""
    rows = [chat(f"Say alpha number {i}", "alpha beta " * (1 + i % 3)) for i in range(64)]
    return {
        "base": str(TINY_LLAMA),
        "method": {"name": "lora", "rank": 4},
        "data": {"train": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "eval": None},
        "train": {
            "max_steps": 40,
            "batch_size": 4,
            "micro_batch": 2,
            "max_length": 64,
            "checkpoint_steps": 2,
            "optimizer": "sgd",
            "learning_rate": 4000,
            "schedule": {"kind": "constant", "warmup": 0.0},
        },
    }


def of(run, name):
    return [event for event in RunDir(run).events() if event["event"] == name]


def test_a_rollback_halves_the_rate_and_the_run_ends_well(steep, tmp_path):
    summary = peftkit.finetune(steep, out=tmp_path / "run")
    spikes, [rollback, *more] = of(tmp_path / "run", "spike"), of(tmp_path / "run", "rollback")
    assert [event["num_in_a_row"] for event in spikes[:3]] == [1, 2, 3]
    assert all(event["skipped"] and event["rows"] for event in spikes[:3])
    assert rollback["learning_rate"] == 2000 and rollback["step"] < rollback["first_bad_step"]
    plan = read_sealed(tmp_path / "run" / "plan.json")
    assert plan["train"]["learning_rate"] == 4000 / 2 ** (1 + len(more))
    reason = next(d for d in plan["decisions"] if d["key"] == "train.learning_rate")["reason"]
    assert "rollback" in reason and "gradient norm" in reason
    assert summary.num_steps == 40 and math.isfinite(summary.loss_last)
    assert summary.loss_last < summary.loss_first
    rates = {event["step"]: event["learning_rate"] for event in of(tmp_path / "run", "step")}
    assert rates[40] == plan["train"]["learning_rate"]
    assert peftkit.verify_run(tmp_path / "run").faults == ()


@pytest.mark.slow
def test_a_run_stopped_after_a_rollback_resumes_to_the_same_bytes(steep, tmp_path):
    whole = peftkit.finetune(steep, out=tmp_path / "whole")
    assert of(tmp_path / "whole", "rollback")
    with pytest.raises(Interrupted):
        peftkit.finetune(steep, out=tmp_path / "cut", observer=stopping_at(27))
    assert weights(peftkit.resume_run(tmp_path / "cut")) == weights(whole)


def test_stop_stops_at_the_first_with_the_last_checkpoint_whole(steep, tmp_path):
    steep["train"]["on_spike"] = "stop"
    with pytest.raises(UserError, match=r"a gradient norm of nan: the step was skipped \(rows .*jsonl:\d+"):
        peftkit.finetune(steep, out=tmp_path / "run")
    run = RunDir(tmp_path / "run")
    assert len(of(run.path, "spike")) == 1
    assert not run.adapter.exists()
    assert verify_folder(run.checkpoint(run.checkpoint_steps()[-1])) == []


@pytest.mark.slow
def test_no_rate_that_helps_ends_the_run_and_publishes_nothing(steep, tmp_path):
    steep["train"].update(learning_rate=1e9, optimizer="adamw_torch")
    with pytest.raises(UserError, match="after 3 rollbacks"):
        peftkit.finetune(steep, out=tmp_path / "run")
    assert len(of(tmp_path / "run", "rollback")) == 3
    assert not (tmp_path / "run" / "adapter").exists()


def test_skip_goes_on_without_the_bad_steps_until_there_are_too_many(steep, tmp_path):
    steep["train"].update(on_spike="skip", max_steps=20)
    summary = peftkit.finetune(steep, out=tmp_path / "run")
    spikes = of(tmp_path / "run", "spike")
    assert len(spikes) > 10 and all(event["skipped"] for event in spikes)
    assert spikes[-1]["num_skipped"] == len(spikes)
    assert not of(tmp_path / "run", "rollback")
    assert math.isfinite(summary.loss_last)
    assert summary.result is not None
    steep["train"]["max_steps"] = 40
    with pytest.raises(UserError, match=r"the step was skipped \(rows .*lower the learning rate"):
        peftkit.finetune(steep, out=tmp_path / "longer")
    assert of(tmp_path / "longer", "spike")[-1]["num_in_a_row"] == 25
    assert not (tmp_path / "longer" / "adapter").exists()


def test_the_loss_of_a_step_is_the_trainers(recipe, tmp_path, monkeypatch):
    """Ours is summed from the micro-batches, because the Trainer's stays NaN once it was."""
    from peftkit.train.recorder import Recorder

    seen, told = [], Recorder.on_log

    def on_log(self, args, state, control, logs=None, **parts):
        if logs and "loss" in logs:
            seen.append((float(logs["loss"]), self.guard.loss))
        return told(self, args, state, control, logs=logs, **parts)

    monkeypatch.setattr(Recorder, "on_log", on_log)
    recipe["train"]["max_steps"] = 4
    peftkit.finetune(recipe, out=tmp_path / "run")
    assert len(seen) == 4
    assert all(theirs == ours for theirs, ours in seen)


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_rollback_changes_nothing(steep, tmp_path, monkeypatch):
    from peftkit.run import recovery as recover

    whole = peftkit.finetune(steep, out=tmp_path / "whole")
    assert len(of(tmp_path / "whole", "rollback")) == 2

    for name in ("write_sealed", "set_aside_abandoned"):

        def killed(*arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr(recover, name, killed)
        with pytest.raises(KeyboardInterrupt):
            peftkit.finetune(steep, out=tmp_path / name)
        monkeypatch.undo()
        assert weights(peftkit.resume_run(tmp_path / name)) == weights(whole)
        plans = [read_sealed(tmp_path / run / "plan.json")["train"] for run in (name, "whole")]
        assert plans[0] == plans[1]


def test_an_evaluation_at_a_bad_step_is_never_the_best(steep, tmp_path):
    """Its state is kept by no checkpoint: taken for the best, nothing could be published."""
    steep["data"]["eval"] = "25%"
    steep["train"].update(eval_steps=3, checkpoint_steps=40, max_steps=12, on_spike="skip")
    summary = peftkit.finetune(steep, out=tmp_path / "run")
    bad = {event["step"] for event in of(tmp_path / "run", "spike")}
    evaluated = [event for event in of(tmp_path / "run", "eval") if event["step"]]
    assert {event["step"] for event in evaluated} == {3, 6, 9, 12} <= bad
    assert not any(event["best"] for event in evaluated)
    assert summary.result is not None
