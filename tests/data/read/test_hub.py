import time

import datasets
import pytest

from peftkit.data.read.hub import dataset_from_rows, hub_key, hub_rows
from peftkit.errors import UserError
from peftkit.recipe.schema import Source


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def folder(tmp_path):
    """A dataset as it stands on the hub: two configs, one of them with two splits."""
    (tmp_path / "a.jsonl").write_text('{"text": "one", "day": null}\n{"text": "two", "day": null}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n')
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: train\n    path: a.jsonl\n"
        "  - split: test\n    path: b.jsonl\n- config_name: large\n  data_files: b.jsonl\n---\n"
    )
    return str(tmp_path)


def refuse(**source):
    with pytest.raises(UserError) as caught:
        list(hub_rows(Source(**source), "data.train"))
    return str(caught.value)


def test_rows_of_a_config_and_split(folder):
    found = list(hub_rows(Source(path=folder, config="small"), "data.train"))
    assert [(row.fields["text"], row.where) for row in found] == [
        ("one", f"{folder}[train] row 1"),
        ("two", f"{folder}[train] row 2"),
    ]
    [row] = hub_rows(Source(path=folder, config="small", split="test"), "data.train")
    assert row.fields == {"text": "three", "day": None}


def test_missing_configs_and_splits_are_told_with_those_there_are(folder):
    said = refuse(path=folder)
    assert "with no config, expected a config of small, large; for example config: small" in said
    said = refuse(path=folder, config="smal")
    assert "with the config smal, expected a config of small, large; did you mean small?" in said
    said = refuse(path=folder, config="small", split="tests")
    assert "with the split tests, expected a split of train, test; did you mean test?" in said


def test_the_key_follows_config_and_split(folder):
    keys = [
        hub_key(Source(path=folder, config=config, split=split), "")
        for config, split in (("small", "train"), ("small", "test"), ("large", "train"), ("small", "train"))
    ]
    assert keys[0] == keys[3]
    assert len(set(keys)) == 3
    assert all(len(key) == 64 for key in keys)


def test_a_hub_that_cannot_be_asked_is_told_at_once(monkeypatch):
    begun = time.perf_counter()
    assert "'org/name' while HF_HUB_OFFLINE is set" in refuse(path="org/name")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert "'org/name' while the hub cannot be reached" in refuse(path="org/name")
    assert time.perf_counter() - begun < 5


def test_whatever_else_the_library_says_is_passed_on(tmp_path):
    said = refuse(path=str(tmp_path))
    assert "doesn't contain any data files" in said
    assert "expected a dataset that can be read; check the name and split, or give a file" in said


def test_tokenized_rows_as_a_dataset():
    assert dataset_from_rows([{"input_ids": [1, 2]}, {"input_ids": []}])["input_ids"][:] == [[1, 2], []]
