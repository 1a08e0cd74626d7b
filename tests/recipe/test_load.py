import time
from pathlib import Path

import numpy as np
import pytest

from peftkit.errors import UserError
from peftkit.recipe import check_recipe, load, override_texts
from peftkit.recipe.document import dump_text


def write(path, text):
    path.write_text(text)
    return path


GOOD = "base: org/model\nmethod:\n  name: lora\n  rank: 8\ndata:\n  train: rows.jsonl\n"


def refuse(source, overrides=()):
    with pytest.raises(UserError) as caught:
        load(source, overrides)
    return caught.value


def test_short_forms_and_defaults(tmp_path):
    loaded = load(write(tmp_path / "r.yaml", "base: org/model\nmethod: ia3\ndata: {train: rows.jsonl}\n"))
    assert loaded.recipe.base.id == "org/model"
    assert loaded.recipe.method.name == "ia3"
    assert loaded.recipe.train.epochs == 3.0


def test_paths_are_relative_to_the_file_that_states_them(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "base.yaml", GOOD)
    child = write(tmp_path / "sub" / "child.yaml", "extends: ../base.yaml\ndata:\n  eval: held.jsonl\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = load(child, ["data.train=here.jsonl"]).recipe
    assert recipe.data.train == [str(tmp_path / "elsewhere" / "here.jsonl")]
    assert recipe.data.eval == str(tmp_path / "sub" / "held.jsonl")
    assert load(child).recipe.data.train == [str(tmp_path / "rows.jsonl")]


def test_sources_tell_file_line_and_layer(tmp_path):
    write(tmp_path / "base.yaml", GOOD)
    child = write(tmp_path / "child.yaml", "extends: base.yaml\nmethod:\n  rank: 32\n")
    loaded = load(child, ["seed=7"])
    assert str(loaded.source(("method", "rank"))) == f"{child}:3"
    assert str(loaded.source(("method", "name"))) == f"{tmp_path / 'base.yaml'}:3 (extends)"
    assert str(loaded.source(("seed",))) == "command line"
    assert loaded.source(("train", "epochs")) is None
    assert loaded.recipe.method.rank == 32


def test_another_method_replaces_the_inherited_section(tmp_path):
    write(tmp_path / "base.yaml", GOOD)
    child = write(tmp_path / "child.yaml", "extends: base.yaml\nmethod: {name: prefix, virtual_tokens: 5}\n")
    assert load(child).recipe.method.virtual_tokens == 5
    assert load(child, ["method=full"]).recipe.method.name == "full"


def test_circles_and_missing_parents(tmp_path):
    write(tmp_path / "a.yaml", "extends: b.yaml\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    assert "a.yaml -> b.yaml -> a.yaml" in str(refuse(tmp_path / "a.yaml"))
    write(tmp_path / "c.yaml", "extends: nowhere.yaml\n")
    assert "c.yaml:1 extends" in str(refuse(tmp_path / "c.yaml"))
    write(tmp_path / "d.yaml", "extends: [a.yaml]\n")
    assert "the path of a recipe" in str(refuse(tmp_path / "d.yaml"))


def test_errors_name_file_line_key_got_expected_and_fix(tmp_path):
    path = write(tmp_path / "r.yaml", GOOD.replace("rank: 8", "rank: -8"))
    [problem] = refuse(path).problems
    assert problem.where == f"{path}:4 method.rank"
    assert problem.got == "-8"
    assert problem.expected == "auto or a number greater than 0"
    assert problem.fix == "try rank: auto"


def test_all_problems_at_once(tmp_path):
    text = (
        "base: org/model\nmethod:\n  name: lora\n  rnk: 8\n  dropout: two\ndata:\n  trian: x.jsonl\n"
        "train:\n  learning_rat: 1\n  epochs: -1\n"
    )
    said = str(refuse(write(tmp_path / "r.yaml", text)))
    for expected in (
        "r.yaml:4 method.rnk",
        "did you mean rank?",
        "r.yaml:5 method.dropout",
        "'two'",
        "data.train: got nothing",
        "did you mean train?",
        "r.yaml:9 train.learning_rat",
        "did you mean learning_rate?",
        "r.yaml:10 train.epochs",
    ):
        assert expected in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("method.rank='16'", "got '16', expected auto or an integer"),
        ("method.rank=true", "got true, expected auto or an integer"),
        ("method.rank=1.5", "got 1.5, expected auto or an integer"),
        ("method.name=lroa", "did you mean lora?"),
        ("method=lroa", "did you mean lora?"),
        ("rank=8", "method.rank"),
        ("train.precision=bf61", "did you mean bf16?"),
        ("train.learning_rate=fast", "expected auto or a number"),
        ("train.gradient_checkpointing=maybe", "expected auto or true or false"),
        ("data.mask=answers", "completion"),
        ("train=5", "expected a mapping"),
        ("method.targets=3", "text or a list"),
        ("nonsense", "expected key=value"),
        ("=3", "expected key=value"),
        ("data.eval=150%", "not a percentage"),
    ],
)
def test_wrong_values_on_the_command_line(tmp_path, override, said):
    assert said in str(refuse(write(tmp_path / "r.yaml", GOOD), [override]))


def test_overrides_may_come_in_any_order(tmp_path):
    path = write(tmp_path / "r.yaml", GOOD)
    for overrides in (["method.rank=64", "method=qlora"], ["method=qlora", "method.rank=64"]):
        assert (load(path, overrides).recipe.method.name, load(path, overrides).recipe.method.rank) == ("qlora", 64)


@pytest.mark.parametrize(
    "override",
    [
        "train.epochs=.inf",
        "train.learning_rate=.inf",
        "train.learning_rate=.nan",
        "seed=4294967296",
        "data.train=[]",
        "method.targets=[]",
    ],
)
def test_absurd_values_are_refused(tmp_path, override):
    assert refuse(write(tmp_path / "r.yaml", GOOD), [override]).problems


def test_missing_sections_are_named(tmp_path):
    said = str(refuse(write(tmp_path / "r.yaml", "seed: 1\n")))
    for section in ("base", "method", "data"):
        assert f"{section}: got nothing" in said
    assert "no method.name" in str(refuse(write(tmp_path / "s.yaml", GOOD.replace("  name: lora\n", ""))))


def test_dicts_and_recipes_load_too(tmp_path):
    source = {"base": "org/model", "method": "full", "data": {"train": str(tmp_path / "x.jsonl")}}
    loaded = load(source)
    assert load(loaded.recipe).recipe == loaded.recipe
    assert source["base"] == "org/model"


def test_values_of_python_are_read_as_yaml_would_hold_them():
    values = {
        "base": Path("org/model"),
        "method": {"name": "lora", "targets": {"q_proj", "k_proj"}},
        "data": {"train": ("x.jsonl", Path("y.jsonl"))},
        "train": {"learning_rate": np.float32(0.5)},
    }
    overrides = {"method": {"rank": np.int64(4)}, "train.max_steps": np.array(7), "data.chat.system": "1e5"}
    recipe = load(values, override_texts(overrides)).recipe
    assert recipe.method.targets == ["k_proj", "q_proj"]
    assert (recipe.train.learning_rate, recipe.train.max_steps, recipe.method.rank) == (0.5, 7, 4)
    assert recipe.data.chat.system == "1e5"
    with pytest.raises(UserError, match="a value that YAML can hold"):
        override_texts({"train.max_steps": object()})


@pytest.mark.parametrize(
    ("settings", "override", "left"),
    [
        ({"epochs": 2}, "max_steps=10", {"max_steps": 10}),
        ({"schedule": {"warmup": 0.1}}, "schedule.warmup_steps=10", {"schedule": {"warmup_steps": 10}}),
        ({"schedule": {"warmup_steps": 9}}, "schedule.warmup=0.1", {"schedule": {"warmup": 0.1}}),
        ({"schedule": {"kind": "wsd", "decay": 0.2}}, "schedule.kind=linear", {"schedule": {"kind": "linear"}}),
        (
            {"schedule": {"kind": "wsd", "min_rate": 0.2}},
            "schedule.kind=cosine",
            {"schedule": {"kind": "cosine", "min_rate": 0.2}},
        ),
    ],
    ids=str,
)
def test_a_later_layer_overrules_what_its_setting_replaces(tmp_path, settings, override, left):
    path = write(tmp_path / "r.yaml", GOOD + dump_text({"train": settings}))
    loaded = load(path, [f"train.{override}"])
    assert loaded.recipe.train.model_dump(exclude_unset=True) == left
    assert not list(check_recipe(loaded))


def test_shipped_recipes_load_by_name():
    assert load("quickstart").recipe.base.id == "embedded:smollm2-135m-instruct"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base": "./a\0b"}, "python base.id: got the character U+0000"),
        ({"base": "./\ud800"}, "python base.id: got the character U+D800"),
        ({"data": {"train": "x.jsonl", "columns": {"\udc00": "a"}}}, "got the character U+DC00"),
        ({"seed": 10**5000}, "python seed: got a number of about 5,000 digits"),
        ({"train": {"learning_rate": 10**400}}, "got a number of about 400 digits"),
    ],
)
def test_values_that_fuzzing_found_are_refused(changes, said):
    with pytest.raises(UserError) as caught:
        load({"base": "org/model", "method": "lora", "data": {"train": "x.jsonl"}, **changes})
    assert said in str(caught.value)
    str(caught.value).encode()


def test_names_that_no_file_can_have():
    long = "x" * 5000
    for name in (long, "a\0b", f"{long}.yaml"):
        with pytest.raises(UserError):
            load(name)
    recipe = {"base": f"./{long}", "method": "lora", "data": {"train": f"./{long}"}}
    assert load(recipe).recipe.base.id.endswith(long)  # to be told by those who look for it


def test_extends_of_long_names_and_long_chains_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text(f"extends: {'x' * 5000}")
    with pytest.raises(UserError, match="which does not exist"):
        load(tmp_path / "a.yaml")
    for number in range(100):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml")
    with pytest.raises(UserError, match="more than 50 recipes"):
        load(tmp_path / "0.yaml")


def test_overrides_of_many_parts_are_refused():
    recipe = {"base": "org/model", "method": "lora", "data": {"train": "x.jsonl"}}
    with pytest.raises(UserError, match="a key of 3000 parts"):
        load(recipe, [".".join("a" * 3000) + "=1"])
    with pytest.raises(UserError) as caught:
        load(recipe, ["base=\ud800", "\ud800=1", "seed=!!int 1"])
    str(caught.value).encode()
    circle = {}
    circle["a"] = circle
    with pytest.raises(UserError, match="too deep"):
        load({**recipe, "train": circle})


def test_thousands_of_keys_are_merged_at_once(tmp_path):
    columns = {f"key{number}": "value" for number in range(4000)}
    (tmp_path / "a.yaml").write_text(dump_text({"base": "org/model", "data": {"columns": columns}}))
    more = {"extends": "a.yaml", "method": "lora", "data": {"train": "x", "columns": {**columns, "key9": "b"}}}
    (tmp_path / "b.yaml").write_text(dump_text(more))
    begin = time.monotonic()
    loaded = load(tmp_path / "b.yaml")
    assert time.monotonic() - begin < 8
    assert loaded.recipe.data.columns == {**columns, "key9": "b"}
    assert loaded.where(("data", "columns", "key9")).startswith(str(tmp_path / "b.yaml"))
    assert loaded.where(("base", "id")).startswith(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("kind", [{"a": 1}, ["cosine"], 3, None])
def test_a_kind_of_schedule_that_is_no_word_is_refused_in_words(kind):
    recipe = {"base": "org/model", "method": "lora", "data": {"train": "x"}, "train": {"schedule": {"kind": kind}}}
    with pytest.raises(UserError) as caught:
        load(recipe, ["train.epochs=2"])
    assert [problem.where for problem in caught.value.problems] == ["python train.schedule.kind"]
