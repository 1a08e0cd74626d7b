import json

import pytest

from peftkit.errors import UserError
from peftkit.model.adapter.attach import (
    attach_adapter,
    count_parameters,
    save_initial_adapter,
    save_trained,
    trainable_tensors,
)
from peftkit.model.load import load_model, load_tokenizer
from tests.conftest import TINY_LLAMA
from tests.rigs.plans import cpu_plan

IDS = [[5, 9, 200, 31, 7, 77, 1024, 3]]


def parts(method):
    plan = cpu_plan(method)
    model = load_model(str(TINY_LLAMA), plan.base, device="cpu")
    return plan, model, load_tokenizer(str(TINY_LLAMA), plan.base)


def logits(model):
    import torch

    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits[:, -len(IDS[0]) :]  # behind virtual tokens


def shake(model):
    """Move every trained tensor, as training would."""
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in trainable_tensors(model).values():
            tensor.add_(torch.randn_like(tensor) * 0.05)


METHODS = {
    "lora": {"name": "lora", "rank": 4},
    "rslora": {"name": "lora", "rank": 4, "rslora": True},
    "dora": {"name": "lora", "rank": 4, "dora": True},
    "gaussian": {"name": "lora", "rank": 4, "init": "gaussian"},
    "orthogonal": {"name": "lora", "rank": 4, "init": "orthogonal"},
    "pissa": {"name": "lora", "rank": 4, "init": "pissa"},
    "olora": {"name": "lora", "rank": 4, "init": "olora"},
    "eva": {"name": "lora", "rank": 2, "init": "eva"},
    "norms": {"name": "lora", "rank": 2, "also_train": ["norms"]},
    "embeddings": {"name": "lora", "rank": 2, "also_train": ["embeddings"]},
    "tokens": {"name": "lora", "rank": 2, "also_train": [{"tokens": ["<|user|>", "<|assistant|>"]}]},
    "qlora": {"name": "qlora", "rank": 4},
    "prefix": {"name": "prefix", "virtual_tokens": 4},
    "ia3": {"name": "ia3"},
    "prompt": {"name": "prompt", "virtual_tokens": 4},
    "vera": {"name": "vera", "rank": 16},
    "oft": {"name": "oft", "block_size": 4},
    "adalora": {"name": "adalora", "initial_rank": 4, "rank": 2},
    "ln": {"name": "ln"},
}


@pytest.mark.parametrize("case", METHODS)
def test_saved_adapter_loads_in_plain_peft_with_equal_logits(case, tmp_path):
    """Saved by us, loaded by PEFT alone on the untouched base: the same function."""
    import torch
    from peft import PeftModel

    plan, model, tokenizer = parts(METHODS[case])
    batches = [{"input_ids": torch.tensor(IDS * 2), "attention_mask": torch.ones(2, 8)}]
    start = logits(model)
    wrapped = attach_adapter(model, plan, tokenizer, eva_batches=batches)
    assert plan.method.num_trainable == count_parameters(wrapped)[0]
    if case not in {"prefix", "prompt"}:
        assert torch.allclose(start, logits(wrapped), atol=2e-4), "an untrained adapter must not change the function"
    save_initial_adapter(wrapped, plan, tmp_path / "start", overwrite=True)
    shake(wrapped)
    trained = logits(wrapped)
    assert not torch.allclose(start, trained, atol=1e-2)
    save_trained(wrapped, plan, tokenizer, tmp_path / "adapter", initial_adapter=tmp_path / "start")
    fresh = load_model(str(TINY_LLAMA), plan.base, device="cpu")
    again = logits(PeftModel.from_pretrained(fresh, tmp_path / "adapter"))
    assert torch.allclose(trained, again, atol=2e-4)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(TINY_LLAMA)
    assert not list(tmp_path.rglob("*.bin"))


def test_full_fine_tuning_saves_a_model(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    plan, model, tokenizer = parts("full")
    attach_adapter(model, plan, tokenizer)
    assert count_parameters(model) == (plan.method.num_trainable, plan.method.num_parameters)
    shake(model)
    save_trained(model, plan, tokenizer, tmp_path / "model", initial_adapter=tmp_path / "none")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert torch.equal(logits(model), logits(again))


def test_targets_are_proven_on_the_real_model():
    from dataclasses import replace

    plan, model, tokenizer = parts("lora")
    plan = replace(plan, method=replace(plan.method, target_modules=("model.layers.9.self_attn.q_proj",)))
    with pytest.raises(UserError, match="matches no module"):
        attach_adapter(model, plan, tokenizer)


def test_token_rows_must_be_single_tokens():
    plan, model, tokenizer = parts({"name": "lora", "also_train": [{"tokens": ["<|user|>", "no such token"]}]})
    with pytest.raises(UserError, match="'no such token'"):
        attach_adapter(model, plan, tokenizer)


@pytest.mark.parametrize("num_steps", [4, 5, 10, 1000])
def test_adalora_has_a_schedule_for_any_number_of_steps_that_is_allowed(num_steps):
    plan = cpu_plan("adalora", train={"max_length": 64, "max_steps": num_steps})
    model = attach_adapter(load_model(str(TINY_LLAMA), plan.base, device="cpu"), plan, tokenizer=None)
    config = model.peft_config["default"]
    assert config.tinit < config.total_step - config.tfinal <= num_steps


def test_adalora_over_too_few_steps_is_refused():
    with pytest.raises(UserError, match="at least 4 steps"):
        cpu_plan("adalora", train={"max_length": 64, "max_steps": 3})
