"""Checkpoints that are quantized already: dequantized once, then trained, merged and exported as any other."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FineGrainedFP8Config,
    LlamaForSequenceClassification,
    Mxfp4Config,
)

import peftkit
from peftkit.errors import UserError
from peftkit.model.base.locate import locate_base
from peftkit.model.load import resolve_source
from tests.conftest import TINY_LLAMA
from tests.rigs.tiny import tiny_config

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def with_config(folder, plain, settings):
    """Give a folder the plain model's tokenizer and configuration, with the quantization's settings."""
    for file in plain.iterdir():
        if file.suffix != ".safetensors" and file.is_file():
            shutil.copyfile(file, folder / file.name)
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return folder


def by_bitsandbytes(plain, folder, **settings):
    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=BitsAndBytesConfig(**settings), device_map="cpu", dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())["quantization_config"]
    return with_config(folder, plain, written)


def in_4_bit(plain, folder):
    return by_bitsandbytes(
        plain, folder, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )


def in_8_bit(plain, folder):
    return by_bitsandbytes(plain, folder, load_in_8bit=True)


def in_fp8(plain, folder):
    """The format of DeepSeek and of Qwen's -FP8: float8 with a scale for each block of 128 x 128."""
    folder.mkdir()
    tensors = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if ("proj" not in name and "experts" not in name) or not name.endswith("weight"):
            tensors[name] = weight
            continue
        rows, columns = (-(-size // 128) for size in weight.shape)
        scales, scaled = torch.zeros(rows, columns), weight.float().clone()
        for row in range(rows):
            for column in range(columns):
                block = scaled[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128]
                scales[row, column] = block.abs().max() / 448
                block /= scales[row, column]
        tensors[name], tensors[f"{name}_scale_inv"] = scaled.to(torch.float8_e4m3fn), scales
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return with_config(folder, plain, settings)


def in_mxfp4(plain, folder):
    """The format of GPT-OSS: experts in 4 bits, a power of two for each 32 numbers."""
    folder.mkdir()
    tensors = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = weight
            continue
        groups = weight.float().transpose(1, 2).contiguous().unflatten(-1, (-1, 32))
        exponents = torch.ceil(torch.log2(groups.abs().amax(-1) / 6)).clamp(-127, 127)
        codes = ((groups / torch.exp2(exponents)[..., None])[..., None] - FP4).abs().argmin(-1).to(torch.uint8)
        tensors[f"{name}_blocks"] = codes[..., 0::2] | (codes[..., 1::2] << 4)
        tensors[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return with_config(folder, plain, {"quant_method": "mxfp4", "modules_to_not_convert": kept})


def saved(model_type, folder):
    """A tiny model of a family in bfloat16, with the tiny Llama's tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(model_type)).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (TINY_LLAMA / name).is_file():
            shutil.copyfile(TINY_LLAMA / name, folder / name)
    return folder


KINDS = {
    "bitsandbytes 4-bit": ("llama", in_4_bit, {}),
    "bitsandbytes 8-bit": ("llama", in_8_bit, {}),
    "FP8": ("llama", in_fp8, {"quantization_config": FineGrainedFP8Config(dequantize=True)}),
    "FP8 of experts": ("qwen3_moe", in_fp8, {"quantization_config": FineGrainedFP8Config(dequantize=True)}),
    "MXFP4": ("gpt_oss", in_mxfp4, {"quantization_config": Mxfp4Config(dequantize=True)}),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", KINDS)
def test_what_is_dequantized_is_what_transformers_reads(name, tmp_path):
    model_type, quantize, settings = KINDS[name]
    folder = quantize(saved(model_type, tmp_path / "plain"), tmp_path / "quantized")
    theirs = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.bfloat16, **settings)
    theirs = theirs if settings else theirs.dequantize()
    source = resolve_source(locate_base(str(folder), revision=None, where="base"), "base")
    ours, told = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    # as the unquantized model was written, so that a merge finds its tensors
    names = set(load_file(f"{source}/model.safetensors"))
    assert names == set(load_file(tmp_path / "plain" / "model.safetensors"))
    assert "quantization_config" not in json.loads((tmp_path / f"{source}/config.json").read_text())


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_quantized_checkpoint_trains_and_merges(method, recipe, tmp_path):
    folder = in_4_bit(TINY_LLAMA, tmp_path / "tiny-bnb-4bit")
    recipe = {**recipe, "base": str(folder), "method": {"name": method, "rank": 4}}
    with pytest.raises(UserError, match=r"base\.dequantize=true"):
        peftkit.finetune(recipe, out=tmp_path / "run")
    # the fix, applied
    plan = peftkit.make_plan(recipe, overrides=["base.dequantize=true"])
    [decision] = [d for d in plan.decisions if d.key == "base.dequantize"]
    assert "bfloat16" in decision.reason
    summary = peftkit.finetune(recipe, overrides=["base.dequantize=true"], out=tmp_path / "run")
    assert summary.eval_loss_after < summary.eval_loss_before
    report = peftkit.merge_adapter(tmp_path / "run", out=tmp_path / "merged")
    assert report.passed, report.problem
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_a_plain_checkpoint_is_not_dequantized(recipe):
    with pytest.raises(UserError, match="not quantized"):
        peftkit.make_plan(recipe, overrides=["base.dequantize=true"])


def test_a_format_that_transformers_cannot_undo_is_refused_at_every_door(recipe, tmp_path):
    folder = with_config(tmp_path, TINY_LLAMA, {"quant_method": "gptq", "bits": 4})
    (tmp_path / "model.safetensors").write_bytes((TINY_LLAMA / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="held as GPTQ 4-bit"):
        resolve_source(locate_base(str(folder), revision=None, where="base"), "base")
    with pytest.raises(UserError, match="take the repository"):
        peftkit.make_plan({**recipe, "base": str(folder)}, overrides=["base.dequantize=true"])


def test_a_damaged_conversion_is_not_used(tmp_path):
    folder = in_fp8(saved("llama", tmp_path / "plain"), tmp_path / "quantized")
    base = locate_base(str(folder), revision=None, where="base")
    source = resolve_source(base, "base")
    (tmp_path / "cache" / "bases" / source / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="remove this folder"):
        resolve_source(base, "base")


@pytest.mark.parametrize("fault", ["no scale", "no tensor"])
def test_a_checkpoint_that_lacks_something_is_refused_and_not_filled_up(fault, tmp_path):
    folder = in_fp8(saved("llama", tmp_path / "plain"), tmp_path / "quantized")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    for gone in {"no scale": [f"{name}_scale_inv"], "no tensor": [name, f"{name}_scale_inv"]}[fault]:
        del tensors[gone]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="down_proj"):
        resolve_source(locate_base(str(folder), revision=None, where="base"), "base")
    assert not list((tmp_path / "cache").glob("bases/*/model.safetensors"))


def test_tied_tables_a_trained_head_and_the_files_beside_the_weights_are_kept(tmp_path):
    plain = tmp_path / "plain"
    config = tiny_config("llama", tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(plain)
    (plain / "generation_config.json").write_text('{"eos_token_id": [2, 5, 7], "do_sample": true, "top_p": 0.8}')
    folder = in_fp8(plain, tmp_path / "quantized")
    source = Path(resolve_source(locate_base(str(folder), revision=None, where="base"), "base"))
    assert json.loads((source / "generation_config.json").read_text())["eos_token_id"] == [2, 5, 7]
    assert "lm_head.weight" not in load_file(source / "model.safetensors")
    (folder / "generation_config.json").write_text('{"eos_token_id": [3]}')
    source = Path(resolve_source(locate_base(str(folder), revision=None, where="base"), "base"))
    assert json.loads((source / "generation_config.json").read_text())["eos_token_id"] == [3], "no stale copy"

    head = tmp_path / "head"
    classifier = LlamaForSequenceClassification(tiny_config("llama", num_labels=3)).to(torch.bfloat16)
    classifier.config.pad_token_id = 0
    classifier.save_pretrained(head)
    folder = in_fp8(head, tmp_path / "quantized head")
    source = Path(resolve_source(locate_base(str(folder), revision=None, where="base"), "base"))
    assert torch.equal(load_file(source / "model.safetensors")["score.weight"], classifier.score.weight)


def test_an_adapter_is_copied_without_its_quantized_base_being_converted(recipe, tmp_path):
    summary = peftkit.finetune(recipe, out=tmp_path / "run")
    shutil.copytree(summary.result, tmp_path / "adapter")
    folder = in_4_bit(TINY_LLAMA, tmp_path / "base")
    for name in ("peftkit.json", "MANIFEST.json"):
        (tmp_path / "adapter" / name).unlink(missing_ok=True)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    options = peftkit.ExportOptions("adapter", out=tmp_path / "copy")
    assert not peftkit.export_adapter(tmp_path / "adapter", options=options).said
    assert not (tmp_path / "cache" / "bases").exists()
    assert peftkit.merge_adapter(tmp_path / "adapter", out=tmp_path / "merged").passed, "into the dequantized copy"
