"""The command line as a person meets it: exit codes, messages, no traceback, and what is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from peftkit.cli import COMMANDS, commands, main
from peftkit.rundir import write_sealed
from tests.conftest import ROOT, TINY_LLAMA

PEFTKIT = [sys.executable, "-m", "peftkit"]


def run(*arguments, cwd=ROOT, **options):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*PEFTKIT, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        check=False,
        timeout=120,
        **options,
    )


def refuse(*arguments, **options):
    done = run(*arguments, **options)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture
def recipe_file(recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


BAD_FILES = {
    "misspelled key": ("base: a/b\nmethod: {name: lora, rnk: 8}\ndata: {train: x.jsonl}\n", "did you mean rank?"),
    "wrong type": (
        "base: a/b\nmethod: {name: lora, rank: eight}\ndata: {train: x.jsonl}\n",
        "expected  auto or an integer",
    ),
    "negative rank": ("base: a/b\nmethod: {name: lora, rank: -8}\ndata: {train: x.jsonl}\n", "greater than 0"),
    "empty": ("", "an empty file"),
    "a list": ("- base\n", "a list"),
    "tabs": ("base: a/b\nmethod:\n\tname: lora\n", "a tab"),
    "duplicate keys": ("base: a/b\nbase: c/d\n", "the key base again"),
    "python tag": ("base: !!python/object/apply:os.system ['touch pwned']\n", "tags can run code"),
    "unknown method": ("base: a/b\nmethod: lroa\ndata: {train: x.jsonl}\n", "did you mean lora?"),
    "unknown base": ("base: no-such-owner/no-such-model\nmethod: lora\ndata: {train: x.jsonl}\n", "HF_HUB_OFFLINE"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_recipes(case, tmp_path):
    text, said = BAD_FILES[case]
    (tmp_path / "recipe.yaml").write_text(text)
    assert said in refuse("finetune", "recipe.yaml", cwd=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml"]


def test_a_reader_that_has_gone_is_no_error():
    command = f"{sys.executable} -m peftkit schema | true; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_bad_paths(tmp_path, recipe_file):
    assert "a folder" in refuse("finetune", tmp_path)
    assert "no such file" in refuse("finetune", "nowhere.yaml")
    assert "expected  a run directory" in refuse("resume", tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((TINY_LLAMA / "config.json").read_bytes())
    assert "without weights" in refuse("finetune", recipe_file, f"base={tmp_path / 'model'}")


def test_bad_data(tmp_path, recipe_file):
    def with_data(name, text):
        (tmp_path / name).write_text(text)
        return refuse("finetune", recipe_file, f"data.train={tmp_path / name}", "--out", tmp_path / "run")

    assert "which does not exist" in refuse("finetune", recipe_file, "data.train=/none.jsonl")
    text = recipe_file.read_text().replace("chats.jsonl", "gone.jsonl")
    (tmp_path / "gone.yaml").write_text(text)
    line = next(i for i, row in enumerate(text.splitlines(), start=1) if "gone.jsonl" in row)
    assert f"gone.yaml:{line} data.train" in refuse("finetune", tmp_path / "gone.yaml")
    assert "no rows" in with_data("empty.jsonl", "")
    assert "bad.jsonl:2" in with_data("bad.jsonl", '{"text": "x"}\n{oops\n')
    assert "the columns foo" in with_data("wrong.jsonl", '{"foo": 1}\n')
    assert not (tmp_path / "run").exists()


def test_output_folder_that_holds_something(tmp_path, recipe_file):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "resolved.yaml").write_text("{}")
    assert "peftkit resume" in refuse("finetune", recipe_file, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "resolved.yaml").read_text() == "{}"


def test_output_folder_that_cannot_be_written(tmp_path, recipe_file):
    """Root may write anywhere, so a file stands where a folder would have to be: true for every user."""
    (tmp_path / "file").write_text("")
    assert "no permission to write" in refuse("finetune", recipe_file, "--out", tmp_path / "file" / "run")


def test_llama_8b_where_it_cannot_run_says_why_before_anything_heavy_is_imported():
    program = (
        "import sys; from peftkit.cli import main; code = main(['finetune', 'recipes/qlora-llama8b.yaml']); "
        "print('heavy', sorted({'torch', 'transformers'} & set(sys.modules))); raise SystemExit(code)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 2
    assert "heavy []" in done.stdout
    assert "HF_HUB_OFFLINE" in done.stderr
    assert "peftkit finetune recipes/quickstart.yaml" in done.stderr
    assert not (ROOT / "runs" / "qlora-llama8b").exists()


def test_dry_run_tells_every_decision_and_imports_no_torch():
    program = (
        "import sys; from peftkit.cli import main; code = main(['finetune', 'recipes/quickstart.yaml', "
        "'method.rank=32', '--dry-run']); print('heavy', sorted({'torch', 'transformers', 'peft', 'trl', "
        "'datasets'} & set(sys.modules))); raise SystemExit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "heavy []" in done.stdout
    for line in (
        "method.rank",
        "command line",
        "recipes/quickstart.yaml:",
        "default",
        "decided",
        "2 x rank",
        "9,768,960 of 144,283,968",
    ):
        assert line in done.stdout


def test_overrides_may_stand_anywhere_and_unknown_options_are_refused(recipe_file, capsys):
    assert main(["finetune", str(recipe_file), "--dry-run", "method.rank=7", "seed=5"]) == 0
    assert "7" in capsys.readouterr().out
    for arguments in (["finetune", str(recipe_file), "--dry-rum"], ["schema", "extra"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2


def test_help_lists_the_commands_and_imports_nothing_heavy():
    program = (
        "import sys\nfrom peftkit.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit: pass\n"
        "print('heavy', sorted({'torch', 'pydantic', 'yaml', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "heavy []" in done.stdout
    assert all(command.name in done.stdout for command in COMMANDS)


def test_every_command_is_a_file_of_its_own_name():
    folder = Path(commands.__file__).parent
    assert {path.stem for path in folder.glob("[!_]*.py")} == {command.name for command in COMMANDS}
    assert all(module.__name__.endswith(f".{module.COMMAND.name}") for module in commands.MODULES)


def test_recipes_schema_and_env(capsys):
    assert main(["recipes", "list"]) == 0
    assert "quickstart" in capsys.readouterr().out
    assert main(["recipes", "new", "org/model", "lora"]) == 0
    assert "base: org/model" in capsys.readouterr().out
    assert main(["recipes", "new", "org/model", "lroa"]) == 2
    assert "did you mean lora?" in capsys.readouterr().err
    assert main(["recipes", "show"]) == 2
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "peftkit recipe"
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["torch"]


def test_train_interrupt_resume_and_generate_from_the_command_line(recipe_file, tmp_path):
    out = tmp_path / "run"
    command = [*PEFTKIT, "finetune", str(recipe_file), "train.max_steps=400", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("step 1/"):
            process.send_signal(2)
            break
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 130
    assert "Traceback" not in rest
    assert f"peftkit resume {out}" in rest
    plan = json.loads((out / "plan.json").read_text())
    plan["train"]["num_steps"] = 30  # the rest of 400 steps proves nothing more
    write_sealed(out / "plan.json", plan)
    resumed = run("resume", out)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from step" in resumed.stderr
    assert f"peftkit generate {out}" in resumed.stdout
    answered = run("generate", out, "Say alpha number 0")
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.strip()


def test_inspect_tells_a_model_offline_as_tables_and_json(tmp_path):
    done = run("inspect", "mistralai/Mixtral-8x7B-v0.1")
    assert done.returncode == 0, done.stderr
    assert "46,702,792,704, 12,879,925,248 active" in done.stdout
    assert "targets: [experts]" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 120
    told = json.loads(run("inspect", "tiiuae/falcon-7b", "--json").stdout)
    assert (told["attention"], told["num_parameters"]) == ("MQA", 6_921_720_704)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4}))
    assert "vocab_size is missing" in refuse("inspect", config)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "' + "word " * 80 + '"}\n')
    assert "your data: about 100" in run("inspect", "openai-community/gpt2", "--data", rows).stdout


def test_inspect_of_a_known_model_imports_no_torch():
    program = (
        "import sys; from peftkit.cli import main; main(['inspect', 'ai21labs/Jamba-v0.1']);"
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "vit", "image_size": 224, "hidden_size": 8}, "a model for vision"),
        ({"model_type": "no_such_thing"}, "unknown family 'no_such_thing'"),
        ({"model_type": "llama"}, "missing or invalid sizes"),
    ],
)
def test_inspect_refuses_what_is_no_text_model(config, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert said in refuse("inspect", tmp_path)


@pytest.mark.slow
def test_eval_measures_a_run_and_loss_by_position(recipe_file, recipe, tmp_path):
    assert run("finetune", recipe_file, "--out", tmp_path / "run").returncode == 0
    done = run("eval", tmp_path / "run", "--json")
    assert json.loads(done.stdout)["loss"] > 0
    done = run("eval", tmp_path / "run", "--context", "32,64", "--data", recipe["data"]["train"])
    assert "loss by position" in done.stdout
    assert "no more than the data holds" in refuse(
        "eval", tmp_path / "run", "--context", "999999", "--data", recipe["data"]["train"]
    )
    assert "pass --data FILE" not in done.stderr


def test_plan_tells_what_a_recipe_takes_and_fails_where_it_does_not_fit(capsys, monkeypatch, tmp_path):
    import json

    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path))
    assert main(["plan", "qlora-llama8b", "--gpu", "rtx4090"]) == 0
    shown = capsys.readouterr().out
    assert "fits on NVIDIA GeForce RTX 4090" in shown
    assert "41,943,040 of 8,072,204,288" in shown
    assert main(["plan", "full-llama8b", "--gpu", "24GiB", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["fit"]["verdict"] == "does not fit"
    assert found["fit"]["margin_bytes"] < 0
    assert found["changes"]
    assert sum(found["by_role"].values()) == found["trainable"]
    peak = next(p for p in found["memory"]["peaks"] if p["phase"] == found["memory"]["peak_phase"])
    assert sum(peak["components"].values()) == found["memory"]["peak_bytes"]
    assert main(["plan", "qlora-llama8b", "--gpu", "rtx4091"]) == 2
    assert "rtx4090" in capsys.readouterr().err


SECRET = "hf_" + "Zq7" * 12


def test_an_unforeseen_error_is_told_without_secrets(monkeypatch, capsys):
    def schema(arguments):
        try:
            raise OSError(f"GET https://me:{SECRET}@host/x failed")
        except OSError as error:
            raise RuntimeError(f"no answer for {SECRET}") from error

    monkeypatch.setattr("peftkit.cli.commands.schema.run", schema)
    assert main(["schema"]) == 1
    told = capsys.readouterr().err
    assert SECRET not in told
    assert "Traceback" in told and "RuntimeError: no answer for REDACTED" in told
    assert "https://REDACTED@host/x" in told
    assert told.splitlines()[-1].startswith("peftkit: internal error, a bug in peftkit: please report it")


def test_what_was_typed_is_told_without_secrets(capsys):
    commands = (
        ["env", f"--token={SECRET}"],
        ["recipes", SECRET],
        ["finetune", f"/nowhere/{SECRET}"],
        ["finetune", "quickstart", f"base={SECRET}/x:y"],
        ["inspect", f"https://me:{SECRET}@host/x"],
    )
    for arguments in commands:
        try:
            code = main(arguments)
        except SystemExit as left:
            code = left.code
        told = capsys.readouterr().err
        assert code == 2, arguments
        assert SECRET not in told
        assert "REDACTED" in told


def test_pickled_weights_are_converted_by_a_command(tmp_path, capsys):
    import torch

    torch.save({"w": torch.zeros(2, 3)}, tmp_path / "adapter_model.bin")
    (tmp_path / "code.py").write_text("")
    assert main(["convert", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    assert told.out == f"{tmp_path / 'out'}: 1 tensors, 24 B in adapter_model.safetensors\n"
    assert told.err == "not converted: code.py\n"
    assert main(["convert", str(tmp_path), "--out", str(tmp_path / "out")]) == 2


def test_trusted_code_of_the_hub_needs_a_commit(capsys):
    for revision in ([], ["--revision", "main"]):
        assert main(["inspect", "org/model", "--trust-remote-code", *revision]) == 2
        assert "then --revision COMMIT" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "quickstart", "--gpu", "9" * 5000 + "GiB"],
        ["generate", "x" * 5000, "hello"],
        ["eval", "x" * 5000],
        ["eval", "a\0b"],
        ["inspect", "x" * 5000],
        ["recipes", "new", "a\0b", "lora"],
        ["recipes", "show", "a\0b"],
        ["finetune", "x" * 5000, "--dry-run"],
        ["finetune", "/dev/zero", "--dry-run"],
        ["finetune", "quickstart", "--dry-run", ".".join("a" * 3000) + "=1"],
    ],
)
def test_arguments_that_nothing_can_be_called_are_told(arguments, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "got" in said.err
    assert len(said.err) < 20_000


def test_a_page_that_cannot_be_written_is_told(tmp_path, recipe, capsys):
    from peftkit.recipe.document import dump_text

    (tmp_path / "recipe.yaml").write_text(dump_text(recipe))
    for place in (tmp_path, tmp_path / ("x" * 300)):
        assert main(["check", str(tmp_path / "recipe.yaml"), "--html", str(place)]) == 2
        assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "quickstart"], "did you mean finetune?"),
        (["infer", "x"], "did you mean generate?"),
        (["finetun", "x"], "did you mean finetune?"),
        (["zzz"], "known: finetune, plan"),
        (["finetune", "quickstart", "--learning_rate", "1e-4"], "train.learning_rate=1e-4"),
        (["finetune", "quickstart", "--lora_r=8", "--bf16"], "method.rank=8, train.precision=bf16"),
        (["finetune"], "required: RECIPE\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_other_tools_say_is_answered_in_our_words(arguments, said, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert said in capsys.readouterr().err


def test_a_recipe_is_no_run_and_a_misspelled_one_is_named(recipe_file, capsys):
    assert main(["generate", str(recipe_file), "hi"]) == 2
    assert f"train it first: peftkit finetune {recipe_file}" in capsys.readouterr().err
    assert main(["finetune", "quickstrat"]) == 2
    assert "did you mean quickstart?" in capsys.readouterr().err


def test_a_reader_that_stops_is_no_fault():
    """As `peftkit plan quickstart | head -1`: also through rich, which would exit with 1."""
    command = f"{sys.executable} -m peftkit plan quickstart"
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -1; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    first, code = done.stdout.splitlines()
    assert first.startswith("fits: needs at most ")
    assert code == "0"
    whole = run("plan", "quickstart").stdout
    assert [line for line in whole.splitlines() if line != line.rstrip()] == [], "no blanks at the ends of lines"


def test_a_package_that_is_not_installed_is_named_with_its_extra(monkeypatch, capsys):
    def without(*arguments, **named):
        raise ModuleNotFoundError("No module named 'gguf'", name="gguf")

    monkeypatch.setattr("peftkit.api.verify_run", without)
    assert main(["verify", "x"]) == 2
    assert "pip install 'peftkit[gguf]'" in capsys.readouterr().err


def test_a_model_alone_is_sized_without_data(capsys):
    assert main(["plan", str(TINY_LLAMA), "--method", "qlora", "--length", "256", "--gpu", "24GiB"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("fits: needs ")
    assert "every row is assumed to have 256 tokens" in said
    assert main(["plan", "embedded:smollm2-135m-instruct", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trainable"] > 0
    assert main(["plan", "quickstart", "--method", "lora"]) == 2
    assert "method.name=" in capsys.readouterr().err
    assert main(["plan", str(TINY_LLAMA), "--method", "lora", "method=ia3"]) == 2
    assert "--method lora and method=ia3" in capsys.readouterr().err
    assert main(["plan", str(TINY_LLAMA.with_name("nowhere"))]) == 2
    assert "command line base.id" in capsys.readouterr().err, "where the model was named"


def test_what_is_without_effect_or_cannot_be_read_is_refused(capsys, monkeypatch):
    assert main(["finetune", "quickstart", "--all"]) == 2
    assert "--all without --dry-run" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", None)
    assert main(["generate", "runs/none"]) == 2
    assert "no input to read one from" in capsys.readouterr().err
