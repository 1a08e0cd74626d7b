"""How many processes train, how a step is shared out, and what is refused."""

from dataclasses import replace

import pytest

from peftkit.archs import shape_from_config
from peftkit.errors import UserError
from peftkit.plan import DataFacts, DeviceFacts, Facts, ModelFacts, make_plan
from peftkit.plan.parallel import plan_for_ranks, shared_device
from peftkit.recipe import load
from tests.rigs.tiny import tiny_config

CPU = DeviceFacts("cpu", "a CPU", 24 * 2**30, True, True, used_bytes=2**30)
GPU = DeviceFacts("cuda", "NVIDIA H100 80GB HBM3", 85_000_000_000, True, True)
SHAPE = shape_from_config(tiny_config("llama").to_dict())


def planned(count="auto", *, device=CPU, launched=1, gpus=None, restarts=0, **train):
    source = {"base": "o/m", "method": "lora", "data": {"train": "x.jsonl"}, "train": {"max_steps": 10, **train}}
    loaded = load({**source, "devices": {"count": count, "restarts": restarts}})
    data = DataFacts(1000, 40, "prompt-completion")
    facts = Facts(device, ModelFacts("o/m", "hub", SHAPE), data, num_ranks=launched, num_devices=gpus)
    plan = make_plan(loaded, facts)
    return plan, {decision.key: decision for decision in plan.decisions}


def test_one_process_unless_more_are_asked_for_or_launched():
    plan, decided = planned()
    assert (plan.ranks.num, plan.ranks.strategy) == (1, "none")
    assert decided["devices.count"].reason == "one process, unless more are asked for"
    assert planned(2)[0].ranks.num == planned(launched=2)[0].ranks.num == planned(2, launched=2)[0].ranks.num == 2
    assert "the whole model" in planned(2)[1]["devices.strategy"].reason


@pytest.mark.parametrize(("num", "batch"), [(2, 16), (3, 15), (8, 16), (64, 64)])
def test_a_batch_that_is_left_open_divides(num, batch):
    plan, _ = planned(num)
    assert plan.train.batch_size == batch
    assert plan.train.accumulation % num == 0
    assert plan.train.micro_batch * plan.train.accumulation == batch


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"count": 3, "batch_size": 8}, r"train\.batch_size.*8 over 3 processes.*multiple of 3.*try 6 or 9"),
        (
            {"count": 2, "batch_size": 8, "micro_batch": 8},
            r"8 over 2 processes with micro_batch 8.*try 16, or train\.micro_batch: 4",
        ),
        ({"count": 4, "device": GPU, "gpus": 2}, r"devices\.count.*4 with 2 GPUs.*at most 2"),
        ({"restarts": 2}, r"devices\.restarts.*2 with one process.*set devices\.count"),
        ({"count": 2, "launched": 4}, r"2 in a launch of 4 processes.*auto, or 4"),
        ({"count": 2, "device": replace(CPU, kind="mps", name="Apple GPU")}, r"2 on Apple GPU.*expected 1"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_does_not_go_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        planned(**options)


def test_each_has_a_share_of_the_host_or_a_gpu_of_its_own_and_buckets_for_the_gradients():
    assert shared_device(CPU, 2).memory_bytes == CPU.memory_bytes // 2
    assert shared_device(GPU, 2) == GPU
    alone, shared = (planned(num, batch_size=8, micro_batch=4)[0] for num in (1, 2))
    components = [plan.memory.peak.components for plan in (alone, shared)]
    assert "buckets" not in components[0]
    assert components[1]["buckets"] == components[1]["adapter"]
    assert shared.train.accumulation == 2, "of all: one for each"


def test_a_run_goes_on_with_so_many_as_divide_its_steps():
    plan, _ = planned(2, batch_size=12, micro_batch=2)
    assert plan_for_ranks(plan, 3).ranks.num == 3
    assert plan_for_ranks(plan, 1).ranks == planned()[0].ranks
    with pytest.raises(UserError, match="4 processes, and a step has 6 micro-batches of 2, expected one of 1, 2, 3, 6"):
        plan_for_ranks(plan, 4)


def test_what_a_rank_alone_cannot_do_is_not_promised():
    plan, decided = planned(2, on_oom="adapt")
    assert plan.train.on_oom == "stop" and "cannot be told" in decided["train.on_oom"].reason
