"""What a run leaves as evidence: the size of its update against its weights."""

from dataclasses import replace

import pytest
import torch

from peftkit.archs import KNOWN
from peftkit.experiments.evidence import standing_events, update_pace
from peftkit.model.adapter.attach import attach_adapter, trainable_tensors
from peftkit.model.load import load_model
from peftkit.plan.plan import Growth
from peftkit.rundir.events import GrowthEvent, GrowthTakenBackEvent, SpikeEvent, of_type
from tests.conftest import save_tiny
from tests.rigs.plans import plan_for

NUM_STEPS, LLAMA = 200, KNOWN["meta-llama/Llama-3.1-8B"]


def moved(tmp_path, kind, method):
    """A base with an adapter whose B is no longer zero, and its plan."""
    folder, config = save_tiny(tmp_path, kind)
    plan = plan_for(config, {"rank": 4, "targets": "all-linear", **method})
    base = load_model(str(folder), replace(plan.base, id=str(folder)), device="cpu")
    model = attach_adapter(base, plan, tokenizer=None)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in trainable_tensors(model).items():
            if "lora_B" in name:
                tensor.normal_(0, 0.02)
    return replace(plan, train=replace(plan.train, num_steps=NUM_STEPS)), model


@pytest.mark.parametrize(
    ("kind", "method"),
    [("llama", {"name": "lora", "rslora": True}), ("gpt2", {"name": "lora"}), ("llama", {"name": "qlora"})],
    ids=["llama", "gpt2", "4-bit"],
)
def test_the_pace_is_that_of_dense_updates(kind, method, tmp_path):
    plan, model = moved(tmp_path, kind, method)
    shares = []
    for _, module in model.named_modules():
        if hasattr(module, "lora_A") and module.lora_A:
            before = module.weight
            if hasattr(before, "quant_state"):
                from bitsandbytes.functional import dequantize_4bit

                before = dequantize_4bit(before.data, before.quant_state)
            shares.append(float(module.get_delta_weight("default").norm() / before.float().norm()))
    expected = sum(shares) / len(shares)
    trained = dict(trainable_tensors(model))
    assert update_pace(plan, model, trained, NUM_STEPS) == pytest.approx(expected, rel=1e-4)
    assert update_pace(plan, model, trained, NUM_STEPS // 4) == pytest.approx(4 * expected, rel=1e-4)
    anew = replace(plan, growths=(Growth(150, "learning rate too high", ()), Growth(160, "rank", ())))
    assert update_pace(anew, model, trained, NUM_STEPS) == pytest.approx(4 * expected, rel=1e-4), "since it began anew"
    assert update_pace(anew, model, trained, 150) is None
    going_on = replace(plan, method=replace(plan.method, start_from="runs/first"))
    assert update_pace(going_on, model, trained, NUM_STEPS) is None


def test_fused_experts_are_passed_over(tmp_path):
    plan, model = moved(tmp_path, "mixtral", {"name": "lora", "targets": ["experts"]})
    assert update_pace(plan, model, dict(trainable_tensors(model)), NUM_STEPS) is None


def test_what_was_taken_back_and_what_was_begun_anew_are_no_evidence():
    def spike(step):
        return SpikeEvent(step=step, text="", skipped=True, num_in_a_row=1, num_skipped=1, rows=[], advice="")

    def grown(step):
        return GrowthEvent(step=step, cause="rank", overrides=[], num_trainable=1, learning_rate=1.0, num_steps=9)

    undone = GrowthTakenBackEvent(step=40, text="", gain=None)
    events = [spike(1), grown(10), spike(20), grown(30), spike(35), undone, spike(32)]
    plan = plan_for(LLAMA, "lora")
    assert [e.step for e in of_type(standing_events(events, plan), SpikeEvent)] == [1, 20, 32]
    anew = replace(plan, growths=(Growth(10, "learning rate too high", ()),))
    assert [e.step for e in of_type(standing_events(events, anew), SpikeEvent)] == [20, 32]
