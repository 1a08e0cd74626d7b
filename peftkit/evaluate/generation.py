"""Greedy answers to prompts, in batches, rendered as in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftkit import interrupt
from peftkit.data.chat.template import adds_bos


def _encode(prompts: Sequence[str], tokenizer: Any, *, encoder: bool) -> Any:
    """Left-padded for decoders, whose prompt must end where the answer begins; right-padded for encoders."""
    if encoder:
        return tokenizer(list(prompts), return_tensors="pt", padding=True)
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
    batch_size: int = 20,
    use_cache: bool = True,
) -> list[str]:
    """One greedy answer per prompt, without special tokens, in the order of the prompts.

    The model's training mode is restored. Prompts of like length share a batch.
    """
    import torch

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    encoder = bool(model.config.is_encoder_decoder)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            interrupt.stop_if_requested("interrupted while generating")
            chosen = order[start : start + batch_size]
            inputs = _encode([prompts[i] for i in chosen], tokenizer, encoder=encoder).to(model.device)
            if encoder:
                inputs.pop("token_type_ids", None)
            with torch.no_grad():
                output = model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    use_cache=use_cache,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    eos_token_id=list(eos_token_ids),
                    pad_token_id=tokenizer.pad_token_id,
                )
            texts = tokenizer.batch_decode(
                output if encoder else output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text
    finally:
        model.train(was_training)
    return answers
