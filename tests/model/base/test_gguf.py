"""GGUF bases: converted once, whole or not at all, with the same logits and tokens."""

import os
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from packaging.version import Version

from peftkit.errors import Interrupted, UserError
from peftkit.hub import cache_folder
from peftkit.model.base.gguf import convert_gguf_base, read_header_config
from peftkit.model.base.locate import locate_base
from tests.conftest import TINY_LLAMA
from tests.rigs.tiny import tiny_config
from tests.rigs.tiny_gguf import write_gguf

TEXT = "def main():\n    return json.loads(text)  # 12345"


def model_of(architecture):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    if architecture == "llama":
        return AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32)
    config = tiny_config(architecture)
    config.vocab_size = 2048
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(params=["llama", "qwen2", "gemma2"])
def pair(request, tmp_path, monkeypatch):
    """(architecture, the original model, the GGUF file)."""
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "cache"))
    model = model_of(request.param).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).to(torch.float32)  # what bf16 can hold
    return (
        request.param,
        model,
        write_gguf(tmp_path / "tiny.gguf", model, request.param, TINY_LLAMA / "tokenizer.json"),
    )


def find(path):
    return locate_base(str(path), revision=None, where="base")


def test_converted_base_has_equal_logits_and_tokens(pair):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    architecture, original, path = pair
    if architecture == "gemma2" and Version(transformers.__version__) < Version("5.23"):
        # older versions reload a Gemma tokenizer from GGUF with other merges: told, never trained on
        with pytest.raises(UserError, match="reloads with other rules"):
            convert_gguf_base(find(path), "base")
        return
    folder = convert_gguf_base(find(path), "base")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.config.model_type == architecture
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids[0]) == TEXT
    if architecture == "llama":
        assert ids[0].tolist() == AutoTokenizer.from_pretrained(TINY_LLAMA)(TEXT)["input_ids"]
    if architecture == "qwen2":  # its rules cut every digit apart, those of GPT-2 do not
        assert len(tokenizer("12345")["input_ids"]) == 5
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, original(input_ids=ids).logits, atol=1e-4)
    model.save_pretrained(folder.parent / "again")  # transformers refuses this right after reading a GGUF


def test_header_tells_the_shapes_without_converting(pair):
    from peftkit.archs import shape_from_config

    _, original, path = pair
    shape = shape_from_config(read_header_config(path, "base"))
    assert shape.num_parameters == sum(p.numel() for p in original.parameters())
    assert not cache_folder().exists()


@pytest.fixture
def llama_gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "cache"))
    return write_gguf(tmp_path / "tiny.gguf", model_of("llama"), "llama", TINY_LLAMA / "tokenizer.json")


def test_second_time_is_a_look_up_and_a_changed_file_is_another_base(llama_gguf):
    first = convert_gguf_base(find(llama_gguf), "base")
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert convert_gguf_base(find(llama_gguf), "base") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    with llama_gguf.open("ab") as file:
        file.write(b"\0")
    assert convert_gguf_base(find(llama_gguf), "base") != first


def test_a_cut_conversion_is_not_trusted(llama_gguf):
    folder = convert_gguf_base(find(llama_gguf), "base")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="remove this folder"):
        convert_gguf_base(find(llama_gguf), "base")


def test_a_killed_conversion_leaves_nothing_that_is_trusted(llama_gguf):
    program = (
        "import sys, os, pathlib\nfrom peftkit.model.base import gguf\n"
        "from peftkit.model.base.locate import locate_base\n"
        "whole = gguf._convert_file\n"
        "def cut(path, folder, where):\n    whole(path, folder, where)\n    os.kill(os.getpid(), 9)\n"
        "gguf._convert_file = cut\n"
        f"gguf.convert_gguf_base(locate_base({str(llama_gguf)!r}, revision=None, where='base'), 'base')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        capture_output=True,
        env={**os.environ, "PEFTKIT_CACHE": str(cache_folder())},
    )
    assert done.returncode == -signal.SIGKILL
    [left] = (cache_folder() / "bases").iterdir()
    assert left.name.startswith(".tmp-")
    assert convert_gguf_base(find(llama_gguf), "base").name.startswith("tiny-")


def test_an_interrupt_during_conversion_leaves_nothing(llama_gguf):
    from peftkit import interrupt

    with interrupt.catch_signals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted):
            convert_gguf_base(find(llama_gguf), "base")
    assert list((cache_folder() / "bases").iterdir()) == []


def test_files_that_are_no_models(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "junk.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match="not a GGUF model"):
        read_header_config(tmp_path / "junk.gguf", "base")
    with pytest.raises(UserError, match="cannot read"):
        convert_gguf_base(find(tmp_path / "junk.gguf"), "base")


def test_embedded_file_must_be_the_pinned_one(monkeypatch, llama_gguf):
    from dataclasses import replace

    from peftkit.model.base.locate import LocatedBase

    base = replace(find(llama_gguf), id="embedded:smollm2-135m-instruct", kind="embedded")
    assert isinstance(base, LocatedBase)
    with pytest.raises(UserError, match="the pinned file"):
        convert_gguf_base(base, "base")


@pytest.mark.slow
def test_smollm2_answers_as_it_should(tmp_path, monkeypatch):
    """The embedded model after conversion: known answers, known size."""
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from peftkit.evaluate.generation import Sampling, generate_answers

    folder = convert_gguf_base(find("embedded:smollm2-135m-instruct"), "base")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    chat = [{"role": "user", "content": "What is the capital of Japan? Answer in one sentence."}]
    prompts = [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
        "The capital of France is",
    ]
    answers = generate_answers(model, tokenizer, prompts, sampling=Sampling(12), eos_token_ids=[tokenizer.eos_token_id])
    assert answers[0].strip() == "The capital of Japan is Tokyo."
    assert answers[1].startswith(" Paris")


def test_two_at_once_both_get_the_base(llama_gguf, monkeypatch):
    """While one converts, another finishes first: both go on with a whole folder."""
    from peftkit.model.base import gguf

    real, nested = gguf._convert_file, []

    def convert(path, staging, where):
        real(path, staging, where)
        if not nested:
            nested.append(path)
            nested.append(convert_gguf_base(find(llama_gguf), "base"))  # the other one

    monkeypatch.setattr(gguf, "_convert_file", convert)
    folder = convert_gguf_base(find(llama_gguf), "base")
    assert nested[1] == folder
    assert not list(folder.parent.glob(".tmp-*"))
