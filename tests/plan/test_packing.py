"""What is decided against padding, with its reasons, and what packing does not go with."""

import json
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from peftkit.archs import KNOWN, shape_from_config
from peftkit.data.tokens.lengths import count_lengths
from peftkit.data.tokens.mask import Tokenized
from peftkit.errors import UserError
from peftkit.plan import DataFacts, DeviceFacts, Facts, ModelFacts, RowLengths, make_plan
from peftkit.plan.packing import GROUPED, SHUFFLED, padding_share
from peftkit.recipe import load
from tests.rigs.plans import plan_for
from tests.rigs.tiny import tiny_config

LLAMA = shape_from_config(KNOWN["meta-llama/Llama-3.1-8B"])
GPU = DeviceFacts("cuda", "NVIDIA H100 80GB HBM3", 85_000_000_000, True, True)
CPU = DeviceFacts("cpu", "a CPU", 64 * 2**30, True, True)


def rows(num=800, shortest=20, longest=200):
    draw = Random(0)
    return [Tokenized([5] * size, [5] * size, "") for size in (draw.randint(shortest, longest) for _ in range(num))]


def planned(device=GPU, method="lora", data=None, shape=LLAMA, **train):
    loaded = load({"base": "o/m", "method": method, "data": {"train": "x.jsonl"}, "train": train})
    found = rows() if data is None else data
    lengths = count_lengths(found, "causal-lm", train.get("max_length", 2048)) if found else None
    facts = DataFacts(len(found) or 800, 10, "chat", lengths=lengths)
    plan = make_plan(loaded, Facts(device, ModelFacts("o/m", "hub", shape), facts))
    return plan, {decision.key: decision for decision in plan.decisions}


def real_padding(found, micro, step, *, by_length):
    """What the trainer's order, or a random one, really pads over an epoch."""
    from peftkit.train.batches import TrainOrder

    lengths = [len(row.input_ids) for row in found]
    order = list(range(len(lengths)))
    Random(1).shuffle(order)
    if by_length:
        plan, _ = planned(micro_batch=micro, batch_size=step, max_steps=num_steps(len(found), step))
        drawn = [lengths[i] for i in TrainOrder(plan, np.array(lengths))]
        pieces = [drawn[start : start + micro] for start in range(0, len(drawn), micro)]
    else:
        pieces = [[lengths[i] for i in order[s : s + micro]] for s in range(0, len(order), micro)]
    held = sum(max(piece) * len(piece) for piece in pieces)
    return 1 - sum(sum(piece) for piece in pieces) / held


def num_steps(num_rows, step):
    return num_rows // step


@pytest.mark.parametrize(("num", "micro", "step"), [(800, 8, 8), (3000, 4, 16), (40, 4, 8), (20_000, 16, 64)])
def test_the_padding_that_is_told_is_what_comes(num, micro, step):
    found = rows(num)
    lengths = count_lengths(found, "causal-lm")
    for sampling in (SHUFFLED, GROUPED):
        told = padding_share(lengths, 2048, micro=micro, step=step, sampling=sampling)
        assert told == pytest.approx(real_padding(found, micro, step, by_length=sampling == GROUPED), abs=0.04)


def test_rows_of_like_length_are_taken_together_where_padding_would_be_much():
    plan, decided = planned(micro_batch=8, packing=False)
    assert plan.train.sampling == GROUPED == decided["train.sampling"].value
    assert decided["train.sampling"].reason == "about 40 % of a micro-batch is padding if only shuffled, 1 % if grouped"
    assert planned(micro_batch=1, packing=False)[0].train.sampling == SHUFFLED
    assert planned(micro_batch=8, data=rows(shortest=195), packing=False)[0].train.sampling == SHUFFLED
    assert planned(micro_batch=8, data=())[0].train.sampling == SHUFFLED


def test_a_batch_stays_about_so_many_examples():
    plan, decided = planned(packing=True, batch_size=64)
    assert plan.train.packing and plan.train.batch_size == round(64 / 2048 * 110) == 3
    assert decided["train.packs_per_step"].reason == "64 examples are about 3.4 packs of 2,048 tokens"
    assert plan.train.num_steps == decided["train.max_steps"].value
    assert plan.train.micro_batch * plan.train.accumulation == plan.train.batch_size
    assert plan.batch.is_packed and plan.batch.num_tokens <= 2048
    assert plan.train.sampling == SHUFFLED


def test_without_lengths_each_pack_has_one_example():
    plan, decided = planned(packing=True, data=())
    assert plan.train.batch_size == 16
    assert "the lengths are known" in decided["train.packs_per_step"].reason


def test_auto_packs_on_no_cpu_and_on_a_gpu_only_where_padding_stays():
    assert "faster" in planned(CPU)[1]["train.packing"].reason
    plan, decided = planned()
    assert not plan.train.packing and "not measured on a GPU" in decided["train.packing"].reason
    few = [*rows(8, 20, 30), *rows(4, 900, 2000)]
    assert planned(data=few)[0].train.packing
    assert not planned(data=few, micro_batch=2, batch_size=4)[0].train.packing


@pytest.mark.parametrize(
    ("model_type", "method", "sections", "said"),
    [
        ("gpt_oss", "lora", {}, "GPT-OSS.*see each other"),
        ("mamba", "lora", {}, "see each other"),
        ("llama", "prompt", {}, "virtual tokens"),
        ("llama", "prefix", {}, "virtual tokens"),
        ("llama", {"name": "lora", "also_train": [{"tokens": ["<x>"]}]}, {}, "another trainer"),
        ("bert", "lora", {"task": "classification", "labels": ("a", "b"), "data_format": "classification"}, "decoder"),
    ],
)
def test_what_packing_does_not_go_with_is_refused(model_type, method, sections, said):
    config = json.loads(tiny_config(model_type).to_json_string())
    train = {"max_length": 64, "packing": True}
    with pytest.raises(UserError, match=rf"train\.packing.*{said}"):
        plan_for(config, method, train=train, **sections)
    kept = plan_for(config, method, train={"max_length": 64}, **sections)
    assert not kept.train.packing


def test_a_model_of_no_known_family_is_not_packed():
    unknown = replace(LLAMA, family=replace(LLAMA.family, inferred=True, mind=("looked at",)))
    with pytest.raises(UserError, match=r"train\.packing.*no known family"):
        planned(shape=unknown, packing=True)
    assert not planned(shape=unknown)[0].train.packing


def test_the_fullest_packs_are_the_longest_batch():
    data = [Tokenized([5] * size, [5] * size, "") for size in (60, 40, 30, 30)]
    lengths = count_lengths(data, "causal-lm", 100)
    assert lengths.packs.num == 2
    assert lengths.packs.fullest == (RowLengths(100, 0, 100), RowLengths(60, 0, 60))
    assert count_lengths(data, "causal-lm", 50).packs is None
