from peftkit.model.mends import falcon_linear
from peftkit.model.quantize import share_in_4bit
from tests.conftest import save_tiny
from tests.rigs.plans import plan_for


def load(folder, plan):
    from peftkit.model.load import load_model

    return load_model(str(folder), plan.base, device="cpu")


def test_the_fault_is_still_there(tmp_path):
    """Once it is gone, delete the mend."""
    from transformers import AutoModelForCausalLM

    from peftkit.model.quantize import build_quantization_config

    folder, config = save_tiny(tmp_path, "falcon")
    plan = plan_for(config, "qlora")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=build_quantization_config(plan.base))
    assert share_in_4bit(model) == 0.0


def test_mended_falcon_is_quantized_and_the_module_is_left_as_it_was(tmp_path):
    from transformers.models.falcon import modeling_falcon

    before = modeling_falcon.FalconLinear
    folder, config = save_tiny(tmp_path, "falcon")
    assert share_in_4bit(load(folder, plan_for(config, "qlora"))) > 0.7  # the rest is the token table
    assert modeling_falcon.FalconLinear is before
    with falcon_linear.plain_falcon_linear():
        assert modeling_falcon.FalconLinear is not before
