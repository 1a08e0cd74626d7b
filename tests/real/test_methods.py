"""Methods on the small or odd data that people bring."""

import pytest

import peftkit
from peftkit.errors import UserError
from tests.real.test_data import recipe_of_lengths


def test_eva_on_fewer_rows_than_rank_ends_and_says_nothing_of_its_own(tmp_path, capfd):
    recipe = recipe_of_lengths(tmp_path, [9, 10], batch_size=2, epochs=1)
    recipe["method"] = {"name": "lora", "rank": 12, "init": "eva"}
    assert peftkit.finetune(recipe, out=tmp_path / "run").num_steps == 1
    assert "skipping SVD" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("rank", "lengths", "said"),
    [(16, [2, 2], "eva at rank 16 with at most"), (80, [40] * 8, "eva at rank 80 for a layer with 128 inputs")],
)
def test_eva_that_cannot_start_is_a_conflict_of_the_plan(rank, lengths, said, tmp_path):
    recipe = recipe_of_lengths(tmp_path, lengths, batch_size=2, epochs=1)
    recipe["method"] = {"name": "lora", "rank": rank, "init": "eva"}
    with pytest.raises(UserError, match=said):
        peftkit.finetune(recipe, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        (["train.learning_rate=0.5"], {"warning.learning_rate"}),
        (["train.learning_rate=1e-9"], {"warning.learning_rate"}),
        (["method.rank=4096"], {"warning.rank"}),
        (["train.learning_rate=0.002", "method.rank=64"], set()),
        ([], set()),
    ],
    ids=str,
)
def test_values_that_nobody_would_choose_are_warned_of(overrides, warned, tmp_path):
    recipe = recipe_of_lengths(tmp_path, [9, 10], batch_size=2, epochs=1)
    decisions = peftkit.make_plan(recipe, overrides).decisions
    assert {decision.key for decision in decisions if decision.key.startswith("warning.")} == warned


def test_a_length_far_beyond_the_model_s_is_no_case_for_yarn(tmp_path):
    recipe = recipe_of_lengths(tmp_path, [9, 10], batch_size=2, epochs=1)
    with pytest.raises(UserError) as caught:
        peftkit.make_plan(recipe, ["train.max_length=100000"])
    assert "yarn" not in str(caught.value)
    with pytest.raises(UserError, match="kind: yarn, factor: 2"):
        peftkit.make_plan(recipe, ["train.max_length=1000"])
