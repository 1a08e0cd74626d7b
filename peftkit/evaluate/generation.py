"""Greedy answers to prompts, in batches, rendered as in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftkit import interrupt
from peftkit.data.template import adds_bos

_BATCH = 20


def _encode(prompts: Sequence[str], tokenizer: Any) -> Any:
    """Left-padded ids: the prompt must end where the answer begins."""
    bos = tokenizer.bos_token if adds_bos(tokenizer) else ""
    texts = [text if not bos or text.startswith(bos) else bos + text for text in prompts]
    side = tokenizer.padding_side
    tokenizer.padding_side = "left"
    try:
        return tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True)
    finally:
        tokenizer.padding_side = side


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
) -> list[str]:
    """One greedy answer per prompt, without special tokens, in the order of the prompts.

    The model's training mode is restored. Prompts of like length share a batch.
    """
    import torch

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), _BATCH):
            interrupt.stop_if_requested("interrupted while generating")
            chosen = order[start : start + _BATCH]
            inputs = _encode([prompts[i] for i in chosen], tokenizer).to(model.device)
            with torch.no_grad():
                output = model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    eos_token_id=list(eos_token_ids),
                    pad_token_id=tokenizer.pad_token_id,
                )
            texts = tokenizer.batch_decode(
                output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text
    finally:
        model.train(was_training)
    return answers
