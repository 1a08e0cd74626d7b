"""Code that comes with a model: pinned, and from nowhere else."""

import json
import shutil
from dataclasses import replace

import pytest

from peftkit.errors import UserError
from peftkit.model.base.remote_code import refuse_foreign_code, require_pinned_commit
from peftkit.model.load import load_tokenizer
from tests.conftest import ROOT, TINY_LLAMA
from tests.rigs.plans import cpu_plan

COMMIT = "0123456789" * 4


def test_hub_code_needs_a_commit():
    for revision in (None, "main", "v1.0", COMMIT[:7], COMMIT.upper().replace("0", "A")):
        with pytest.raises(UserError, match="a pinned commit: 40 hex digits; read that commit's code"):
            require_pinned_commit("org/model", revision, where="base", remedy="set base.revision: COMMIT")
    require_pinned_commit("org/model", COMMIT, where="base", remedy="")
    require_pinned_commit(str(TINY_LLAMA), None, where="base", remedy="")


FOREIGN = [
    {"AutoConfig": "evil/repo--configuration_x.X"},
    {"AutoTokenizer": ["tok.Slow", "evil/repo--tok.Fast"]},
    {"AutoModel": "../../elsewhere.X"},
    {"AutoModel": "/tmp/x.X"},
    "evil/repo--x.X",
]


@pytest.mark.parametrize("auto_map", FOREIGN, ids=str)
def test_code_elsewhere_is_refused(auto_map):
    with pytest.raises(UserError, match="auto_map names code elsewhere"):
        refuse_foreign_code({"auto_map": auto_map}, "org/model", "base")


def test_code_beside_the_model_is_taken():
    own = {"AutoConfig": "configuration_x.X", "AutoModel": "org/model--x.X", "AutoTokenizer": [None, "t.T"]}
    refuse_foreign_code({"auto_map": own}, "org/model", "base")
    refuse_foreign_code({}, "org/model", "base")


def test_a_tokenizer_that_names_code_elsewhere_is_not_loaded(tmp_path):
    base = shutil.copytree(TINY_LLAMA, tmp_path / "base")
    file = base / "tokenizer_config.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps(told | {"auto_map": {"AutoTokenizer": ["evil/repo--tok.T", None]}}))
    plan = replace(cpu_plan().base, trust_remote_code=True)
    with pytest.raises(UserError, match="evil/repo--tok"):
        load_tokenizer(str(base), plan)


def test_code_is_not_run_unasked(tmp_path):
    """The code of the tiny RetNet's folder leaves a mark when it runs."""
    import peftkit

    base = tmp_path / "base"
    shutil.copytree(ROOT / "tests" / "assets" / "retnet", base)
    mark = tmp_path / "ran"
    for code in base.glob("*.py"):
        code.write_text(f"open({str(mark)!r}, 'w')\n" + code.read_text())
    auto_map = {"AutoConfig": "configuration_retnet.TinyRetNetConfig"}
    (base / "config.json").write_text(json.dumps({"model_type": "tiny_retnet", "auto_map": auto_map}))
    with pytest.raises(UserError, match="comes with its own code"):
        peftkit.inspect_model(base)
    assert not mark.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_beside_a_known_model_does_not_run_unasked(file, recipe, tmp_path):
    """A Llama that also names code: it loads without, and its code is never read."""
    import peftkit

    base, mark = shutil.copytree(TINY_LLAMA, tmp_path / "base"), tmp_path / "ran"
    (base / "own.py").write_text(f"open({str(mark)!r}, 'w')\n")
    told = json.loads((base / file).read_text())
    auto_map = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": ["own.T", "own.T"]}
    (base / file).write_text(json.dumps(told | {"auto_map": auto_map}))
    recipe["base"] = str(base)
    recipe["train"]["max_steps"] = 1
    peftkit.finetune(recipe, out=tmp_path / "run")
    assert not mark.exists()
