"""Models as GGUF files, read back by others: the gguf package, and transformers' own GGUF loader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from peftkit.errors import UserError
from peftkit.ship.export.gguf import check_exportable, write_model
from peftkit.ship.export.gguf.writing import QUANTIZED_DTYPES, GgufTensor, publish_file, write_file
from tests.conftest import ROOT
from tests.ship.export.gguf.models import byte_tokenizer, save_model

GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 16}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma2": GEMMA,
    "gemma3_text": {**GEMMA, "num_hidden_layers": 7},
    "phi3": {},
    "gpt2": {},
}


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(header, tensor by name)."""
    reader = gguf.GGUFReader(path)
    header = {key: field.contents() for key, field in reader.fields.items()}
    return header, {tensor.name: tensor for tensor in reader.tensors}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture
def llama(tmp_path: Path, tokenizer: Any) -> Path:
    save_model(tmp_path / "llama", "llama", tokenizer)
    return tmp_path / "llama"


@pytest.mark.parametrize("model_type", list(MODELS))
def test_transformers_reads_back_every_weight(model_type: str, tmp_path: Path, tokenizer: Any) -> None:
    """Its loader undoes llama.cpp's layout: interleaved heads, norms plus one, transposed Conv1D."""
    from transformers import AutoModelForCausalLM

    model = save_model(tmp_path / "hf", model_type, tokenizer, **MODELS[model_type])
    written = write_model(tmp_path / "hf", tmp_path / "out.gguf", dtype="f32")
    assert written.num_bytes == (tmp_path / "out.gguf").stat().st_size
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="out.gguf", dtype=torch.float32, config=model.config
    )
    found = again.state_dict()
    for name, tensor in model.state_dict().items():
        if "attention_bias" in MODELS[model_type] and name.endswith("_proj.bias"):
            continue  # not in transformers' table; test_parity compares them
        # a norm's weight plus one, minus one again, is rounded
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-6 if "gemma" in model_type else 0), name


def test_the_header_says_what_the_folder_says(llama: Path) -> None:
    write_model(llama, llama.parent / "out.gguf", dtype="f16", name="mine")
    header, tensors = read(llama.parent / "out.gguf")
    config = json.loads((llama / "config.json").read_text())
    vocabulary = json.loads((llama / "tokenizer.json").read_text())["model"]
    assert header["general.architecture"] == "llama"
    assert header["general.name"] == "mine"
    assert header["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    assert header["llama.context_length"] == config["max_position_embeddings"]
    assert header["llama.attention.head_count_kv"] == config["num_key_value_heads"]
    assert header["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(config["rms_norm_eps"])
    assert header["llama.rope.freq_base"] == config["rope_parameters"]["rope_theta"]
    texts, kinds = header["tokenizer.ggml.tokens"], header["tokenizer.ggml.token_type"]
    assert all(texts[i] == text for text, i in vocabulary["vocab"].items())
    assert [kinds[i] for i in (0, 1, 2, 3, 10)] == [3, 3, 3, 3, 1]
    size = len(vocabulary["vocab"])
    assert texts[size:] == [f"[PAD{i}]" for i in range(size, config["vocab_size"])]
    assert set(kinds[size:]) == {gguf.TokenType.UNUSED}
    assert header["tokenizer.ggml.merges"] == [" ".join(pair) for pair in vocabulary["merges"]]
    assert header["tokenizer.ggml.eos_token_id"] == 2
    assert header["tokenizer.ggml.add_bos_token"] is False
    assert header["tokenizer.chat_template"] == (llama / "chat_template.jinja").read_text()
    assert tensors["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    assert tensors["blk.0.attn_q.weight"].tensor_type == gguf.GGMLQuantizationType.F16


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_each_dtype_holds_the_weights_as_near_as_it_can(dtype: str, llama: Path) -> None:
    write_model(llama, llama.parent / "out.gguf", dtype=dtype)
    _, tensors = read(llama.parent / "out.gguf")
    tensor = tensors["blk.1.ffn_down.weight"]
    assert tensor.tensor_type.name == dtype.upper()
    weights = [load_file(file) for file in llama.glob("*.safetensors")]
    name = "model.layers.1.mlp.down_proj.weight"
    true = next(part[name] for part in weights if name in part).numpy()
    found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    scale = np.abs(true.reshape(-1, 32)).max(axis=1).repeat(32).reshape(true.shape)  # of a q8_0 block
    # q8_0: half a step, and 127 steps of a scale that is rounded to f16
    allowed = {"f32": 0 * scale, "f16": np.abs(true) * 2**-11 + 1e-7, "bf16": np.abs(true) * 2**-8}
    assert (np.abs(found - true) <= allowed.get(dtype, scale / 127 * 0.57)).all()


def test_rows_that_no_block_fits_stay_f16(tmp_path: Path, tokenizer: Any) -> None:
    save_model(tmp_path / "hf", "llama", tokenizer, intermediate_size=80)
    written = write_model(tmp_path / "hf", tmp_path / "out.gguf", dtype="q8_0")
    _, tensors = read(tmp_path / "out.gguf")
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == "Q8_0"
    assert any("2 tensors are f16" in note for note in written.notes)


def test_a_tied_output_is_left_out_and_one_of_its_own_kept(tmp_path: Path, tokenizer: Any) -> None:
    for tied in (True, False):
        folder = tmp_path / str(tied)
        save_model(folder, "llama", tokenizer, tie_word_embeddings=tied)
        write_model(folder, tmp_path / f"{tied}.gguf")
        assert ("output.weight" in read(tmp_path / f"{tied}.gguf")[1]) is not tied


@pytest.mark.parametrize("changed", [False, True])
def test_a_tied_output_in_the_file_is_looked_at(changed: bool, tmp_path: Path, tokenizer: Any) -> None:
    """transformers unties what a file holds twice with different numbers, whatever config.json says."""
    model = save_model(tmp_path / "hf", "llama", tokenizer, tie_word_embeddings=True)
    embedding = model.get_input_embeddings().weight.detach()
    save_file({"lm_head.weight": embedding + changed}, tmp_path / "hf" / "head.safetensors")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    known = json.loads(index.read_text())
    known["weight_map"]["lm_head.weight"] = "head.safetensors"
    index.write_text(json.dumps(known))
    write_model(tmp_path / "hf", tmp_path / "out.gguf", dtype="f32")
    tensors = read(tmp_path / "out.gguf")[1]
    assert ("output.weight" in tensors) is changed
    if changed:
        assert np.array_equal(tensors["output.weight"].data, embedding.numpy() + 1)


def test_a_window_that_llama_cpp_drops_bounds_the_context(tmp_path: Path, tokenizer: Any) -> None:
    save_model(tmp_path / "hf", "mistral", tokenizer, sliding_window=32)
    written = write_model(tmp_path / "hf", tmp_path / "out.gguf")
    assert read(tmp_path / "out.gguf")[0]["llama.context_length"] == 32
    assert any("32 tokens" in note for note in written.notes)


@pytest.mark.parametrize("name", ["phi3", "Phi-3-mini", "PHI3"])
def test_no_name_makes_llama_cpp_think_of_phi3(name: str, llama: Path) -> None:
    write_model(llama, llama.parent / "out.gguf", name=name)
    found = read(llama.parent / "out.gguf")[0]["general.name"].lower()
    assert "phi3" not in found
    assert "phi-3" not in found


def _weights(folder: Path, change: Any) -> None:
    """Rewrite a saved model as one file, its tensors changed."""
    tensors = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    for file in folder.glob("model*"):
        file.unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("model.norm.weight"), "no tensor model.norm.weight"),
        (lambda t: t.update(strange=torch.ones(2)), "other tensors: strange"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), "model.norm.weight of shape (3,)"),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), "NaN"),
        (lambda t: t["lm_head.weight"].fill_(1e6), "beyond f16"),
    ],
)
def test_weights_that_are_not_the_models_leave_nothing(change: Any, told: str, llama: Path) -> None:
    _weights(llama, change)
    out = llama.parent / "out" / "out.gguf"
    with pytest.raises(UserError) as error:
        write_model(llama, out, dtype="f16")
    assert told in str(error.value)
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_what_is_there_is_not_overwritten(llama: Path) -> None:
    out = llama.parent / "out.gguf"
    out.write_text("precious")
    with pytest.raises(UserError, match="an existing file"):
        write_model(llama, out)
    assert out.read_text() == "precious"
    assert not (llama.parent / "out.gguf.part").exists()


def test_a_part_is_removed_whatever_happens(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), publish_file(tmp_path / "out") as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_told_and_left_clean(llama: Path) -> None:
    """In a process of its own, whose files may not grow beyond what the header and a few tensors take."""
    program = (
        "import resource, sys, pathlib; from peftkit.errors import UserError\n"
        "from peftkit.ship.export import gguf\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))\n"
        "try: gguf.write_model(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))\n"
        "except UserError as error: print(error)"
    )
    out = llama.parent / "out.gguf"
    command = [sys.executable, "-W", "ignore", "-c", program, str(llama), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "a full disk or a limit on file sizes" in done.stdout
    assert not list(llama.parent.glob("out.gguf*"))


def test_room_is_looked_at_before_the_weights(tmp_path: Path) -> None:
    """A tensor of 4 EiB: the header is written, the tensor never asked for."""
    huge = GgufTensor("huge", (2**31, 2**29), "f32", lambda: pytest.fail("loaded"))
    with pytest.raises(UserError, match="bytes of GGUF") as error, publish_file(tmp_path / "out") as part:
        write_file(part, "llama", {"general.name": "x"}, [huge])
    assert f"{2**62 + 160:,} bytes" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_large_tensors_are_converted_in_blocks(tmp_path: Path) -> None:
    """17 million numbers in five blocks are those of one."""
    tensor = torch.arange(17 * 2**20, dtype=torch.float32).reshape(-1, 64).remainder(251)
    write_file(tmp_path / "out", "llama", {}, [GgufTensor("t", tuple(tensor.shape), "f32", lambda: tensor)])
    assert np.array_equal(read(tmp_path / "out")[1]["t"].data, tensor.numpy())


def test_bytes_are_told_while_it_writes(llama: Path) -> None:
    told: list[tuple[int, int]] = []
    made = write_model(llama, llama.parent / "out.gguf", progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (made.num_bytes, made.num_bytes) and told == sorted(told)


def test_quantizations_need_llama_cpps_tool(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(llama))
    with pytest.raises(UserError) as error:
        check_exportable(llama, dtype="q4_k_m", pre=None)
    assert "llama-quantize F16.gguf OUT.gguf Q4_K_M" in str(error.value)
    with pytest.raises(UserError, match="did you mean q4_k_m"):
        check_exportable(llama, dtype="q4_km", pre=None)
    assert all(hasattr(gguf.LlamaFileType, f"MOSTLY_{name.upper()}") for name in QUANTIZED_DTYPES)


def test_a_tool_that_fails_leaves_nothing(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = llama.parent / "tools"
    tools.mkdir()
    (tools / "llama-quantize").write_text("#!/bin/sh\necho out of luck >&2\nexit 3\n")
    (tools / "llama-quantize").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    out = llama.parent / "new" / "out.gguf"
    with pytest.raises(Exception, match=r"llama-quantize failed \(3\): out of luck"):
        write_model(llama, out, dtype="q4_k_m")
    assert not list(out.parent.iterdir())


def test_without_the_gguf_package_the_pip_line_is_told(llama: Path) -> None:
    program = (
        "import sys, pathlib; sys.modules['gguf'] = None\n"
        "from peftkit.ship.export.gguf import check_exportable\n"
        "check_exportable(pathlib.Path(sys.argv[1]), dtype='f16')"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(llama)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert "pip install 'peftkit[gguf]'" in done.stderr


def test_memory_stays_with_the_largest_tensor(tmp_path: Path, tokenizer: Any) -> None:
    """Peak of a model of 130 MB in fp32 whose largest tensor has 17 MB: far from the whole."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=16
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf", max_shard_size="20MB")
    tokenizer.save_pretrained(tmp_path / "hf")
    program = (
        "import pathlib, resource, sys; from peftkit.ship.export.gguf import model\n"
        "folder, out = map(pathlib.Path, sys.argv[1:]); model.check_exportable(folder, dtype='f16')\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); model.write_model(folder, out, dtype='q8_0'); print(peak() - before)"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path / "hf"), str(tmp_path / "out.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    grown = int(done.stdout.split()[-1])
    total = sum(file.stat().st_size for file in (tmp_path / "hf").glob("*.safetensors"))
    assert total > 120 * 10**6
    assert grown < 100 * 10**6
