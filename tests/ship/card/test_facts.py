"""Facts of real runs and of adapters made elsewhere; the code of their cards is executed as it stands."""

import io
import json
import shutil
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import peftkit
from peftkit.errors import UserError
from peftkit.rundir import RunDir
from peftkit.ship.card.card import render_card
from peftkit.ship.card.facts import read_adapter_facts, read_run_facts
from tests.conftest import TINY_LLAMA, chat, write_jsonl
from tests.rigs.tiny import tiny_model

WORDS = ("alpha", "beta", "gamma", "delta")
LICENCED = "---\nlicense: other\nlicense_name: tiny\nlicense_link: https://example.org\n---\n# Tiny\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which org/tiny is a base and me/tuned an adapter: hub ids that are folders too."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(TINY_LLAMA, folder / "org" / "tiny")
    (folder / "org" / "tiny" / "README.md").write_text(LICENCED)
    return folder


@pytest.fixture(scope="module")
def run(place):
    rows = [chat(f"Say {WORDS[i % 4]} number {i}", f"{WORDS[i % 4]}") for i in range(48)]
    recipe = {
        "base": str(place / "org" / "tiny"),
        "method": {"name": "lora", "rank": 4},
        "data": {"train": str(write_jsonl(place / "chats.jsonl", rows)), "eval": "25%"},
        "evaluate": {"metric": "exact_match", "max_new_tokens": 4},
        "train": {"max_steps": 8, "batch_size": 8, "micro_batch": 4, "max_length": 64, "eval_steps": 4},
    }
    return RunDir(peftkit.finetune(recipe, out=place / "run").path)


def event(run, name):
    return [one for one in run.events() if one["event"] == name][-1]


def test_facts_are_those_of_the_runs_own_files(run, place):
    facts = read_run_facts(run, name="me/tuned")
    assert (facts.layout, facts.method, facts.task, facts.chats) == ("adapter", "lora", "causal-lm", True)
    assert facts.base.id is None
    assert (facts.base.said, facts.base.license, facts.base.license_name) == ("tiny", "other", "tiny")
    identity = json.loads((run.adapter / "peftkit.json").read_text())
    assert facts.base.weights_sha256 == identity["base"]["weights_sha256"]
    assert facts.data.sha256 == identity["data"]
    assert facts.data.names == ("chats.jsonl",)
    assert (facts.data.num_train, facts.data.num_eval) == (36, 12)
    assert facts.num_trainable == event(run, "parameters")["num_trainable"]
    assert facts.planned_bytes == event(run, "memory")["predicted_bytes"]
    assert facts.measured_bytes == event(run, "memory")["measured_bytes"]
    assert facts.settings["rank"] == 4
    assert facts.settings["optimizer steps"] == 8
    assert facts.verdict == event(run, "verdict")["text"]
    loss, judged, match, _ = facts.scores
    assert loss.after == event(run, "eval")["loss"] < loss.before
    assert (judged.low, judged.after, judged.high) == tuple(
        event(run, "verdict")["loss"][key] for key in ("low", "mean", "high")
    )
    assert match.low < match.after < match.high or match.after in {0.0, 1.0}
    card = render_card(facts)
    assert str(place) not in card
    assert "Licence: other (tiny), inherited from the base." in card


def code_of(card):
    return card.split("```python\n")[1].split("```")[0]


def execute(card, folder, monkeypatch):
    """What the code of a card prints, in a folder where its names stand."""
    monkeypatch.chdir(folder)
    with redirect_stdout(io.StringIO()) as out:
        exec(compile(code_of(card), "card", "exec"), {})
    return out.getvalue().strip()


def on(facts, base):
    return replace(facts, base=replace(facts.base, id=base))


def test_the_code_of_a_card_answers_as_the_run_does(run, place, monkeypatch):
    shutil.copytree(run.adapter, place / "me" / "tuned", dirs_exist_ok=True)
    card = render_card(on(read_run_facts(run, name="me/tuned"), "org/tiny"))
    answer = execute(card, place, monkeypatch)
    assert [answer] == peftkit.generate(run.path, ["Your question"], max_new_tokens=64)
    assert answer


def test_an_adapter_away_from_its_run(run, place, monkeypatch, tmp_path):
    folder = shutil.copytree(run.adapter, tmp_path / "me" / "away")
    config = json.loads((folder / "adapter_config.json").read_text())
    facts = read_adapter_facts(folder)
    assert facts.base.said == "tiny"
    assert facts.base.id is None
    assert facts.base.license == "other"
    assert facts.num_trainable == event(run, "parameters")["num_trainable"]
    assert facts.settings["target_modules"] == sorted(config["target_modules"])
    (folder / "peftkit.json").unlink()
    for name, base_id in (("org/other", "org/other"), (str(place / "org/tiny"), None), ("./x", None)):
        (folder / "adapter_config.json").write_text(
            json.dumps({**config, "base_model_name_or_path": name, "rank_pattern": {"a": 12}})
        )
        found = read_adapter_facts(folder, name="me/away")
        assert found.base.id == base_id
        assert found.rank == 12
        assert not found.plain_lora
        assert str(place) not in render_card(found)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled weights can run code"):
        read_adapter_facts(folder)


@pytest.mark.parametrize("front", ["", "---\n- a\n---\n", "---\nlicense: [\n---\n", "---\nlicense: 3\n---\n", "no"])
def test_a_base_whose_card_names_no_licence(run, place, front):
    card = place / "org" / "tiny" / "README.md"
    card.write_text(front)
    try:
        facts = read_run_facts(run)
    finally:
        card.write_text(LICENCED)
    assert facts.base.license is None
    assert "Licence: unknown" in render_card(facts)


def test_an_embedded_base_has_the_licence_of_its_table(run):
    from peftkit.ship.card.facts import _run_base_facts, read_plan

    plan = replace(read_plan(run).base, id="embedded:smollm2-135m-instruct", kind="embedded")
    base = _run_base_facts(plan, {})
    assert (base.id, base.license) == (None, "apache-2.0")
    assert "SmolLM2-135M-Instruct" in base.said


def recipe_of(case, place, tmp_path):
    """A short run of each kind of card's code: task, data and method."""
    pairs = [{"prompt": f"say {WORDS[i % 4]} {i}", "completion": WORDS[i % 4]} for i in range(24)]
    classes = [{"text": f"say {WORDS[i % 3]} {i}", "label": WORDS[i % 3]} for i in range(24)]
    tags = [{"tokens": [f"now{i}", WORDS[i % 2]], "tags": ["O", f"B-{'AB'[i % 2]}"]} for i in range(48)]
    rows = {"classes": classes, "tags": tags}.get(case, pairs)
    base = {"t5": "t5", "tags": "bert"}.get(case, "tiny")
    method = case if case in {"qlora", "full", "prefix", "ia3"} else "lora"
    return base, {
        "base": str(place / "org" / base),
        "method": method,
        "data": {"train": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "eval": "25%"},
        "train": {"max_steps": 2, "batch_size": 4, "micro_batch": 4, "max_length": 64, "eval_steps": 2},
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", ["pairs", "qlora", "prefix", "ia3", "full", "classes", "tags", "t5"])
def test_the_code_of_every_kind_of_card_runs(case, place, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    base, recipe = recipe_of(case, place, tmp_path)
    if base != "tiny":
        tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
        ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        task = "seq2seq" if base == "t5" else "token-classification"
        tiny_model(base, task, vocab_size=len(tokenizer), **ids).save_pretrained(place / "org" / base)
        tokenizer.save_pretrained(place / "org" / base)
    run = RunDir(peftkit.finetune(recipe, out=tmp_path / "run").path)
    result = run.adapter if run.adapter.is_dir() else run.model
    shutil.copytree(result, place / "me" / case)
    card = render_card(on(read_run_facts(run, name=f"me/{case}"), f"org/{base}"))
    torch.manual_seed(0)
    printed = execute(card, place, monkeypatch)
    asked = {"classes": "A text to classify", "tags": "A text to classify", "t5": "Your text"}.get(case)
    if case == "classes":
        assert f"[{WORDS[:3].index(peftkit.generate(run.path, [asked])[0])}]" == printed
    elif case == "tags":
        assert json.loads(printed)[0]
    elif case == "t5":
        assert [printed] == peftkit.generate(run.path, [asked], max_new_tokens=64)
    else:
        assert ("BitsAndBytesConfig" in card) == (case == "qlora")
        assert ("PeftModel" in card) == (case != "full")
    assert Path.cwd() == place
