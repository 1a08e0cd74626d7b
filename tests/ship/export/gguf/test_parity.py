"""GGUF files judged by real llama.cpp: logits, greedy text and tokens against transformers and PEFT.

The judge computes with an fp32 cache and without flash attention, so that the file is judged and nothing
else: what is left is rounding (1e-12 nats), and llama.cpp's table of GELU values in f16 (1e-7). With
llama.cpp's defaults, an f16 cache, it is about 1e-6: one test looks at that.

    python -m tests.ship.export.gguf.test_parity       # the table of docs/gguf.md
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from peftkit.model.base.locate import locate_base
from peftkit.model.load import resolve_source
from peftkit.ship.export.gguf import FAMILIES, write_adapter, write_model
from peftkit.ship.export.gguf.tokenizer import PRE_TOKENIZERS
from peftkit.ship.export.ollama import read_separators, render_go_template, write_modelfile
from tests.rigs.llama_cpp import RUNS_HERE, Llama, quantize
from tests.ship.export.gguf.models import (
    TEXTS,
    Nearness,
    byte_tokenizer,
    corpus,
    nearness,
    piece_tokenizer,
    save_adapter,
    save_model,
    torch_logits,
)
from tests.ship.export.test_ollama import go

# where the library cannot run there is nothing to judge; where it can, its absence is a failure
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not RUNS_HERE, reason="the prebuilt llama.cpp is for Linux on x86-64"),
]

_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
_LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LOCAL = {"rope_type": "default", "rope_theta": 1e4}
_GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 16}  # shorter than the texts
_TIED = {"tie_word_embeddings": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Llama, tied": ("llama", _TIED),
    "Llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama, head_dim": ("llama", {"head_dim": 32}),
    "Llama, llama3 rope": ("llama", {"rope_parameters": _LLAMA3}),
    "Llama, linear rope": ("llama", {"rope_parameters": _LINEAR}),
    "Llama, YaRN": ("llama", {"rope_parameters": _YARN}),
    "Mistral": ("mistral", {"sliding_window": None}),
    "Mistral, within its window": ("mistral", {"sliding_window": 96}),
    "Qwen2": ("qwen2", {}),
    "Qwen2, tied": ("qwen2", _TIED),
    "Qwen2, linear rope": ("qwen2", {"rope_parameters": _LINEAR}),
    "Qwen2, YaRN": ("qwen2", {"rope_parameters": _YARN}),
    "Qwen3": ("qwen3", {}),
    "Qwen3, tied": ("qwen3", _TIED),
    "Qwen3, linear rope": ("qwen3", {"rope_parameters": _LINEAR}),
    "Qwen3, YaRN": ("qwen3", {"rope_parameters": _YARN}),
    "Gemma": ("gemma", {}),
    "Gemma 2": ("gemma2", _GEMMA),
    "Gemma 3 (text)": ("gemma3_text", {**_GEMMA, "num_hidden_layers": 7}),
    "Gemma 3 (text), linear rope": (
        "gemma3_text",
        {
            **_GEMMA,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": _LOCAL,
            },
        },
    ),
    "Phi-3": ("phi3", {"sliding_window": None}),
    "Phi-3, tied": ("phi3", {**_TIED, "sliding_window": None}),
    "GPT-2": ("gpt2", {}),
    "GPT-2, untied, n_inner": ("gpt2", {"tie_word_embeddings": False, "n_inner": 96}),
}
PIECES = {"gemma", "gemma2", "gemma3_text", "phi3", "mistral"}


def _tokenizer(model_type: str) -> Any:
    """Of the kind that the family's models bring."""
    if model_type in PIECES:
        return piece_tokenizer(space=not model_type.startswith("gemma"))
    return byte_tokenizer({"llama": "llama-bpe", "qwen2": "qwen2", "qwen3": "qwen2"}.get(model_type, "gpt-2"))


def _tokens(folder: Path) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)(TEXTS[0])["input_ids"][:72]


def measured(name: str, folder: Path) -> Nearness:
    """A tiny model of a row exported as f32 and run by both."""
    model_type, changes = MODELS[name]
    model = save_model(folder / "hf", model_type, _tokenizer(model_type), **changes)
    path = write_model(folder / "hf", folder / "out.gguf", dtype="f32").path
    tokens = _tokens(folder / "hf")
    assert len(tokens) > 40
    with Llama(path) as llama:
        return nearness(torch_logits(model, tokens), llama.logits(tokens))


@pytest.mark.parametrize("name", list(MODELS))
def test_every_family_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    found = measured(name, tmp_path)
    assert found.top1 == 1.0
    assert found.kl < (1e-6 if MODELS[name][0] in {"gpt2", "gemma", "gemma2", "gemma3_text"} else 1e-10)


def test_every_row_of_the_table_is_measured() -> None:
    assert {model_type for model_type, _ in MODELS.values()} == {t for row in FAMILIES for t in row.model_types}


def test_a_window_is_right_up_to_its_length_and_wrong_beyond(tmp_path: Path) -> None:
    """Why the context length is cut to it."""
    model = save_model(tmp_path / "hf", "mistral", byte_tokenizer(), sliding_window=24)
    path = write_model(tmp_path / "hf", tmp_path / "out.gguf", dtype="f32").path
    tokens = _tokens(tmp_path / "hf")
    with Llama(path) as llama:
        true, found = torch_logits(model, tokens), llama.logits(tokens)
        assert llama.trained_context == 24
    assert nearness(true[:24], found[:24]).exact
    assert not nearness(true[24:], found[24:]).exact


ADAPTED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "gpt2")


def measured_adapter(model_type: str, folder: Path) -> tuple[Nearness, float]:
    """(nearness to PEFT, how far the adapter moves logits), with rsLoRA, ranks and alphas by pattern."""
    changes = next(changes for kind, changes in MODELS.values() if kind == model_type)
    model = save_model(folder / "hf", model_type, _tokenizer(model_type), **changes)
    path = write_model(folder / "hf", folder / "out.gguf", dtype="f32").path
    first, second = {"phi3": ("qkv_proj", "gate_up_proj"), "gpt2": ("c_attn", "c_fc")}.get(
        model_type, ("q_proj", "v_proj")
    )
    adapted = save_adapter(
        model,
        folder / "adapter",
        use_rslora=True,
        fan_in_fan_out=model_type == "gpt2",
        rank_pattern={first: 4},
        alpha_pattern={rf"0\..*{first}": 5, second: 32},
    )
    lora = write_adapter(folder / "adapter", folder / "hf", folder / "lora.gguf").path
    tokens = _tokens(folder / "hf")
    with Llama(path, lora=lora) as llama:
        found = llama.logits(tokens)
    true = torch_logits(adapted, tokens)
    with adapted.disable_adapter():
        moved = np.abs(true - torch_logits(adapted, tokens)).max()
    return nearness(true, found), float(moved)


@pytest.mark.parametrize("model_type", ADAPTED)
def test_an_adapter_file_moves_logits_as_peft_does(model_type: str, tmp_path: Path) -> None:
    found, moved = measured_adapter(model_type, tmp_path)
    assert found.exact
    assert found.largest < 5e-3
    assert moved > 1


def test_an_adapter_on_an_output_matrix_of_its_own(tmp_path: Path) -> None:
    model = save_model(tmp_path / "hf", "llama", byte_tokenizer())
    path = write_model(tmp_path / "hf", tmp_path / "out.gguf", dtype="f32").path
    adapted = save_adapter(model, tmp_path / "adapter", target_modules=["lm_head", "k_proj"])
    lora = write_adapter(tmp_path / "adapter", tmp_path / "hf", tmp_path / "lora.gguf").path
    tokens = _tokens(tmp_path / "hf")
    with Llama(path, lora=lora) as llama:
        assert nearness(torch_logits(adapted, tokens), llama.logits(tokens)).exact


def _strings(count: int) -> Iterator[str]:
    """Words, white space, signs, digits and special tokens of the corpus, shuffled."""
    chance = random.Random(0)
    pool = [word for text in corpus() for word in text.split(" ")]
    pool += ["<s>", "</s>", "<|user|>", "  ", "\n\n", "\t", "\r\n", "🦙", "é", "北京", "123", "4567", "\u2581", "'LL"]
    for i in range(count):
        yield ("", " ")[i % 2].join(chance.choices(pool, k=chance.randint(1, 30)))


PIECE_KINDS = {"Llama's pieces": {}, "Gemma's pieces": {"space": False}, "old Gemma's": {"space": False, "tab": True}}


@pytest.mark.parametrize("kind", [*(rules.name for rules in PRE_TOKENIZERS), *PIECE_KINDS])
def test_text_is_cut_alike(kind: str, tmp_path: Path) -> None:
    """Emoji, Chinese, digits, white space and special tokens, and 400 strings of pieces of them."""
    from transformers import AutoTokenizer

    made = piece_tokenizer(**PIECE_KINDS[kind]) if kind in PIECE_KINDS else byte_tokenizer(kind)
    save_model(tmp_path / "hf", "llama", made)
    path = write_model(tmp_path / "hf", tmp_path / "out.gguf").path
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    with Llama(path) as llama:
        for text in [*TEXTS, "", " ", "a", "  a", "\n", *_strings(400)]:
            assert llama.tokenize(text) == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize("strips", [True, False])
def test_phi3s_tokens_swallow_spaces_where_they_do(strips: bool, tmp_path: Path) -> None:
    """By the one way that llama.cpp has: the model's name."""
    import json

    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    spec = json.loads(piece_tokenizer().backend_tokenizer.to_str())
    spec["added_tokens"].append({**spec["added_tokens"][-1], "id": 639, "content": "<|endoftext|>"})
    for token in spec["added_tokens"]:
        token["rstrip"] = strips and token["content"] not in {"<unk>", "<s>", "<|endoftext|>"}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    save_model(tmp_path / "phi3", "phi3", made, sliding_window=None)
    path = write_model(tmp_path / "phi3", tmp_path / "out.gguf").path
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "phi3")
    with Llama(path) as llama:
        for text in ("<|user|>\nHello  you</s>  <|assistant|>  Hi<|endoftext|>  x", *_strings(100)):
            assert llama.tokenize(text) == tokenizer(text)["input_ids"], text


@pytest.fixture(scope="module")
def smollm() -> tuple[Path, Any, list[int]]:
    return real_smollm()


def real_smollm() -> tuple[Path, Any, list[int]]:
    """(folder, model, tokens) of SmolLM2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = locate_base("embedded:smollm2-135m-instruct", revision=None, where="base")
    folder = Path(resolve_source(base, "base"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return folder, model, AutoTokenizer.from_pretrained(folder)(TEXTS[0] + TEXTS[2])["input_ids"][:64]


_LARGEST_KL = {"f32": 1e-9, "f16": 1e-4, "bf16": 2e-3, "q8_0": 3e-2}


def measured_smollm(
    smollm: tuple[Path, Any, list[int]], dtype: str, path: Path, *, exact_cache: bool = True
) -> tuple[Nearness, bool]:
    """(nearness, whether 24 greedy tokens are equal) of the real model."""
    _, model, tokens = smollm
    with Llama(path, exact_cache=exact_cache) as llama:
        found, made = nearness(torch_logits(model, tokens), llama.logits(tokens)), llama.greedy(tokens, 24)
    with torch.no_grad():
        true = model.generate(
            torch.tensor([tokens]), max_new_tokens=24, min_new_tokens=24, do_sample=False, eos_token_id=None
        )
    return found, made == true[0, len(tokens) :].tolist()


@pytest.mark.parametrize("dtype", list(_LARGEST_KL))
def test_the_real_smollm(dtype: str, smollm: tuple[Path, Any, list[int]], tmp_path: Path) -> None:
    """q8_0 rounds activations too in llama.cpp: its top-1 differs in some places, and so may its text."""
    path = write_model(smollm[0], tmp_path / "out.gguf", dtype=dtype).path
    found, same_text = measured_smollm(smollm, dtype, path)
    assert found.kl < _LARGEST_KL[dtype]
    assert found.top1 >= (0.9 if dtype == "q8_0" else 0.98)
    if dtype in {"f32", "f16"}:
        assert found.top1 == 1.0
        assert same_text


def test_the_real_smollm_with_the_defaults_of_llama_cpp(smollm: tuple[Path, Any, list[int]], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = write_model(smollm[0], tmp_path / "out.gguf", dtype="f32").path
    found, same_text = measured_smollm(smollm, "f32", path, exact_cache=False)
    assert found.exact
    assert same_text
    tokenizer = AutoTokenizer.from_pretrained(smollm[0])
    with Llama(path) as llama:
        for text in [*TEXTS, *_strings(200)]:
            assert llama.tokenize(text) == tokenizer(text)["input_ids"], text
        assert llama.stops(tokenizer.eos_token_id)
        assert not llama.stops(tokenizer("a")["input_ids"][0])


def test_q8_0_is_what_llama_cpp_makes_of_the_f32_file(tmp_path: Path) -> None:
    """Byte for byte, scales included."""
    save_model(tmp_path / "hf", "llama", byte_tokenizer())
    plain = write_model(tmp_path / "hf", tmp_path / "f32.gguf", dtype="f32").path
    ours = write_model(tmp_path / "hf", tmp_path / "q8.gguf", dtype="q8_0").path
    quantize(plain, tmp_path / "theirs.gguf", int(gguf.LlamaFileType.MOSTLY_Q8_0))
    found, true = ({t.name: t for t in gguf.GGUFReader(p).tensors} for p in (ours, tmp_path / "theirs.gguf"))
    assert found.keys() == true.keys()
    for name, tensor in true.items():
        assert found[name].tensor_type == tensor.tensor_type, name
        assert np.array_equal(found[name].data, tensor.data), name


def test_k_quants_through_llama_quantize(
    smollm: tuple[Path, Any, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With llama.cpp's own quantization behind the command that a user has on PATH."""
    tool = tmp_path / "bin" / "llama-quantize"
    tool.parent.mkdir()
    root = Path(__file__).parents[4]
    tool.write_text(
        f"#!{sys.executable}\nimport sys; sys.path.insert(0, {str(root)!r})\n"
        "import gguf; from pathlib import Path; from tests.rigs.llama_cpp import quantize\n"
        "kind = gguf.LlamaFileType['MOSTLY_' + sys.argv[3]]\n"
        "quantize(Path(sys.argv[1]), Path(sys.argv[2]), int(kind))\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    written = write_model(smollm[0], tmp_path / "out" / "q4.gguf", dtype="q4_k_m")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["q4.gguf"]
    assert written.num_bytes == written.path.stat().st_size < 120 * 10**6
    found, _ = measured_smollm(smollm, "q4_k_m", written.path)
    assert found.kl < 0.3
    assert found.top1 > 0.6


def test_ollamas_prompt_and_stop_in_llama_cpp(smollm: tuple[Path, Any, list[int]], tmp_path: Path) -> None:
    """The prompt that the Modelfile makes is the chat template's, to the token; its stop ends an answer."""
    from transformers import AutoTokenizer

    folder = smollm[0]
    path = write_model(folder, tmp_path / "out.gguf", dtype="f16").path
    write_modelfile(path, tmp_path / "Modelfile", folder=folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    glue = read_separators(tokenizer)
    assert glue is not None
    template = render_go_template(glue)
    text = (tmp_path / "Modelfile").read_text()
    assert f'TEMPLATE """{template}"""' in text
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert "PARAMETER num_ctx 8192" in text
    messages = [{"role": "user", "content": "What is the capital of France? One word."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    with Llama(path) as llama:
        assert llama.tokenize(go(template, messages)) == prompt
        made = llama.greedy(prompt, 40)
    answer = made[: made.index(tokenizer.eos_token_id)]
    assert "Paris" in tokenizer.decode(answer)


def _table() -> None:
    """Print what docs/gguf.md holds."""
    with tempfile.TemporaryDirectory() as made:
        for i, name in enumerate(MODELS):
            found = measured(name, Path(made) / str(i))
            print(f"| {name} | {found.kl:.0e} | {found.largest:.0e} | {found.top1:.3f} |", flush=True)
        for model_type in ADAPTED:
            near, moved = measured_adapter(model_type, Path(made) / model_type)
            numbers = f"{moved:.1f} | {near.kl:.0e} | {near.largest:.0e} | {near.top1:.3f}"
            print(f"| {model_type} | {numbers} |", flush=True)
        real = real_smollm()
        for dtype in _LARGEST_KL:
            path = write_model(real[0], Path(made) / f"{dtype}.gguf", dtype=dtype).path
            for exact in (True, False):
                near, same = measured_smollm(real, dtype, path, exact_cache=exact)
                cache = "fp32" if exact else "f16"
                print(f"| {dtype} | {cache} | {near.kl:.1e} | {near.top1:.3f} | {'yes' if same else 'no'} |")


if __name__ == "__main__":
    _table()
