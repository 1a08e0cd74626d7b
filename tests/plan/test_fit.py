"""Devices by name, the verdict, the choice of what a recipe leaves open, and what would fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from peftkit.archs import KNOWN, shape_from_config
from peftkit.errors import UserError
from peftkit.plan import DataFacts, DeviceFacts, Facts, Lengths, ModelFacts, RowLengths, make_plan
from peftkit.plan.changes import nearest_changes
from peftkit.plan.devices import GPUS, parse_device, teraflops_of
from peftkit.plan.fit import check_fit, longest_batch
from peftkit.plan.throughput import active_parameters, estimate_cost, flops_per_token, speed_key
from peftkit.recipe import load

LLAMA = shape_from_config(KNOWN["meta-llama/Llama-3.1-8B"])
HERE = DeviceFacts("cpu", "a CPU", 24 * 2**30, True, True)


def gpu(name):
    return parse_device(name, HERE)[0]


def planned(device, method="qlora", lengths=None, **sections):
    loaded = load({"base": "o/m", "method": method, "data": {"train": "x.jsonl"}} | sections)
    data = DataFacts(1000, 10, "chat", lengths=lengths)
    facts = Facts(device, ModelFacts("o/m", "hub", LLAMA), data)
    return loaded, facts, make_plan(loaded, facts)


def test_a_device_is_a_name_a_size_or_this():
    assert gpu("rtx4090").memory_bytes == int(23.5 * 2**30)
    assert gpu("RTX 4090") == gpu("rtx4090")
    assert gpu("24GiB").memory_bytes == 24 * 2**30
    assert gpu("24gb").memory_bytes == 24 * 10**9
    assert gpu("this") is HERE
    assert not gpu("t4").supports_bf16
    assert gpu("24 GiB").memory_bytes == gpu("24G").memory_bytes == 24 * 2**30
    assert gpu("NVIDIA H100 80GB HBM3") == gpu("h100-80gb")
    for unclear, told in {"h100": "h100-80gb or h100-pcie", "a100": "a100-80gb", "4090": "rtx4090"}.items():
        with pytest.raises(UserError, match=told):
            gpu(unclear)
    assert "24 GiB" in parse_device("24", HERE)[1]  # a bare number is ambiguous: it is said how it is read


@pytest.mark.parametrize("name", ["rtx4091", "0", "-3GiB", "h10", "24 parsecs", ""])
def test_an_unknown_device_is_refused_with_the_nearest_names(name):
    with pytest.raises(UserError) as caught:
        parse_device(name, HERE)
    assert "this" in str(caught.value)
    if name == "rtx4091":
        assert "rtx4090" in str(caught.value)


def test_every_gpu_is_found_by_the_name_its_driver_gives():
    assert all(teraflops_of(one.title) == one.teraflops for one in GPUS.values())
    assert teraflops_of("a CPU") is None


def test_a_smaller_device_gets_smaller_pieces_and_then_recomputation():
    long = {"train": {"max_length": 4096, "batch_size": 16}}
    large, small = (planned(gpu(n), **long)[2].train for n in ("h200", "16GiB"))
    assert large.gradient_checkpointing == "none"
    assert small.gradient_checkpointing == "full"
    assert small.micro_batch * small.accumulation == large.micro_batch * large.accumulation == 16


def test_what_is_chosen_fits_with_a_margin_and_says_so():
    for name in ("rtx4090", "a100-40gb", "h100-80gb"):
        _, facts, plan = planned(gpu(name), train={"max_length": 2048})
        assert check_fit(plan.memory, facts.device).verdict == "fits"
        why = next(d.reason for d in plan.decisions if d.key == "train.micro_batch")
        assert "fits" in why and "GiB" in why


def test_a_device_that_is_half_full_has_half_its_memory():
    device = gpu("16GiB")
    _, _, plan = planned(device)
    full = check_fit(plan.memory, device)
    half = check_fit(plan.memory, replace(device, used_bytes=device.memory_bytes // 2))
    assert half.free_bytes == full.free_bytes // 2


def test_what_does_not_fit_names_changes_that_do():
    loaded, facts, plan = planned(gpu("rtx4090"), "full", train={"max_length": 2048})
    assert check_fit(plan.memory, facts.device).verdict == "does not fit"
    changes = nearest_changes(loaded, facts, plan)
    assert changes
    for change in changes:
        again = make_plan(load(loaded.recipe, list(change.overrides)), facts)
        assert again.memory.needed_bytes == change.needed_bytes <= facts.device.memory_bytes


def test_the_longest_rows_are_those_of_the_data():
    rows = tuple(RowLengths(n, 0, n // 2) for n in (900, 300, 200, 100))
    lengths = Lengths(rows, tuple(range(100, 1000, 80))[:11], 1500, 750, "counted", 4)
    given = {"train": {"max_length": 2048, "micro_batch": 2, "batch_size": 2}}
    _, facts, plan = planned(gpu("h100-80gb"), lengths=lengths, **given)
    batch = longest_batch(plan, facts)
    assert (batch.num_rows, batch.num_tokens, batch.num_learnt, batch.is_padded) == (2, 900, 600, True)


def test_a_micro_batch_may_be_larger_than_the_rows_that_are_known_by_length():
    rows = tuple(RowLengths(100, 0, 50) for _ in range(64))
    lengths = Lengths(rows, (50,) * 11, 50 * 3000, 25 * 3000, "counted", 3000)

    def batch(micro):
        given = {"train": {"max_length": 2048, "micro_batch": micro, "batch_size": micro}}
        return planned(gpu("h100-80gb"), lengths=lengths, **given)[2].batch

    assert batch(1000).num_rows == 1000
    assert batch(4000).num_rows == 3000  # there are no more


def test_held_out_rows_are_planned_by_their_own_length():
    _, facts, plan = planned(gpu("h100-80gb"), data={"train": "x.jsonl", "eval": "y.jsonl"})
    long = replace(facts, data=replace(facts.data, num_eval=3, longest_eval=RowLengths(1500, 0, 700)))
    none = replace(facts, data=replace(facts.data, num_eval=0))
    assert longest_batch(plan, none).eval_rows == 0
    batch = longest_batch(plan, long)
    assert (batch.eval_rows, batch.eval_tokens) == (min(3, plan.train.micro_batch), 1500)


def test_work_follows_from_parameters_and_the_measured_speed():
    _, facts, plan = planned(gpu("h100-80gb"), train={"max_length": 2048, "max_steps": 100})
    per_token = flops_per_token(LLAMA, plan, 2048)
    assert 4 * LLAMA.num_parameters < 1.2 * per_token < 8 * LLAMA.num_parameters
    unknown = estimate_cost(LLAMA, plan, facts, {}, 2.0)
    assert unknown.seconds is None and unknown.price is None
    known = estimate_cost(LLAMA, plan, facts, {speed_key(plan): unknown.flops_per_step}, 3600.0)
    assert known.seconds == pytest.approx(100)
    assert known.price == pytest.approx(100)


def test_layers_below_the_first_that_is_adapted_are_passed_forwards_alone():
    def work(**changes):
        method = {"name": "lora", "rank": 1, **changes.pop("method", {})}
        _, _, plan = planned(gpu("h100-80gb"), method=method, train={"max_length": 2048, "max_steps": 9, **changes})
        return flops_per_token(LLAMA, plan, 2048)

    last = {"method": {"layers": "last 1"}}
    everywhere, at_the_end = work(gradient_checkpointing=False), work(gradient_checkpointing=False, **last)
    assert 0.5 < at_the_end / everywhere < 0.65, "half, and the last layer and the head"
    assert work(gradient_checkpointing=True, **last) == pytest.approx(work(gradient_checkpointing=True), rel=1e-3)


def test_a_token_meets_the_experts_that_it_is_routed_to():
    shape = shape_from_config(KNOWN["mistralai/Mixtral-8x7B-v0.1"])
    assert active_parameters(shape) / 1e9 == pytest.approx(12.75, abs=0.2)  # 12.9 B with the embeddings


def test_states_go_to_8_bits_only_where_plain_ones_do_not_fit():
    def optimizer(gib):
        device = DeviceFacts("cuda", "a GPU", gib * 2**30, True, True)
        return planned(device, "full", train={"max_length": 512})[2]

    assert optimizer(141).train.optimizer == "adamw_torch_fused"
    small = optimizer(100)
    assert small.train.optimizer == "adamw_bnb_8bit"
    assert optimizer(80).train.optimizer == "paged_adamw_8bit"
    [told] = [d for d in small.decisions if d.key == "train.optimizer"]
    assert "do not fit" in told.reason
