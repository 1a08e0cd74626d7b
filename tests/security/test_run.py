"""A whole run with secrets about: none is written or said, no socket is opened, nothing is pickled."""

import json
import os
import subprocess
import sys

import yaml

from tests.conftest import ROOT

SECRETS = {
    "HF_TOKEN": "hf_" + "Qz7" * 12,
    "HUGGING_FACE_HUB_TOKEN": "an-older-hub-token-91",
    "WANDB_API_KEY": "0a1b2c3d4e" * 4,
    "AWS_ACCESS_KEY_ID": "AKIAQ7QZQ7QZQ7QZQ7QZ",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCY",
    "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEBYaD-session",
    "OPENAI_API_KEY": "sk-proj-" + "Ab3" * 10,
    "OUR_DATABASE_PASSWORD": "correct horse battery",
}
# audited from the first line on: whatever connects, binds, sends, or resolves a name
PROGRAM = """
import json, sys
seen = []
def watch(event, arguments):
    if event.startswith("socket.") and event not in {"socket.__new__", "socket.gethostname"}:
        seen.append([event, repr(arguments[1:])])
sys.addaudithook(watch)
from peftkit.cli import main
codes = [main(arguments) for arguments in json.loads(sys.argv[1])]
open(sys.argv[2], "w").write(json.dumps({"codes": codes, "seen": seen}))
"""


def test_no_secret_is_written_and_no_socket_opened(recipe, tmp_path):
    recipe["evaluate"] = {"metric": "exact_match", "max_new_tokens": 4}
    recipe["train"] |= {"max_steps": 3, "checkpoint_steps": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = tmp_path / "run"
    commands = [
        ["finetune", "recipe.yaml", "--out", str(run)],
        ["generate", str(run), "hi", "--max-new-tokens", "3"],
        ["resume", str(run)],
        ["finetune", f"base=x/{SECRETS['HF_TOKEN']}", "recipe.yaml", "--dry-run"],
        ["inspect", f"https://me:{SECRETS['OUR_DATABASE_PASSWORD']}@host/x"],
    ]
    # not offline by its own wish: a run of local files must not ask for the network in the first place
    environment = {k: v for k, v in os.environ.items() if k not in {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"}}
    environment |= {**SECRETS, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands[:3]), str(tmp_path / "audit.json")],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "audit.json").read_text())
    assert found["codes"][:2] == [0, 0], done.stderr
    assert found["seen"] == []
    refused = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands[3:]), str(tmp_path / "audit.json")],
        capture_output=True, text=True, cwd=tmp_path, env={**environment, "HF_HUB_OFFLINE": "1"}, check=False,
        timeout=60,
    )  # fmt: skip
    assert refused.stderr.count("to fix") == 2
    assert json.loads((tmp_path / "audit.json").read_text())["seen"] == []
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 8
    told = {str(path): path.read_bytes() for path in files}
    told |= {"output": "".join((done.stdout, done.stderr, refused.stdout, refused.stderr)).encode()}
    for place, content in told.items():
        for name, secret in SECRETS.items():
            assert secret.encode() not in content, f"{name} in {place}"
    # safetensors and text: nothing that a reader would have to execute
    known = {".safetensors", ".json", ".jsonl", ".yaml", ".lock", ".jinja", ".txt", ".model", ".md", ".html", ".log"}
    assert {path.suffix for path in files} <= known
    for place, content in told.items():
        assert not content.startswith((b"\x80", b"PK\x03\x04")), place
