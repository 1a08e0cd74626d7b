"""A base by its hub id: gated, pinned, offline; with the real client and a hub of this machine."""

import json
import subprocess
import sys

import pytest

from tests.conftest import TINY_LLAMA, chat, write_jsonl
from tests.rigs.hub_server import running_hub
from tests.ship.export.test_hub import READER, TOKEN, Client

CARD = b"---\nlicense: apache-2.0\n---\n# Tiny\n"


@pytest.fixture
def hub():
    with running_hub() as server:
        server.users = {TOKEN: "me", READER: "reader"}
        files = {path.name: path.read_bytes() for path in TINY_LLAMA.iterdir()}
        server.add("org/tiny", {**files, "README.md": CARD})
        server.add("org/gated", files, gated=True, granted={"me"})
        server.add("org/notes", {"README.md": CARD})
        yield server


@pytest.fixture
def client(tmp_path, hub):
    found = Client(tmp_path / "home", hub.url, "")
    found.environment["PEFTKIT_CACHE"] = str(tmp_path / "cache")
    yield found
    found.refuse_secrets()


INSPECT = """
    import json
    from peftkit import api
    from peftkit.errors import UserError
    for model, revision in {models!r}:
        try:
            found = api.inspect_model(model, revision=revision)
            print(json.dumps(found.family))
        except UserError as error:
            print(json.dumps(str(error)))
"""


def inspect(client, *models, **more):
    return client.run(INSPECT.format(models=models), **more)


def test_a_base_by_its_id_and_what_may_be_wrong_with_it(client, hub):
    old = hub.repos["org/tiny"].refs["main"]
    hub.repos["org/tiny"].commit({"config.json": b"{}"})
    found, changed, gated, missing, revision, other = inspect(
        client,
        ("org/tiny", old),
        ("org/tiny", None),
        ("org/gated", None),
        ("org/none", None),
        ("org/tiny", "v9"),
        ("org/notes", None),
    )
    assert found == "Llama"
    assert "no model_type" in changed or "model_type" in changed
    assert "'org/gated', which is gated, and you have no access" in gated
    assert "accept its licence on its hub page and log in (hf auth login)" in gated
    assert "'org/none', which the hub does not have, or which is private" in missing
    assert "which has no revision 'v9'" in revision
    assert "which has no config.json" in other
    assert inspect(client, ("org/gated", None), HF_TOKEN=READER)[0] == gated, "logged in, and not granted"
    assert inspect(client, ("org/gated", None), HF_TOKEN=TOKEN) == ["Llama"]


def test_offline_is_served_from_the_cache_or_said(client, hub):
    assert inspect(client, ("org/tiny", None)) == ["Llama"]
    num_asked = len(hub.asked)
    cached, missing = inspect(client, ("org/tiny", None), ("org/gated", None), HF_HUB_OFFLINE="1")
    assert cached == "Llama"
    assert "which is not in the cache while HF_HUB_OFFLINE is set" in missing
    assert len(hub.asked) == num_asked
    dead = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    cached, missing = inspect(client, ("org/tiny", None), ("org/gated", None), **dead)
    assert cached == "Llama"
    assert "which is not in the cache while the hub cannot be reached" in missing


FINETUNE = """
    import json
    from pathlib import Path
    import peftkit
    from peftkit.errors import UserError
    try:
        print(json.dumps(peftkit.finetune({recipe!r}, out={out!r}).num_steps))
    except UserError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture
def recipe(tmp_path):
    chats = write_jsonl(tmp_path / "chats.jsonl", [chat(f"Say a {i}", "a a") for i in range(24)])
    return {
        "base": "org/gated",
        "method": {"name": "lora", "rank": 4},
        "data": {"train": str(chats), "eval": "25%"},
        "train": {"max_steps": 4, "batch_size": 4, "micro_batch": 2, "max_length": 64, "eval_steps": 2},
    }


@pytest.mark.slow
def test_a_base_of_which_only_the_configuration_is_in_the_cache(client, recipe):
    assert inspect(client, ("org/gated", None), HF_TOKEN=TOKEN) == ["Llama"]
    program = FINETUNE.format(recipe=recipe, out="run")
    [gated] = client.run(program)
    assert "You are trying to access a gated repo" in gated
    assert "accept its licence on its hub page and log in (hf auth login)" in gated
    [offline] = client.run(program, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set, and the cache may lack some of its files" in offline
    [unreachable] = client.run(program, HF_ENDPOINT="http://127.0.0.1:9")
    assert "the hub cannot be reached, and the cache may lack some of its files" in unreachable


@pytest.mark.slow
def test_a_cached_base_trains_without_a_hub_and_without_waiting_for_it(client, hub, recipe):
    """transformers retries each file for half a minute where nobody answers: it took minutes here."""
    assert client.run(FINETUNE.format(recipe=recipe, out="one"), HF_TOKEN=TOKEN) == [4]
    assert [path for path in hub.paths("GET") if path.startswith("/cdn/")]
    assert not [path for _, path, _, _ in hub.asked if "telemetry" in path]
    num_asked = len(hub.asked)
    assert client.run(FINETUNE.format(recipe=recipe, out="two"), HF_HUB_OFFLINE="1") == [4]
    assert len(hub.asked) == num_asked
    dead = "http://127.0.0.1:9"
    assert client.run(FINETUNE.format(recipe=recipe, out="three"), HF_ENDPOINT=dead) == [4]
    assert "Retrying in" not in client.told, "the client waits a second, two, four, eight, eight"


@pytest.mark.slow
def test_from_a_gated_base_to_what_was_pushed_and_its_cards_run_as_they_stand(client, hub, recipe, tmp_path):
    """The whole way: a base by id and commit, a run, a merge, both pushed; the cards' code in a new home."""
    commit = hub.repos["org/gated"].refs["main"]
    recipe["base"] = {"id": "org/gated", "revision": commit}
    program = f"""
        import json
        import peftkit
        from peftkit import ExportOptions
        peftkit.finetune({recipe!r}, out="run")
        report = peftkit.merge_adapter("run", out="merged")
        print(json.dumps([report.passed]))
        for path, repo in (("run", "me/tuned"), ("merged", "me/whole")):
            print(json.dumps(peftkit.export_adapter(path, options=ExportOptions("hub", repo=repo)).where))
    """
    passed, *urls = client.run(program, HF_TOKEN=TOKEN)
    assert passed == [True], "merged from the symlinks of a hub's cache"
    assert [url.split("/commit/")[0].removeprefix(hub.url + "/") for url in urls] == ["me/tuned", "me/whole"]
    for repo, relation in (("me/tuned", "adapter"), ("me/whole", "finetune")):
        card = hub.repos[repo].at("main")[1]["README.md"].decode()
        assert f"base_model: org/gated\nbase_model_relation: {relation}\n" in card
        code = card.split("```python\n")[1].split("```")[0]
        assert f'from_pretrained("{repo}"' in code
        assert (f'revision="{commit}"' in code) == (relation == "adapter")
        other = Client(tmp_path / relation, hub.url, TOKEN)
        assert other.start(code).strip()
        other.refuse_secrets()
    assert [path for path in hub.paths("GET") if path.startswith("/me/tuned/resolve/main/adapter")]
    assert [path for path in hub.paths("GET") if path == f"/org/gated/resolve/{commit}/config.json"]


def test_the_command_line_says_how_to_get_access(client, hub):
    done = subprocess.run(
        [sys.executable, "-m", "peftkit", "inspect", "org/gated"],
        env={**client.environment, "HF_TOKEN": READER},
        capture_output=True,
        text=True,
        check=False,
    )
    client.told += done.stdout + done.stderr
    assert done.returncode == 2
    assert "accept its licence on its hub page" in done.stderr
    assert json.dumps(READER) not in done.stderr
