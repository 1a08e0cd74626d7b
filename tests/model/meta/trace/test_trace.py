"""The ledger against torch's own allocator, and against numbers worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from peftkit.archs import KNOWN, shape_from_config
from peftkit.evaluate.losses import collate
from peftkit.evaluate.step import loss_from_logits
from peftkit.model.adapter.attach import attach_adapter
from peftkit.model.hardware import allocator_peak
from peftkit.model.load import load_model
from peftkit.model.meta.trace.caching import simulate_reserved_bytes
from peftkit.model.meta.trace.ledger import FORWARD, Ledger, PhasePeak
from peftkit.model.meta.trace.step import StepTrace
from peftkit.plan import Batch, DeviceFacts, Facts, ModelFacts
from peftkit.prepare import traced_memory as memory
from peftkit.recipe import load
from tests.conformance.cells import rows_for
from tests.conftest import save_tiny
from tests.rigs.plans import CPU, plan_for
from tests.rigs.tiny import tiny_config

MIB = 2**20
GPU = DeviceFacts("cuda", "NVIDIA H100 80GB HBM3", 85_000_000_000, True, True)
LLAMA8B = KNOWN["meta-llama/Llama-3.1-8B"]


def test_the_caching_allocator_rounds_splits_and_reuses():
    def reserved(*steps):
        sizes = [abs(size) for size in dict.fromkeys(abs(s) for s in steps)]
        events = [(sizes.index(abs(size)), size > 0) for size in steps]
        return simulate_reserved_bytes(sizes, events)

    assert reserved(512) == 2 * MIB
    assert reserved(MIB + 512 * 1024) == 20 * MIB
    assert reserved(11 * MIB) == 12 * MIB
    assert reserved(512, 1024, 2048) == 2 * MIB  # all in one small segment
    assert reserved(12 * MIB, -12 * MIB, 11 * MIB) == 12 * MIB  # given back and used again
    assert reserved(12 * MIB, 11 * MIB) == 24 * MIB


@given(st.lists(st.tuples(st.integers(1, 64), st.booleans()), max_size=40))
def test_no_record_reserves_less_than_it_allocates(steps):
    sizes, events, live, peak = [], [], [], 0
    for size, frees in steps:
        if frees and live:
            events.append((live.pop(0), False))
        sizes.append(size * 256 * 1024)
        events.append((len(sizes) - 1, True))
        live.append(len(sizes) - 1)
        peak = max(peak, sum(sizes[i] for i in live))
    assert simulate_reserved_bytes(sizes, events) >= peak


def test_the_ledger_follows_a_tensor_through_its_life():
    ledger = Ledger(round_to=1, vocab=99, scratch={}, scalar_value=lambda tensor: True)
    with ledger:
        ledger.phase = FORWARD
        kept = torch.empty(100, device="meta") + 1  # 400 bytes, twice while both live
        view = kept.view(10, 10)
        del view
    assert ledger.live_bytes() == 400
    assert ledger.peaks([FORWARD])[FORWARD].allocated_bytes == 800
    del kept
    assert ledger.live_bytes() == 0


@pytest.mark.parametrize("method", ["lora", "full", "qlora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_traced_step_is_what_the_allocator_reports(method, checkpointing, tmp_path):
    """Full logits and their loss here; TRL's fused head is compared in benchmarks/memory.py."""
    folder, config = save_tiny(tmp_path, "llama")
    train = {"max_length": 64, "micro_batch": 4, "batch_size": 4, "gradient_checkpointing": checkpointing}
    plan = plan_for(config, {"name": method, "rank": 4} if method != "full" else method, train=train)
    plan = replace(plan, base=replace(plan.base, id=str(folder), inferred=True))  # inferred: plain logits
    traced = memory.trace_plan(plan, config, Batch(4, 16, 0, 60, is_padded=False))
    predicted = max(traced.peaks[p].allocated_bytes for p in ("forward", "backward")) - traced.static_bytes

    model = attach_adapter(load_model(str(folder), plan.base, device="cpu"), plan, tokenizer=None)
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        if method != "full":
            model.enable_input_require_grads()
    batch = collate(rows_for("causal-lm"), 0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        loss_from_logits(model, batch, "causal-lm").backward()
    peak = allocator_peak(run)
    # beside the ledger checkpointing holds the CPU's random state, 5,056 bytes, for each layer
    slack = 3 * torch.get_rng_state().nbytes if checkpointing else 0
    assert predicted == pytest.approx(peak, rel=0.005, abs=slack)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "method", "checkpointing"),
    [
        ("llama", "lora", False),
        ("llama", "full", True),
        ("llama", "lora", "selective"),
        ("gemma3_text", "lora", False),
        ("gemma3_text", "full", False),
    ],
)
def test_three_depths_give_the_whole_model(model_type, method, checkpointing, monkeypatch):
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    layers = {"layer_types": kinds * 13} if model_type == "gemma3_text" else {}
    config = json.loads(tiny_config(model_type, num_hidden_layers=78, **layers).to_json_string())
    train = {"max_length": 64, "micro_batch": 1, "gradient_checkpointing": checkpointing}
    plan = plan_for(config, method, device=GPU, train=train)
    shape = shape_from_config(config)
    whole = memory.trace_plan(plan, config, plan.batch)
    seen, traced = [], memory.trace_plan
    monkeypatch.setattr(memory, "trace_plan", lambda *given: seen.append(given) or traced(*given))
    few = memory._trace_or_extrapolate(plan, shape, config, plan.batch)
    depths = [12, 18, 24] if layers else [8, 12, 16]
    assert [config["num_hidden_layers"] for _, config, _ in seen] == depths
    for peak in few.peaks:
        if peak.phase in whole.peaks:
            assert peak.allocated_bytes == pytest.approx(whole.peaks[peak.phase].allocated_bytes, rel=1e-4)


def test_stand_ins_have_layers_of_each_kind_in_proportion():
    """Windows come in turns of six, recomputation in turns of two; shallow models are traced as they are."""

    def depths(model_type, num, period=1, **more):
        config = json.loads(tiny_config(model_type, num_hidden_layers=num, **more).to_json_string())
        return memory._stand_in_depths(shape_from_config(config), config, period=period)

    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    assert depths("llama", 32) is None
    assert depths("llama", 80) == (8, 12, 16)
    assert depths("llama", 81, period=2) == (9, 13, 17)
    assert depths("gemma3_text", 80, layer_types=(kinds * 14)[:80]) == (8, 14, 20)


def test_the_backward_pass_is_told_in_two():
    """Up to some 30 layers this step is highest at the loss, then after all gradients: both grow evenly."""
    config = json.loads(tiny_config("llama").to_json_string())

    def at(depth):
        deep = {**config, "num_hidden_layers": depth}
        train = {"max_length": 64, "batch_size": 1, "gradient_checkpointing": True}
        plan = plan_for(deep, "full", device=GPU, train=train)
        return memory.trace_plan(plan, deep, plan.batch)

    shallow, *_, deep = found = [at(depth) for depth in (10, 30, 50)]
    assert "logits and loss" in shallow.peaks["backward"].components
    assert "logits and loss" not in deep.peaks["backward"].components
    assert memory._is_linear_in_depth(found)


@pytest.mark.parametrize("sizes", [(10, 20, 40), (10, 25, 30)])
def test_what_does_not_grow_evenly_is_not_extrapolated(sizes):
    def step(size):
        names = ("forward", "backward", "backward below", "optimizer step", "evaluation")
        return StepTrace({n: PhasePeak(n, {"gradients": 1000 * size}) for n in names}, 0, 0, 0, 0)

    assert memory._is_linear_in_depth([step(size) for size in (10, 20, 30)])
    assert not memory._is_linear_in_depth([step(size) for size in sizes])


@pytest.mark.parametrize("method", ["lora", "adalora", "ia3", "prefix", "vera", "oft", "full"])
def test_what_is_traced_trains_what_was_planned(method):
    config = json.loads(tiny_config("llama").to_json_string())
    plan = plan_for(config, method)
    assert memory.trace_plan(plan, config, plan.batch).num_trainable == plan.method.num_trainable


def test_a_traced_plan_is_kept_and_found_again(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path))
    config = json.loads(tiny_config("llama").to_json_string())
    plan, shape = plan_for(config, "lora", device=GPU), shape_from_config(config)
    first = memory.trace_memory(plan, shape, config, plan.batch)
    again = memory.trace_memory(plan, shape, config, plan.batch)
    assert not first.from_cache and again.from_cache
    assert first.memory == again.memory


def test_a_family_whose_table_counts_other_weights_is_told(monkeypatch, tmp_path):
    """As of a known type with a new key: the table counts one model, transformers builds another."""
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path))
    config = json.loads(tiny_config("llama", hidden_size=256, intermediate_size=1024).to_json_string())
    plan, loaded = plan_for(config, "lora"), load({"base": "org/model", "method": "lora", "data": {"train": "t.jsonl"}})
    facts = Facts(CPU, ModelFacts("org/model", "hub", shape_from_config(config)), None)
    same, _ = memory.plan_with_traced_memory(loaded, facts, plan, config)
    assert same.decisions == plan.decisions
    wider, _ = memory.plan_with_traced_memory(loaded, facts, plan, {**config, "intermediate_size": 2048})
    [warning] = [d for d in wider.decisions if d not in plan.decisions]
    assert warning.key == "warning.base.id"
    assert "its config.json has a key that the table does not read" in warning.reason


def test_a_model_that_cannot_be_traced_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path))
    config = json.loads(tiny_config("mixtral").to_json_string())
    method = {"name": "lora", "targets": ["attention", "experts"]}
    plan, shape = plan_for(config, method), shape_from_config(config)
    outcome = memory.trace_memory(plan, shape, config, plan.batch)
    assert outcome.memory is None
    assert "RuntimeError" in outcome.reason
