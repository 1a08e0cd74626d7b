import os

import pytest

from peftkit.data.read.locate import READERS, local_files, rows_of_file
from peftkit.errors import UserError
from peftkit.recipe.paths import DATA_SUFFIXES


def names(path, split="train"):
    return [
        os.path.relpath(file.path, path.parent if path.is_file() else path)
        for file in local_files(str(path), split, "data.train")
    ]


def refuse(path, split="train"):
    with pytest.raises(UserError) as caught:
        local_files(str(path), split, "data.train")
    return str(caught.value)


def fill(folder, *paths):
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text('{"text": "x"}\n')
    return folder


def test_every_suffix_of_a_recipe_has_its_reader():
    assert tuple(READERS) == DATA_SUFFIXES


def test_a_folder_is_read_in_order_with_all_below(tmp_path):
    fill(tmp_path, "b.jsonl", "a/z.csv.gz", "a/c.txt", "a-b.md", ".cache/x.bin", "README.md", "LICENSE", "a/x.md5")
    assert names(tmp_path) == ["a/c.txt", "a/z.csv.gz", "a-b.md", "b.jsonl"]


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    fill(tmp_path / "data", "a.jsonl")
    fill(tmp_path / "else", "b.jsonl")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "else")
    (tmp_path / "data" / "self").symlink_to(tmp_path / "data")
    assert names(tmp_path / "data") == ["a.jsonl", "linked/b.jsonl"]


def test_strays_are_listed(tmp_path):
    fill(tmp_path, "a.jsonl", "notes.docx", "archive.tar.gz")
    said = refuse(tmp_path)
    assert said.startswith("data.train: got ")
    assert "with archive.tar.gz, notes.docx, expected only data files" in said
    fill(tmp_path, *(f"{number:02}.bin" for number in range(30)))
    assert "19.bin, 12 more" in refuse(tmp_path)
    fill(tmp_path / "empty", "README.md")
    assert "no data file" in refuse(tmp_path / "empty")


def test_globs(tmp_path):
    fill(tmp_path, "b.jsonl", "a.jsonl", "deep/er/c.jsonl", "a.csv", "[1].jsonl", "x.bin")
    assert [file.name for file in local_files(str(tmp_path / "*.jsonl"), "train", "")] == [
        str(tmp_path / name) for name in ("[1].jsonl", "a.jsonl", "b.jsonl")
    ]
    assert len(local_files(str(tmp_path / "**" / "*.jsonl"), "train", "")) == 4
    assert [file.path.name for file in local_files(str(tmp_path / "[1].jsonl"), "train", "")] == ["[1].jsonl"]
    assert "matches no file" in refuse(tmp_path / "*.parquet")
    assert "x.bin" in refuse(tmp_path / "*")
    hidden = fill(tmp_path / ".hidden", "a.jsonl")
    assert len(local_files(str(hidden / "*.jsonl"), "train", "")) == 1


def test_what_is_no_data_file(tmp_path):
    fill(tmp_path, "a.docx")
    assert "a file of a known kind: .jsonl" in refuse(tmp_path / "a.docx")
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "a pipe or a device" in refuse(tmp_path / "pipe.jsonl")
    assert "which does not exist" in refuse(tmp_path / "none")


def test_folders_of_save_to_disk(tmp_path):
    import datasets

    train, held = (datasets.Dataset.from_dict({"text": [name] * 3}) for name in ("train", "test"))
    train.save_to_disk(tmp_path / "one", num_shards=2)
    (tmp_path / "one" / "cache-1.arrow").write_bytes(b"left by a map")
    assert names(tmp_path / "one") == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    datasets.DatasetDict(train=train, test=held).save_to_disk(tmp_path / "both")
    [file] = local_files(str(tmp_path / "both"), "test", "")
    assert [row.fields for row in rows_of_file(file)] == [{"text": "test"}] * 3
    assert "expected one of test, train; did you mean test?" in refuse(tmp_path / "both", "tests")


def test_a_file_that_may_not_be_read(tmp_path):
    fill(tmp_path, "a.jsonl")
    [file] = local_files(str(tmp_path / "a.jsonl"), "train", "")
    file.path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        list(rows_of_file(file))


def test_a_name_that_no_file_can_have_is_not_there():
    for path in ("./" + "x" * 5000, "/" + "x" * 5000, "*/" + "x" * 5000):
        with pytest.raises(UserError, match=r"which does not exist|matches no file"):
            local_files(path, "train", "data.train")
