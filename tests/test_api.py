import json
import os
import re
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import peftkit
from peftkit import api
from peftkit.errors import UserError
from tests.conftest import ROOT, TINY_LLAMA, write_jsonl


def test_the_public_names_are_frozen():
    """To add or rename one is a decision: change this list, and tell it in CHANGELOG.md."""
    assert peftkit.__all__ == [
        *("ExportOptions", "Interrupted", "MergeOptions", "PeftkitError", "Problem", "UserError"),
        *("check_data", "combine_adapters", "convert_weights", "diagnose_run", "evaluate_run", "export_adapter"),
        *("finetune", "generate", "inspect_model", "load_recipe", "make_plan", "merge_adapter", "open_chat"),
        *("plan_recipe", "reproduce_run", "resume_run", "summarize_run", "verify_run"),
    ]


def test_names_are_imported_on_first_use():
    assert set(peftkit.__all__) <= set(dir(peftkit))
    for name in peftkit.__all__:
        assert getattr(peftkit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        peftkit.nonsense  # noqa: B018


def test_every_type_that_the_api_names_can_be_imported_from_it():
    functions = [getattr(api, name) for name in api.__all__ if name.islower()]
    text = " ".join(str(note) for function in functions for note in function.__annotations__.values())
    named = set(re.findall(r"\b[A-Z][a-z]\w+", text)) - {"Any", "Mapping", "None", "Path", "Sequence"}
    assert {"Reproduction", "Verification", "Account", "Verdict"} <= named
    assert [name for name in named if not hasattr(api, name)] == []


def test_a_path_a_dict_and_a_recipe_make_the_same_plan(recipe):
    loaded = peftkit.load_recipe(recipe)
    plans = [peftkit.make_plan(source) for source in (recipe, loaded, loaded.recipe)]
    assert plans[0].method == plans[1].method == plans[2].method
    assert plans[0].train.num_steps == 6


def test_overrides_reach_the_plan(recipe):
    assert peftkit.make_plan(recipe, ["method.rank=8"]).method.peft.arguments["r"] == 8


def test_overrides_of_a_loaded_recipe_count(recipe):
    loaded = peftkit.load_recipe(recipe)
    assert peftkit.load_recipe(loaded, ["train.max_steps=1"]).recipe.train.max_steps == 1
    assert peftkit.load_recipe(loaded) is loaded


def test_summaries_want_a_run(tmp_path):
    with pytest.raises(UserError):
        peftkit.summarize_run(tmp_path)
    with pytest.raises(UserError):
        peftkit.generate(tmp_path, ["x"])


@pytest.mark.parametrize(
    "overrides",
    ["method.rank=8", ["method.rank=8"], ("method.rank=8",), {"method.rank": 8}, {"method": {"rank": 8}}],
    ids=str,
)
def test_overrides_are_one_text_several_or_a_mapping(overrides, recipe):
    assert peftkit.make_plan(recipe, overrides).method.peft.arguments["r"] == 8


@example({"x": ["\x85"], "y": "\u2028"})
@given(
    st.dictionaries(
        st.sampled_from(["epochs", "x", "y"]),
        st.none() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False) | st.lists(st.text()),
    )
)
def test_a_mapping_of_overrides_keeps_its_values(values):
    from peftkit.recipe.document import parse_value
    from peftkit.recipe.load import override_texts

    texts = dict(text.split("=", 1) for text in override_texts(values))
    assert {key: parse_value(text) for key, text in texts.items()} == values


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What a program that trains, generates and merges prints, and its results as a notebook shows them."""
    folder = tmp_path_factory.mktemp("python")
    rows = [{"prompt": f"Say {n}", "completion": f"word {n}"} for n in range(24)]
    data = write_jsonl(folder / "rows.jsonl", rows)
    recipe = {
        "base": str(TINY_LLAMA),
        "method": {"name": "lora", "rank": 2},
        "data": {"train": str(data), "eval": "25%", "waive": ["near-leakage", "near-duplicates"]},
        "train": {"max_steps": 2, "max_length": 64},
    }
    program = f"""
import json, peftkit, sys
recipe = json.loads({json.dumps(json.dumps(recipe))})
summary = peftkit.finetune(recipe, out={str(folder / "run")!r})
results = [summary, peftkit.make_plan(recipe), peftkit.plan_recipe(recipe), peftkit.check_data(recipe)]
results += [peftkit.diagnose_run(summary.path), peftkit.verify_run(summary.path), peftkit.evaluate_run(summary.path)]
force = peftkit.MergeOptions(force=True)
results += [peftkit.merge_adapter(summary.path, out={str(folder / "merged")!r}, options=force)]
results += [peftkit.inspect_model(recipe["base"])]
options = peftkit.ExportOptions("adapter", out={str(folder / "exported")!r})
results += [peftkit.export_adapter(summary.path, options=options)]
print(json.dumps([[type(one).__name__, one._repr_html_()[:6]] for one in results]))
print(json.dumps(peftkit.generate(summary.path, "Say 1", max_new_tokens=2)))
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )


def test_from_python_progress_is_shown_and_libraries_are_quiet(shown):
    assert shown.returncode == 0, shown.stderr
    lines = shown.stderr.splitlines()
    assert "loading: lora" in lines
    assert any(line.startswith("step 2/2: loss") for line in lines)
    noise = ("Loading weights", "FutureWarning", "gemm_4bit", "warnings.warn", "UserWarning")
    assert [line for line in lines if any(word in line for word in noise)] == []


def test_every_result_shows_itself_in_a_notebook(shown):
    results = json.loads(shown.stdout.splitlines()[0])
    assert len(results) == 10
    assert {html for _, html in results} == {"<table"}, results


def test_one_prompt_is_one_answer(shown):
    assert len(json.loads(shown.stdout.splitlines()[1])) == 1
