"""Merging end to end: real runs, real adapters, the command line, and all that a user can get wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftkit
from peftkit import MergeOptions
from peftkit.errors import PeftkitError, UserError
from peftkit.results.load import open_result
from peftkit.ship.merge.fidelity import Fidelity
from tests.conftest import TINY_LLAMA, write_jsonl
from tests.rigs.adapters import FLAVOURS, load, make
from tests.ship.merge.test_write import with_tokenizer


def trained(recipe, folder, **method):
    recipe = {**recipe, "method": {"name": "lora", "rank": 4, **method}, "diagnose": {"escalate": "off"}}
    recipe["train"] = {**recipe["train"], "max_steps": 8, "learning_rate": 2e-2}
    peftkit.finetune(recipe, out=folder)
    return folder


def told(error):
    return " ".join(f"{p.where}: {p.got}; {p.expected}; {p.fix}" for p in error.value.problems)


def test_a_run_is_merged_and_shown_to_be_the_same(recipe, tmp_path):
    run = trained(recipe, tmp_path / "run")
    events = []
    exact = MergeOptions(dtype="float32")  # the base's files are in 16 bits, the run computed in 32
    report = peftkit.merge_adapter(run, out=tmp_path / "merged", options=exact, observer=events.append)
    assert report.passed and report.fidelity.effect > 100 * report.fidelity.kl
    assert report.fidelity.kl < 1e-7 and report.fidelity.top1_agreement == 1
    assert abs(report.fidelity.loss - report.fidelity.loss_reference) < 1e-5
    written = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert written["passed"] is True and written["kl"] == report.fidelity.kl
    done = [event for event in events if event["event"] == "progress"]
    assert done[-1]["done_bytes"] == done[-1]["total_bytes"] == report.num_bytes
    result = open_result(run)
    model = load(tmp_path / "merged", "causal-lm")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.allclose(result.model(ids).logits, model(ids).logits, atol=1e-4)
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")] == []


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ia3", "ln", "adalora", "vera", "dora", "pissa", "tokens"])
def test_every_method_that_merges(case, recipe, tmp_path):
    method = {
        "ia3": {"name": "ia3"},
        "ln": {"name": "ln"},
        "adalora": {"name": "adalora", "initial_rank": 4, "rank": 2},
        "vera": {"name": "vera", "rank": 8},
        "dora": {"name": "lora", "rank": 4, "dora": True},
        "pissa": {"name": "lora", "rank": 4, "init": "pissa"},
        "tokens": {"name": "lora", "rank": 4, "also_train": ["norms", {"tokens": ["a", "e"]}]},
    }[case]
    recipe = {**recipe, "method": method, "diagnose": {"escalate": "off"}}
    recipe["train"] = {**recipe["train"], "max_steps": 10, "learning_rate": 2e-2}
    peftkit.finetune(recipe, out=tmp_path / "run")
    report = peftkit.merge_adapter(tmp_path / "run", out=tmp_path / "merged")
    assert report.passed and report.fidelity.effect > 10 * report.fidelity.kl


def test_a_classifier_brings_its_head_and_its_labels(tmp_path, recipe):
    rows = [{"text": f"number {i}", "label": ("even", "odd")[i % 2]} for i in range(24)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe = {**recipe, "data": {"train": str(data), "eval": "25%"}, "diagnose": {"escalate": "off"}}
    peftkit.finetune(recipe, out=tmp_path / "run")
    report = peftkit.merge_adapter(tmp_path / "run", out=tmp_path / "merged")
    assert report.passed
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert set(config["label2id"]) == {"even", "odd"} and config["architectures"] == ["LlamaForSequenceClassification"]
    assert "score.weight" in load_file(tmp_path / "merged" / "model.safetensors")


@pytest.fixture(scope="module")
def qlora(tmp_path_factory):
    from tests.conftest import chat

    folder = tmp_path_factory.mktemp("qlora")
    words = ("alpha", "beta", "gamma", "delta")
    rows = [chat(f"Say {words[i % 4]} number {i}", f"{words[i % 4]} {words[i % 4]}") for i in range(32)]
    recipe = {
        "base": str(TINY_LLAMA),
        "method": {"name": "qlora", "rank": 4},
        "data": {"train": str(write_jsonl(folder / "chats.jsonl", rows)), "eval": "40%"},
        "train": {"max_steps": 12, "batch_size": 4, "max_length": 64, "learning_rate": 5e-3},
        "diagnose": {"escalate": "off"},
    }
    peftkit.finetune(recipe, out=folder / "run")
    return folder / "run"


def test_qlora_is_merged_into_what_it_was_trained_on(qlora, tmp_path):
    report = peftkit.merge_adapter(qlora, out=tmp_path / "merged")
    assert report.base == "dequantized" and report.passed
    faithful, original = report.choices
    assert faithful.fidelity.kl < 1e-4 < original.fidelity.kl, "4-bit is not the original"
    assert report.recommended in {"dequantized", "original"} and report.gain is not None
    assert [path.name for path in tmp_path.iterdir()] == ["merged"], "what was tried beside it is gone"
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(TINY_LLAMA / "model.safetensors")
    assert weights.keys() == base.keys()


def test_the_other_base_is_the_user_s_choice(qlora, tmp_path):
    report = peftkit.merge_adapter(qlora, out=tmp_path / "merged", options=MergeOptions(base="original"))
    assert report.base == "original" and report.passed
    assert report.reference == "the original base with the adapter" and report.fidelity.kl < 1e-4


@pytest.mark.slow
def test_an_adapter_away_from_its_run_knows_its_4_bit(qlora, tmp_path):
    shutil.copytree(qlora / "adapter", tmp_path / "away")
    report = peftkit.merge_adapter(tmp_path / "away", out=tmp_path / "merged")
    assert report.base == "dequantized" and report.passed and not report.choices
    one = load_file(tmp_path / "merged" / "model.safetensors")
    peftkit.merge_adapter(qlora, out=tmp_path / "other")
    two = load_file(tmp_path / "other" / "model.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_requantized_is_the_original_with_the_adapter_in_nf4(qlora, tmp_path):
    report = peftkit.merge_adapter(qlora, out=tmp_path / "nf4", options=MergeOptions(requantize=True))
    assert report.requantized == "nf4" and report.base == "original"
    assert any("requantized" in row for row, _ in report.rows())
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    model = load(tmp_path / "nf4", "causal-lm")
    peftkit.merge_adapter(qlora, out=tmp_path / "dense", options=MergeOptions(base="original"))
    dense = load(tmp_path / "dense", "causal-lm")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        a, b = (m(ids).logits.float().log_softmax(-1) for m in (dense, model))
    assert 0 < float((a.exp() * (a - b)).sum(-1).mean()) < 0.2, "what rounding to 4 bits costs"
    assert (tmp_path / "nf4" / "model.safetensors").stat().st_size < (
        tmp_path / "dense" / "model.safetensors"
    ).stat().st_size
    for options in (MergeOptions(requantize=True, base="dequantized"),):
        with pytest.raises(UserError, match="rounds away"):
            peftkit.merge_adapter(qlora, out=tmp_path / "x", options=options)


def test_two_adapters_are_added(recipe, tmp_path):
    one = trained(recipe, tmp_path / "one")
    two = trained({**recipe, "seed": 5}, tmp_path / "two", rank=2, rslora=True, targets=["q", "v"])
    options = MergeOptions(weights=(1.0, 0.5), dtype="float32")
    report = peftkit.merge_adapter([one, two], out=tmp_path / "sum", options=options)
    assert report.passed and report.fidelity.kl < 1e-9, "PEFT computes the same with both at once"
    ties = MergeOptions(combine="ties", density=0.5)
    report = peftkit.merge_adapter([one, two], out=tmp_path / "ties", options=ties)
    assert report.fidelity is None and report.passed and "a new model" in dict(report.rows())["verdict"]
    base = load(TINY_LLAMA, "causal-lm").state_dict()
    alone = []
    for run in (one, two):
        exact = MergeOptions(dtype="float32")
        peftkit.merge_adapter(run, out=tmp_path / f"m-{run.name}", options=exact)
        alone.append(load(tmp_path / f"m-{run.name}", "causal-lm").state_dict())
    both = load(tmp_path / "sum", "causal-lm").state_dict()
    for name, weight in base.items():
        expected = weight + (alone[0][name] - weight) + 0.5 * (alone[1][name] - weight)
        assert torch.allclose(both[name], expected, atol=1e-5), name


def test_what_is_not_the_same_is_not_kept(recipe, tmp_path, monkeypatch):
    run = trained(recipe, tmp_path / "run")
    monkeypatch.setattr(Fidelity, "problem", lambda self, dtype: "another model")
    with pytest.raises(PeftkitError, match=r"another model.*--force"):
        peftkit.merge_adapter(run, out=tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir() if "merged" in path.name] == []
    report = peftkit.merge_adapter(run, out=tmp_path / "merged", options=MergeOptions(force=True))
    assert not report.passed and "another model" in dict(report.rows())["verdict"]
    assert json.loads((tmp_path / "merged" / "merge_report.json").read_text())["passed"] is False


def test_bad_runs_and_places_are_refused(recipe, tmp_path):
    run = trained(recipe, tmp_path / "run")
    out = tmp_path / "full"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(UserError) as error:
        peftkit.merge_adapter(run, out=out)
    assert "not empty" in told(error) and (out / "mine.txt").read_text() == "kept"
    peftkit.merge_adapter(run, out=tmp_path / "merged")
    for path, said in (
        (tmp_path / "merged", "a full model, without an adapter to merge"),
        (tmp_path / "nowhere", "nothing there"),
        (tmp_path, "without resolved.yaml"),
    ):
        with pytest.raises(UserError) as error:
            peftkit.merge_adapter(path, out=tmp_path / "x")
        assert said in told(error)
    assert not (tmp_path / "x").exists()


def test_a_method_without_weights_is_refused_with_the_way_out(recipe, tmp_path):
    recipe = {**recipe, "method": {"name": "prefix", "virtual_tokens": 4}, "diagnose": {"escalate": "off"}}
    peftkit.finetune(recipe, out=tmp_path / "run")
    with pytest.raises(UserError) as error:
        peftkit.merge_adapter(tmp_path / "run", out=tmp_path / "x")
    assert "nothing to merge" in told(error) and "method lora" in told(error)
    peftkit.finetune({**recipe, "method": {"name": "full"}}, out=tmp_path / "whole")
    with pytest.raises(UserError) as error:
        peftkit.merge_adapter(tmp_path / "whole", out=tmp_path / "x")
    assert "trained the weights themselves" in told(error)


@pytest.fixture
def away(tmp_path):
    """A base with a tokenizer and an adapter of it, both made by plain libraries."""
    base, adapter = make(FLAVOURS["lora"], tmp_path)
    with_tokenizer(base)
    return base, adapter


def test_another_base_is_refused_with_both_names(recipe, tmp_path):
    run = trained(recipe, tmp_path / "run")
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    other = shutil.copytree(TINY_LLAMA, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({k: v + 1e-3 for k, v in weights.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError) as error:
        options = MergeOptions(base_model=str(other))
        peftkit.merge_adapter(tmp_path / "adapter", out=tmp_path / "x", options=options)
    assert str(other) in told(error) and str(TINY_LLAMA) in told(error)
    same = shutil.copytree(TINY_LLAMA, tmp_path / "same")
    options = MergeOptions(base_model=str(same))
    assert peftkit.merge_adapter(tmp_path / "adapter", out=tmp_path / "x", options=options).passed


def test_damaged_and_strange_adapters_are_refused(away, tmp_path):
    _, adapter = away
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights = load_file(adapter / "adapter_model.safetensors")
    first = sorted(weights)[0]

    def refused(said, *, tensors=weights, **changes):
        save_file(tensors, adapter / "adapter_model.safetensors")
        (adapter / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(UserError) as error:
            peftkit.merge_adapter(adapter, out=tmp_path / "x")
        assert said in told(error), told(error)
        assert not (tmp_path / "x").exists()

    extra = {**weights, "base_model.model.model.layers.0.other.lora_A.weight": torch.ones(2, 2)}
    refused("without a module in this base", tensors=extra)
    refused("not in the file", tensors={k: v for k, v in weights.items() if k != first})
    refused("shape", tensors={**weights, first: torch.ones(3, 3)})
    refused("shape", r=2)
    refused("which changed the base", init_lora_weights="pissa")
    refused("does not fit this base", target_modules=["nothing_like_it"])
    refused("peftkit does not merge this kind", layer_replication=[[0, 2]])
    refused("which does not exist", base_model_name_or_path=str(tmp_path / "gone"))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError) as error:
        peftkit.merge_adapter(adapter, out=tmp_path / "x")
    assert "peftkit convert" in told(error)


def test_adapters_of_two_bases_are_refused(recipe, tmp_path, away):
    run = trained(recipe, tmp_path / "run")
    with pytest.raises(UserError) as error:
        peftkit.merge_adapter([run, away[1]], out=tmp_path / "x")
    assert "as the first" in told(error)


@pytest.mark.slow
def test_no_room_is_told_before_and_while_writing(recipe, tmp_path, monkeypatch):
    run = trained(recipe, tmp_path / "run")
    from peftkit.rundir import disk

    with monkeypatch.context() as patched:
        patched.setattr(disk.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
        with pytest.raises(UserError) as error:
            peftkit.merge_adapter(run, out=tmp_path / "x")
    assert "free for the merged model" in told(error)
    program = (
        "import resource, sys, peftkit\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from peftkit.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "merge", str(run), "--out", str(tmp_path / "x")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "a full disk" in done.stderr, done.stderr
    assert "no partial files are left" in done.stderr
    assert [path.name for path in tmp_path.iterdir() if "x" in path.name] == []


def test_an_interrupted_merge_leaves_nothing_and_goes_again(recipe, tmp_path, monkeypatch):
    run = trained(recipe, tmp_path / "run")
    seen = []

    def interrupting(event):
        seen.append(event)
        if event["event"] == "progress" and len(seen) > 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Exception, match="nothing is left of it"):
        peftkit.merge_adapter(run, out=tmp_path / "merged", observer=interrupting)
    assert [path.name for path in tmp_path.iterdir() if "merged" in path.name] == []
    assert peftkit.merge_adapter(run, out=tmp_path / "merged").passed


@pytest.mark.slow
def test_what_a_killed_merge_left_is_told(recipe, tmp_path):
    run = trained(recipe, tmp_path / "run")
    program = f"""
import os, peftkit
def stop(event):
    if event["event"] == "progress":
        os.kill(os.getpid(), 9)
peftkit.merge_adapter({str(run)!r}, out={str(tmp_path / "merged")!r}, observer=stop)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == -9 and not (tmp_path / "merged").exists()
    events = []
    assert peftkit.merge_adapter(run, out=tmp_path / "merged", observer=events.append).passed
    [notice] = [event["text"] for event in events if event["event"] == "notice"]
    assert "safe to remove" in notice


@pytest.mark.slow
def test_the_command_line(recipe, tmp_path):
    run = trained(recipe, tmp_path / "run")
    command = [sys.executable, "-m", "peftkit", "merge", str(run), "--out"]
    done = subprocess.run([*command, str(tmp_path / "m")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the same model" in done.stdout and "KL divergence" in done.stdout
    assert "verify:" in done.stderr and "Traceback" not in done.stderr
    done = subprocess.run([*command, str(tmp_path / "m")], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "not empty" in done.stderr
    weighted = [*command[:-2], f"{run}*0.5", f"{run}*0.5", "--out", str(tmp_path / "h"), "--json"]
    done = subprocess.run(weighted, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["adapters"][0][1] == 0.5
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "h"))
    assert all(torch.equal(one[name], two[name]) for name in one), "half and half is the whole"


def test_data_that_is_gone_is_told_and_short_texts_stand_in(recipe, tmp_path):
    run = trained(recipe, tmp_path / "run")
    next(tmp_path.glob("*.jsonl")).unlink()
    events = []
    report = peftkit.merge_adapter(run, out=tmp_path / "merged", observer=events.append)
    assert report.passed and report.fidelity.loss is None
    assert any("compared on short texts" in event.get("text", "") for event in events)


@pytest.mark.slow
@pytest.mark.parametrize("also", ["embeddings", "head"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom"])
def test_a_tied_table_is_trained_and_merged_as_the_one_that_it_is(model_type, also, recipe, tmp_path):
    """PEFT keeps a tie where it is asked for the end that it knows: which one differs by family."""
    from transformers import AutoTokenizer

    from tests.conftest import save_tiny

    num_tokens = len(AutoTokenizer.from_pretrained(TINY_LLAMA))
    base, _ = save_tiny(tmp_path, model_type, tie_word_embeddings=True, vocab_size=num_tokens)
    with_tokenizer(base)
    run = trained({**recipe, "base": str(base)}, tmp_path / "run", also_train=[also])
    report = peftkit.merge_adapter(run, out=tmp_path / "merged")
    assert report.passed and not report.untied
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config.get("tie_word_embeddings", True) is True
