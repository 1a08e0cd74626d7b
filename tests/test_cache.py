from pathlib import Path

from peftkit.cache import cache_folder


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("PEFTKIT_CACHE", "/elsewhere")
    assert cache_folder() == Path("/elsewhere")
    monkeypatch.delenv("PEFTKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/peftkit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "peftkit"
