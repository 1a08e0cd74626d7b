import json

import pytest
import yaml

import peftkit
from peftkit.errors import UserError
from peftkit.recipe import load
from peftkit.recipe.json_schema import recipe_schema
from peftkit.recipe.schema import Recipe
from peftkit.recipe.shipped import find_shipped, list_shipped, new_recipe, shipped_folder, show_shipped
from tests.conftest import TINY_LLAMA

WANTED = {
    "quickstart",
    "qlora-llama8b",
    "lora-llama8b",
    "full-llama8b",
    "prefix-llama8b",
    "ia3-llama8b",
    "qlora-mistral7b",
    "qlora-qwen7b",
    "qlora-gemma9b",
    "lora-phi",
    "qlora-llama70b",
    "lora-t5-base",
    "lora-minilm-banking77",
    "lora-mamba",
    "qlora-mixtral",
    "lora-rwkv",
    "lora-falcon-h1",
    "lora-gpt2",
}


def test_all_promised_recipes_are_shipped_each_with_a_title():
    assert {recipe.name for recipe in list_shipped()} >= WANTED
    assert all(recipe.title for recipe in list_shipped())


@pytest.mark.parametrize("shipped", list_shipped(), ids=lambda s: s.name)
def test_every_knob_has_a_comment(shipped):
    for line in shipped.path.read_text().splitlines():
        if line and not line.startswith("#") and not line.endswith(":"):
            assert "#" in line, line


def test_schema_file_is_current_and_accepts_the_shipped_recipes():
    written = json.loads((shipped_folder() / "recipe.schema.json").read_text())
    assert written == recipe_schema(), "run: peftkit schema > recipes/recipe.schema.json"
    jsonschema = pytest.importorskip("jsonschema")
    for shipped in list_shipped():
        jsonschema.validate(yaml.safe_load(shipped.path.read_text()), written)


def test_editors_find_the_schema():
    for shipped in list_shipped():
        assert "yaml-language-server: $schema=recipe.schema.json" in shipped.path.read_text()


def test_show_find_and_new(tmp_path, monkeypatch):
    assert "smollm2" in show_shipped("quickstart")
    with pytest.raises(UserError, match="did you mean quickstart"):
        show_shipped("quikstart")
    monkeypatch.chdir(tmp_path)
    assert find_shipped("quickstart").name == "quickstart.yaml"
    (tmp_path / "quickstart").mkdir()
    assert find_shipped("quickstart") is None
    (tmp_path / "new.yaml").write_text(new_recipe("org/model", "prefix"))
    assert load(tmp_path / "new.yaml").recipe.method.name == "prefix"
    (tmp_path / "odd.yaml").write_text(new_recipe("a: b #c", "lora"))
    assert load(tmp_path / "odd.yaml").recipe.base.id == "a: b #c"


@pytest.mark.parametrize("method", ["lora", "full", "prefix", "ia3"])
@pytest.mark.parametrize(
    ("model", "fmt"),
    [
        (str(TINY_LLAMA), "chat"),
        ("meta-llama/Llama-3.1-8B", "chat"),
        ("google-t5/t5-base", "chat"),
        ("google-bert/bert-base-uncased", "labelled"),
        ("embedded:smollm2-135m-instruct", "chat"),
    ],
)
def test_a_new_recipe_works_as_it_is(model, fmt, method, tmp_path):
    (tmp_path / "new.yaml").write_text(new_recipe(model, method))
    plan = peftkit.make_plan(tmp_path / "new.yaml")
    assert plan.method.name == method and plan.method.num_trainable
    assert (plan.base.task == "classification") == (fmt == "labelled")


def test_a_sample_that_there_is_not_is_named(tmp_path):
    (tmp_path / "new.yaml").write_text(new_recipe("o/m", "lora").replace("sample:chats", "sample:chat"))
    with pytest.raises(UserError, match="did you mean chats"):
        load(tmp_path / "new.yaml")


def test_the_set_of_recipe_keys_is_frozen():
    """Adding a key is a decision: document it, then list it here."""

    def keys(section):
        return sorted(section.model_fields)

    fields = Recipe.model_fields
    sections = ["base", "data", "devices", "diagnose", "evaluate", "method", "seed", "start_from", "task", "train"]
    assert sorted(fields) == sections
    base_keys = ["attention", "dequantize", "id", "revision", "rope_scaling", "trust_remote_code"]
    assert keys(fields["base"].annotation) == base_keys
    assert keys(fields["data"].annotation) == [
        "chat",
        "columns",
        "eval",
        "format",
        "group",
        "mask",
        "train",
        "truncation",
        "waive",
    ]
    assert keys(fields["train"].annotation) == [
        "batch_size",
        "checkpoint_steps",
        "early_stopping",
        "epochs",
        "eval_steps",
        "gradient_checkpointing",
        "label_smoothing",
        "learning_rate",
        "max_grad_norm",
        "max_length",
        "max_steps",
        "micro_batch",
        "neftune",
        "on_oom",
        "on_spike",
        "optimizer",
        "packing",
        "precision",
        "schedule",
        "weight_decay",
    ]
    assert keys(fields["evaluate"].annotation) == ["max_examples", "max_new_tokens", "metric"]
