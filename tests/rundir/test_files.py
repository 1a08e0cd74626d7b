import errno
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkit.errors import UserError
from peftkit.rundir import (
    MANIFEST,
    is_disk_full,
    publish_folder,
    read_sealed,
    verify_folder,
    verify_sealed,
    write_sealed,
)
from peftkit.rundir.files import remove_leftovers

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text().filter(lambda key: key != "sha256"), values, max_size=4))
def test_a_sealed_value_comes_back_and_any_change_shows(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("sealed") / "plan.json"
    write_sealed(path, value)
    assert read_sealed(path) == value
    path.write_text(json.dumps({**json.loads(path.read_text()), "more": 1}))
    assert verify_sealed(path) == ["plan.json was changed after it was written"]
    with pytest.raises(UserError, match="changed after it was written"):
        read_sealed(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"sha256": 3}', "null"])
def test_a_broken_seal_is_told(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    assert verify_sealed(tmp_path / "plan.json")
    assert verify_sealed(tmp_path / "absent.json") == ["absent.json is missing"]


def test_what_the_disk_gives_back_is_compared_with_what_was_in_memory(tmp_path):
    with (
        pytest.raises(OSError, match="does not give back what was written"),
        publish_folder(tmp_path / "step", known_hashes={"w": "0" * 64}) as staging,
    ):
        (staging / "w").write_text("not what was hashed")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside"])
def test_a_manifest_that_names_files_elsewhere_is_not_believed(tmp_path, name):
    folder = tmp_path / "step"
    folder.mkdir()
    (tmp_path / "outside").write_text("x")
    entry = {"size_bytes": 1, "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}
    (folder / MANIFEST).write_text(json.dumps({"files": {name: entry}}))
    assert "has no hash" in verify_folder(folder)[0]
    write_sealed(folder / MANIFEST, {"files": {name: entry}})
    assert "names a file elsewhere" in verify_folder(folder)[0]


def test_a_link_is_no_file_of_a_checkpoint(tmp_path):
    with publish_folder(tmp_path / "step") as staging:
        (staging / "w").write_text("x")
    (tmp_path / "step" / "w").rename(tmp_path / "w")
    (tmp_path / "step" / "w").symlink_to(tmp_path / "w")
    assert verify_folder(tmp_path / "step") == ["step/w is missing"]


@pytest.mark.parametrize(
    "text", ['{"files": []}', '{"files": {"a": 3}}', '{"files": {"a": {"size_bytes": "x"}}}', "[]", "\x00"]
)
def test_a_manifest_of_another_shape_is_unreadable(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    assert "unreadable" in verify_folder(tmp_path)[0]


def test_leftovers_are_swept_and_links_are_not_followed(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "keep").write_text("me")
    run = tmp_path / "run"
    (run / ".tmp-step-000001-abcd_123").mkdir(parents=True)
    (run / ".tmp-plan.json-abcdefg0").write_text("half")
    (run / ".tmp-adapter-abcdefg0").symlink_to(mine)
    (run / "step-000001").mkdir()
    assert len(remove_leftovers(run)) == 3
    assert [path.name for path in run.iterdir()] == ["step-000001"]
    assert (mine / "keep").read_text() == "me"


def test_no_room_is_told_from_other_faults():
    assert all(is_disk_full(OSError(number, "")) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
    assert not is_disk_full(OSError(errno.EIO, ""))
    assert not is_disk_full(ValueError())
    assert not is_disk_full(FileNotFoundError(errno.ENOENT, "", str(Path("x"))))
