import pytest

from peftkit.recipe import check_recipe, load
from peftkit.recipe.document import dump_text


def problems(method, **sections):
    source = {"base": "org/model", "method": method, "data": {"train": "x.jsonl"}, **sections}
    return [str(problem) for problem in check_recipe(load(source))]


@pytest.mark.parametrize(
    ("method", "sections", "said"),
    [
        ("prefix", {"train": {"gradient_checkpointing": True}}, "gradient_checkpointing"),
        ({"name": "qlora", "init": "pissa"}, {}, "4-bit"),
        ({"name": "lora", "lr_ratio": 16.0}, {"train": {"optimizer": "adafactor"}}, "LoRA+"),
        ({"name": "adalora"}, {"train": {"optimizer": "schedule_free_adamw"}}, "no ranks that are cut off"),
        ({"name": "lora", "lr_ratio": 4.0, "dora": True}, {}, "a ratio with dora"),
        ({"name": "lora", "init": "pissa", "dora": True}, {}, "would be lost"),
        ({"name": "lora", "init": "olora", "also_train": ["norms"]}, {}, "would be lost"),
        ({"name": "lora", "also_train": ["embeddings", {"tokens": ["a"]}]}, {}, "every token's row"),
        ("lora", {"train": {"batch_size": 8, "micro_batch": 3}}, "try micro_batch: 2"),
        ("lora", {"train": {"epochs": 1.0, "max_steps": 5}}, "epochs together with max_steps"),
        (
            "lora",
            {"data": {"train": "x.jsonl", "eval": None}, "train": {"early_stopping": {"patience": 2}}},
            "early stopping without data.eval",
        ),
        (
            "lora",
            {"data": {"train": "x.jsonl", "eval": None}, "evaluate": {"metric": "exact_match"}},
            "a metric without data.eval",
        ),
        ("lora", {"data": {"train": "x.jsonl", "eval": 0}, "evaluate": {"metric": "exact_match"}}, "a metric without"),
        ({"name": "prefix", "projection_hidden": 8}, {}, "a hidden size without projection"),
        ("lora", {"data": {"train": "x.txt", "format": "text", "mask": "completion"}}, "no completion"),
    ],
)
def test_conflicts_are_told(method, sections, said):
    found = problems(method, **sections)
    assert len(found) == 1
    assert said in found[0]


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "prefix", "ia3"])
def test_plain_methods_are_consistent(method):
    assert problems(method) == []


def test_a_setting_that_a_lower_layer_silences_is_told(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("base: o/m\nmethod: lora\ndata: {train: x.jsonl}\ntrain: {max_steps: 60}\n")
    [problem] = check_recipe(load(path, ["train.epochs=2"]))
    assert f"epochs together with max_steps ({path}:4)" in str(problem)
    assert check_recipe(load(path, ["train.epochs=2", "train.max_steps=null"])) == []


def test_what_was_accepted_is_accepted_again(tmp_path):
    """A resolved recipe is what resume reads: it must not hold what a later layer overruled."""
    path = tmp_path / "r.yaml"
    path.write_text("base: o/m\nmethod: lora\ndata: {train: x.jsonl}\ntrain: {epochs: 2}\n")
    loaded = load(path, ["train.max_steps=5"])
    (tmp_path / "resolved.yaml").write_text(dump_text(loaded.recipe.model_dump(mode="json", exclude_unset=True)))
    for again in (load(tmp_path / "resolved.yaml"), load(loaded.recipe), load(loaded.recipe, ["seed=1"])):
        assert check_recipe(again) == []
        assert again.recipe.train.max_steps == 5


def test_command_line_overrides_epochs_without_conflict(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("base: o/m\nmethod: lora\ndata: {train: x.jsonl}\ntrain: {epochs: 2}\n")
    assert check_recipe(load(path, ["train.max_steps=5"])) == []


def test_trusted_code_needs_a_commit_or_a_local_folder(tmp_path):
    def found(base):
        return problems("lora", base={"trust_remote_code": True, **base})

    commit = "0123456789" * 4
    for revision in ({}, {"revision": "main"}, {"revision": commit[1:]}):
        [told] = found({"id": "org/model", **revision})
        assert "a pinned commit, or a local folder" in told
        assert "set base.revision: COMMIT" in told
    assert found({"id": "org/model", "revision": commit}) == []
    assert found({"id": str(tmp_path)}) == []
