"""Tiny models with tokenizers, saved as Hugging Face folders, and how near llama.cpp comes to them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import ROOT
from tests.rigs.tiny import tiny_model

VOCAB = 640
SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEXTS = (
    "Once upon a time there was a 1234 year-old king's cat, isn't it?  Two  spaces\n\n\nand\ttabs.",
    "Hello <|user|> naïve café 北京 🦙🦙 3.14159 'RE you'LL",
    "def f(x):\n    return x**2  # ok\r\n\r\n  done   ",
    "<s><|user|>Say  it<|assistant|> こんにちは 12345678</s>",
    " leading, trailing ",
    "👩‍👩‍👧‍👦 é 한국어 العربية Ελληνικά ½²ⅷ",
)
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def corpus() -> list[str]:
    """Text that every checkout has, and that does not change: else the tokenizers would."""
    text = (ROOT / "tests" / "assets" / "data" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    return [*text[:40_000].split("\n\n"), *TEXTS]


def byte_tokenizer(rules: str = "gpt-2") -> Any:
    """A byte-level BPE tokenizer trained here, that cuts text by the rules llama.cpp calls so."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def split(pattern: str) -> Any:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = Tokenizer(models.BPE(ignore_merges=rules == "llama-bpe"))
    made.pre_tokenizer = {
        "gpt-2": plain,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]),
        "qwen2": split(_WORDS.replace("{1,3}", "")),
        "llama-bpe": split(_WORDS),
    }[rules]
    if rules == "qwen2":
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 8, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE
    )


def save_model(folder: Path, model_type: str, tokenizer: Any = None, **changes: Any) -> Any:
    """Save a random model of a family beside its tokenizer; returns the model."""
    import torch

    model = tiny_model(model_type, vocab_size=VOCAB, **changes)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms and biases that are not all one or zero
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    model.save_pretrained(folder, max_shard_size="200KB")
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return model


_TIE = 0.01  # random models have near ties, which llama.cpp's f16 table of GELU values decides


@dataclasses.dataclass(frozen=True)
class Nearness:
    """How near two models are on the same tokens.

    Mean KL in nats, the share of equal top-1 where the best two are no tie, the largest difference.
    """

    kl: float
    top1: float
    largest: float

    @property
    def exact(self) -> bool:
        """What an f32 export has to reach."""
        return self.kl < 1e-4 and self.top1 == 1.0


def nearness(reference: np.ndarray, found: np.ndarray) -> Nearness:
    """Of logits (tokens, vocabulary), in float64."""
    a, b = reference.astype(np.float64), found[:, : reference.shape[1]].astype(np.float64)
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (a, b))
    best = np.sort(a, axis=-1)
    clear = best[:, -1] - best[:, -2] > _TIE
    assert clear.mean() > 0.8, "nothing is left to compare"
    return Nearness(
        float((np.exp(p) * (p - q)).sum(-1).mean()),
        float((a.argmax(-1) == b.argmax(-1))[clear].mean()),
        float(np.abs(a - b).max()),
    )


def torch_logits(model: Any, tokens: list[int]) -> np.ndarray:
    """(tokens, vocabulary) in fp32."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


def piece_tokenizer(*, complete: bool = True, space: bool = True, tab: bool = False) -> Any:
    """SentencePiece's kind of BPE with byte fallback, trained here.

    `complete` has a merge for each way to split a token, as transformers writes Llama 2, Mistral and Gemma;
    `space` puts one in front of each text (Llama), or not (Gemma); `tab` stands for its byte (old Gemma).
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    bytes_ = ["\t" if tab and byte == 9 else f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", *SPECIAL[1:], SPECIAL[0]]
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 8, special_tokens=[*special, *bytes_], limit_alphabet=100, max_token_length=8
    )
    # line by line: without a pre-tokenizer a text is one word
    made.train_from_iterator([word for text in corpus() for word in text.replace(" ", " \n ").split("\n")], trainer)
    vocab = dict(sorted(made.get_vocab().items(), key=lambda item: item[1]))
    if complete:
        cuts = [(text, cut) for text in vocab if text not in {*special, *bytes_} for cut in range(1, len(text))]
        pairs = [(text[:cut], text[cut:]) for text, cut in cuts]
        merges = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        made.model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    if space:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    spec = json.loads(made.to_str())  # bytes are tokens that no text is searched for
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in special]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )


def save_adapter(model: Any, folder: Path, **options: Any) -> Any:
    """A LoRA whose B is not zero, put on a model and saved; returns PEFT's model."""
    import peft
    import torch

    settings = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    wrapped.save_pretrained(folder)
    return wrapped
