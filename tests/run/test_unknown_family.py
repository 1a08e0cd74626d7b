"""A model of no known family with code of its own: a tiny RetNet, which no library has."""

import json
import shutil

import pytest
import torch

import peftkit
from peftkit.errors import UserError
from tests.conftest import ROOT, TINY_LLAMA

ASSETS = ROOT / "tests" / "assets" / "retnet"


@pytest.fixture(scope="module")
def retnet(tmp_path_factory):
    """A folder as a hub repository would be: code, configuration, weights, tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("retnet") / "base"
    shutil.copytree(ASSETS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    vocabulary = len(json.loads((TINY_LLAMA / "tokenizer.json").read_text())["model"]["vocab"])
    config = {
        "model_type": "tiny_retnet",
        "architectures": ["TinyRetNetForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_retnet.TinyRetNetConfig",
            "AutoModelForCausalLM": "modeling_retnet.TinyRetNetForCausalLM",
        },
        "vocab_size": max(2048, vocabulary),
        "hidden_size": 64,
        "num_heads": 2,
        "ffn_dim": 128,
        "num_layers": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    made = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(made, trust_remote_code=True)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    for file in TINY_LLAMA.glob("*token*"):
        shutil.copy(file, folder)
    shutil.copy(TINY_LLAMA / "chat_template.jinja", folder) if (TINY_LLAMA / "chat_template.jinja").exists() else None
    return folder


@pytest.fixture
def trusted(retnet, recipe):
    recipe["base"] = {"id": str(retnet), "trust_remote_code": True}
    recipe["train"].update(learning_rate=5e-3, max_steps=12, eval_steps=6)
    return recipe


def test_its_code_runs_only_when_trusted(retnet, recipe, tmp_path):
    recipe["base"] = str(retnet)
    with pytest.raises(UserError, match="trust_remote_code: true, if you have read and trust it"):
        peftkit.finetune(recipe, out=tmp_path / "run")
    with pytest.raises(UserError, match="comes with its own code"):
        peftkit.inspect_model(retnet)


def test_roles_are_inferred_and_said_so(retnet, trusted):
    found = peftkit.inspect_model(retnet, trust_remote_code=True)
    assert found.by_role["q"] == 2 * 64 * 64
    assert found.by_role["up"] == 2 * (64 * 128 + 128)
    assert "inferred from their names and shapes" in " ".join(found.mind)
    plan = peftkit.make_plan(trusted)
    reasons = {d.key: d for d in plan.decisions}
    assert "inferred" in reasons["base.family"].reason
    trusted["method"] = "prefix"
    with pytest.raises(UserError, match="the nearest that works: prompt"):
        peftkit.make_plan(trusted)


METHODS = {
    "lora": {"name": "lora", "rank": 4},
    "attention": {"name": "lora", "rank": 4, "targets": "attention"},
    "qlora": {"name": "qlora", "rank": 4},
    "ia3": {"name": "ia3"},
    "full": {"name": "full"},
}


@pytest.mark.parametrize("case", METHODS)
def test_it_trains_with_every_method(case, trusted, tmp_path):
    trusted["method"] = METHODS[case]
    if case == "ia3":
        trusted["train"]["learning_rate"] = 5e-2
    told = []
    summary = peftkit.finetune(trusted, out=tmp_path / "run", observer=told.append)
    assert summary.eval_loss_after < summary.eval_loss_before
    [parameters] = [e for e in told if e["event"] == "parameters"]
    assert parameters["num_planned"] == parameters["num_trainable"]
    assert [e for e in told if e["event"] == "warning" and "code that comes with" in e["text"]]
    [passed] = [e for e in told if e["event"] == "preflight"]
    assert passed["num_tensors"] > 0


def test_micro_batches_do_not_change_what_is_learnt(retnet, trusted, tmp_path):
    """The Trainer divides the loss of a model without loss arguments: we keep the mean over a step."""
    from peftkit.rundir import RunDir
    from tests.conftest import chat, write_jsonl

    base = shutil.copytree(retnet, tmp_path / "without_loss_arguments")
    code = base / "modeling_retnet.py"
    text = code.read_text()
    assert text.count("return_dict=True, **kwargs") == 1
    named = "return_dict=True, output_attentions=None, output_hidden_states=None"
    code.write_text(text.replace("return_dict=True, **kwargs", named))
    trusted["base"]["id"] = str(base)

    rows = [chat(f"Say alpha {i}", "alpha " * (1 + 5 * (i % 4))) for i in range(16)]
    trusted["data"] = {"train": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "eval": None}
    first = []
    for micro in (16, 1):
        trusted["train"] |= {"max_steps": 1, "batch_size": 16, "micro_batch": micro, "eval_steps": "auto"}
        summary = peftkit.finetune(trusted, out=tmp_path / str(micro))
        first += [event for event in RunDir(summary.path).events() if event["event"] == "step"]
    whole, cut = first
    assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    assert cut["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)
