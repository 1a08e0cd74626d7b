"""Adapters as they are found: every door that lets one out looks at its tensors the same way."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

import peftkit
from peftkit.errors import UserError
from tests.conftest import TINY_LLAMA
from tests.real.test_data import recipe_of_lengths


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    recipe = recipe_of_lengths(folder, range(5, 13), batch_size=4, epochs=1)
    return peftkit.finetune(recipe, out=folder / "run").result


def without_a_layer(tensors):
    return {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}


def with_default_in_keys(tensors):
    return {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}


def with_a_stranger(tensors):
    return {
        **tensors,
        "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": next(iter(tensors.values())).clone(),
    }


DOORS = {
    "merge": lambda path, out: peftkit.merge_adapter(path, out=out),
    "adapter": lambda path, out: peftkit.export_adapter(path, options=peftkit.ExportOptions("adapter", out=out)),
    "vllm": lambda path, out: peftkit.export_adapter(
        path, options=peftkit.ExportOptions("adapter", out=out, engine="vllm")
    ),
    "gguf": lambda path, out: peftkit.export_adapter(path, options=peftkit.ExportOptions("gguf", out=out, lora=True)),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("change", [without_a_layer, with_default_in_keys, with_a_stranger], ids=lambda f: f.__name__)
def test_a_broken_adapter_leaves_by_no_door(door, change, adapter, tmp_path):
    broken = shutil.copytree(adapter, tmp_path / "broken")
    (broken / "MANIFEST.json").unlink()
    file = broken / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(UserError):
        DOORS[door](broken, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_copy_without_its_base_says_what_was_not_compared(adapter, tmp_path):
    away = shutil.copytree(adapter, tmp_path / "away")
    config = away / "adapter_config.json"
    (away / "MANIFEST.json").unlink()
    config.write_text(config.read_text().replace(str(TINY_LLAMA), str(tmp_path / "moved")))
    result = peftkit.export_adapter(away, options=peftkit.ExportOptions("adapter", out=str(tmp_path / "out")))
    assert "not compared" in result.said[0]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
