"""Batched, left-padded, cached answers equal single answers found by full forward passes."""

import pytest

from peftkit.evaluate.generation import generate_answers
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
    answers = generate_answers(model, tokenizer, PROMPTS, max_new_tokens=8, eos_token_ids=[tokenizer.eos_token_id])
    assert answers == [greedy(model.eval(), tokenizer, p, 8) for p in PROMPTS]


def test_training_mode_is_restored(parts):
    model, tokenizer = parts
    for mode in (True, False):
        model.train(mode)
        generate_answers(model, tokenizer, ["x"], max_new_tokens=1, eos_token_ids=[tokenizer.eos_token_id])
        assert model.training is mode
