"""The hooks' energies equal those of full gradients, on adapted and bare layers."""

from dataclasses import replace

import pytest
import torch

from peftkit.evaluate.losses import collate
from peftkit.evaluate.step import summed_loss
from peftkit.experiments.gradients import SKETCH_COLUMNS, STREAMS, GradientProbe
from peftkit.model.adapter.attach import attach_adapter, trainable_tensors
from tests.conformance.cells import rows_for
from tests.rigs.plans import plan_for
from tests.rigs.tiny import tiny_config, tiny_model

ROWS = rows_for("causal-lm") * 2


def looked(model_type="llama", targets=("q", "v"), *, train_b=True, **method):
    plan = plan_for(tiny_config(model_type).to_dict(), {"name": "lora", "rank": 4, "targets": list(targets), **method})
    plan = replace(plan, train=replace(plan.train, micro_batch=2))
    model = attach_adapter(tiny_model(model_type), plan, tokenizer=None)
    if train_b:
        torch.manual_seed(0)
        with torch.no_grad():
            for name, tensor in trainable_tensors(model).items():
                if "lora_B" in name:
                    tensor.normal_(0, 0.02)
    from peftkit.archs import shape_from_config

    modules = [m for m in shape_from_config(tiny_config(model_type).to_dict()).modules if not m.blocked_reason]
    looker = GradientProbe(model, plan, modules, pad_id=0)
    return looker, model, modules


def streams():
    return dict(zip(STREAMS, (ROWS[:4], ROWS[2:6], ROWS[:3]), strict=True))


def full_gradient(model, module, rows):
    """dL/dW of the effective weight, (d_out, d_in), by making the base's weight trainable."""
    layer = model.get_base_model().get_submodule(module.name)
    weight = (layer.base_layer if hasattr(layer, "base_layer") else layer).weight
    weight.requires_grad_(True)
    made = collate(rows, 0)
    logits = model(input_ids=made["input_ids"], attention_mask=made["attention_mask"]).logits
    learnt = int((made["labels"][:, 1:] != -100).sum())
    (summed_loss(logits, made["labels"], "causal-lm") / learnt).backward()
    found = weight.grad.clone()
    weight.grad = None
    weight.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    return found if type(layer).__name__ != "Conv1D" and found.shape == (module.d_out, module.d_in) else found.T


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_sketches_are_those_of_the_full_gradients(model_type):
    targets = {"llama": ("q", "v"), "gpt2": ("qkv",)}[model_type]
    looker, model, modules = looked(model_type, targets)
    signals = looker.look(streams())
    assert {m.name for m in signals.modules} == {m.name for m in modules}
    model.eval()
    for module, found in zip(modules, signals.modules, strict=True):
        first, second = (full_gradient(model, module, streams()[name]) for name in STREAMS[:2])
        sketch = looker.sketches[module.name]
        made = sketch.out["first"][:, :SKETCH_COLUMNS]
        expected = first @ sketch.right[:, :SKETCH_COLUMNS]
        assert torch.allclose(made, expected, atol=1e-5 * float(expected.abs().max())), module.name
        if found.is_adapted:
            inside, outside = sketch.rows_of_a, sketch.columns_of_b
            rest = first - outside @ (outside.T @ first)
            rest = rest - (rest @ inside) @ inside.T
            assert torch.allclose(
                sketch.residual("first"),
                rest @ sketch.right[:, :SKETCH_COLUMNS],
                atol=1e-5 * float(first.abs().max()) * 10,
            )
        exact = float((first * second).sum())
        whole = found.tangent + found.residual
        assert whole == pytest.approx(exact, rel=0.6), "an estimate by 32 random columns"


def test_every_layer_is_heard_also_the_first_and_with_b_at_zero():
    looker, model, modules = looked(train_b=False)
    signals = looker.look(streams())
    assert len(signals.modules) == len(modules)
    assert all(m.residual != 0 for m in signals.modules)
    assert signals.unadapted > 0
    assert signals.head_size > 0
    assert all(tensor.grad is None for tensor in model.parameters())
    assert not model.get_input_embeddings().weight.requires_grad


def test_new_rows_point_to_where_the_adapter_does_not_reach():
    looker, _, modules = looked()
    looker.look(streams())
    for module in modules:
        sketch = looker.sketches[module.name]
        rows = sketch.directions()
        assert torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-4)
        if sketch.rows_of_a is not None:
            strongest = rows[:4] @ sketch.rows_of_a
            assert float(strongest.abs().max()) < 1e-4


def test_looking_changes_nothing():
    looker, model, _ = looked(dropout=0.1)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    random = torch.get_rng_state()
    model.train()
    signals = looker.look(streams())
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_parameters())
    again, _, _ = looked(dropout=0.1)
    assert looker.num_tokens == sum(row.length for rows in streams().values() for row in rows)
    assert again.look(streams()).generalises == pytest.approx(signals.generalises)
