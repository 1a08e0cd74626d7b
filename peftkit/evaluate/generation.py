"""Generation in batches, greedy unless told otherwise, from prompts rendered as in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from peftkit import interrupt
from peftkit.data.chat.template import adds_bos
from peftkit.errors import Problem, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_LOWEST_TEMPERATURE = 1e-3  # logits are divided by it, in half precision perhaps
_NUM_SEEDS = 2**63


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: greedily at temperature 0, else by `seed` from the most likely tokens up to `top_p`.

    Raises UserError for values that nothing can be drawn with, or that are without effect.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be drawn from."""
        problems = []
        if self.temperature and not _LOWEST_TEMPERATURE <= self.temperature < float("inf"):
            expected = f"0 (greedy), or a number of at least {_LOWEST_TEMPERATURE}"
            problems.append(Problem("temperature", str(self.temperature), expected))
        if not 0 < self.top_p <= 1:
            problems.append(Problem("top_p", str(self.top_p), "a share above 0, of at most 1"))
        if not 0 <= self.seed < _NUM_SEEDS:
            problems.append(Problem("seed", str(self.seed), "a number from 0, below 2**63"))
        if not problems and not self.temperature:
            fix = "set temperature to draw answers, for example 0.7"
            given = {"top_p": self.top_p} if self.top_p != 1 else {}
            given |= {"seed": self.seed} if self.seed else {}
            problems += [Problem(key, f"{value} at temperature 0", "no such key", fix) for key, value in given.items()]
        if problems:
            raise UserError(problems)

    def next_seed(self, number: int) -> int:
        """Return the seed of the answer that is `number` answers further."""
        return (self.seed + number) % _NUM_SEEDS if self.temperature else 0

    @property
    def options(self) -> Mapping[str, Any]:
        """The options of `generate` in transformers."""
        if not self.temperature:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


def encode_prompts(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, is_encoder_decoder: bool) -> Any:
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


def stream_answer(tokenizer: PreTrainedTokenizerBase, show: Callable[[str], object], *, has_prompt: bool) -> Any:
    """Return a streamer for transformers' `generate` that shows an answer word by word, without blanks around it."""
    from transformers import TextStreamer

    class AnswerStreamer(TextStreamer):  # type: ignore[misc]
        blanks: str | None = None  # at the end of what was shown, which may be the end; None: nothing was

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            piece = text if self.blanks is not None else text.lstrip()
            if kept := piece.rstrip():
                show((self.blanks or "") + kept)
                self.blanks = piece[len(kept) :]
            elif self.blanks is not None:
                self.blanks += piece

    return AnswerStreamer(tokenizer, skip_prompt=has_prompt, skip_special_tokens=True)


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    sampling: Sampling,
    eos_token_ids: Sequence[int],
    batch_size: int = 20,
    use_cache: bool = True,
    show: Callable[[str], object] | None = None,
) -> list[str]:
    """Generate one answer per prompt, without special tokens, in the order of the prompts.

    Prompts of similar length share a batch. Drawn answers do not: prompt i is answered by itself, with seed + i.
    `show` is given the pieces of the answer to a single prompt. The model's training mode is restored, and what
    the caller draws is as before.
    """
    if sampling.temperature:
        batch_size = 1
    streamer = None if show is None else stream_answer(tokenizer, show, has_prompt=not model.config.is_encoder_decoder)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    is_encoder_decoder = bool(model.config.is_encoder_decoder)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            interrupt.stop_if_requested("interrupted while generating")
            indices = order[start : start + batch_size]
            inputs = encode_prompts([prompts[i] for i in indices], tokenizer, is_encoder_decoder=is_encoder_decoder).to(
                model.device
            )
            if is_encoder_decoder:
                inputs.pop("token_type_ids", None)
            with torch.no_grad(), torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
                torch.manual_seed(sampling.next_seed(indices[0]))
                output = model.generate(
                    **inputs,
                    **sampling.options,
                    max_new_tokens=sampling.max_new_tokens,
                    use_cache=use_cache,
                    eos_token_id=list(eos_token_ids),
                    pad_token_id=tokenizer.pad_token_id,
                    streamer=streamer,
                )
            texts = tokenizer.batch_decode(
                output if is_encoder_decoder else output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            for i, text in zip(indices, texts, strict=True):
                answers[i] = text
    finally:
        model.train(was_training)
    return answers
