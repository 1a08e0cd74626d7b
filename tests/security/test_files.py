"""Files too large to be what they are named, names and symlinks that lead elsewhere: nothing is read."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import peftkit
from peftkit.errors import UserError
from peftkit.model.base.file_checks import check_model_folder, contained_file
from peftkit.model.base.locate import locate_base
from peftkit.model.load import load_tokenizer
from tests.conftest import ROOT, TINY_LLAMA
from tests.rigs.plans import cpu_plan


@pytest.fixture
def base(tmp_path):
    return shutil.copytree(TINY_LLAMA, tmp_path / "base")


def refuse(path):
    with pytest.raises(UserError) as refused:
        locate_base(str(path), revision=None, where="base")
    return str(refused.value)


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt",
        "vocab.json", "tokenizer.model", "generation_config.json",
        "model.safetensors.index.json", "other.json",
    ],
)  # fmt: skip
def test_files_of_gigabytes_are_refused_before_they_are_read(name, base, recipe, tmp_path):
    with (base / name).open("ab") as file:
        os.truncate(file.fileno(), 5 * 2**30)  # sparse: takes no room here
    start = time.monotonic()
    assert f"got {name} of 5.00 GiB, expected at most" in refuse(base)
    with pytest.raises(UserError, match="is what its name says"):
        load_tokenizer(str(base), cpu_plan().base)
    recipe["base"] = str(base)
    with pytest.raises(UserError, match=r"5\.00 GiB"):
        peftkit.finetune(recipe, out=tmp_path / "run")
    assert time.monotonic() - start < 5


def test_deep_json_is_no_crash(base):
    (base / "config.json").write_text("[" * 200_000)
    assert "text that is not JSON" in refuse(base)


def test_symlinks_that_lead_out_are_refused(base, tmp_path):
    outside = tmp_path / "outside.safetensors"
    shutil.move(base / "model.safetensors", outside)
    (base / "model.safetensors").symlink_to(outside)
    assert "a symlink that leads out of its folder (model.safetensors)" in refuse(base)
    (base / "model.safetensors").unlink()
    shutil.move(outside, base / "weights")
    (base / "model.safetensors").symlink_to("weights")
    assert locate_base(str(base), revision=None, where="base").kind == "folder"
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.json").symlink_to("/etc/passwd")
    assert "a symlink that leads out of its folder (tokenizer.json)" in refuse(base)


def test_a_hub_cache_works_and_no_further(base, tmp_path):
    """snapshots/COMMIT/* are symlinks into blobs/ beside it."""
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in base.iterdir():
        shutil.copy(file, repository / "blobs" / f"sha-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/sha-{file.name}")
    assert locate_base(str(snapshot), revision=None, where="base").path == snapshot
    assert load_tokenizer(str(snapshot), cpu_plan().base)
    alias = tmp_path / "alias"
    alias.symlink_to(snapshot)
    assert locate_base(str(alias), revision=None, where="base").path == alias
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(base / "config.json")
    assert "leads out" in refuse(snapshot)


def sharded(base, named):
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    save_file(tensors, base / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, named)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    return base


OUTSIDE = [
    "../secret.safetensors", "/etc/secret.safetensors", "sub/../../x.safetensors", "..", "",
    "a\0.safetensors", "weights.bin", "missing.safetensors", 7, ["x"],
]  # fmt: skip


@pytest.mark.parametrize("named", OUTSIDE, ids=repr)
def test_an_index_names_files_of_its_own_folder_only(named, base, recipe, tmp_path):
    shutil.copy(base / "model.safetensors", tmp_path / "secret.safetensors")
    recipe["base"] = str(sharded(base, named))
    said = "which does not exist" if named == "missing.safetensors" else "a weight_map that names"
    with pytest.raises(UserError, match=said):
        peftkit.finetune(recipe, out=tmp_path / "run")


def test_an_honest_index_loads(base):
    folder = sharded(base, "model-00001-of-00001.safetensors")
    assert locate_base(str(folder), revision=None, where="base").kind == "folder"


def test_an_adapter_reads_nothing_outside(base, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").symlink_to(base / "model.safetensors")
    with pytest.raises(UserError, match="a symlink that leads out of its folder"):
        peftkit.generate(adapter, ["hi"])


def test_a_name_stays_inside(base):
    for name in ("../x", "/etc/passwd", "a/../../x"):
        with pytest.raises(UserError, match="leads out of its folder"):
            contained_file(base, name)
    assert contained_file(base, "config.json").is_file()
    check_model_folder(base)


@pytest.mark.parametrize("name", ["../../x.yaml", "a b.yaml", "x.y.yaml"])
def test_runs_are_named_inside_their_folder(name, recipe, tmp_path, monkeypatch):
    """The name comes from the recipe's file alone."""
    from peftkit.recipe import load
    from peftkit.run.finetune import default_out

    here = tmp_path / "one" / "two"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    Path(name).write_text(json.dumps(recipe))
    out = default_out(load(name)).absolute()
    assert out.parent == here / "runs"
    assert out.resolve().is_relative_to(here / "runs")


@pytest.mark.slow
def test_files_from_the_hub_are_of_a_sane_size(base, tmp_path):
    """A hub cache as huggingface_hub keeps it; offline, so that only it is asked."""
    program = """
import sys
from dataclasses import replace
from peftkit.errors import UserError
from peftkit.model.load import load_tokenizer
from tests.rigs.plans import cpu_plan
plan = replace(cpu_plan().base, id="org/name", revision=None)
print(load_tokenizer("org/name", plan).eos_token)
with open(sys.argv[1], "ab") as file:
    file.truncate(5 * 2**30)
try:
    load_tokenizer("org/name", plan)
except UserError as error:
    print(error)
"""
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    for file in base.iterdir():
        shutil.copy(file, repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    done = subprocess.run(
        [sys.executable, "-c", program, str(repository / "blobs" / "tokenizer.json")],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    ends, told = done.stdout.splitlines()
    assert ends, done.stderr
    assert "got tokenizer.json of 5.00 GiB, expected at most 256.0 MiB" in told
