import pytest

from peftkit.data.rows import cache


@pytest.fixture(autouse=True)
def _own(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path))


def keep(key, text, size=1):
    with cache.new_entry("rows", key) as folder:
        (folder / "a").write_text(text * size)
        return cache.publish_entry(folder, "rows", key, {"text": text})


def test_a_key_follows_from_every_part():
    assert cache.content_key(a=1, b=[2]) == cache.content_key(b=[2], a=1)
    assert cache.content_key(a=1) != cache.content_key(a=2)


def test_what_is_published_is_found_whole():
    assert cache.find_entry("rows", "k") is None
    folder = keep("k", "x")
    found, meta = cache.find_entry("rows", "k")
    assert (found, meta["text"]) == (folder, "x")


def test_what_was_cut_is_made_again():
    (keep("k", "xyz") / "a").write_text("x")
    assert cache.find_entry("rows", "k") is None
    keep("k", "xyz")
    assert cache.find_entry("rows", "k") is not None


def test_nothing_is_left_of_what_failed(tmp_path):
    with pytest.raises(ValueError, match="no"), cache.new_entry("rows", "k"):
        raise ValueError("no")
    assert list((tmp_path / "rows").iterdir()) == []


def test_the_second_of_two_that_make_the_same_is_as_good():
    first = keep("k", "x")
    assert keep("k", "x") == first


def test_the_least_recently_used_go_first(monkeypatch):
    import os

    monkeypatch.setattr(cache, "_MAX_BYTES", 2500)
    for number, key in enumerate(("one", "two")):
        os.utime(keep(key, "x", 1000), (number, number))
    cache.find_entry("rows", "one")  # used
    keep("three", "x", 1000)
    assert cache.find_entry("rows", "two") is None
    assert cache.find_entry("rows", "one") is not None


def test_a_cache_that_cannot_be_written_is_a_temporary_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "file"))
    cache._temporary_root.cache_clear()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = keep("k", "x")
    cache._temporary_root.cache_clear()
    assert folder.is_relative_to(tmp_path)
    assert folder.parent.stat().st_mode & 0o077 == 0
