"""Adding a family is one entry: a family that is defined here alone works everywhere."""

import pytest
import torch

from peftkit.archs import FAMILIES, Family, shape_of
from peftkit.archs.families.pieces import LM, PRE_NORMS, attention, decoder, gated_ffn
from peftkit.plan import DataFacts, Facts, ModelFacts, make_plan
from peftkit.recipe import load
from tests.rigs.plans import CPU

HELIUM = decoder(
    "Helium",
    ("helium",),
    attention(bias="attention_bias", o_bias="attention_bias"),
    gated_ffn(bias="mlp_bias"),
    PRE_NORMS,
    heads=LM,
    defaults={"head_dim": 128},
)
TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_an_entry_alone_suffices():
    """Helium is in no table: its entry above is the one of CONTRIBUTING, and everything follows from it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from peftkit.model.adapter.attach import attach_adapter, count_parameters, trainable_by_role

    assert "helium" not in {t for known in FAMILIES for t in known.model_types}
    config = AutoConfig.for_model("helium", **{**TINY, "head_dim": 16, "pad_token_id": 0})
    model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(HELIUM, config.to_dict())
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    for method in ("lora", "ia3", "prefix", "vera", "oft", "ln"):
        loaded = load({"base": "o/m", "method": method, "data": {"train": "x.jsonl"}})
        facts = Facts(CPU, ModelFacts("o/m", "hub", shape), DataFacts(10, 2, "chat"))
        plan = make_plan(load({**loaded.recipe.model_dump(), "train": {"max_length": 64}}), facts)
        wrapped = attach_adapter(AutoModelForCausalLM.from_config(config), plan, tokenizer=None)
        assert count_parameters(wrapped)[0] == plan.method.num_trainable
        assert trainable_by_role(wrapped, plan) == plan.method.trainable_by_role
        ids = torch.tensor([[5, 6, 7, 8]])
        wrapped(input_ids=ids, labels=ids).loss.backward()


def test_families_are_frozen_and_say_why():
    for family in FAMILIES:
        with pytest.raises(AttributeError):
            family.name = "other"
        assert all(len(reason) > 20 for reason in family.refuses.values()), family.name
        assert all(len(linear.blocked_reason) > 20 for linear in family.linears if linear.blocked_reason), family.name
        for key in family.overrides:
            assert any(key in text for text in family.mind), f"{family.name}: {key} without a reason"


def test_ia3_pairs_follow_from_the_roles():
    from peftkit.archs import KNOWN, shape_from_config
    from peftkit.methods import METHODS
    from peftkit.plan.method import default_selection

    def pairs(name):
        shape = shape_from_config(KNOWN[name])
        options = METHODS["ia3"].options(name="ia3")
        made = METHODS["ia3"].peft(options, shape, default_selection(METHODS["ia3"], shape)).arguments
        return made["target_modules"], made["feedforward_modules"]

    assert pairs("meta-llama/Llama-3.1-8B") == (["k_proj", "v_proj", "down_proj"], ["down_proj"])
    assert pairs("openai-community/gpt2") == (["c_attn", "mlp.c_proj"], ["mlp.c_proj"])
    assert pairs("tiiuae/falcon-7b") == (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"])
    assert pairs("google-t5/t5-base") == (["k", "v", "wo"], ["wo"])
    assert pairs("microsoft/phi-4") == (["qkv_proj", "down_proj"], ["down_proj"])
    targets, inputs = pairs("google-bert/bert-base-uncased")
    assert targets[:2] == ["key", "value"]
    assert inputs[0] == "0.output.dense"
    assert len(inputs) == 12


def test_a_family_is_data():
    assert isinstance(HELIUM, Family)
    assert HELIUM.roles == ("q", "k", "v", "o", "gate", "up", "down")
    assert [linear.name for linear in HELIUM.linears][:2] == ["self_attn.q_proj", "self_attn.k_proj"]
