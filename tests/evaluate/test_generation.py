"""Batched, left-padded, cached answers equal single answers found by full forward passes."""

import pytest

from peftkit.errors import UserError
from peftkit.evaluate.generation import Sampling, generate_answers
from peftkit.model.load import load_model, load_tokenizer
from tests.conftest import TINY_LLAMA
from tests.rigs.plans import cpu_plan

PROMPTS = [
    "<|user|>What does json.loads do?<|end|><|assistant|>",
    "<|user|>Hi<|end|><|assistant|>",
    "import os\nimport",
]


@pytest.fixture(scope="module")
def parts():
    plan = cpu_plan()
    return load_model(str(TINY_LLAMA), plan.base, device="cpu"), load_tokenizer(str(TINY_LLAMA), plan.base)


def greedy(model, tokenizer, prompt, count):
    import torch

    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    start = ids.shape[1]
    for _ in range(count):
        with torch.no_grad():
            token = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
        if token == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, token.view(1, 1)], dim=1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_batches_answer_like_single_full_passes(parts):
    model, tokenizer = parts
    model.train()
    answers = generate_answers(model, tokenizer, PROMPTS, sampling=Sampling(8), eos_token_ids=[tokenizer.eos_token_id])
    assert answers == [greedy(model.eval(), tokenizer, p, 8) for p in PROMPTS]


def test_what_is_streamed_is_the_answer(parts):
    model, tokenizer = parts
    options = {"sampling": Sampling(8), "eos_token_ids": [tokenizer.eos_token_id]}
    for prompt in PROMPTS:
        pieces = []
        [answer] = generate_answers(model, tokenizer, [prompt], **options, show=pieces.append)
        assert "".join(pieces) == answer.strip()


def test_answers_are_drawn_by_their_seed_and_the_callers_draws_are_its_own(parts):
    import torch

    model, tokenizer = parts

    def drawn(seed):
        sampling = Sampling(12, temperature=1.5, seed=seed)
        return generate_answers(model, tokenizer, PROMPTS, sampling=sampling, eos_token_ids=[tokenizer.eos_token_id])

    before = torch.random.get_rng_state()
    assert drawn(1) == drawn(1) != drawn(2)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_drawn_answer_does_not_hang_on_its_neighbours(parts):
    model, tokenizer = parts

    def drawn(prompts, seed):
        sampling = Sampling(12, temperature=1.5, seed=seed)
        return generate_answers(model, tokenizer, prompts, sampling=sampling, eos_token_ids=[tokenizer.eos_token_id])

    answers = drawn(["say alpha", "say beta and gamma", "say alpha"], 3)
    assert answers[0] != answers[2], "one prompt, two draws"
    assert drawn(["say alpha"], 3) == answers[:1]
    assert drawn(["say beta and gamma", "x"], 4)[0] == answers[1], "prompt i draws with seed + i"


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": value} for value in (-1, float("nan"), float("inf"), 1e-6)),
        *({"top_p": value, "temperature": 1} for value in (0, 1.1)),
        *({"seed": value, "temperature": 1} for value in (-1, 2**63)),
        *({"top_p": 0.5}, {"seed": 1}),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_from_is_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_training_mode_is_restored(parts):
    model, tokenizer = parts
    for mode in (True, False):
        model.train(mode)
        generate_answers(model, tokenizer, ["x"], sampling=Sampling(1), eos_token_ids=[tokenizer.eos_token_id])
        assert model.training is mode
