"""Greedy generation in batches, from prompts rendered as in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from peftkit import interrupt
from peftkit.data.chat.template import adds_bos

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def _encode_prompts(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, is_encoder_decoder: bool) -> Any:
    """Tokenize prompts.

    Padded on the left for decoders, whose prompt ends where the answer begins, else on the right.
    """
    if is_encoder_decoder:
        return tokenizer(list(prompts), return_tensors="pt", padding=True)
    bos = tokenizer.bos_token if adds_bos(tokenizer) else ""
    texts = [text if not bos or text.startswith(bos) else bos + text for text in prompts]
    padding_side = tokenizer.padding_side
    tokenizer.padding_side = "left"
    try:
        return tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True)
    finally:
        tokenizer.padding_side = padding_side


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    batch_size: int = 20,
    use_cache: bool = True,
) -> list[str]:
    """Generate one greedy answer per prompt, without special tokens, in the order of the prompts.

    Prompts of similar length share a batch. The model's training mode is restored.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    is_encoder_decoder = bool(model.config.is_encoder_decoder)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            interrupt.stop_if_requested("interrupted while generating")
            indices = order[start : start + batch_size]
            inputs = _encode_prompts(
                [prompts[i] for i in indices], tokenizer, is_encoder_decoder=is_encoder_decoder
            ).to(model.device)
            if is_encoder_decoder:
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
                output if is_encoder_decoder else output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            for i, text in zip(indices, texts, strict=True):
                answers[i] = text
    finally:
        model.train(was_training)
    return answers
