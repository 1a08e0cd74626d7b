import socket
from pathlib import Path

from peftkit.hub import cache_folder, hub_is_offline, hub_is_reachable, probe_hub


def test_whether_the_hub_answers(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert hub_is_offline()
        assert not probe_hub()
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        assert not hub_is_offline()
        assert probe_hub()
        assert hub_is_reachable()
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert not hub_is_reachable()
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert not probe_hub()
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    assert probe_hub()


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("PEFTKIT_CACHE", "/elsewhere")
    assert cache_folder() == Path("/elsewhere")
    monkeypatch.delenv("PEFTKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/peftkit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "peftkit"
