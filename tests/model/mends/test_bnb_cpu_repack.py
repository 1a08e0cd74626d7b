"""The mend, and the fault that it mends: when the second test fails, the mend can go."""

import pytest
import torch

from peftkit.model.load import load_model
from peftkit.model.mends import bnb_cpu_repack
from tests.conftest import TINY_LLAMA
from tests.rigs.plans import cpu_plan


def gradients_after_evaluation(model, *, evaluate):
    import peft

    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    ids = torch.arange(5, 69).view(2, 32)
    if evaluate:
        wrapped.eval()
        with torch.no_grad():
            wrapped(input_ids=ids)
    wrapped.train()
    wrapped(input_ids=ids, labels=ids).loss.backward()
    return {n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None}


def difference(load):
    plain, after = (gradients_after_evaluation(load(), evaluate=e) for e in (False, True))
    return max(float((plain[n] - after[n]).norm() / plain[n].norm()) for n in plain)


def test_gradients_are_the_same_after_an_evaluation_pass():
    plan = cpu_plan({"name": "qlora"})
    assert difference(lambda: load_model(str(TINY_LLAMA), plan.base, device="cpu")) == 0.0


def test_the_fault_is_still_there():
    from transformers import AutoModelForCausalLM

    from peftkit.model.quantize import build_quantization_config

    plan = cpu_plan({"name": "qlora"})

    def load():
        return AutoModelForCausalLM.from_pretrained(
            TINY_LLAMA,
            quantization_config=build_quantization_config(plan.base),
            dtype=torch.float32,
            device_map={"": "cpu"},
        )

    if not any(getattr(module, bnb_cpu_repack.FLAG, False) for module in load().modules()):
        pytest.skip("this CPU has no AVX512-BF16: bitsandbytes does not repack here")
    assert difference(load) > 0.1, "bitsandbytes keeps gradients right now: remove model/mends/bnb_cpu_repack.py"
