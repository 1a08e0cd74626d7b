"""Make tests/assets/tiny-llama: a Llama of about 1M parameters, pretrained on the Python standard library.

    .venv/bin/python tests/assets/make_tiny_llama.py [--minutes 6]

Text: the sources and docstrings of CPython's standard library (PSF-2.0 licence), which every machine with
Python has. Three quarters plain source text, one quarter chats made of docstrings ("What does json.loads
do?" -> the docstring's first sentence), so that the chat template's tokens are trained as well.
"""

from __future__ import annotations

import argparse
import ast
import math
import random
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

OUT = Path(__file__).parent / "tiny-llama"
SEQUENCE, VOCAB, BATCH = 128, 2048, 16
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def sources() -> list[Path]:
    """Standard library modules without tests and generated tables, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = ("test", "site-packages", "pydoc_data", "encodings", "idlelib", "lib2to3", "__pycache__")
    return sorted(p for p in root.rglob("*.py") if not any(part in skip or part == "tests" for part in p.parts))


def chats(path: Path, text: str) -> list[str]:
    """Questions about functions and classes, answered by the first line of their docstrings."""
    found = []
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (doc := ast.get_docstring(node)):
            first = doc.strip().split("\n")[0].strip()
            if 15 < len(first) < 160:
                found.append(f"<|user|>What does {path.stem}.{node.name} do?<|end|><|assistant|>{first}<|end|>")
    return found


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with the special tokens of the chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL],
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=6.0)
    minutes = parser.parse_args().minutes
    rng = random.Random(0)
    paths = sources()
    texts = [(p, p.read_text(encoding="utf-8", errors="ignore")[:40_000]) for p in paths]
    texts = [(p, t) for p, t in texts if len(t) > 400]
    tokenizer = make_tokenizer([t[:8000] for _, t in texts])
    source_ids = [i for _, t in texts for i in [*tokenizer(t)["input_ids"], tokenizer.eos_token_id]]
    talk = [c for p, t in texts for c in chats(p, t)]
    rng.shuffle(talk)
    talk_ids = [i for c in talk for i in tokenizer(c)["input_ids"]]
    print(f"{len(source_ids):,} tokens of source, {len(talk_ids):,} of {len(talk):,} chats", flush=True)
    streams = [torch.tensor(source_ids), torch.tensor(talk_ids)]
    held = [s[-SEQUENCE * 64 :].view(64, SEQUENCE) for s in streams]
    streams = [s[: -SEQUENCE * 64] for s in streams]

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.05)
    started, step = time.time(), 0
    while (share := (time.time() - started) / (60 * minutes)) < 1:
        rate = 3e-3 * min(1, (step + 1) / 100) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = [streams[1 if rng.random() < 0.25 else 0] for _ in range(BATCH)]
        starts = [rng.randrange(len(s) - SEQUENCE) for s in chosen]
        batch = torch.stack([s[i : i + SEQUENCE] for s, i in zip(chosen, starts, strict=True)])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            print(f"{step} steps, {time.time() - started:.0f} s, loss {loss.item():.3f}", flush=True)
    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=h, labels=h).loss.item() for h in held]
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {step} steps; held out: "
        f"source {losses[0]:.3f}, chats {losses[1]:.3f} nats per token"
    )
    model.to(torch.bfloat16).save_pretrained(OUT)
    tokenizer.save_pretrained(OUT)


if __name__ == "__main__":
    main()
