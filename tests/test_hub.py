import socket
from pathlib import Path

from peftkit.hub import cache_folder, hub_answers, hub_is_off, hub_is_there


def test_whether_the_hub_answers(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert hub_is_off()
        assert not hub_answers()
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        assert not hub_is_off()
        assert hub_answers()
        assert hub_is_there()
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert not hub_is_there()
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert not hub_answers()
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    assert hub_answers()


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("PEFTKIT_CACHE", "/elsewhere")
    assert cache_folder() == Path("/elsewhere")
    monkeypatch.delenv("PEFTKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/peftkit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "peftkit"
