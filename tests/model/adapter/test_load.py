import json
import shutil
import struct

import pytest

from peftkit.errors import UserError
from peftkit.model.adapter.attach import attach_adapter, save_trained
from peftkit.model.adapter.load import load_adapter, read_adapter_config
from peftkit.model.load import load_model, load_tokenizer
from tests.conftest import TINY_LLAMA
from tests.rigs.plans import cpu_plan

QUERY = "base_model.model.model.layers.0.self_attn.q_proj"
PLAN = cpu_plan({"name": "lora", "rank": 4})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A saved LoRA."""
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    model = attach_adapter(base(), PLAN, None)
    save_trained(model, PLAN, load_tokenizer(str(TINY_LLAMA), PLAN.base), folder, initial_adapter=folder / "none")
    return folder


@pytest.fixture
def adapter(made, tmp_path):
    return shutil.copytree(made, tmp_path / "lora")


def base():
    return load_model(str(TINY_LLAMA), PLAN.base, device="cpu")


def rewrite(folder, change):
    """Change the dict of tensors, and write it again."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def configure(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def query():
    """Zeros like the base's own weights, which PEFT would lay over them."""
    return base().model.layers[0].self_attn.q_proj.weight.detach() * 0


def refuse(folder):
    with pytest.raises(UserError) as caught:
        load_adapter(base(), folder)
    return str(caught.value)


def test_a_whole_adapter_is_loaded(adapter):
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    held = get_peft_model_state_dict(load_adapter(base(), adapter))
    saved = load_file(adapter / "adapter_model.safetensors")
    assert held.keys() == saved.keys()
    assert all(torch.equal(held[name], saved[name]) for name in saved)


def test_half_precision_is_taken(adapter):
    rewrite(adapter, lambda tensors: tensors.update({name: t.half() for name, t in tensors.items()}))
    assert load_adapter(base(), adapter)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{QUERY}.lora_B.weight"), f"a file without {QUERY}.lora_B.weight"),
        (lambda t: t.clear(), "largest size|without"),
        (lambda t: t.update(x=t[f"{QUERY}.lora_A.weight"].clone()), "with unexpected tensors, x"),
        (lambda t: t.update({f"{QUERY}.base_layer.weight": query()}), "with unexpected tensors, .*base_layer"),
        (lambda t: t[f"{QUERY}.lora_A.weight"].fill_(float("nan")), "lora_A.weight with NaN"),
        (lambda t: t.update({n: x.t().contiguous() for n, x in t.items()}), "size mismatch"),
        (lambda t: t.update({n: x.int() for n, x in t.items()}), "of torch.int32"),
    ],
)
def test_what_peft_only_warns_of_is_refused(adapter, change, said):
    rewrite(adapter, change)
    with pytest.raises(UserError, match=said):
        load_adapter(base(), adapter)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 8}, "size mismatch"),
        ({"r": 10**9}, "r: got 1000000000, expected at most"),
        ({"r": "x"}, "does not load"),
        ({"rank_pattern": {"q_proj": 10**9}}, "rank_pattern q_proj"),
        ({"target_modules": ["q_proj"]}, "with unexpected tensors"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"peft_type": "NO_SUCH"}, "does not load"),
        ({"lora_alpha": float("nan")}, "the number NaN"),
    ],
)
def test_a_configuration_of_another_adapter_is_refused(adapter, changes, said):
    configure(adapter, **changes)
    assert said in refuse(adapter)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 64, b"PK\x03\x04", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 2) + b"{}x"]
)
def test_what_is_no_safetensors_is_refused(adapter, content):
    (adapter / "adapter_model.safetensors").write_bytes(content)
    assert "not safetensors" in refuse(adapter)


def test_a_pickle_is_not_what_is_looked_for(adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "adapter_model.bin only" in refuse(adapter)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"r": NaN}', '{"r": 1e999}'])
def test_configurations_that_are_none(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match="PEFT's configuration"):
        read_adapter_config(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="PEFT's configuration"):
        read_adapter_config(tmp_path)
