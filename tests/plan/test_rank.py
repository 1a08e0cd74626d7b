"""The rank that `auto` settles on: 64 where it fits, and less where it does not."""

import pytest

from peftkit.archs import KNOWN, shape_from_config
from peftkit.plan import DeviceFacts, Facts, ModelFacts, make_plan
from peftkit.recipe import load
from tests.rigs.tiny import tiny_config

LLAMA = shape_from_config(KNOWN["meta-llama/Llama-3.1-8B"])


def decided(method, *, shape=LLAMA, gib=80):
    device = DeviceFacts("cuda", "a GPU", gib * 2**30, True, True)
    loaded = load({"base": "o/m", "method": method, "data": {"train": "x.jsonl"}, "train": {"max_length": 512}})
    plan = make_plan(loaded, Facts(device, ModelFacts("o/m", "hub", shape), None))
    [decision] = [one for one in plan.decisions if one.key == "method.rank"]
    assert decision.value == plan.method.peft.arguments["r"] == plan.method.peft.arguments["lora_alpha"] / 2
    return decision


@pytest.mark.parametrize("method", ["lora", {"name": "qlora", "rank": "auto"}], ids=str)
def test_it_is_64_where_that_fits_with_a_reason(method):
    assert (decided(method).value, decided(method).source) == (64, "decided")
    assert "no lower one ended better" in decided(method).reason


def test_it_is_the_largest_that_fits_with_a_margin():
    ranks = {gib: decided("qlora", gib=gib) for gib in (8, 9, 10, 11, 12, 16)}
    values = [ranks[gib].value for gib in sorted(ranks)]
    assert values == sorted(values) and values[-1] == 64
    smaller = [one for one in ranks.values() if one.value < 64]
    assert smaller and all("larger one does not fit" in one.reason for one in smaller)


def test_it_is_16_beside_a_new_head():
    bert = shape_from_config(KNOWN["google-bert/bert-base-uncased"])
    assert (decided("lora", shape=bert).value, decided("lora", shape=bert).source) == (16, "decided")
    assert "a new head" in decided("lora", shape=bert).reason


def test_it_is_at_most_half_the_width_and_a_given_one_is_kept():
    tiny = shape_from_config({**tiny_config("llama").to_dict(), "hidden_size": 64, "max_position_embeddings": 2048})
    assert decided("lora", shape=tiny).value == 32
    assert decided({"name": "lora", "rank": 8}).value == 8
    assert decided({"name": "lora", "rank": 8}).source != "decided"
