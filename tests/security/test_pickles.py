"""Pickled payloads, everywhere weights are read: nothing of them is ever executed."""

import builtins
import importlib.util
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch

import peftkit
from peftkit.errors import UserError
from tests.conftest import ROOT, TINY_LLAMA

READER = ROOT / "peftkit" / "model" / "base" / "unpickle.py"


class Payload:
    """Runs a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def legacy(value, file):
    torch.save(value, file, _use_new_zipfile_serialization=False)


def raw(value, file):
    file.write_bytes(pickle.dumps(value, protocol=2))


def stacked(value, file):
    """A stream that is no file of torch's at all: code first, a dict after it."""
    stream = io.BytesIO()
    pickle.dump(value, stream, protocol=2)
    pickle.dump({"w": 1}, stream, protocol=2)
    file.write_bytes(stream.getvalue())


WRITERS = {"zip": torch.save, "legacy": legacy, "raw": raw, "stacked": stacked}


def payloads(mark):
    touch = f"open({str(mark)!r}, 'w').close()"
    return {
        "system": Payload(os.system, f"touch {mark}"),
        "eval": Payload(builtins.eval, touch),
        "exec": Payload(builtins.exec, touch),
        "popen": Payload(subprocess.Popen, ["touch", str(mark)]),
        "open": Payload(builtins.open, str(mark), "w"),
        "getattr": Payload(getattr, Payload(__import__, "os"), "system"),
    }


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "executed"


def test_the_payloads_are_real(mark, tmp_path):
    """Otherwise the tests below would prove nothing."""
    for name, payload in payloads(mark).items():
        if name in {"popen", "getattr"}:
            continue  # the first ends by itself, the second only fetches
        pickle.loads(pickle.dumps({"w": payload}))
        assert mark.exists(), name
        mark.unlink()


def reader():
    """The program that reads, as a module: no package imports it."""
    spec = importlib.util.spec_from_file_location("reader", READER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("writer", WRITERS)
def test_the_reader_refuses_every_payload(writer, mark, tmp_path):
    """Here without its own process and its guard: what torch's restricted reader takes."""
    convert_one, file = reader().convert_file, tmp_path / "evil.bin"
    tried = 0
    for name, payload in payloads(mark).items():
        for value in ({"w": torch.zeros(2), "x": payload}, payload, {"a": [{"b": (payload,)}]}):
            try:
                WRITERS[writer](value, file)
            except (pickle.PicklingError, TypeError, AttributeError):
                continue  # torch's tensors cannot be written so
            tried += 1
            with pytest.raises((pickle.UnpicklingError, RuntimeError, EOFError)):
                convert_one(str(file), str(tmp_path / "out"), 2**20)
            assert not mark.exists(), name
            assert not (tmp_path / "out").exists()
    assert tried >= 12


def test_torchs_advice_to_run_the_code_is_not_passed_on(mark, tmp_path):
    file = tmp_path / "evil.bin"
    torch.save({"w": payloads(mark)["eval"]}, file)
    with pytest.raises(UserError, match=r"code or objects in it \(eval\)") as refused:
        peftkit.convert_weights(file, out=tmp_path / "out")
    assert "weights_only" not in str(refused.value)
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


def test_the_reader_itself_can_do_no_harm(mark, tmp_path):
    """Even if torch's reader took everything: the process may start, write, remove and connect nothing."""
    program = f"""
import sys; sys.argv = ["x"]
import importlib.util, os, socket, subprocess, shutil
spec = importlib.util.spec_from_file_location("unpickle", {str(READER)!r})
unpickle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(unpickle)
sys.addaudithook(unpickle._audit)
for attempt in (
    lambda: os.system("touch {mark}"),
    lambda: subprocess.run(["touch", "{mark}"]),
    lambda: os.posix_spawn("/bin/touch", ["touch", "{mark}"], {{}}),
    lambda: os.fork(),
    lambda: os.execv("/bin/touch", ["touch", "{mark}"]),
    lambda: open("{mark}", "w"),
    lambda: os.open("{mark}", os.O_CREAT | os.O_WRONLY),
    lambda: os.remove({str(ROOT / "README.md")!r}),
    lambda: os.rename("{tmp_path}", "{mark}"),
    lambda: os.mkdir("{mark}"),
    lambda: os.symlink("/", "{mark}"),
    lambda: os.kill(os.getppid(), 0),
    lambda: shutil.rmtree("{tmp_path}"),
    lambda: socket.create_connection(("127.0.0.1", 9)),
    lambda: __import__("ctypes").CDLL(None),
):
    try:
        attempt()
    except unpickle._Refused as error:
        print("refused")
open({str(ROOT / "README.md")!r}).close()
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["refused"] * 15, done.stderr
    assert done.returncode == 0, done.stderr
    assert not mark.exists()
    assert (ROOT / "README.md").exists()


def test_bombs_are_bounded_by_the_file(tmp_path):
    file = tmp_path / "bomb.bin"

    def refuse():
        with pytest.raises(UserError) as refused:
            peftkit.convert_weights(file, out=tmp_path / "out")
        return str(refused.value)

    torch.save({"w": torch.zeros(1).expand(10**6, 10**6)}, file)
    assert "expand to 4,000,000,000,000 bytes" in refuse()
    torch.save({"w": Payload(bytearray, 10**12)}, file)
    assert "it needs more memory than its size allows" in refuse()
    torch.save({"w": torch.zeros(2**22)}, tmp_path / "plain.bin")
    with zipfile.ZipFile(tmp_path / "plain.bin") as plain, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped:
        for entry in plain.infolist():
            zipped.writestr(entry.filename, plain.read(entry))
    assert file.stat().st_size < 2**17
    assert "compressed entries, which torch never writes" in refuse()


def adapter(folder, mark, name):
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(TINY_LLAMA), "task_type": "CAUSAL_LM", "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"w": Payload(os.system, f"touch {mark}")}, folder / name)
    return folder


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter.ckpt"])
def test_a_pickled_adapter_is_refused(name, mark, tmp_path):
    folder = adapter(tmp_path / "adapter", mark, name)
    with pytest.raises(UserError, match=f"{name} only.*peftkit convert {folder} --out NEW"):
        peftkit.generate(folder, ["hi"])
    assert not mark.exists()


def test_a_payload_in_an_adapter_is_not_converted(mark, tmp_path):
    folder = adapter(tmp_path / "adapter", mark, "adapter_model.bin")
    with pytest.raises(UserError, match=r"code or objects in it \(posix.system\)"):
        peftkit.convert_weights(folder, out=tmp_path / "out")
    assert not mark.exists()


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt", "pkl"])
def test_a_pickled_base_is_refused(suffix, recipe, mark, tmp_path):
    base = shutil.copytree(TINY_LLAMA, tmp_path / "base")
    (base / "model.safetensors").unlink()
    torch.save({"w": Payload(os.system, f"touch {mark}")}, base / f"pytorch_model.{suffix}")
    recipe["base"] = str(base)
    with pytest.raises(UserError, match=f"pytorch_model.{suffix} only"):
        peftkit.finetune(recipe, out=tmp_path / "run")
    assert not mark.exists()
