"""The schedule of a plan, and what an optimizer without one leaves of it."""

import pytest

from peftkit.errors import UserError
from peftkit.plan.schedule import SCHEDULE_FREE
from tests.rigs.plans import plan_for
from tests.rigs.tiny import tiny_config

CONFIG = tiny_config("llama").to_dict()


def decided(**train):
    plan = plan_for(CONFIG, "lora", train={"max_steps": 600, "max_length": 64, **train})
    return plan, {decision.key: decision for decision in plan.decisions}


def test_a_mean_of_the_weights_takes_the_place_of_a_schedule():
    plan, decisions = decided(optimizer=SCHEDULE_FREE)
    assert (plan.train.schedule, plan.train.schedule_arguments) == ("constant", {})
    assert plan.train.num_warmup_steps == 30, "the warm-up stays: it is the optimizer's own"
    assert "mean of the weights" in decisions["train.schedule.kind"].reason
    assert decided(optimizer=SCHEDULE_FREE, schedule={"kind": "constant"})[0].train.schedule == "constant"


@pytest.mark.parametrize("schedule", [{"kind": "linear"}, {"min_rate": 0.1}], ids=str)
def test_a_falling_rate_with_it_is_refused(schedule):
    with pytest.raises(UserError, match=r"train\.schedule\..*schedule_free_adamw"):
        decided(optimizer=SCHEDULE_FREE, schedule=schedule)
