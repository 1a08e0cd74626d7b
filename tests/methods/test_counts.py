"""Predicted trainable parameters equal what PEFT counts, by role, for each family and method."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.archs import FAMILIES, KNOWN, shape_from_config
from peftkit.methods import METHODS
from peftkit.model.adapter import attach, count_parameters, trainable_by_role
from peftkit.plan import Facts, ModelFacts, make_plan
from peftkit.recipe import load
from tests.tiny import tiny_model

METHOD_CASES = {
    "full": {"name": "full"},
    "lora": {"name": "lora", "rank": 3},
    "lora attention": {"name": "lora", "rank": 4, "targets": "attention"},
    "dora rslora": {"name": "lora", "rank": 2, "dora": True, "rslora": True},
    "one role": {"name": "lora", "rank": 5, "targets": "down"},
    "norms": {"name": "lora", "rank": 2, "also_train": ["norms"]},
    "prefix": {"name": "prefix", "virtual_tokens": 7},
    "prefix projection": {"name": "prefix", "virtual_tokens": 3, "projection": True},
    "ia3": {"name": "ia3"},
}


def plan_of(method, config, device):
    shape = shape_from_config(config)
    loaded = load(
        {"base": "org/model", "method": method, "data": {"train": "x.jsonl"}, "train": {"max_length": 64}}
    )
    return make_plan(loaded, Facts(device, ModelFacts("org/model", "hub", config["model_type"], shape), None))


@pytest.mark.parametrize("model_type", [family.model_types[0] for family in FAMILIES])
@pytest.mark.parametrize("case", METHOD_CASES)
def test_planned_equals_counted(model_type, case, cpu):
    model = tiny_model(model_type)
    config = model.config.to_dict()
    plan = plan_of(METHOD_CASES[case], config, cpu)
    wrapped = attach(model, plan, tokenizer=None)
    trainable, total = count_parameters(wrapped)
    assert plan.method.num_trainable == trainable
    counted = trainable_by_role(wrapped, model_type)
    assert {k: v for k, v in plan.method.trainable_by_role.items() if v} == counted
    adds = plan.method.peft is not None
    assert total == plan.method.num_parameters + (trainable if adds else 0)


@pytest.mark.parametrize("also", [["embeddings"], ["head"], ["embeddings", "head"]])
@pytest.mark.parametrize("model_type", ["llama", "gemma", "gpt2"])
def test_tied_tables_are_counted_once(model_type, also, cpu):
    model = tiny_model(model_type)
    method = {"name": "lora", "rank": 2, "also_train": also}
    plan = plan_of(method, model.config.to_dict(), cpu)
    assert plan.method.num_trainable == count_parameters(attach(model, plan, tokenizer=None))[0]


def test_every_method_is_registered_under_its_own_name():
    assert {name: method.name for name, method in METHODS.items()} == {name: name for name in METHODS}
    assert set(METHODS) == {"full", "lora", "qlora", "prefix", "ia3"}


@pytest.mark.parametrize("name", METHODS)
@given(num=st.integers(1, 10**12))
@settings(max_examples=30)
def test_default_learning_rates_are_sane_and_sourced(name, num):
    rate, source = METHODS[name].learning_rate(num)
    assert 1e-6 < rate < 0.1
    assert len(source) > 20


def test_lora_of_llama_8b_at_rank_16_is_the_known_number(h100):
    plan = plan_of({"name": "qlora"}, KNOWN["meta-llama/Llama-3.1-8B"], h100)
    assert plan.method.num_trainable == 41_943_040
