"""New tokens: rows for them in the tables, trained, saved, loaded by PEFT, merged and exported right."""

import json
import shutil

import gguf
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import peftkit
from peftkit.errors import UserError
from tests.conftest import TINY_LLAMA, write_jsonl

NEW = {"new_tokens": ["<mood>", "<calm>"], "init": {"<calm>": "a calm voice"}}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The tiny model, its tables tied, untied, or with room for more tokens than its tokenizer has."""
    folder = tmp_path_factory.mktemp("bases")
    for name in ("untied", "roomy"):
        shutil.copytree(TINY_LLAMA, folder / name)
        model = transformers.AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32)
        if name == "untied":
            model.config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        else:
            model.resize_token_embeddings(2064, mean_resizing=False)
        model.save_pretrained(folder / name)
    return {"tied": TINY_LLAMA, "untied": folder / "untied", "roomy": folder / "roomy"}


@pytest.fixture
def recipe(tmp_path):
    rows = [{"prompt": f"<mood> Say {n}", "completion": f"<calm> word {n}"} for n in range(24)]
    data = {"train": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "eval": "25%"}
    data["waive"] = ["near-leakage", "near-duplicates"]
    train = {"max_steps": 8, "max_length": 64, "learning_rate": 2e-2}
    return {"method": {"name": "lora", "rank": 4, "also_train": [NEW]}, "data": data, "train": train}


@pytest.mark.parametrize(
    ("kind", "method"),
    [("tied", "lora"), ("untied", "lora"), ("roomy", "lora"), pytest.param("untied", "qlora", marks=pytest.mark.slow)],
)
def test_new_tokens_are_trained_saved_loaded_and_merged(kind, method, bases, recipe, tmp_path):
    recipe = {**recipe, "base": str(bases[kind]), "method": {**recipe["method"], "name": method}}
    plan = peftkit.make_plan(recipe)
    run = peftkit.finetune(recipe, out=tmp_path / "run")
    assert run.num_trainable == plan.method.num_trainable
    assert plan.method.trainable_by_role["tokens"] == 2 * 128 * (2 if kind == "untied" else 1)
    assert peftkit.evaluate_run(run.path).loss == pytest.approx(run.eval_loss_after, rel=1e-5)
    assert "<calm>" in peftkit.generate(run.path, "<mood> Say 3", max_new_tokens=8)[0], "seen, not hidden"
    assert peftkit.merge_adapter(run.path, out=str(tmp_path / "merged")).passed

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    inputs = tokenizer("<mood> Say 3 <calm>", return_tensors="pt")
    assert inputs["input_ids"][0, 0] == 2048 and inputs["input_ids"][0, -1] == 2049
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    if method == "lora":
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(run.result, dtype=torch.float32)
        with torch.no_grad():
            gap = (theirs(**inputs).logits[..., :2050] - merged(**inputs).logits[..., :2050]).abs().max()
        assert gap < (1e-3 if kind == "roomy" else 0.15), "the tiny model is held in 16 bits"


def test_a_row_starts_from_its_text_or_from_the_mean(bases, recipe, tmp_path):
    recipe = {**recipe, "base": str(bases["untied"])}
    recipe["train"] = {**recipe["train"], "max_steps": 1, "learning_rate": 1e-12}
    run = peftkit.finetune(recipe, out=tmp_path / "run")
    tensors = load_file(run.result / "adapter_model.safetensors")
    base = transformers.AutoModelForCausalLM.from_pretrained(bases["untied"], dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bases["untied"])
    of_text = tokenizer("a calm voice", add_special_tokens=False)["input_ids"]
    for name, table in (("model.embed_tokens", base.model.embed_tokens), ("lm_head", base.lm_head)):
        rows = tensors[f"base_model.model.{name}.token_adapter.trainable_tokens_delta"]
        assert torch.allclose(rows[0], table.weight.mean(dim=0), atol=1e-4)
        assert torch.allclose(rows[1], table.weight[of_text].mean(dim=0), atol=1e-4)


def test_a_gguf_file_has_the_tokens(recipe, tmp_path):
    recipe = {**recipe, "base": str(TINY_LLAMA)}
    whole = peftkit.finetune(recipe, out=tmp_path / "whole")
    options = peftkit.ExportOptions("gguf", out=str(tmp_path / "gguf"))
    peftkit.export_adapter(whole.path, options=options)
    [file] = (tmp_path / "gguf").glob("*.gguf")
    reader = gguf.GGUFReader(file)
    tokens = reader.fields["tokenizer.ggml.tokens"]
    assert [bytes(tokens.parts[tokens.data[i]]).decode() for i in (2048, 2049)] == ["<mood>", "<calm>"]
    table = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    assert list(table.shape) == [128, 2050]


def test_tokens_that_are_there_and_tokens_that_are_not_are_told_apart(recipe, tmp_path):
    def fix_for(also_train):
        changed = {**recipe, "base": str(TINY_LLAMA), "method": {"name": "lora", "also_train": also_train}}
        with pytest.raises(UserError) as caught:
            peftkit.finetune(changed, out=tmp_path / "run")
        with pytest.raises(UserError) as planned:
            peftkit.make_plan(changed)
        assert planned.value.problems == caught.value.problems, "a dry run promises nothing else"
        assert not (tmp_path / "run").exists(), "before anything is loaded"
        return caught.value.problems[0].fix

    assert fix_for([{"tokens": ["<mood>"]}]) == 'add it: also_train: [{new_tokens: ["<mood>"]}]'
    assert fix_for([{"new_tokens": ["the"]}]) == 'train its row: also_train: [{tokens: ["the"]}]'
    with pytest.raises(UserError, match="init of '<x>'"):
        peftkit.make_plan(
            {
                **recipe,
                "base": str(TINY_LLAMA),
                "method": {"name": "lora", "also_train": [{**NEW, "init": {"<x>": "y"}}]},
            }
        )


def test_a_dry_run_knows_the_tokens_that_only_the_tokenizers_configuration_has(recipe, tmp_path):
    base = shutil.copytree(TINY_LLAMA, tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**config, "extra_special_tokens": ["<|extra|>"]}))
    method = {"name": "lora", "also_train": [{"tokens": ["<|extra|>"]}]}
    assert peftkit.make_plan({**recipe, "base": str(base), "method": method}).method.token_rows == ("<|extra|>",)
    method = {"name": "lora", "also_train": [{"new_tokens": ["model_max_length"]}]}
    assert peftkit.make_plan({**recipe, "base": str(base), "method": method}), "a key of the file is no token"
    (base / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config"):
        peftkit.make_plan({**recipe, "base": str(base), "method": method})
