import gzip
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest

from peftkit.data.read import content_key, read
from peftkit.data.read.locate import rows_of_file
from peftkit.data.read.remote import remote_files
from peftkit.errors import UserError
from peftkit.hub import cache_folder
from peftkit.recipe.schema import Source

ROWS = b'{"n": 1}\n{"n": 2}\n'


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


class Handler(BaseHTTPRequestHandler):
    """Answers as the server's `answers` say: path -> (headers, body)."""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        if self.path.split("?")[0] not in self.server.answers:
            self.send_error(404)
            return
        headers, body = self.server.answers[self.path.split("?")[0]]
        self.send_response(302 if "Location" in headers else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        for start in range(0, len(body), 2**16):
            self.wfile.write(body[start : start + 2**16])
            self.server.num_sent += len(body[start : start + 2**16])

    def log_message(self, *_):
        """Nothing on the terminal."""


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answers, server.asked, server.num_sent = {}, [], 0
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def refuse(url, **options):
    with pytest.raises(UserError) as caught:
        remote_files(url, "data.train", **options)
    return str(caught.value)


def rows(url):
    return [(row.fields["n"], row.where) for file in remote_files(url, "") for row in rows_of_file(file)]


def left_over():
    return [path for path in cache_folder().rglob("*") if path.name.startswith(".tmp")]


def test_a_file_is_fetched_once_and_again_when_it_changed(server):
    body = gzip.compress(ROWS, mtime=0)
    server.answers["/a.jsonl.gz"] = ({"ETag": '"1"', "Content-Length": len(body)}, body)
    url = f"{server.url}/a.jsonl.gz"
    assert rows(url) == [(1, f"{url}:1"), (2, f"{url}:2")]
    [first] = remote_files(url, "")
    stamp = first.path.stat().st_mtime_ns
    assert first.path.name == "content.jsonl.gz"
    assert remote_files(url, "")[0].path.stat().st_mtime_ns == stamp
    server.answers["/a.jsonl.gz"] = ({"ETag": '"2"', "Content-Length": len(body)}, body)
    assert remote_files(url, "")[0].path != first.path
    assert len(server.asked) == 4
    assert not left_over()


def test_a_file_that_nothing_is_known_of_is_fetched_each_time(server):
    server.answers["/a.jsonl"] = ({}, ROWS)
    assert len(rows(f"{server.url}/a.jsonl")) == 2
    server.answers["/a.jsonl"] = ({}, ROWS + b'{"n": 3}\n')
    assert len(rows(f"{server.url}/a.jsonl")) == 3


def test_passwords_and_queries_are_used_but_never_shown(server):
    server.answers["/a.jsonl"] = ({"ETag": "1"}, ROWS)
    server.answers["/moved.jsonl"] = ({"Location": f"{server.url}/a.jsonl"}, b"")
    secret = server.url.replace("://", "://user:hush@")
    for name in ("a.jsonl", "moved.jsonl"):
        assert rows(f"{secret}/{name}?token=hush")[0][1] == f"{server.url}/{name}:1"
    assert [asked[0] for asked in server.asked] == ["/a.jsonl?token=hush", "/moved.jsonl?token=hush", "/a.jsonl"]
    assert [bool(asked[1]) for asked in server.asked] == [True, True, False]
    for name in ("none.jsonl", "none.docx", "*.jsonl", "a b.jsonl"):
        assert "hush" not in refuse(f"{secret}/{name}?token=hush")
    source = Source(path=f"{secret}/none.jsonl?token=hush")
    with pytest.raises(UserError) as caught:
        read(source, where="data.train")
    assert "hush" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_what_a_web_server_may_answer(server):
    server.answers["/page.jsonl"] = ({"Content-Type": "text/html; charset=utf-8"}, b"<html>")
    server.answers["/half.jsonl"] = ({"Content-Length": "100"}, ROWS)
    assert "which is a web page" in refuse(f"{server.url}/page.jsonl")
    assert "18 of 100 bytes received" in refuse(f"{server.url}/half.jsonl", timeout=5)
    assert "HTTP Error 404" in refuse(f"{server.url}/none.jsonl")
    assert "a web server has no file list" in refuse(f"{server.url}/*.jsonl")
    assert "a file of a known kind" in refuse(f"{server.url}/a.docx")
    assert "Connection refused" in refuse("http://127.0.0.1:9/a.jsonl")
    assert not left_over()


@pytest.mark.parametrize(
    "sent", [b"", b"HTTP/1.1 200 OK\r\nETag: 1\r\nContent-Length: 100\r\n\r\n" + ROWS], ids=["nothing", "half"]
)
def test_a_server_that_stalls_is_given_up(sent):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            connection, _ = listener.accept()
            connections.append(connection)
            connection.sendall(sent)

        connections = []
        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http://user:hush@127.0.0.1:{listener.getsockname()[1]}/a.jsonl"
        begun = time.perf_counter()
        said = refuse(url, timeout=0.4)
        assert time.perf_counter() - begun < 2
        thread.join()
        connections[0].close()
    assert "/a.jsonl, which sent nothing for 0.4 s" in said
    assert "hush" not in said
    time.sleep(0.1)
    assert not left_over()


def test_a_slow_server_is_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            connection, _ = listener.accept()
            connection.recv(2**16)
            connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(ROWS)}\r\n\r\n".encode())
            for byte in ROWS:
                time.sleep(0.15)
                connection.sendall(bytes([byte]))
            connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.jsonl"
        [file] = remote_files(url, "", timeout=2.0)  # all of it takes longer
        thread.join()
    assert file.path.read_bytes() == ROWS


def test_other_filesystems_one_file_folders_and_globs(memory):
    for name in ("/d/b.jsonl", "/d/a.jsonl", "/d/deep/c.jsonl", "/d/README.md"):
        memory.pipe(name, ROWS)
    assert rows("memory://d/a.jsonl") == [(1, "memory://d/a.jsonl:1"), (2, "memory://d/a.jsonl:2")]
    found = [file.name for file in remote_files("memory://d", "")]
    assert found == ["memory:///d/a.jsonl", "memory:///d/b.jsonl", "memory:///d/deep/c.jsonl"]
    assert [file.name for file in remote_files("memory://d/*.jsonl", "")] == found[:2]
    assert [file.name for file in remote_files("memory://d/**/*.jsonl", "")][-1] == found[-1]
    assert "matches no file" in refuse("memory://d/*.csv")
    assert "which does not exist" in refuse("memory://d/none.jsonl")
    memory.pipe("/d/x.bin", b"")
    assert "with x.bin" in refuse("memory://d")


def test_other_filesystems_are_fetched_once(memory):
    memory.pipe("/a.jsonl", ROWS)
    [first], [second] = remote_files("memory://a.jsonl", ""), remote_files("memory://a.jsonl", "")
    assert first == second
    key = content_key(Source(path="memory://a.jsonl"), where="")
    memory.pipe("/a.jsonl", ROWS * 2)
    assert remote_files("memory://a.jsonl", "")[0].path != first.path
    assert content_key(Source(path="memory://a.jsonl"), where="") != key


def test_urls_of_local_files(tmp_path):
    (tmp_path / "a b.jsonl").write_bytes(ROWS)
    [file] = remote_files(f"file://{tmp_path}/a%20b.jsonl", "")
    assert file.path == tmp_path / "a b.jsonl"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("abfs://container/a.jsonl", "without the package that reads abfs://, expected the package; pip install adlfs"),
        ("htps://host/a.jsonl", "did you mean https?"),
        ("hf://datasets/org/name/a.jsonl", "while the hub cannot be reached"),
    ],
)
def test_protocols_that_cannot_be_read(url, said):
    assert said in refuse(url)
