"""Training goes on from an adapter: exactly where it stood, on its base, with its settings."""

import json
import os
import shutil
import signal

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import peftkit
from peftkit.errors import Interrupted, UserError
from peftkit.rundir import RunDir
from tests.conftest import TINY_LLAMA, write_jsonl

METHODS = {
    "lora": {"name": "lora", "rank": 4, "rank_pattern": {"down": 8}, "layers": "last 2", "also_train": ["norms"]},
    "dora": {"name": "lora", "rank": 2, "dora": True, "rslora": True},
    "pissa": {"name": "lora", "rank": 2, "init": "pissa"},
    "qlora": {"name": "qlora", "rank": 4},
    "head": {"name": "lora", "rank": 2, "also_train": ["head"], "targets": ["q", "v"]},
    "prefix": {"name": "prefix", "virtual_tokens": 3},
    "prompt": {"name": "prompt", "virtual_tokens": 3},
    "ia3": {"name": "ia3"},
    "vera": {"name": "vera", "rank": 8},
    "oft": {"name": "oft", "block_size": 4},
    "ln": {"name": "ln"},
}
FAST = {"lora", "qlora", "pissa", "ia3"}


def weights(result):
    return (result / "adapter_model.safetensors").read_bytes()


def stopping_at(name, step=None):
    """Return an observer that stops the process at an event."""

    def observe(event):
        if event["event"] == name and step in {None, event.get("step")}:
            os.kill(os.getpid(), signal.SIGTERM)

    return observe


def first_loss(events):
    return next(event["loss"] for event in events if event["event"] == "eval")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A finished LoRA run, with the data of it and of what is learned next."""
    folder = tmp_path_factory.mktemp("start")
    rows = [{"prompt": f"Say {n}", "completion": f"word {n}"} for n in range(24)]
    data = {"train": str(write_jsonl(folder / "rows.jsonl", rows)), "eval": "25%"}
    data["waive"] = ["near-leakage", "near-duplicates"]
    train = {"max_steps": 4, "max_length": 64, "learning_rate": 1e-2}
    recipe = {"base": str(TINY_LLAMA), "method": {"name": "lora", "rank": 4}, "data": data, "train": train}
    peftkit.finetune(recipe, out=folder / "first")
    return folder, recipe


@pytest.mark.parametrize("case", [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in METHODS])
def test_it_begins_at_the_loss_where_the_adapter_stood(case, first, tmp_path):
    _, recipe = first
    run = peftkit.finetune({**recipe, "method": METHODS[case]}, out=tmp_path / "one")
    events = []
    following = {"start_from": str(run.path), "data": recipe["data"], "train": {**recipe["train"], "max_steps": 2}}
    second = peftkit.finetune(following, out=tmp_path / "two", observer=events.append)
    assert first_loss(events) == pytest.approx(run.eval_loss_after, abs=2e-5 if case == "pissa" else 1e-9)
    assert second.num_trainable == run.num_trainable * (2 if case == "pissa" else 1), "PiSSA is saved as plain LoRA"
    if case not in {"prefix", "prompt", "oft"}:
        assert peftkit.merge_adapter(second.path, out=str(tmp_path / "merged")).passed


def test_stopped_and_resumed_equals_uninterrupted_though_the_adapter_is_gone(first, tmp_path):
    folder, recipe = first
    start = shutil.copytree(folder / "first", tmp_path / "start")
    following = {"start_from": str(start), "data": recipe["data"], "train": {**recipe["train"], "max_steps": 6}}
    whole = peftkit.finetune(following, out=tmp_path / "whole")

    with pytest.raises(Interrupted):
        peftkit.finetune(following, out=tmp_path / "cut", observer=stopping_at("step", 3))
    shutil.rmtree(start)
    assert weights(peftkit.resume_run(tmp_path / "cut").result) == weights(whole.result)


def test_without_a_checkpoint_it_begins_again_from_the_same_adapter(first, tmp_path):
    folder, recipe = first
    start = shutil.copytree(folder / "first", tmp_path / "start")
    following = {"start_from": str(start), "data": recipe["data"], "train": {**recipe["train"], "max_steps": 3}}
    whole = peftkit.finetune(following, out=tmp_path / "whole")

    with pytest.raises(Interrupted):
        peftkit.finetune(following, out=tmp_path / "cut", observer=stopping_at("preflight"))
    assert not RunDir(tmp_path / "cut").checkpoint_steps()
    shutil.copyfile(whole.result / "adapter_model.safetensors", start / "adapter" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="start_from that changed since the run began"):
        peftkit.resume_run(tmp_path / "cut")
    shutil.copytree(folder / "first", start, dirs_exist_ok=True)
    assert weights(peftkit.resume_run(tmp_path / "cut").result) == weights(whole.result)


def test_an_adapter_that_peft_saved_goes_on(first, tmp_path):
    _, recipe = first
    base = shutil.copytree(TINY_LLAMA, tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=r".*\.(0|1)\..*(q|v)_proj",
        rank_pattern={r"1\..*": 3},
        modules_to_save=["lm_head"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, config)
    model.save_pretrained(tmp_path / "theirs")
    events = []
    following = {"start_from": str(tmp_path / "theirs"), "data": recipe["data"]}
    plan = peftkit.make_plan(following)
    assert plan.method.num_trainable == model.get_nb_trainable_parameters()[0]
    following["train"] = {"max_steps": 1, "learning_rate": 1e-12}
    run = peftkit.finetune(following, out=tmp_path / "run", observer=events.append)
    assert any("nothing in theirs says what base" in event.get("text", "") for event in events)
    theirs, ours = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "theirs", run.result))
    assert theirs.keys() == ours.keys()
    assert all(torch.allclose(theirs[name].float(), ours[name].float(), atol=1e-6) for name in theirs)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_modules", 3),
        ("rank_pattern", ["q"]),
        ("modules_to_save", "lm_head"),
        ("r", "x"),
        ("target_modules", {}),
    ],
    ids=str,
)
def test_a_configuration_of_odd_types_is_refused_in_words(key, value, tmp_path):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], key: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        peftkit.make_plan({"base": str(TINY_LLAMA), "start_from": str(tmp_path), "data": {"train": "x.jsonl"}})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": {"name": "lora", "rank": 8}}, "method.rank: got 8, expected 4; leave it out"),
        ({"method": "ia3"}, "an adapter of type LORA for method ia3"),
        ({"method": {"name": "lora", "init": "pissa"}}, "pissa with start_from"),
        ({"start_from": "nowhere"}, "which does not exist"),
        ({"start_from": "x" * 5000}, "which does not exist"),
        ({"start_from": "a\0b"}, "character U"),
        ({"start_from": str(TINY_LLAMA)}, "without adapter_config.json"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_adapter_is_refused_before_anything_is_read(change, said, first):
    folder, recipe = first
    with pytest.raises(UserError, match=said):
        peftkit.make_plan({"start_from": str(folder / "first"), "data": recipe["data"], **change})


def test_another_base_and_settings_that_peftkit_does_not_have_are_refused(first, tmp_path):
    folder, recipe = first
    following = {"start_from": str(tmp_path / "odd"), "data": recipe["data"]}
    odd = shutil.copytree(folder / "first" / "adapter", tmp_path / "odd")
    other = shutil.copytree(TINY_LLAMA, tmp_path / "base")
    file = next(other.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-70_000:] = bytes(70_000)
    file.write_bytes(content)
    with pytest.raises(UserError, match="with different weights"):
        peftkit.finetune({**following, "base": str(other)}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config = json.loads((odd / "adapter_config.json").read_text())
    (odd / "adapter_config.json").write_text(json.dumps({**config, "bias": "all", "trainable_token_indices": [1]}))
    with pytest.raises(UserError) as caught:
        peftkit.make_plan(following)
    assert {problem.got for problem in caught.value.problems} == {'bias: "all"', "trainable_token_indices: [1]"}


@pytest.mark.parametrize("base", [5, ["x"], "", {}, {"attention": "eager"}, None], ids=str)
def test_a_base_without_an_id_is_taken_from_the_adapter_or_refused_in_words(base, first):
    folder, recipe = first
    following = {"start_from": str(folder / "first"), "base": base, "data": recipe["data"]}
    if isinstance(base, dict | None):
        plan = peftkit.make_plan(following)
        assert plan.base.id == str(TINY_LLAMA)
        assert plan.base.attention == ("eager" if base else "sdpa")
    else:
        with pytest.raises(UserError):
            peftkit.make_plan(following)


def test_a_base_in_other_bits_is_told(first, tmp_path):
    folder, recipe = first
    events = []
    following = {"start_from": str(folder / "first"), "method": "qlora", "data": recipe["data"]}
    following["train"] = {"max_steps": 1}
    peftkit.finetune(following, out=tmp_path / "run", observer=events.append)
    assert any("loaded in 4 bit, and was without" in event.get("text", "") for event in events)


def test_a_run_of_full_fine_tuning_is_a_base(first, tmp_path):
    _, recipe = first
    full = peftkit.finetune({**recipe, "method": "full", "train": {"max_steps": 1}}, out=tmp_path / "full")
    with pytest.raises(UserError) as caught:
        peftkit.make_plan({"start_from": str(full.path), "data": recipe["data"]})
    fix = caught.value.problems[0].fix
    base = fix.removeprefix("train on it: base: ")
    assert peftkit.make_plan({"base": base, "method": "lora", "data": recipe["data"]}).method.num_trainable


def test_a_classifier_goes_on_with_its_own_classes(tmp_path):
    def data(name, labels):
        rows = [{"text": f"word {n} {label}", "label": label} for n in range(8) for label in labels]
        return {"train": str(write_jsonl(tmp_path / name, rows)), "eval": None}

    recipe = {"base": str(TINY_LLAMA), "method": {"name": "lora", "rank": 2}, "train": {"max_steps": 2}}
    run = peftkit.finetune({**recipe, "data": data("a.jsonl", ["no", "yes"])}, out=tmp_path / "run")
    following = {"start_from": str(run.path), "train": {"max_steps": 2}}
    with pytest.raises(UserError, match="data of the classes maybe, yes"):
        peftkit.finetune({**following, "data": data("b.jsonl", ["yes", "maybe"])}, out=tmp_path / "two")
    peftkit.finetune({**following, "data": data("c.jsonl", ["yes", "no"])}, out=tmp_path / "two")


def test_a_result_that_is_worse_than_its_start_is_told_so(first, tmp_path):
    folder, recipe = first

    def warnings_at(rate):
        events = []
        train = {"max_steps": 2, "max_length": 64, "learning_rate": rate, "schedule": {"warmup": 0}}
        following = {"start_from": str(folder / "first"), "data": recipe["data"], "train": train}
        run = peftkit.finetune(following, out=tmp_path / f"at {rate}", observer=events.append)
        texts = [event["text"] for event in events if event["event"] == "warning"]
        return run, [text for text in texts if "worse than" in text]

    run, [warning] = warnings_at(3.0)
    assert run.eval_loss_after > run.eval_loss_before
    assert f"evaluation loss {run.eval_loss_before:.4f} -> {run.eval_loss_after:.4f}" in warning
    run, none = warnings_at(1e-5)
    assert not none
