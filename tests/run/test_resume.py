"""A run that is stopped and resumed ends byte for byte where an uninterrupted run ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

import peftkit
from peftkit.errors import Interrupted, UserError
from peftkit.results.evaluate import evaluate
from peftkit.rundir import RunDir, read_json
from peftkit.train.checkpoint.snapshot import load_tensors

METHODS = {
    "lora": {"name": "lora", "rank": 4, "dropout": 0.2},
    "lora+": {"name": "lora", "rank": 4, "lr_ratio": 4.0},
    "dora": {"name": "lora", "rank": 2, "dora": True},
    "pissa": {"name": "lora", "rank": 2, "init": "pissa"},
    "embeddings": {"name": "lora", "rank": 2, "also_train": ["embeddings"]},
    "new tokens": {"name": "lora", "rank": 2, "also_train": [{"new_tokens": ["<one>"]}]},
    "layers": {"name": "lora", "rank": 2, "layers": "last 2", "rank_pattern": {"down": 4}},
    "qlora": {"name": "qlora", "rank": 4, "dropout": 0.1},
    "prefix": {"name": "prefix", "virtual_tokens": 3},
    "prefix projection": {"name": "prefix", "virtual_tokens": 3, "projection": True},
    "ia3": {"name": "ia3"},
    "full": {"name": "full"},
    "prompt": {"name": "prompt", "virtual_tokens": 3},
    "vera": {"name": "vera", "rank": 8},
    "oft": {"name": "oft", "block_size": 4},
    "adalora": {"name": "adalora", "initial_rank": 4, "rank": 2, "dropout": 0.1},
    "ln": {"name": "ln"},
}


@pytest.fixture
def long_recipe(recipe):
    """12 steps over a bit more than two epochs, with accumulation, warm-up and evaluation."""
    recipe["train"].update(max_steps=12, eval_steps=4, checkpoint_steps=3)
    return recipe


def stopping_at(step, number=signal.SIGTERM):
    def observe(event):
        if event["event"] == "step" and event["step"] == step:
            os.kill(os.getpid(), number)

    return observe


def weights(summary):
    [file] = summary.result.glob("*model.safetensors")
    return file.read_bytes()


FAST = {"lora", "qlora", "prefix", "full", "adalora", "pissa"}
CASES = [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in METHODS]


@pytest.mark.slow
def test_noise_on_embeddings_is_drawn_again_as_it_was(long_recipe, tmp_path):
    long_recipe["train"]["neftune"] = 5.0
    whole = peftkit.finetune(long_recipe, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        peftkit.finetune(long_recipe, out=tmp_path / "cut", observer=stopping_at(7))
    assert weights(peftkit.resume_run(tmp_path / "cut")) == weights(whole)


def test_averaged_weights_are_what_is_kept_and_gone_on_from(long_recipe, tmp_path):
    """Schedule-free AdamW: the model holds the mean between steps, and trains at y = x + 0.1 (z - x)."""
    long_recipe["train"]["optimizer"] = "schedule_free_adamw"
    whole = peftkit.finetune(long_recipe, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        peftkit.finetune(long_recipe, out=tmp_path / "cut", observer=stopping_at(7))
    assert weights(peftkit.resume_run(tmp_path / "cut")) == weights(whole)
    newest, _ = RunDir(tmp_path / "whole").newest_checkpoint()
    mean, states = load_tensors(newest, "trained"), load_tensors(newest, "optimizer")
    for name, tensor in load_file(whole.result / "adapter_model.safetensors").items():
        held = mean[name.replace(".weight", ".default.weight")]
        assert torch.equal(tensor, held)
        assert not torch.equal(held, states[f"{name.replace('.weight', '.default.weight')}|z"])
    [group, *_] = read_json(newest / "state.json")["groups"]
    assert group["k"] == 12 and group["lr_max"] > 0 and group["weight_sum"] > 0
    assert whole.eval_loss_after < whole.eval_loss_before
    assert evaluate(whole.result.parent).loss == pytest.approx(whole.eval_loss_after, abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_stopped_and_resumed_equals_uninterrupted(case, long_recipe, tmp_path):
    source = {**long_recipe, "method": METHODS[case]}
    whole = peftkit.finetune(source, out=tmp_path / "whole")
    with pytest.raises(Interrupted, match="peftkit resume") as caught:
        peftkit.finetune(source, out=tmp_path / "cut", observer=stopping_at(7))
    assert caught.value.exit_code == 143
    assert RunDir(tmp_path / "cut").checkpoint_steps()[-1] in (7, 8)
    assert not (tmp_path / "cut" / "adapter").exists()
    resumed = peftkit.resume_run(tmp_path / "cut")
    assert weights(resumed) == weights(whole)
    assert resumed.loss_last == whole.loss_last
    assert resumed.eval_loss_after == whole.eval_loss_after
    assert resumed.num_steps == 12


@pytest.mark.parametrize("step", [1, 4, 9])
def test_any_step_is_a_good_place_to_stop(step, long_recipe, tmp_path):
    """18 rows in batches of 4: step 5 begins a further pass, 4 and 8 are evaluated, dropout draws at each."""
    source = {**long_recipe, "method": METHODS["lora"]}
    whole = peftkit.finetune(source, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        peftkit.finetune(source, out=tmp_path / "cut", observer=stopping_at(step))
    resumed = peftkit.resume_run(tmp_path / "cut")
    assert weights(resumed) == weights(whole)
    assert resumed.eval_loss_after == whole.eval_loss_after


def test_a_stop_just_before_early_stopping_ends_the_same(long_recipe, tmp_path):
    long_recipe["train"].update(max_steps=40, eval_steps=2, learning_rate=0.3, early_stopping={"patience": 2})
    whole = peftkit.finetune(long_recipe, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        peftkit.finetune(long_recipe, out=tmp_path / "cut", observer=stopping_at(whole.num_steps))
    resumed = peftkit.resume_run(tmp_path / "cut")
    assert weights(resumed) == weights(whole)
    assert resumed.num_steps == whole.num_steps


def test_damaged_newest_checkpoint_is_passed_over(long_recipe, tmp_path):
    whole = peftkit.finetune(long_recipe, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        peftkit.finetune(long_recipe, out=tmp_path / "cut", observer=stopping_at(7, signal.SIGINT))
    run = RunDir(tmp_path / "cut")
    newest = run.checkpoint(run.checkpoint_steps()[-1])
    data = bytearray((newest / "trained.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "trained.safetensors").write_bytes(data)
    told = []
    resumed = peftkit.resume_run(run.path, observer=told.append)
    assert [e for e in told if e["event"] == "warning" and "changed after it was written" in e["text"]]
    assert weights(resumed) == weights(whole)


def test_stopped_before_the_first_checkpoint_starts_over(long_recipe, tmp_path):
    whole = peftkit.finetune(long_recipe, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        peftkit.finetune(long_recipe, out=tmp_path / "cut", observer=stopping_at(7))
    shutil.rmtree(tmp_path / "cut" / "checkpoints")
    assert weights(peftkit.resume_run(tmp_path / "cut")) == weights(whole)


def test_changed_data_and_finished_runs_are_refused(long_recipe, chats, tmp_path):
    with pytest.raises(Interrupted):
        peftkit.finetune(long_recipe, out=tmp_path / "cut", observer=stopping_at(7))
    before = chats.read_text()
    chats.write_text(before.replace("number 3", "number 33"))
    with pytest.raises(UserError, match="data that changed"):
        peftkit.resume_run(tmp_path / "cut")
    chats.write_text(before)
    peftkit.resume_run(tmp_path / "cut")
    with pytest.raises(UserError, match="finished"):
        peftkit.resume_run(tmp_path / "cut")


def test_changed_held_out_rows_and_a_changed_base_are_refused(long_recipe, tmp_path):
    from tests.conftest import TINY_LLAMA, chat, write_jsonl

    shutil.copytree(TINY_LLAMA, tmp_path / "base")
    held = write_jsonl(tmp_path / "held.jsonl", [chat("Say alpha number 99", "alpha alpha")])
    long_recipe["base"] = str(tmp_path / "base")
    long_recipe["data"]["eval"] = str(held)
    with pytest.raises(Interrupted):
        peftkit.finetune(long_recipe, out=tmp_path / "cut", observer=stopping_at(7))
    held.write_text(held.read_text().replace("99", "98"))
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 2e-5}))
    with pytest.raises(UserError) as caught:
        peftkit.resume_run(tmp_path / "cut")
    assert len(caught.value.problems) == 2


def test_a_lost_best_checkpoint_is_told_and_the_run_still_ends(long_recipe, tmp_path):
    long_recipe["train"].update(max_steps=20, eval_steps=2, checkpoint_steps=1, learning_rate=0.3)
    with pytest.raises(Interrupted):
        peftkit.finetune(long_recipe, out=tmp_path / "cut", observer=stopping_at(9))
    run = RunDir(tmp_path / "cut")
    best = json.loads((run.checkpoint(run.checkpoint_steps()[-1]) / "state.json").read_text())["progress"]["best_step"]
    assert best != run.checkpoint_steps()[-1], "a rate of 0.3 makes an early step the best"
    (run.checkpoint(best) / "trained.safetensors").write_bytes(b"")
    told = []
    assert peftkit.resume_run(run.path, observer=told.append).result is not None
    assert [e for e in told if e["event"] == "warning" and "is lost" in e["text"]]


def test_old_checkpoints_are_rotated_by_step(long_recipe, tmp_path):
    long_recipe["train"].update(checkpoint_steps=1)
    peftkit.finetune(long_recipe, out=tmp_path / "run")
    steps = RunDir(tmp_path / "run").checkpoint_steps()
    assert len(steps) <= 4
    assert 11 in steps or 12 in steps


@pytest.mark.slow
def test_kill_nine_and_resume_from_the_command_line(long_recipe, tmp_path):
    """No handler runs on SIGKILL: what stands on disk must be enough."""
    path = tmp_path / "recipe.yaml"
    long_recipe["train"].update(max_steps=40, checkpoint_steps=5, eval_steps=20)
    path.write_text(yaml.safe_dump(long_recipe))
    whole = peftkit.finetune(path, out=tmp_path / "whole")
    command = [sys.executable, "-m", "peftkit", "finetune", str(path), "--out", str(tmp_path / "cut")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    run = RunDir(tmp_path / "cut")
    while process.poll() is None and len(run.checkpoint_steps()) < 2:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = subprocess.run(
        [sys.executable, "-m", "peftkit", "resume", str(run.path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stderr
    assert weights(peftkit.summarize_run(run.path)) == weights(whole)


@pytest.mark.slow
def test_a_run_that_another_process_works_on_is_refused(long_recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    long_recipe["train"].update(max_steps=4000, checkpoint_steps=50, eval_steps=4000)
    path.write_text(yaml.safe_dump(long_recipe))
    command = [sys.executable, "-m", "peftkit", "finetune", str(path), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    run = RunDir(tmp_path / "run")
    while process.poll() is None and not run.checkpoint_steps():
        time.sleep(0.05)
    with pytest.raises(UserError, match=f"a run that process {process.pid} on .* works on"):
        peftkit.resume_run(run.path)
    assert peftkit.verify_run(run.path).faults == (), "to look at it is no work"
    process.terminate()
    assert process.wait(timeout=60) == 143
    assert run.newest_checkpoint()[0] is not None
