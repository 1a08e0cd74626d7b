"""The learning rate of a plan: the usual one by width, rank and steps, and when it is measured."""

import math

import pytest

from peftkit.archs import shape_from_config
from peftkit.diagnose.statistics import MIN_DOCUMENTS
from peftkit.methods import METHODS
from peftkit.methods.base import RunSize
from peftkit.methods.lora import LoraOptions
from peftkit.plan import DataFacts, DeviceFacts, Facts, ModelFacts, make_plan
from peftkit.plan import rate as rates
from peftkit.plan.schedule import SCHEDULE_FREE
from peftkit.recipe import load
from tests.rigs.tiny import tiny_config

CPU = DeviceFacts("cpu", "a CPU", 24 * 2**30, True, True)


def plan(method="lora", *, steps=1200, held_out=40, hidden=128, device=CPU, **sections):
    train = {"max_steps": steps, "batch_size": 4, **sections.pop("train", {})}
    source = {"base": "org/m", "method": method, "data": {"train": "x.jsonl", "eval": "5%"}, "train": train, **sections}
    config = {**tiny_config("llama").to_dict(), "hidden_size": hidden}
    model = ModelFacts("m", "hub", shape_from_config(config))
    return make_plan(load(source), Facts(device, model, DataFacts(1000, held_out, "prompt-completion")))


def reason(made, key="train.rate_search"):
    return next((one.reason for one in made.decisions if one.key == key), None)


def usual(*args, **kwargs):
    return plan(*args, **kwargs).train.learning_rate


def test_the_usual_rate_follows_width_rank_scale_and_steps():
    # Tinker's formula for an adapter at 200 steps: 5e-5 * 10 * (2000 / width)^0.781
    rank_16 = {"name": "lora", "rank": 16}
    assert usual(rank_16, hidden=128, steps=200) == pytest.approx(4.28e-3, rel=0.01)
    assert usual(rank_16, hidden=192, steps=200) == pytest.approx(3.12e-3, rel=0.01)
    for batch_size, factor in ((8, math.sqrt(2)), (16, 2), (64, 2), (1, 0.5)):
        rate = usual(rank_16, hidden=128, steps=200, train={"batch_size": batch_size})
        assert rate == pytest.approx(factor * 4.28e-3, rel=0.01)
    assert usual("full", hidden=128, steps=200) == pytest.approx(4.28e-4, rel=0.01)
    at_16 = usual(rank_16)
    assert usual({"name": "lora", "rank": 64}) == pytest.approx(at_16 / 2, rel=0.01)
    assert usual({"name": "lora", "rank": 4}) == pytest.approx(2 * at_16, rel=0.01)
    assert usual({"name": "lora", "rank": 64, "alpha": 32}) == pytest.approx(at_16, rel=0.01)
    assert usual({"name": "lora", "rank": 16, "rslora": True, "alpha": 8}) == pytest.approx(at_16, rel=0.01)
    assert usual({"name": "qlora", "rank": 16}) == at_16
    assert usual({"name": "lora", "rank": 16, "lr_ratio": 16}) == pytest.approx(at_16 / 4, rel=0.01)
    config, options = tiny_config("llama").to_dict(), LoraOptions(name="lora", rank=16)
    for task, share in (("auto", 1), ("classification", 0.5)):  # of a decoder, whose new head reads one token
        rate, _ = METHODS["lora"].learning_rate(
            options, shape_from_config(config, task=task), RunSize(200, 4 if share == 1 else 8)
        )
        assert rate == pytest.approx(share * usual(rank_16, hidden=config["hidden_size"], steps=200), rel=0.01)
    assert usual(steps=1200) == pytest.approx(usual(steps=200) * (200 / 1200) ** 0.17, rel=0.01)


@pytest.mark.parametrize(
    ("steps", "fork_steps", "is_exact"), [(1200, 12, True), (700, 6, False), (360, 4, False), (200, None, None)]
)
def test_forks_are_as_long_as_five_percent_of_the_run_pay_for(steps, fork_steps, is_exact):
    made = plan(steps=steps)
    search = made.train.rate_search
    assert (search and search.fork_steps, search and search.is_exact) == (fork_steps, is_exact)
    if search is None:
        assert "forks cost more than 10 of the 200 steps" in reason(made)
        return
    judging = rates.EVAL_COST * rates.JUDGING_ROWS / 4
    assert judging + search.max_forks * (search.fork_steps + judging) <= rates.SEARCH_SHARE * steps
    assert search.usual == made.train.learning_rate
    assert "at most 5% of the run" in reason(made)


def test_a_given_rate_is_used_as_given():
    made = plan(train={"learning_rate": 1e-4})
    assert made.train.learning_rate == 1e-4
    assert made.train.rate_search is None and reason(made) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "full"}, "whole models are not copied"),
        ({"method": "adalora"}, "follow a schedule"),
        ({"train": {"optimizer": SCHEDULE_FREE}}, "of schedule_free_adamw does not"),
        ({"held_out": MIN_DOCUMENTS - 1}, "fewer than 10 held-out rows"),
        ({"diagnose": {"bounds": {"compute": 0}}}, "diagnose.bounds.compute is 0"),
        ({"device": DeviceFacts("cuda", "T4", 16 * 2**30, False, True), "train": {"precision": "fp16"}}, "loss scale"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_where_forks_say_nothing_the_usual_rate_is_taken_and_the_plan_says_why(changes, said):
    made = plan(**changes)
    assert made.train.rate_search is None
    assert "the usual rate as it is" in reason(made) and said in reason(made)


@pytest.mark.parametrize(("rate", "outcome"), [(1.0, "diverge"), (1e-8, "hardly anything")])
def test_a_rate_that_nobody_would_choose_is_warned_of(rate, outcome):
    assert outcome in reason(plan(train={"learning_rate": rate}), "warning.learning_rate")
    assert reason(plan(train={"learning_rate": 1e-3}), "warning.learning_rate") is None
