"""Results are found, loaded and evaluated from their folders alone."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import peftkit
from peftkit.errors import UserError
from peftkit.evaluate.generation import Sampling, generate_answers
from peftkit.model.load import model_stop_ids
from peftkit.results.evaluate import evaluate
from peftkit.results.find import find_adapter, find_adapter_folder, is_standalone_adapter, run_folder
from peftkit.results.generate import answer
from peftkit.results.load import is_full_finetuning_run, open_result
from tests.conftest import TINY_LLAMA, chat, write_jsonl


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("results")
    colours, things = ("red", "blue", "green", "black"), ("hill", "lake", "stone", "road")
    words = [f"{colour} {thing}" for colour in colours for thing in things]
    chats = [chat(f"Say {word} and {words[-i]}", "one two" if i % 2 else "two") for i, word in enumerate(words)]
    rows = write_jsonl(place / "chats.jsonl", chats)
    train = {"max_steps": 6, "batch_size": 4, "micro_batch": 2, "max_length": 64, "learning_rate": 3e-2}
    recipe = {
        "base": str(TINY_LLAMA),
        "method": {"name": "lora", "rank": 2},
        "data": {"train": str(rows), "eval": "25%"},
        "train": train,
        "diagnose": {"escalate": "off"},
    }
    return peftkit.finetune(recipe, out=place / "run").path


def test_a_run_and_its_adapter_folder_are_one_result(run):
    assert run_folder(run / "adapter") == run_folder(run) == run
    assert find_adapter(run).folder == find_adapter(run / "adapter").folder == find_adapter_folder(run)
    assert not is_standalone_adapter(run / "adapter") and not is_full_finetuning_run(run)


def test_an_adapter_away_from_its_run_answers_alike(run, tmp_path):
    away = shutil.copytree(run / "adapter", tmp_path / "away")
    assert is_standalone_adapter(away)
    assert find_adapter(away).plan is None
    prompts = ["Say red hill and blue lake", "Say green stone and black road"]
    answers = answer(run, prompts, Sampling(4))
    assert answer(away, prompts, Sampling(4)) == answers
    (away / "MANIFEST.json").unlink()
    tensors = load_file(away / "adapter_model.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, away / "adapter_model.safetensors")
    assert answer(away, prompts, Sampling(4)) != answers, "it is the adapter that answers"


def test_a_chat_keeps_its_turns_and_streams_what_it_answers(run, tmp_path):
    chat = peftkit.open_chat(shutil.copytree(run / "adapter", tmp_path / "away"), max_new_tokens=6)
    pieces = []
    first = chat.ask("Say red hill", pieces.append)
    assert "".join(pieces) == first
    second = chat.ask("Say green stone")
    roles = [turn["role"] for turn in chat.turns]
    assert roles == ["user", "assistant"] * 2
    turns = chat.turns[:3]
    prompt = chat.result.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    stops = model_stop_ids(chat.result.model, chat.result.tokenizer)
    [expected] = generate_answers(
        chat.result.model, chat.result.tokenizer, [prompt], sampling=Sampling(6), eos_token_ids=stops
    )
    assert second == expected.strip(), "the second answer follows the first turns"
    with pytest.raises(UserError, match="an empty prompt"):
        chat.ask(" ")


def test_the_loss_is_the_one_of_the_run_s_own_evaluation(run):
    evaluation = evaluate(run)
    assert evaluation.loss == pytest.approx(peftkit.summarize_run(run).eval_loss_after, rel=1e-5)
    assert evaluation.num_rows == 4
    [context] = evaluate(run, contexts=(16,)).contexts
    assert context.length == 16 and math.isfinite(context.loss)


def test_what_is_no_result_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="nothing there"):
        open_result(tmp_path / "absent")
    half = shutil.copytree(run, tmp_path / "half")
    shutil.rmtree(half / "adapter")
    with pytest.raises(UserError, match="a run without a result"):
        find_adapter(half)
    damaged = shutil.copytree(run / "adapter", tmp_path / "damaged")
    weights = damaged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="adapter_model"):
        find_adapter(damaged)
