"""Exporting end to end: each target of a real run, and what is refused before anything is written."""

import shutil
import subprocess
import sys

import pytest
import torch

import peftkit
from peftkit import ExportOptions
from peftkit.errors import UserError
from peftkit.results.load import open_result
from peftkit.rundir import verify_folder
from peftkit.ship.export import TARGETS
from tests.conftest import TINY_LLAMA, chat, write_jsonl
from tests.rigs.adapters import load, load_adapted


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    words = ("alpha", "beta", "gamma", "delta")
    rows = [chat(f"Say {words[i % 4]} number {i}", f"{words[i % 4]} {words[i % 4]}") for i in range(24)]
    recipe = {
        "base": str(TINY_LLAMA),
        "method": {"name": "lora", "rank": 4, "rslora": True, "targets": ["q", "v", "up"]},
        "data": {"train": str(write_jsonl(folder / "chats.jsonl", rows)), "eval": "25%"},
        "train": {"max_steps": 8, "batch_size": 4, "max_length": 64, "learning_rate": 2e-2},
        "diagnose": {"escalate": "off"},
    }
    peftkit.finetune(recipe, out=folder / "run")
    return folder / "run"


def exported(path, to, out=None, **options):
    return peftkit.export_adapter(path, options=ExportOptions(to, str(out) if out else None, **options))


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7, 8, 9]])).logits


def told(error):
    return " ".join(f"{p.where}: {p.got}; {p.expected}; {p.fix}" for p in error.value.problems)


def test_an_adapter_with_its_card(run, tmp_path):
    found = exported(run, "adapter", tmp_path / "out")
    names = {name for name, _ in found.files}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= names
    assert verify_folder(tmp_path / "out") == []
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()
    expected = logits(open_result(run).model)
    assert torch.equal(expected, logits(load_adapted(TINY_LLAMA, tmp_path / "out", "causal-lm")))
    again = exported(tmp_path / "out", "adapter", tmp_path / "again")
    assert {name for name, _ in again.files} == names, "an exported adapter is exported again"


def test_an_adapter_for_vllm(run, tmp_path):
    found = exported(run, "adapter", tmp_path / "out", engine="vllm")
    assert any("rsLoRA" in text for text in found.said)
    assert any("vllm serve" in text for text in found.said)
    expected = logits(open_result(run).model)
    got = logits(load_adapted(TINY_LLAMA, tmp_path / "out", "causal-lm"))
    assert torch.allclose(expected, got, atol=1e-5)


def test_safetensors_are_the_merged_model(run, tmp_path):
    found = exported(run, "safetensors", tmp_path / "out", dtype="float32")
    assert found.merge["passed"] and any("KL" in value for _, value in found.rows())
    expected = logits(open_result(run).model)
    assert torch.allclose(expected, logits(load(tmp_path / "out", "causal-lm")), atol=1e-4)
    again = exported(tmp_path / "out", "safetensors", tmp_path / "again")
    assert again.merge == found.merge
    assert torch.equal(logits(load(tmp_path / "out", "causal-lm")), logits(load(tmp_path / "again", "causal-lm")))


def test_gguf_of_the_model_and_of_the_adapter(run, tmp_path):
    import gguf

    found = exported(run, "gguf", tmp_path / "whole", dtype="f32", pre="gpt-2")
    [file] = (tmp_path / "whole").glob("*.gguf")
    assert file.name == "whole-f32.gguf" and found.merge["passed"]
    assert "library_name: gguf" in (tmp_path / "whole" / "README.md").read_text()
    assert len(gguf.GGUFReader(file).tensors) > 10
    exported(run, "gguf", tmp_path / "lora", lora=True)
    [file] = (tmp_path / "lora").glob("*.gguf")
    names = {tensor.name for tensor in gguf.GGUFReader(file).tensors}
    assert any(name.endswith("attn_q.weight.lora_a") for name in names)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")] == []


def test_ollama_has_a_modelfile(run, tmp_path):
    found = exported(run, "ollama", tmp_path / "out", pre="gpt-2")
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert "FROM ./out-f16.gguf" in text and "PARAMETER num_ctx" in text and "PARAMETER stop" in text
    assert any("ollama create" in said for said in found.said)


def test_a_whole_model_is_exported_as_it_is(tmp_path):
    rows = [chat(f"Say {i}", f"{i} {i}") for i in range(12)]
    made = {
        "base": str(TINY_LLAMA),
        "method": "full",
        "data": {"train": str(write_jsonl(tmp_path / "x.jsonl", rows)), "eval": None},
        "train": {"max_steps": 2, "batch_size": 4, "max_length": 64},
    }
    peftkit.finetune(made, out=tmp_path / "full")
    exported(tmp_path / "full", "safetensors", tmp_path / "out")
    assert torch.equal(
        logits(load(tmp_path / "full" / "model", "causal-lm")), logits(load(tmp_path / "out", "causal-lm"))
    )
    with pytest.raises(UserError) as error:
        exported(tmp_path / "full", "adapter", tmp_path / "x")
    assert "full fine-tuning" in told(error)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"to": "ggfu", "out": "x"}, "did you mean gguf"),
        ({"to": "gguf"}, "a new folder"),
        ({"to": "hub"}, "OWNER/NAME"),
        ({"to": "hub", "repo": "a/b", "out": "x"}, "no folder"),
        ({"to": "adapter", "out": "x", "engine": "tgi"}, "vllm"),
        ({"to": "adapter", "out": "x", "dtype": "f16", "public": True}, "leave it out"),
        ({"to": "gguf", "out": "x", "engine": "vllm"}, "--to adapter"),
        ({"to": "gguf", "out": "x", "dtype": "f13"}, "a type of GGUF weights"),
        ({"to": "ollama", "out": "x", "lora": True}, "merged model"),
    ],
)
def test_options_without_effect_are_refused(run, options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        peftkit.export_adapter(run, options=ExportOptions(**options))
    assert said in told(error), told(error)
    assert list(tmp_path.iterdir()) == []


def test_what_gguf_cannot_hold_is_refused_before_anything_is_merged(tmp_path):
    from tests.conftest import save_tiny

    base, _ = save_tiny(tmp_path, "bloom")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LLAMA / file, base / file)
    with pytest.raises(UserError) as error:
        exported(base, "gguf", tmp_path / "out")
    assert "bloom" in told(error) and "convert_hf_to_gguf.py" in told(error)
    assert not (tmp_path / "out").exists()


def test_folders_that_are_in_use_are_refused(run, tmp_path):
    (tmp_path / "mine").write_text("kept")
    for to in set(TARGETS) - {"hub"}:
        with pytest.raises(UserError) as error:
            exported(run, to, tmp_path)
        assert "not empty" in told(error)
        with pytest.raises(UserError) as error:
            exported(run, to, tmp_path / "mine")
        assert "a file" in told(error)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_the_command_line(run, tmp_path):
    def said(*arguments):
        command = [sys.executable, "-m", "peftkit", "export", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = said(run, "--to", "adapter", "--for", "vllm", "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert "vllm serve" in done.stdout and "adapter_model.safetensors" in done.stdout
    done = said(run, "--to", "adapter", "--out", tmp_path / "a")
    assert done.returncode == 2 and "not empty" in done.stderr and "Traceback" not in done.stderr
    done = said(tmp_path, "--to", "hub", "--repo", "me/x")
    assert done.returncode == 2 and "nothing that can be pushed" in done.stderr
