"""Each command on one finished run, in this process: its exit code, what it prints, and what it leaves."""

import io
import json

import pytest
import yaml

import peftkit
from peftkit.cli import COMMANDS, commands, main
from tests.conftest import TINY_LLAMA, write_jsonl

ROWS = [{"prompt": f"Say {word} number {i}", "completion": word} for i, word in enumerate(["alpha", "beta"] * 12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def recipe_file(folder):
    data = write_jsonl(folder / "rows.jsonl", ROWS)
    train = {"max_steps": 4, "batch_size": 4, "max_length": 64, "eval_steps": 2, "learning_rate": 1e-3}
    recipe = {"base": str(TINY_LLAMA), "method": {"name": "lora", "rank": 4}, "train": train}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, "data": {"train": str(data), "eval": "25%"}}))
    return path


@pytest.fixture(scope="module")
def run(folder, recipe_file):
    assert main(["finetune", str(recipe_file), "--out", str(folder / "run")]) == 0
    return folder / "run"


def called(capsys, *arguments):
    """The exit code, and stdout of the command alone."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return code, capsys.readouterr().out


def test_every_command_can_be_called():
    for command in COMMANDS:
        module = getattr(commands, command.name)
        assert callable(module.run), command.name
        assert module.COMMAND is command


def test_verify_names_the_file_that_changed(run, capsys, tmp_path):
    code, out = called(capsys, "verify", run, "--json")
    assert code == 0
    assert json.loads(out)["faults"] == []
    file = run / "adapter" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        code, out = called(capsys, "verify", run)
        assert code == 2
        assert "adapter_model.safetensors" in out
        assert "1 fault;" in out
    finally:
        file.write_bytes(whole)
    code, out = called(capsys, "verify", run)
    assert (code, "no faults; finished" in out) == (0, True)


def test_diagnose_prints_the_verdict_of_the_run(run, capsys):
    code, out = called(capsys, "diagnose", run, "--json")
    verdict = json.loads(out)
    assert code == 0
    assert verdict == peftkit.diagnose_run(run).to_json()
    code, out = called(capsys, "diagnose", run)
    assert code == 0
    assert verdict["cause"] in out


def test_eval_prints_the_losses_of_the_run(run, capsys):
    code, out = called(capsys, "eval", run, "--json")
    measured = json.loads(out)
    assert code == 0
    assert measured["loss"] == pytest.approx(peftkit.summarize_run(run).eval_loss_after, rel=1e-5)
    code, out = called(capsys, "eval", run, "--context", "4,8")
    assert code == 0
    assert "loss by position" in out
    with pytest.raises(SystemExit) as exit:
        main(["eval", str(run), "--context", "1"])
    assert exit.value.code == 2


def test_merge_and_export_leave_what_they_print(run, capsys, folder):
    code, out = called(capsys, "merge", run, "--out", folder / "merged", "--dtype", "float32")
    assert code == 0
    assert str(folder / "merged") in out
    assert (folder / "merged" / "model.safetensors").exists()
    code, out = called(capsys, "export", run, "--to", "adapter", "--out", folder / "adapter")
    assert code == 0
    assert "adapter_model.safetensors" in out
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == (
        run / "adapter" / "adapter_model.safetensors"
    ).read_bytes()
    refused = main(["export", str(run), "--to", "adapter", "--out", str(folder / "adapter")])
    assert refused == 2, "never over what is there"


def test_generate_and_resume_of_a_finished_run(run, capsys):
    code, out = called(capsys, "generate", run, "Say alpha number 1", "--max-new-tokens", "3")
    assert code == 0
    assert out.strip() == peftkit.generate(run, ["Say alpha number 1"], max_new_tokens=3)[0].strip()
    prompts = ["Say alpha number 1", "Say beta number 2"]
    code, out = called(capsys, "generate", run, *prompts, "--max-new-tokens", "3")
    answers = peftkit.generate(run, prompts, max_new_tokens=3)
    assert out == "".join(f"> {prompt}\n{text}\n\n" for prompt, text in zip(prompts, answers, strict=True))
    before = (run / "events.jsonl").read_bytes()
    assert main(["resume", str(run)]) == 2
    assert "finished" in capsys.readouterr().err
    assert (run / "events.jsonl").read_bytes() == before


def test_lines_that_are_piped_in_are_answered_one_by_one(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Say alpha number 1\n\nSay beta number 2\n"))
    code, out = called(capsys, "generate", run, "--max-new-tokens", "3")
    assert code == 0
    assert out.splitlines() == peftkit.generate(run, ["Say alpha number 1", "Say beta number 2"], max_new_tokens=3), (
        "trained on raw text: each is answered by itself"
    )
    assert main(["generate", str(run), "x", "--temperature", "-1", "--top-p", "2"]) == 2
    said = capsys.readouterr().err
    assert "temperature" in said and "top_p" in said


def test_check_and_plan_as_json(recipe_file, capsys):
    code, out = called(capsys, "plan", recipe_file, "--json")
    assert code == 0
    assert json.loads(out)["trainable"] == peftkit.make_plan(recipe_file).method.num_trainable
    code, out = called(capsys, "check", recipe_file)
    assert code in {0, 1}
    assert "in the loss" in out
