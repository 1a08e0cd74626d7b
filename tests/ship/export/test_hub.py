"""Pushing with the real client, in processes of their own, to a hub of this machine."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from safetensors.numpy import save_file

from peftkit.rundir import publish_folder
from tests.conftest import ROOT
from tests.rigs.hub_server import running_hub

TOKEN = "hf_" + "Zq7w" * 9  # of the shape of a real one
READER = "hf_" + "Rd5k" * 9
CARD = "---\nlicense: mit\ntags:\n- peftkit\n---\n\n# One\n"


@pytest.fixture
def hub():
    with running_hub() as server:
        server.users = {TOKEN: "me", READER: "reader"}
        yield server


@pytest.fixture
def folder(tmp_path):
    """An adapter's folder with its manifest."""
    import numpy

    with publish_folder(tmp_path / "adapter") as made:
        save_file({"w": numpy.ones(300, "float32")}, made / "adapter_model.safetensors")
        (made / "adapter_config.json").write_text('{"base_model_name_or_path": "/srv/base"}')
        (made / "README.md").write_text(CARD)
    return tmp_path / "adapter"


class Client:
    """A home with a login, as `hf auth login` leaves it, and programs that run in it."""

    def __init__(self, home, url, token):
        home.mkdir()
        if token:
            (home / "token").write_text(token)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        self.home = home
        self.environment = {
            **kept,
            "HF_HOME": str(home),
            "HF_ENDPOINT": url,
            "HF_HUB_DISABLE_XET": "1",  # the LFS route: xet's binary protocol has no server here
            "HF_DEBUG": "1",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "no_proxy": "*",
        }
        self.told = ""

    def start(self, program, **more):
        """What a program prints; all that it writes is kept in `told`."""
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            env={**self.environment, **more},
            cwd=self.home,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        self.told += done.stdout + done.stderr
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(self, program, **more):
        """The JSON lines that a program prints."""
        lines = self.start(program, **more).splitlines()
        return [json.loads(line) for line in lines if line and line[0] in '["0123456789']

    def push(self, folder, *repos, **more):
        """For each repository, and its options: the URL, or the message; and what was told."""
        program = f"""
            import json
            from pathlib import Path
            from peftkit.errors import UserError
            from peftkit.ship.export.hub import push_folder as push
            for repo, options in {[one if isinstance(one, tuple) else (one, {}) for one in repos]!r}:
                told = []
                try:
                    said = push(Path({str(folder)!r}), repo, tell=told.append, **options)
                except UserError as error:
                    assert error.__cause__ is None and error.__context__ is None
                    said = str(error)
                print(json.dumps([said, told]))
        """
        return self.run(program, **more)

    def refuse_secrets(self):
        """No token in what was printed, nor in any file but the one that the login wrote."""
        files = [path for path in self.home.rglob("*") if path.is_file() and path != self.home / "token"]
        for text in [self.told, *(path.read_bytes().decode("latin-1") for path in files)]:
            assert TOKEN not in text
            assert READER not in text


@pytest.fixture
def client(tmp_path, hub):
    found = Client(tmp_path / "home", hub.url, TOKEN)
    yield found
    found.refuse_secrets()


def test_a_folder_is_pushed_in_one_commit_and_comes_back_as_it_was(client, hub, folder, tmp_path):
    (folder / "script.py").write_text("print(1)")
    first, again, branch = client.push(folder, "me/one", "me/one", ("me/one", {"revision": "v2"}))
    repo = hub.repos["me/one"]
    assert first == [f"{hub.url}/me/one/commit/{repo.refs['main']}", TOLD]
    assert again[0] == first[0], "the same files are no second commit"
    assert branch[0] == first[0], "nor are they on a new branch"
    assert repo.private
    assert len([path for path in hub.paths("POST") if "/commit/" in path]) == 1
    pushed = {path: content for path, content in repo.at("main")[1].items() if path != ".gitattributes"}
    assert pushed == {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".py"}
    assert hub.paths("PUT"), "weights go through LFS"
    [[back]] = client.run(
        """
        import json, huggingface_hub
        print(json.dumps([huggingface_hub.snapshot_download("me/one", revision="v2")]))
        """
    )
    weights = "adapter_model.safetensors"
    assert (tmp_path / "home" / back / weights).read_bytes() == (folder / weights).read_bytes()
    tokens = {token for method, path, token, _ in hub.asked if path.startswith(("/put/", "/cdn/"))}
    assert tokens == {""}, "storage on another host never gets the token"
    assert {token for _, path, token, _ in hub.asked if "/me/one" in path} == {TOKEN}
    assert "HEAD" in client.told or "curl" in client.told, "the client's own log was looked at"


TOLD = [
    "not pushed, as their type is not allowed: script.py",
    "adapter_config.json names its base by a path, /srv/base: others cannot load it, and it reveals your folders",
]


def test_what_the_hub_refuses_is_told_with_what_to_do(client, hub, folder):
    hub.add("me/public", {"a.md": b""})
    hub.add("me/hidden", {"a.md": b""}, private=True)
    (owner, _), (public, _), (odd, _), (opened, told) = client.push(
        folder, "you/one", "me/public", "me/no spaces/x", ("me/hidden", {"private": False})
    )
    assert "no permission to write to you/one, expected a token that may write there" in owner
    assert "choose a name under your own account" in owner
    assert "me/public, which is public, expected a private repository" in public
    assert "'me/no spaces/x', expected a repository's name as owner/name" in odd
    assert told == [TOLD[1], "me/hidden exists and stays private"]
    assert opened.startswith(f"{hub.url}/me/hidden/commit/")
    assert list(hub.repos["me/public"].at("main")[1]) == ["a.md"], "nothing came to the public one"
    [[reader, _]] = client.push(folder, "reader/one", HF_TOKEN=READER)
    assert "no permission to write to reader/one" in reader
    [[invalid, _]] = client.push(folder, "me/two", HF_TOKEN="hf_" + "Un8n" * 9)
    assert "a login that the Hub rejects, expected a valid token; hf auth login" in invalid
    assert "Un8n" not in client.told


def test_without_a_login_a_network_or_permission_to_ask(client, hub, folder):
    (client.home / "token").rename(client.home / "kept")
    [[out, _]] = client.push(folder, "me/one")
    (client.home / "kept").rename(client.home / "token")
    assert out == ("hub: got no login, expected a Hugging Face login; hf auth login, with a write token")
    [[offline, _]] = client.push(folder, "me/one", HF_HUB_OFFLINE="1")
    assert offline == (
        "hub: got me/one while HF_HUB_OFFLINE is set, expected online access to the Hub; unset it to push"
    )
    [[dead, _]] = client.push(folder, "me/one", HF_ENDPOINT="http://127.0.0.1:9")
    assert "http://127.0.0.1:9, which cannot be reached, expected a Hub that answers" in dead
    assert hub.asked == []


@pytest.mark.parametrize("part", ["/put/", "/commit/", "/objects/batch"])
def test_a_push_that_breaks_leaves_nothing_behind(client, hub, folder, part):
    hub.broken = {part: 400}
    [[said, _]] = client.push(folder, "me/one")
    assert "a push to me/one that failed" in said
    assert "broken on purpose" in said
    assert list(hub.repos["me/one"].at("main")[1]) == [".gitattributes"]
    hub.broken = {}
    assert client.push(folder, "me/one")[0][0].startswith(f"{hub.url}/me/one/commit/")


def test_a_failure_of_the_xet_client_is_told_as_well(client, hub, folder):
    """Large files go there by default; hf_xet raises errors of its own, and asks for a token of its own."""
    [[said, _]] = client.push(folder, "me/one", HF_HUB_DISABLE_XET="")
    assert "/api/models/me/one/xet-write-token/main" in hub.paths("GET")
    assert "a push to me/one that failed (Network error" in said
    assert list(hub.repos["me/one"].at("main")[1]) == [".gitattributes"]


def test_a_card_that_the_hub_does_not_take(client, hub, folder):
    (folder / "MANIFEST.json").unlink()
    (folder / "README.md").write_text("---\ntags: one\n---\n")
    [[said, _]] = client.push(folder, "me/one")
    assert '"tags" is of a wrong type' in said
    assert list(hub.repos["me/one"].at("main")[1]) == [".gitattributes"]


def refuse(folder):
    from peftkit.errors import UserError
    from peftkit.ship.export.hub import push_folder

    with pytest.raises(UserError) as caught:
        push_folder(folder, "me/one")
    return str(caught.value)


def test_what_must_not_leave(folder, tmp_path):
    """Before anything is asked: these tests run offline."""
    assert "while HF_HUB_OFFLINE is set" in refuse(folder)
    weights, whole = folder / "adapter_model.safetensors", (folder / "adapter_model.safetensors").read_bytes()
    weights.write_bytes(whole[:-4])
    (folder / "training_args.bin").write_bytes(b"\x80")
    (folder / "notes.md").write_text(f"with {TOKEN}")
    (tmp_path / "elsewhere.txt").write_text("mine")
    (folder / "link.txt").symlink_to(tmp_path / "elsewhere.txt")
    said = refuse(folder)
    assert TOKEN not in said
    for part in (
        f"{folder}/training_args.bin: got a pickled file, expected safetensors",
        f"{folder}/link.txt: got a link to a file outside the folder",
        f"{folder}/notes.md: got a text file with a secret",
        "adapter_model.safetensors has 1268 bytes, not 1272",
        "damaged weights (Error while deserializing header",
    ):
        assert part in said, said
    assert "no folder" in refuse(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "no weights" in refuse(tmp_path / "empty")
