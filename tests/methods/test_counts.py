"""Predicted trainable parameters equal what PEFT counts, by role, for each family and method."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.archs import FAMILIES, KNOWN, shape_from_config
from peftkit.errors import UserError
from peftkit.methods import METHODS
from peftkit.methods.base import RunSize
from peftkit.model.adapter.attach import attach_adapter, count_parameters, trainable_by_role, trainable_tensors
from tests.rigs.plans import plan_for
from tests.rigs.tiny import LABELS, tiny_config, tiny_model

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
    "prompt": {"name": "prompt", "virtual_tokens": 5, "init": "random"},
    "vera": {"name": "vera", "rank": 8},
    "oft": {"name": "oft", "block_size": 4},
    "adalora": {"name": "adalora", "initial_rank": 4, "rank": 2},
    "ln": {"name": "ln"},
}
REFUSED = {
    (model_type, name): "the nearest that works"
    for family in FAMILIES
    for model_type in family.model_types
    for name in family.refuses
}


CLASSES = ("a", "b", "c")
assert len(CLASSES) == LABELS
TRIED = [(t, task) for family in FAMILIES for t in family.model_types for task in family.heads]


def build(model_type, task, case, device):
    """(plan, model with its adapter), or the reason why the method is refused."""
    labels = CLASSES if "class" in task else ()
    plan = plan_for(tiny_config(model_type).to_dict(), METHOD_CASES[case], task=task, labels=labels, device=device)
    return plan, attach_adapter(tiny_model(model_type, task), plan, tokenizer=None)


@pytest.mark.parametrize(("model_type", "task"), TRIED)
@pytest.mark.parametrize("case", METHOD_CASES)
def test_planned_equals_counted(model_type, task, case, cpu):
    if refused := REFUSED.get((model_type, METHOD_CASES[case]["name"])):
        with pytest.raises(UserError, match=refused):
            build(model_type, task, case, cpu)
        return
    try:
        plan, wrapped = build(model_type, task, case, cpu)
    except UserError as error:
        # a role that the family lacks, or has in a shared block only; a prompt before tagged tokens
        known = ("roles of", "share one weight", "share their norms", "the prompt's positions")
        assert all(any(text in str(problem) for text in known) for problem in error.problems), error
        return
    trainable, total = count_parameters(wrapped)
    assert plan.method.num_trainable == trainable
    assert plan.method.trainable_by_role == trainable_by_role(wrapped, plan)
    if case != "adalora":  # it counts one number more per module, which it does not train
        assert total == plan.method.num_parameters + (trainable if plan.method.peft else 0)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "jamba", "nemotron_h", "gpt_oss", "llama4_text"])
def test_experts_are_reached_by_name_and_counted(model_type, cpu):
    method = {"name": "lora", "rank": 2, "targets": ["attention", "experts"]}
    plan = plan_for(tiny_config(model_type).to_dict(), method, device=cpu)
    wrapped = attach_adapter(tiny_model(model_type), plan, tokenizer=None)
    assert plan.method.num_trainable == count_parameters(wrapped)[0]
    assert plan.method.trainable_by_role == trainable_by_role(wrapped, plan)
    assert not any("router" in name for name in trainable_tensors(wrapped))


@pytest.mark.parametrize("also", [["embeddings"], ["head"], ["embeddings", "head"]])
@pytest.mark.parametrize("model_type", ["llama", "gemma", "gpt2"])
def test_tied_tables_are_counted_once(model_type, also, cpu):
    method = {"name": "lora", "rank": 2, "also_train": also}
    plan = plan_for(tiny_config(model_type).to_dict(), method, device=cpu)
    model = tiny_model(model_type)
    assert plan.method.num_trainable == count_parameters(attach_adapter(model, plan, tokenizer=None))[0]


def test_every_method_is_registered_under_its_own_name():
    assert {name: method.name for name, method in METHODS.items()} == {name: name for name in METHODS}
    assert set(METHODS) == {"full", "lora", "qlora", "prefix", "ia3", "prompt", "vera", "oft", "adalora", "ln"}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("config", ["meta-llama/Llama-3.1-8B", "google-t5/t5-base", "google-bert/bert-base-uncased"])
@given(num_steps=st.none() | st.integers(1, 10**6))
@settings(max_examples=10, deadline=None)
def test_default_learning_rates_are_sane_and_sourced(name, config, num_steps):
    options = METHODS[name].options(name=name, **({"rank": 64} if name in {"lora", "qlora"} else {}))
    rate, source = METHODS[name].learning_rate(options, shape_from_config(KNOWN[config]), RunSize(num_steps, 16))
    assert 1e-6 < rate < 0.1
    assert len(source) > 20


def test_lora_of_llama_8b_at_rank_16_is_the_known_number(h100):
    plan = plan_for(KNOWN["meta-llama/Llama-3.1-8B"], {"name": "qlora", "rank": 16}, device=h100)
    assert plan.method.num_trainable == 41_943_040
