"""Pickled weights as safetensors: the tensors, all of them, and nothing else."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import peftkit
from peftkit.errors import UserError
from peftkit.model.base.locate import locate_base
from peftkit.rundir import verify_folder
from tests.conftest import TINY_LLAMA


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and tensor.shape == other[name].shape, name
        flat = (t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, other[name]))
        assert torch.equal(*flat), name


@pytest.fixture
def pickled(tmp_path):
    """The tiny Llama as it came before safetensors, with what must not be taken along."""
    folder = shutil.copytree(TINY_LLAMA, tmp_path / "pickled")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    torch.save({"lr": 1.0}, folder / "training_args.bin")
    (folder / "modeling_own.py").write_text("print('code')\n")
    return folder, tensors


def test_a_folder_is_refused_until_converted_and_equals_it_then(pickled, tmp_path):
    folder, tensors = pickled
    with pytest.raises(UserError, match=r"pytorch_model.bin only.*peftkit convert .* --out NEW"):
        locate_base(str(folder), revision=None, where="base")
    made = peftkit.convert_weights(folder, out=tmp_path / "out")
    same(load_file(made.out / "model.safetensors"), tensors)
    assert made.left == ("modeling_own.py", "training_args.bin")
    assert verify_folder(made.out) == []
    names = {path.name for path in made.out.iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not [name for name in names if name.endswith((".py", ".bin"))]

    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(made.out, use_safetensors=True).state_dict()
    before = AutoModelForCausalLM.from_pretrained(TINY_LLAMA).state_dict()
    same(loaded, before)


def test_shards_with_an_index(pickled, tmp_path):
    folder, tensors = pickled
    names = sorted(tensors)
    halves = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    (folder / "pytorch_model.bin").unlink()
    for file, keys in halves.items():
        torch.save({key: tensors[key] for key in keys}, folder / file)
    weight_map = {key: file for file, keys in halves.items() for key in keys}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    made = peftkit.convert_weights(folder, out=tmp_path / "out")
    assert made.files == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    found = {}
    for file in made.files:
        found |= load_file(made.out / file)
    same(found, tensors)
    index = json.loads((made.out / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == tensors.keys()
    assert not (made.out / "pytorch_model.bin.index.json").exists()
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(made.out, use_safetensors=True)
    same(loaded.state_dict(), AutoModelForCausalLM.from_pretrained(TINY_LLAMA).state_dict())


@pytest.mark.parametrize("legacy", [False, True])
def test_odd_tensors_survive(legacy, tmp_path):
    table = torch.randn(8, 4)
    tensors = {
        "tied.a": table,
        "tied.b": table,
        "view": table[2:5],
        "turned": torch.randn(3, 5).t(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "half": torch.randn(7).bfloat16(),
        "nan": torch.tensor([float("nan"), float("inf")]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    }
    file = tmp_path / "weights.pt"
    torch.save(tensors, file, _use_new_zipfile_serialization=not legacy)
    made = peftkit.convert_weights(file, out=tmp_path / "out")
    same(load_file(made.out / "model.safetensors"), {k: v.detach().contiguous() for k, v in tensors.items()})
    assert made.num_tensors == len(tensors)


@pytest.mark.slow
def test_what_is_no_flat_dict_of_tensors_is_refused_and_nothing_is_left(tmp_path):
    cases = {
        "nested": {"state": {"w": torch.zeros(2)}},
        "a list": [torch.zeros(2)],
        "other things": {"w": torch.zeros(2), "epoch": 3},
        "sparse": {"w": torch.eye(3).to_sparse()},
    }
    for name, value in cases.items():
        file = tmp_path / f"{name}.bin"
        torch.save(value, file)
        with pytest.raises(UserError, match=r"flat dict of tensors|no plain tensor"):
            peftkit.convert_weights(file, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".tmp-*"))


def test_what_is_there_is_not_written_over(pickled, tmp_path):
    folder, _ = pickled
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="which already exists"):
        peftkit.convert_weights(folder, out=tmp_path / "out")
    with pytest.raises(UserError, match="no such path"):
        peftkit.convert_weights(tmp_path / "none", out=tmp_path / "new")
    with pytest.raises(UserError, match="a folder without known pickled weights"):
        peftkit.convert_weights(TINY_LLAMA, out=tmp_path / "new")
