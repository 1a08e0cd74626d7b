"""Every key of another tool is named in ours, and what the error says to write loads."""

import json

import pytest
import yaml

from peftkit.errors import UserError
from peftkit.recipe import load
from peftkit.recipe.vocabulary import _INSTEAD, _KEYS, translate_key
from tests.conftest import ROOT

BASE = {"base": "o/m", "method": "lora", "data": {"train": "x.jsonl"}}
SAMPLES = {
    "method.name": "lora",
    "method.alpha": 32.0,
    "method.dropout": 0.1,
    "method.lr_ratio": 16.0,
    "method.target_parameters": ["mlp.experts.gate_up_proj"],
    "method.targets": "q_proj,v_proj",
    "method.init": True,
    "train.epochs": 2.0,
    "train.learning_rate": 2e-4,
    "train.schedule.warmup": 0.03,
    "train.schedule.kind": "cosine",
    "train.max_grad_norm": 0.3,
    "train.optimizer": "adamw_torch",
    "train.precision": True,
    "base": "o/other",
    "base.revision": "main",
    "base.attention": True,
    "data.train": "y.jsonl",
    "data.eval": 0.1,
    "data.format": "chat",
    "data.chat.system": "Be brief.",
    "data.mask": False,
    "task": "CAUSAL_LM",
    "train.label_smoothing": 0.1,
    "method.also_train": ["lm_head"],
}
SWITCHES = {"method.dora", "method.rslora", "method.double_quant", "base.trust_remote_code", "train.packing"}
SWITCHES |= {"train.gradient_checkpointing"}


@pytest.mark.parametrize("key", sorted(_KEYS))
def test_what_is_advised_for_a_foreign_key_loads(key, tmp_path):
    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    ours = translate_key(key, 4, {})[0].partition(":")[0]
    special = {"quantization_bit": 4, "attn_implementation": "flash_attention_2", "torch_dtype": "bfloat16"}
    special |= dict.fromkeys(("modules_to_save", "lora_modules_to_save"), "lm_head")
    special |= {key: {"down_proj": 8} for key in ("rank_pattern", "alpha_pattern")} | {"exclude_modules": ["q_proj"]}
    samples = {**SAMPLES, "start_from": str(tmp_path)}
    value = special.get(key, True if ours in SWITCHES else samples.get(ours, 4))
    text, instead = translate_key(key, value, {"per_device_train_batch_size": 2})
    assert not instead
    recipe = dict(BASE)
    if ours == "method.double_quant":
        recipe["method"] = "qlora"
    elif ours == "method.virtual_tokens":
        recipe["method"] = "prefix"
    home, _, written = text.partition(": ")
    assert load(recipe, [f"{home}={written}"])


@pytest.mark.parametrize(
    ("key", "value", "written"),
    [
        ("lora_r", 16, "method.rank: 16"),
        ("--lora-r", 16, "method.rank: 16"),
        ("lora_target", "all", "method.targets: all-linear"),
        ("target_modules", ["q_proj"], "method.targets: [q_proj]"),
        ("bf16", True, "train.precision: bf16"),
        ("load_in_4bit", True, "method.name: qlora"),
        ("train_on_inputs", False, "data.mask: completion"),
        ("gradient_accumulation_steps", 4, "train.batch_size: 8"),
        ("lr_scheduler_type", "constant_with_warmup", "train.schedule.kind: constant"),
        ("init_lora_weights", "pissa", "method.init: pissa"),
        ("modules_to_save", ["lm_head", "embed_tokens"], "method.also_train: [embeddings, head]"),
        ("modules_to_save", "lm_head", "method.also_train: [head]"),
        ("modules_to_save", ["q_norm", "lm_head"], "method.also_train: [head, q_norm]"),
        ("layers_to_transform", [0, 1], "method.layers: [0, 1]"),
        ("exclude_modules", ["down_proj"], "method.exclude: [down_proj]"),
        ("rank_pattern", {"down_proj": 8}, "method.rank_pattern: {down_proj: 8}"),
        ("alpha_pattern", {r"^model\..*": 8}, "method.alpha_pattern: {'match:(.*\\.)?(^model\\..*)': 8}"),
        ("warmup_ratio", 0.1, "train.schedule.warmup: 0.1"),
        ("warmup_steps", 10, "train.schedule.warmup_steps: 10"),
    ],
)
def test_values_are_in_our_terms(key, value, written):
    assert translate_key(key, value, {"micro_batch_size": 2}) == (written, "")


@pytest.mark.parametrize(
    ("key", "value", "siblings", "said"),
    [
        ("modules_to_save", [], {}, "leave it out"),
        ("modules_to_save", ["score"], {}, "leave it out: the head of a classifier is always trained"),
        ("rank_pattern", {}, {}, "leave it out"),
        ("init_lora_weights", "loftq", {}, "leave it out, or take method.init: gaussian"),
        ("finetuning_type", "freeze", {}, "training some of the layers: peftkit has none yet"),
        ("fp16", False, {"bf16": True}, "leave it out: the precision is chosen then"),
        ("use_peft", True, {"load_in_4bit": True}, "leave it out: method.name: qlora says it"),
        ("load_in_4bit", False, {}, "leave it out"),
        ("warmup_steps", 0, {}, "leave it out"),
        ("warmup_ratio", 0.1, {"warmup_steps": 5}, "leave it out: the steps of the warm-up count"),
        ("report_to", "none", {}, "leave it out"),
        ("lora_r", None, {}, "leave it out: null is no setting"),
    ],
)
def test_a_value_without_one_of_ours_says_what_to_do(key, value, siblings, said):
    ours, instead = translate_key(key, value, siblings)
    assert not ours
    assert instead.startswith(said)


def test_keys_without_one_of_ours_say_what_to_do_instead():
    assert not _KEYS.keys() & _INSTEAD.keys()
    page = (ROOT / "docs" / "compatibility.md").read_text()
    assert f"\n{len(_KEYS) + len(_INSTEAD)} keys of transformers' TrainingArguments" in page
    assert all(translate_key(key, True, {}) == ("", text) and text for key, text in _INSTEAD.items())
    assert translate_key("no_such_key", 1, {}) == ("", "")


def test_a_recipe_in_another_tool_s_words_is_told_key_by_key():
    foreign = {"base_model": "o/m", "adapter": "lora", "datasets": [{"path": "x.jsonl"}], "lora_r": 8, "foo": 1}
    with pytest.raises(UserError) as caught:
        load(foreign)
    fixes = {problem.got: problem.fix for problem in caught.value.problems}
    assert fixes["the key base_model"] == "write base: o/m"
    assert fixes["the key lora_r"] == "write rank: 8 under method"
    assert fixes["the key datasets"] == "write train: [{path: x.jsonl}] under data"
    assert "known: base, data" in fixes["the key foo"]
    assert len(fixes) == 5, "base, method and data are not missing as well"


@pytest.mark.parametrize(("section", "key", "fix"), [("train", "num_train_epochs", "write epochs: 2")])
def test_a_foreign_key_in_the_right_section_is_renamed(section, key, fix):
    with pytest.raises(UserError) as caught:
        load({**BASE, section: {key: 2}})
    [problem] = caught.value.problems
    assert problem.fix == fix
    written = yaml.safe_load(problem.fix.removeprefix("write "))
    assert load({**BASE, section: written})
