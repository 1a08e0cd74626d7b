"""What trains silently on nothing is found before the first step."""

from dataclasses import replace

import pytest
import torch

from peftkit.errors import UserError
from peftkit.evaluate.step import loss_from_logits
from peftkit.methods import PeftSpec
from peftkit.model.adapter.attach import attach_adapter, trainable_tensors
from peftkit.train.preflight import run_preflight
from tests.conformance.cells import rows_for
from tests.rigs.plans import plan_for
from tests.rigs.tiny import tiny_config, tiny_model


def made(model_type, method, **arguments):
    """(plan, wrapped model), with PEFT's arguments changed behind the plan's back."""
    plan = plan_for(tiny_config(model_type).to_dict(), method)
    if arguments:
        changed = {**plan.method.peft.arguments, **arguments}
        spec = PeftSpec(plan.method.peft.class_name, changed)
        names = tuple(changed["target_modules"])
        plan = replace(plan, method=replace(plan.method, peft=spec, target_modules=names))
    return plan, attach_adapter(tiny_model(model_type), plan, tokenizer=None)


def fly(plan, model):
    return run_preflight(model, plan, [[row] for row in rows_for("causal-lm")], pad_id=0, loss=loss_from_logits)


def test_a_sound_adapter_passes_and_nothing_is_left_behind():
    plan, model = made("llama", "lora")
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    passed = fly(plan, model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_parameters())
    assert all(tensor.grad is None for tensor in model.parameters())
    assert passed.num_tensors == len(trainable_tensors(model))
    assert passed.num_waiting == passed.num_tensors // 2, "every A waits for its B to move from zero"


def test_a_layer_that_is_read_and_never_called_is_found():
    plan, model = made("mamba", "lora", target_modules=["dt_proj", "in_proj"])
    with pytest.raises(UserError, match=r"trained tensors without gradient.*dt_proj"):
        fly(plan, model)


def test_adapters_on_one_storage_are_found():
    plan, model = made("zamba2", "lora", target_modules=["q_proj", "linear"])
    with pytest.raises(UserError, match="adapted modules that share one weight"):
        fly(plan, model)


def test_a_loss_that_is_not_finite_is_told():
    plan, model = made("llama", "lora")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(UserError, match="a loss of nan"):
        fly(plan, model)


def test_a_base_that_a_pass_changes_is_told():
    plan, model = made("llama", "lora")
    norm = model.get_base_model().model.norm

    def touch(module, inputs, output):
        module.weight.data.add_(1e-3)

    norm.register_forward_hook(touch)
    with pytest.raises(UserError, match=r"frozen tensors that a pass changed: .*norm\.weight"):
        fly(plan, model)


def test_a_rank_of_experts_that_no_token_visits_is_not_a_fault():
    method = {"name": "lora", "rank": 2, "targets": ["attention", "experts"]}
    plan, model = made("mixtral", method)
    assert fly(plan, model).num_tensors == len(trainable_tensors(model))


def test_checksums_see_swapped_rows_and_single_bits():
    from peftkit.train.preflight import frozen_checksums

    model = torch.nn.Linear(64, 64).requires_grad_(False)
    before = frozen_checksums(model)
    with torch.no_grad():
        model.weight[[0, 1]] = model.weight[[1, 0]]
    assert frozen_checksums(model)["weight"] != before["weight"]
    assert frozen_checksums(model)["bias"] == before["bias"]
