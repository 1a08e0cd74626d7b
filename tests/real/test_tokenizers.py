"""Tokenizers as they come: without an end token, without padding."""

import json
import shutil

import pytest

import peftkit
from peftkit.errors import UserError
from tests.conftest import TINY_LLAMA, write_jsonl


@pytest.fixture
def endless(tmp_path):
    """The tiny model, whose tokenizer names neither an end nor a padding token."""
    folder = shutil.copytree(TINY_LLAMA, tmp_path / "endless")
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    for key in ("eos_token", "pad_token"):
        config.pop(key, None)
    file.write_text(json.dumps(config))
    return folder


def recipe_of(base, tmp_path, rows, **data):
    train = {"max_steps": 2, "batch_size": 4, "max_length": 64}
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = {"train": str(source), "eval": "20%", "waive": ["near-duplicates", "near-leakage"], **data}
    return {"base": str(base), "method": "lora", "data": data, "train": train}


def test_raw_text_needs_no_end_token(endless, tmp_path):
    rows = [{"text": f"word number {i} of a long story about {i * i} things"} for i in range(40)]
    summary = peftkit.finetune(recipe_of(endless, tmp_path, rows), out=tmp_path / "run")
    assert summary.num_steps == 2
    assert isinstance(peftkit.generate(summary.path, ["word number"], max_new_tokens=3)[0], str)


def test_answers_need_one_and_the_error_s_fix_works(endless, tmp_path):
    rows = [{"prompt": f"Say {i}", "completion": f"word {i}"} for i in range(40)]
    with pytest.raises(UserError) as caught:
        peftkit.check_data(recipe_of(endless, tmp_path, rows))
    [problem] = caught.value.problems
    token = problem.fix.partition("data.chat.end_token: ")[2].partition(" (")[0]
    recipe = recipe_of(endless, tmp_path, rows, chat={"end_token": token})
    summary = peftkit.finetune(recipe, out=tmp_path / "run")
    saved = json.loads((summary.result / "tokenizer_config.json").read_text())
    assert saved["eos_token"] == token
    assert summary.num_steps == 2
