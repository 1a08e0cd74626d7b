"""`plan --measure`: three real steps on random weights agree with what the plan says, without any weights."""

import json

import pytest

import peftkit
from peftkit.cli import main
from peftkit.errors import UserError
from tests.conftest import TINY_LLAMA

METHODS = {"lora": {"name": "lora", "rank": 8}, "qlora": {"name": "qlora", "rank": 8}, "full": {"name": "full"}}


@pytest.fixture
def unseen(recipe, tmp_path):
    """A base of which only the configuration and the tokenizer are there."""
    folder = tmp_path / "unseen"
    folder.mkdir()
    for file in TINY_LLAMA.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    assert not list(folder.glob("*.safetensors"))
    recipe["base"] = str(folder)
    recipe["train"].update(batch_size=8, micro_batch=4)
    return recipe


@pytest.mark.parametrize("case", METHODS)
def test_measured_is_what_was_predicted(case, unseen):
    found = peftkit.plan_recipe({**unseen, "method": METHODS[case]}, measure=True)
    assert found.memory.depth == "traced"
    assert found.measured_memory is not None
    assert found.measured_memory.num_steps == 3
    assert found.measured_memory.step_seconds > 0
    assert abs(found.measured_memory.error_percent) < 2.0
    assert "base weights" in found._repr_html_()


def test_packs_are_measured_as_packs(unseen):
    """Each of two documents, which a mask keeps apart."""
    unseen["train"].update(packing=True, batch_size=24, micro_batch=2)
    found = peftkit.plan_recipe(unseen, measure=True)
    assert found.plan.batch.is_packed and found.plan.batch.num_rows == 2
    assert abs(found.measured_memory.error_percent) < 2.0


def test_a_trial_teaches_this_devices_speed(unseen, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "cache"))
    found = peftkit.plan_recipe(unseen, measure=True)
    assert found.work.tokens_per_second
    kept = json.loads((tmp_path / "cache" / "calibration.json").read_text())
    assert kept["memory"][-1]["measured_bytes"] == found.measured_memory.measured_bytes


def test_a_trial_is_only_here(unseen):
    with pytest.raises(UserError, match="--measure with --gpu rtx4090"):
        peftkit.plan_recipe(unseen, measure=True, gpu="rtx4090")


def test_the_command_prints_predicted_and_measured(unseen, tmp_path, capsys):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(unseen))
    assert main(["plan", str(path), "--measure", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert abs(told["trial"]["error_percent"]) < 2.0
