import re

import pytest

import peftkit
from peftkit import api
from peftkit.errors import UserError


def test_the_public_names_are_frozen():
    """To add or rename one is a decision: change this list, and tell it in CHANGELOG.md."""
    assert peftkit.__all__ == [
        *("ExportOptions", "Interrupted", "MergeOptions", "PeftkitError", "Problem", "UserError"),
        *("check_data", "combine_adapters", "convert_weights", "diagnose_run", "evaluate_run", "export_adapter"),
        *("finetune", "generate", "inspect_model", "load_recipe", "make_plan", "merge_adapter", "plan_recipe"),
        *("reproduce_run", "resume_run", "summarize_run", "verify_run"),
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
