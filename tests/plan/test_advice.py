"""Advice is told with its reason, and only where its rule holds."""

from peftkit.plan import DataFacts, Facts, Lengths, ModelFacts, RowLengths, make_plan
from peftkit.recipe import load
from tests.plan.test_fit import LLAMA, gpu


def advised(device, method, *, rows=1000, learnt=10_000, epochs=1.0):
    loaded = load({"base": "o/m", "method": method, "data": {"train": "x.jsonl"}, "train": {"epochs": epochs}})
    lengths = Lengths((RowLengths(512, 0, 256),) * 64, (256,) * 11, 4 * learnt, learnt, "counted", 64)
    facts = Facts(device, ModelFacts("o/m", "hub", LLAMA), DataFacts(rows, 10, "chat", lengths=lengths))
    plan = make_plan(loaded, facts)
    return {d.key: d for d in plan.decisions if d.key.startswith("advice.")}


def test_a_base_that_does_not_fit_is_advised_in_4_bits():
    found = advised(gpu("12GiB"), "lora")["advice.method"]
    assert found.value == "qlora"
    assert "GiB more than is free" in found.reason


def test_few_rows_are_an_adapters():
    assert advised(gpu("b200"), "full", rows=1000)["advice.method"].value == "lora"
    assert advised(gpu("b200"), "full", rows=1_000_000) == {}


def test_4_bits_are_not_needed_where_16_fit():
    assert advised(gpu("h100-80gb"), {"name": "qlora", "rank": 16})["advice.method"].value == "lora"
    assert advised(gpu("12GiB"), "qlora") == {}


def test_small_methods_name_the_next_rung():
    assert "if quality lags, try" in advised(gpu("h100-80gb"), "ia3")["advice.method"].reason


def test_many_epochs_and_more_tokens_than_parameters_are_told():
    found = advised(gpu("12GiB"), {"name": "qlora", "rank": 1}, learnt=50_000_000, epochs=9)
    assert "9 times" in found["advice.epochs"].reason
    assert found["advice.capacity"].value == "a larger rank"
