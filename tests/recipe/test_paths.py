import pytest

from peftkit.recipe import load
from peftkit.recipe.paths import is_data_path, is_glob, is_url, redact_url


@pytest.mark.parametrize(
    "text",
    [
        "rows.jsonl",
        "rows.ndjson",
        "ROWS.CSV",
        "rows.arrow",
        "notes.md",
        "rows.json.gz",
        "rows.csv.zst",
        "rows.bin.gz",
        "./folder",
        "~/folder",
        "/folder",
        "data/*",
        "data/**/part-?",
        "data/[ab]",
        "https://host/rows",
        "s3://bucket/rows/",
        "simplecache::s3://bucket/rows",
    ],
)
def test_what_is_a_path(text):
    assert is_data_path(text)


@pytest.mark.parametrize("text", ["org/name", "squad", "train[:10%]", "train[10:20]+test", ""])
def test_what_is_a_hub_id_or_a_split(text, tmp_path):
    assert not is_data_path(text)
    assert not is_data_path(text, tmp_path)


def test_a_folder_beside_the_recipe_is_a_path(tmp_path):
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert is_data_path("org/name", tmp_path)
    assert not is_data_path("org/name", tmp_path / "org")


def test_urls_and_globs():
    assert is_url("memory://rows.jsonl")
    assert not is_url("C:/rows.jsonl")
    assert is_glob("a/*.jsonl")
    assert not is_glob("a/b.jsonl")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("https://user:p@ss@host:1/a.jsonl?token=x#y", "https://host:1/a.jsonl"),
        ("http://user:pa/55word@host/a.jsonl", "http://host/a.jsonl"),
        ("hf://datasets/org/name@main/a.jsonl", "hf://datasets/org/name@main/a.jsonl"),
        ("cannot open https://u:p@host/a?b=c now", "cannot open https://host/a now"),
        ("zip://a.csv::https://u@host/a.zip?b", "zip://a.csv::https://host/a.zip"),
        ("data/what?.jsonl", "data/what?.jsonl"),
    ],
)
def test_no_secret_is_shown(text, said):
    assert redact_url(text) == said


def recipe(tmp_path, data):
    path = tmp_path / "r.yaml"
    path.write_text(f"base: org/model\nmethod: ia3\ndata: {data}\n")
    return load(path).recipe.data


def test_paths_are_made_absolute_and_urls_left_alone(tmp_path):
    (tmp_path / "rows").mkdir()
    data = recipe(tmp_path, "{train: [rows, 'a/*.csv', 'https://h/../x.jsonl', org/name, {path: ./b}]}")
    given = [source.path for source in data.sources]
    assert given == [str(tmp_path / "rows"), str(tmp_path / "a/*.csv"), "https://h/../x.jsonl", "org/name",
                     str(tmp_path / "b")]  # fmt: skip


def test_a_split_is_no_folder_that_is_called_so(tmp_path):
    (tmp_path / "test").mkdir()
    assert recipe(tmp_path, "{train: org/name, eval: test}").eval == "test"
    assert recipe(tmp_path, "{train: rows.jsonl, eval: test}").eval == str(tmp_path / "test")
    assert recipe(tmp_path, "{train: org/name, eval: {path: test}}").eval.path == str(tmp_path / "test")
    assert recipe(tmp_path, "{train: org/name, eval: 'train[90%:]'}").eval == "train[90%:]"
