"""LoRA adapters as GGUF: llama.cpp computes alpha / rank * B @ A, which has to be PEFT's delta."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from peftkit.errors import UserError
from peftkit.ship.export.gguf import write_adapter
from tests.ship.export.gguf.models import byte_tokenizer, save_adapter, save_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("base") / "hf"
    return folder, save_model(folder, "llama", byte_tokenizer())


def adapter_of(llama: tuple[Path, Any], folder: Path, **options: Any) -> Any:
    """An adapter on a fresh copy of the base, saved; returns PEFT's model."""
    from transformers import AutoModelForCausalLM

    return save_adapter(AutoModelForCausalLM.from_pretrained(llama[0]), folder, **options)


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    header = {key: field.contents() for key, field in reader.fields.items()}
    return header, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def plain_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo the interleaving, row by row: llama.cpp's row 2i + j of a head is row i + j * half."""
    half = weight.shape[0] // heads // 2
    found = np.empty_like(weight)
    for head in range(heads):
        for i in range(half):
            for j in range(2):
                found[head * 2 * half + i + j * half] = weight[head * 2 * half + 2 * i + j]
    return found


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 4, "mlp.*": 2}, "alpha_pattern": {"v_proj": 3, "up_proj": 0}},
    "all": {"use_rslora": True, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {r"0\..*_proj": 5}},
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_every_delta_is_pefts(name: str, llama: tuple[Path, Any], tmp_path: Path) -> None:
    model = adapter_of(llama, tmp_path / "adapter", **OPTIONS[name])
    written = write_adapter(tmp_path / "adapter", llama[0], tmp_path / "out.gguf")
    header, tensors = read(tmp_path / "out.gguf")
    assert (header["general.type"], header["adapter.type"]) == ("adapter", "lora")
    assert written.num_tensors == len(tensors) == 28
    names = {"self_attn": "attn", "mlp": "ffn"}
    short = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "output"}
    heads = {"q_proj": 4, "k_proj": 2}
    for module_name, module in model.base_model.model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        _, _, layer, part, leaf = module_name.split(".")
        base = f"blk.{layer}.{names[part]}_{short.get(leaf, leaf.removesuffix('_proj'))}.weight"
        a, b = tensors[f"{base}.lora_a"], tensors[f"{base}.lora_b"]
        delta = header["adapter.lora.alpha"] / b.shape[1] * b @ a
        delta = plain_rows(delta, heads[leaf]) if leaf in heads else delta
        true = module.get_delta_weight("default").detach().numpy()
        assert np.abs(delta - true).max() <= 1e-6 * max(1.0, np.abs(true).max()), module_name


def test_a_plain_adapter_is_not_touched(llama: tuple[Path, Any], tmp_path: Path) -> None:
    adapter_of(llama, tmp_path / "adapter")
    write_adapter(tmp_path / "adapter", llama[0], tmp_path / "out.gguf")
    header, tensors = read(tmp_path / "out.gguf")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert header["adapter.lora.alpha"] == 16
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    assert np.array_equal(tensors["blk.0.ffn_up.weight.lora_b"], weights[name].numpy())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora True"),
    "lora bias": ({"lora_bias": True, "target_modules": ["q_proj"], "bias": "none"}, "lora_bias True"),
    "bias": ({"bias": "lora_only"}, "bias lora_only"),
    "modules to save": ({"modules_to_save": ["lm_head"]}, "modules_to_save ['lm_head']"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices [1, 2]"),
    "embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, "lora_embedding_A"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights pissa, which changes the base"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(REFUSED))
def test_what_an_adapter_file_cannot_carry_is_refused(name: str, llama: tuple[Path, Any], tmp_path: Path) -> None:
    options, told = REFUSED[name]
    adapter_of(llama, tmp_path / "adapter", **options)
    with pytest.raises(UserError) as error:
        write_adapter(tmp_path / "adapter", llama[0], tmp_path / "new" / "out.gguf")
    assert told in str(error.value)
    assert ("peftkit merge" in str(error.value)) is not (name == "pissa")
    assert not (tmp_path / "new").exists()


def test_all_refusals_come_at_once(llama: tuple[Path, Any], tmp_path: Path) -> None:
    adapter_of(llama, tmp_path / "adapter", use_dora=True, bias="all", modules_to_save=["lm_head"])
    with pytest.raises(UserError) as error:
        write_adapter(tmp_path / "adapter", llama[0], tmp_path / "out.gguf")
    assert len(error.value.problems) == 3


@pytest.mark.parametrize(
    ("method", "told", "way_out"),
    [
        (peft.IA3Config(task_type="CAUSAL_LM"), "peft_type IA3", "peftkit merge"),
        (
            peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
            "peft_type PREFIX_TUNING",
            "train a LoRA",
        ),
    ],
)
def test_other_methods_are_refused(
    method: Any, told: str, way_out: str, llama: tuple[Path, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama[0]), method).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError) as error:
        write_adapter(tmp_path / "adapter", llama[0], tmp_path / "out.gguf")
    assert told in str(error.value)
    assert way_out in str(error.value)


def test_an_unknown_setting_is_not_passed_over(llama: tuple[Path, Any], tmp_path: Path) -> None:
    """PEFT grows new kinds of LoRA each year: what is not known to be harmless is refused."""
    adapter_of(llama, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_tomorrows_lora": True}))
    with pytest.raises(UserError, match="use_tomorrows_lora True"):
        write_adapter(tmp_path / "adapter", llama[0], tmp_path / "out.gguf")


def _lose(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"]


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.ones(2, 2)


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    tensors[name] = tensors[name][:-1].clone()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_lose, "layers.0.mlp.up_proj lora_A None"),
        (_add, "base_model.model.lm_head.weight"),
        (_reshape, "layers.0.mlp.up_proj lora_B (127, 8), expected (128, 8)"),
    ],
)
def test_a_tensor_without_a_place_is_a_failure(change: Any, told: str, llama: tuple[Path, Any], tmp_path: Path) -> None:
    adapter_of(llama, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(UserError) as error:
        write_adapter(tmp_path / "adapter", llama[0], tmp_path / "out.gguf")
    assert told in str(error.value)


def test_an_output_matrix_that_is_the_embedding_cannot_have_its_own(tmp_path: Path) -> None:
    model = save_model(tmp_path / "hf", "llama", byte_tokenizer(), tie_word_embeddings=True)
    save_adapter(model, tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    with pytest.raises(UserError, match=r"lm_head.*is tied to the embedding"):
        write_adapter(tmp_path / "adapter", tmp_path / "hf", tmp_path / "out.gguf")


def test_a_copy_of_the_base_is_the_bases_or_refused(llama: tuple[Path, Any], tmp_path: Path) -> None:
    """PEFT saves the output matrix beside a LoRA of it: after a resize it would be another."""
    adapter_of(llama, tmp_path / "adapter", target_modules=["lm_head"])
    write_adapter(tmp_path / "adapter", llama[0], tmp_path / "out.gguf")
    assert sorted(read(tmp_path / "out.gguf")[1]) == ["output.weight.lora_a", "output.weight.lora_b"]
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.base_layer.weight"][0, 0] += 1
    save_file(tensors, file)
    with pytest.raises(UserError, match="the base's own matrix"):
        write_adapter(tmp_path / "adapter", llama[0], tmp_path / "again.gguf")


def test_pickled_adapters_are_refused(llama: tuple[Path, Any], tmp_path: Path) -> None:
    adapter_of(llama, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.bin only"):
        write_adapter(tmp_path / "adapter", llama[0], tmp_path / "out.gguf")
