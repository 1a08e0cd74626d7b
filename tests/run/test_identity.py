"""A run is bound to its recipe, data, base and versions: what changed is named, and may be allowed."""

import json
import shutil

import pytest

import peftkit
from peftkit.errors import Interrupted, UserError
from peftkit.recipe.document import dump_text
from peftkit.rundir import RunDir, read_sealed, verify_sealed, write_sealed
from tests.conftest import TINY_LLAMA
from tests.data.read.test_remote import server  # noqa: F401
from tests.run.test_resume import stopping_at, weights


@pytest.fixture
def cut(recipe, tmp_path):
    """A run on a base of its own, stopped at step 5 of 8."""
    shutil.copytree(TINY_LLAMA, tmp_path / "base")
    recipe["base"] = str(tmp_path / "base")
    recipe["train"].update(max_steps=8, eval_steps=4, checkpoint_steps=2)
    with pytest.raises(Interrupted):
        peftkit.finetune(recipe, out=tmp_path / "cut", observer=stopping_at(5))
    return RunDir(tmp_path / "cut")


def other_weights(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[-1]
    tensors[name] = tensors[name] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_changed_recipe_is_refused_or_decided_anew(cut):
    file = cut.path / "resolved.yaml"
    file.write_text(file.read_text().replace("max_steps: 8", "max_steps: 10"))
    with pytest.raises(UserError, match="--allow-changed recipe"):
        peftkit.resume_run(cut.path)
    resumed = peftkit.resume_run(cut.path, allow_changed=["recipe"])
    assert resumed.num_steps == 10
    assert [e["event"] for e in cut.events()].count("changed") == 1
    assert verify_sealed(cut.path / "environment.json") == []


def test_another_base_is_refused_with_both_names(cut, tmp_path):
    other_weights(tmp_path / "base")
    with pytest.raises(UserError, match=r"base that changed.*other weights"):
        peftkit.resume_run(cut.path)
    assert peftkit.resume_run(cut.path, allow_changed=["base"]).num_steps == 8


def test_other_versions_are_refused_with_both_numbers(cut):
    environment = read_sealed(cut.path / "environment.json")
    environment["fingerprints"]["versions"]["peft"] = "0.1.0"
    write_sealed(cut.path / "environment.json", environment)
    with pytest.raises(UserError, match=r"peft 0\.1\.0 then, 0\.21"):
        peftkit.resume_run(cut.path)
    peftkit.resume_run(cut.path, allow_changed=["versions"])


def test_only_known_changes_can_be_allowed(cut):
    with pytest.raises(UserError, match="did you mean versions"):
        peftkit.resume_run(cut.path, allow_changed=["version"])


def test_a_plan_changed_by_hand_is_refused(cut):
    plan = json.loads((cut.path / "plan.json").read_text())
    plan["train"]["learning_rate"] *= 10
    (cut.path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match="changed after it was written"):
        peftkit.resume_run(cut.path)


def test_an_adapter_asked_on_another_base_is_refused(recipe, tmp_path):
    shutil.copytree(TINY_LLAMA, tmp_path / "base")
    recipe["base"] = str(tmp_path / "base")
    recipe["train"]["max_steps"] = 2
    summary = peftkit.finetune(recipe, out=tmp_path / "run")
    assert peftkit.generate(tmp_path / "run", ["Say alpha"])
    told = json.loads((summary.result / "peftkit.json").read_text())
    assert told["base"]["id"] == str(tmp_path / "base") and told["recipe"] and told["template"]
    other_weights(tmp_path / "base")
    for path in (tmp_path / "run", summary.result):
        with pytest.raises(UserError, match=r"different weights.*it was trained on"):
            peftkit.generate(path, ["Say alpha"])


def test_a_flipped_byte_of_an_adapter_is_refused(recipe, tmp_path):
    recipe["train"]["max_steps"] = 2
    summary = peftkit.finetune(recipe, out=tmp_path / "run")
    file = summary.result / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="changed after it was written"):
        peftkit.generate(tmp_path / "run", ["Say alpha"])
    assert peftkit.verify_run(tmp_path / "run").faults


def test_verify_reads_everything_again(cut, tmp_path):
    assert peftkit.verify_run(cut.path).faults == ()
    found = peftkit.verify_run(cut.path)
    assert not found.is_finished and found.newest_step >= 5
    weights(peftkit.resume_run(cut.path))
    found = peftkit.verify_run(cut.path)
    assert found.faults == () and found.is_finished
    names = [one.name for one in found.checked]
    assert {"resolved.yaml", "plan.json", "environment.json", "events.jsonl", "adapter"} <= set(names)
    (cut.path / "adapter" / "more.txt").write_text("x")
    (cut.path / "data.json").write_text("{}")
    assert len(peftkit.verify_run(cut.path).faults) == 2
    (cut.path / "recipe.yaml").write_text("# mine\n" + (cut.path / "recipe.yaml").read_text())
    assert "recipe.yaml was changed after it was written" in peftkit.verify_run(cut.path).faults


@pytest.mark.slow
def test_a_password_is_not_kept_and_the_recipe_asked_for(recipe, chats, server, tmp_path):  # noqa: F811
    server.answers["/rows.jsonl"] = ({}, chats.read_bytes())
    url = server.url.replace("://", "://me:open-sesame-99@") + "/rows.jsonl"
    recipe["data"] = {"train": url, "eval": "25%"}
    recipe["train"].update(max_steps=8, checkpoint_steps=2)
    (tmp_path / "mine.yaml").write_text(dump_text(recipe))
    given = ["method.rank=2"]
    with pytest.raises(Interrupted):
        peftkit.finetune(tmp_path / "mine.yaml", given, out=tmp_path / "cut", observer=stopping_at(5))
    for path in (tmp_path / "cut").rglob("*"):
        assert path.is_dir() or b"open-sesame-99" not in path.read_bytes(), path
    with pytest.raises(UserError, match="--recipe FILE"):
        peftkit.resume_run(tmp_path / "cut")
    recipe["train"]["max_steps"] = 9
    (tmp_path / "other.yaml").write_text(dump_text(recipe))
    with pytest.raises(UserError, match="a recipe other than the run's"):
        peftkit.resume_run(tmp_path / "cut", recipe=tmp_path / "other.yaml", overrides=given)
    assert peftkit.resume_run(tmp_path / "cut", recipe=tmp_path / "mine.yaml", overrides=given).num_steps == 8
    assert peftkit.verify_run(tmp_path / "cut").faults == ()


def test_a_changed_recipe_that_the_checkpoint_does_not_fit_is_refused_and_nothing_is_lost(cut):
    file, plan = cut.path / "resolved.yaml", (cut.path / "plan.json").read_bytes()
    before = file.read_text()
    for other in (
        before.replace("rank: 4", "rank: 8"),
        before.replace("  max_steps: 8", "  optimizer: sgd\n  max_steps: 8"),
    ):
        assert other != before
        file.write_text(other)
        with pytest.raises(UserError, match="a method, base or optimizer other than that of step-"):
            peftkit.resume_run(cut.path, allow_changed=["recipe"])
        assert (cut.path / "plan.json").read_bytes() == plan
    file.write_text(before)
    assert peftkit.resume_run(cut.path).num_steps == 8


@pytest.mark.slow
def test_checkpoints_without_their_plan_are_not_gone_on_with(cut):
    kept = (cut.path / "plan.json").read_bytes()
    (cut.path / "plan.json").unlink()
    with pytest.raises(UserError, match=r"checkpoints without plan\.json"):
        peftkit.resume_run(cut.path)
    (cut.path / "plan.json").write_bytes(kept)
    assert peftkit.resume_run(cut.path).num_steps == 8


@pytest.mark.slow
def test_data_in_another_folder_is_the_same_data(cut, chats, tmp_path):
    moved = tmp_path / "elsewhere.jsonl"
    chats.rename(moved)
    file = cut.path / "resolved.yaml"
    file.write_text(file.read_text().replace(str(chats), str(moved)))
    with pytest.raises(UserError) as caught:
        peftkit.resume_run(cut.path)
    assert [problem.where for problem in caught.value.problems] == ["recipe"]
    assert peftkit.resume_run(cut.path, allow_changed=["recipe"]).num_steps == 8


def test_weights_that_were_not_there_yet_are_no_other_base(tmp_path):
    from dataclasses import replace

    from peftkit.model.base.identity import base_identity, changed_parts
    from tests.rigs.plans import cpu_plan

    shutil.copytree(TINY_LLAMA, tmp_path / "base")
    plan = replace(cpu_plan().base, revision=None)
    whole = base_identity(str(tmp_path / "base"), plan)
    weights = (tmp_path / "base" / "model.safetensors").read_bytes()
    (tmp_path / "base" / "model.safetensors").unlink()
    before = base_identity(str(tmp_path / "base"), plan)
    assert before["weights_sha256"] is None and changed_parts(before, whole) == []
    (tmp_path / "base" / "model.safetensors").write_bytes(weights)
    (tmp_path / "base" / "consolidated.safetensors").write_bytes(weights[:100])
    assert base_identity(str(tmp_path / "base"), plan) == whole, "what is not loaded is no part of it"


@pytest.mark.slow
def test_what_pissa_subtracts_is_made_again_where_it_is_damaged(recipe, tmp_path):
    recipe["method"] = {"name": "lora", "rank": 2, "init": "pissa"}
    recipe["train"].update(max_steps=8, checkpoint_steps=2)
    whole = peftkit.finetune(recipe, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        peftkit.finetune(recipe, out=tmp_path / "cut", observer=stopping_at(5))
    file = tmp_path / "cut" / "adapter_start" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert weights(peftkit.resume_run(tmp_path / "cut")) == weights(whole)
