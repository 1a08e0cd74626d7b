"""The base of the suite: a Llama of 0.85M parameters, pretrained once on real text.

    python benchmarks/diagnosis/tiny_model.py --data FOLDER

Text: Shakespeare and the questions of GSM8K. Answers of GSM8K and all of BANKING77 are left out: they are
what the tasks teach. The vocabulary ends in reserved tokens that no text has: their embeddings stay random.
FOLDER (or $PEFTKIT_BENCH_DATA) holds gsm8k/{train,test}.jsonl, banking77/{train,test}.csv and
tinyshakespeare/input.txt. The model is kept in $PEFTKIT_BENCH_CACHE, or ~/.cache/peftkit-bench.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

SEQUENCE, BATCH, VOCAB, NUM_RESERVED = 128, 16, 1664, 100
STEPS = 1423  # as many as four minutes held when the faults were measured
PLAIN = ["<|pad|>", "<|start|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
RESERVED = [f"<|label_{number}|>" for number in range(NUM_RESERVED)]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_HELD_SHARE = 0.9  # of Shakespeare is pretrained on
_HELD_QUESTIONS = 6000  # questions of GSM8K before this one are


def data_folder(given: str | Path | None = None) -> Path:
    """The folder with the whole data sets: as given, or $PEFTKIT_BENCH_DATA. Raises SystemExit without."""
    folder = given or os.environ.get("PEFTKIT_BENCH_DATA")
    if not folder:
        raise SystemExit("give the folder of the data sets: --data FOLDER, or PEFTKIT_BENCH_DATA=FOLDER")
    return Path(folder)


def cache_folder() -> Path:
    """Where the base is kept between runs."""
    return Path(os.environ.get("PEFTKIT_BENCH_CACHE") or Path.home() / ".cache" / "peftkit-bench")


def base_folder(data: Path) -> Path:
    """The pretrained base, made now where it is not there yet."""
    folder = cache_folder() / "diagnosis-base"
    if not (folder / "config.json").exists():
        _pretrain(data, folder)
    return folder


def read_lines(path: Path) -> list[dict[str, str]]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _texts(data: Path) -> tuple[list[str], list[str]]:
    """(texts to pretrain on, texts held out)."""
    questions = [row["question"].strip() for row in read_lines(data / "gsm8k" / "train.jsonl")]
    plays = (data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8").split("\n\n")
    cut = int(len(plays) * _HELD_SHARE)
    pieces = ["\n\n".join(plays[i : i + 8]) for i in range(0, cut, 8)]
    return questions[:_HELD_QUESTIONS] + pieces, questions[_HELD_QUESTIONS:] + plays[cut:]


def _make_tokenizer(texts: list[str]) -> Any:
    """Byte-level BPE; digits are tokens of their own, so that numbers can be copied and worked with."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - NUM_RESERVED,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in PLAIN],
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens([AddedToken(text, normalized=False) for text in RESERVED])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PLAIN[0],
        bos_token=PLAIN[1],
        eos_token=PLAIN[2],
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _make_model(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def _pretrain(data: Path, folder: Path) -> None:
    """Train from nothing, and save: some four minutes on one core."""
    import torch

    draw = random.Random(0)
    torch.manual_seed(0)
    texts, held_texts = _texts(data)
    tokenizer = _make_tokenizer(texts)
    draw.shuffle(texts)
    streams = []
    for group in (texts, held_texts):
        ids = [i for t in group for i in [*tokenizer(t)["input_ids"], tokenizer.eos_token_id]]
        streams.append(torch.tensor(ids))
    train, held = streams
    held = held[: SEQUENCE * 64].view(-1, SEQUENCE)
    model = _make_model(tokenizer)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {len(train):,} tokens, {len(texts):,} texts", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.05)
    started = time.time()
    for step in range(STEPS):
        share = 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        rate = 3e-3 * min(1, (step + 1) / 60) * share
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = [draw.randrange(len(train) - SEQUENCE) for _ in range(BATCH)]
        batch = torch.stack([train[i : i + SEQUENCE] for i in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            print(f"{step + 1} steps, {time.time() - started:.0f} s, loss {loss.item():.3f}", flush=True)
    _renew_reserved(model, tokenizer)
    model.eval()
    with torch.no_grad():
        held_loss = model(input_ids=held, labels=held).loss.item()
    print(f"{STEPS} steps; held out: {held_loss:.3f} nats per token", flush=True)
    staging = folder.with_name(folder.name + ".new")
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    staging.rename(folder)


def _renew_reserved(model: Any, tokenizer: Any) -> None:
    """Random rows for the reserved tokens.

    As the head's rows they were pushed down at every step, as rows that nothing ever wanted; added ones would
    not have been.
    """
    import torch

    ids = tokenizer.convert_tokens_to_ids(RESERVED)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[ids] = torch.randn(len(ids), table.shape[1]) * model.config.initializer_range


def main() -> None:
    """Make the base."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder of the data sets")
    arguments = parser.parse_args()
    print(base_folder(data_folder(arguments.data)))


if __name__ == "__main__":
    main()
