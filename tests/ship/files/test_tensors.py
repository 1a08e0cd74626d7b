"""safetensors files, read and written without mapping them."""

import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from peftkit.errors import PeftkitError, UserError
from peftkit.ship.files.tensors import (
    SAFETENSORS_DTYPES,
    SafetensorsWriter,
    is_finite,
    read_all_entries,
    read_entries,
    safetensors_files,
    shard_index,
)

SHAPES = st.lists(st.integers(0, 5), max_size=3)
NAMES = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__")


def drawn(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) * 100).to(dtype)


@given(st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from(list(SAFETENSORS_DTYPES.values()))), max_size=6))
def test_what_is_written_is_read_by_us_and_by_the_library(tmp_path_factory, about):
    path = tmp_path_factory.mktemp("w") / "model.safetensors"
    tensors = {name: drawn(shape, dtype) for name, (shape, dtype) in about.items()}
    with SafetensorsWriter(path, tensors) as writer:
        for name, tensor in tensors.items():
            writer.put(name, tensor)
    assert writer.written == {name: t.numel() * t.element_size() for name, t in tensors.items()}
    ours = {entry.name: entry.read() for entry in read_entries(path)}
    for found in (ours, load_file(path)):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


def test_what_the_library_writes_is_read(tmp_path):
    tensors = {"a": drawn((3, 4), torch.bfloat16), "b": drawn((), torch.float32), "c": drawn((0, 2), torch.int64)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = read_all_entries([tmp_path / "x.safetensors"])
    assert all(torch.equal(found[name].read(), tensor) for name, tensor in tensors.items())


def test_strides_are_not_written(tmp_path):
    tensor = drawn((4, 6), torch.float32).T
    with SafetensorsWriter(tmp_path / "x.safetensors", ["a"]) as writer:
        writer.put("a", tensor)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], tensor)


def test_a_file_whose_writing_fails_is_no_safetensors_file(tmp_path):
    with pytest.raises(ZeroDivisionError), SafetensorsWriter(tmp_path / "x", ["a", "b"]) as writer:
        writer.put("a", torch.ones(3))
        raise ZeroDivisionError
    with pytest.raises(UserError):
        read_entries(tmp_path / "x")


def test_more_tensors_than_there_is_room_for_are_a_fault_of_ours(tmp_path):
    with pytest.raises(PeftkitError, match="more tensors"), SafetensorsWriter(tmp_path / "x", ["a"]) as writer:
        for number in range(300):
            writer.put(f"tensor {number}", torch.ones(1))


def header(path, about, body=b""):
    text = about if isinstance(about, bytes) else json.dumps(about).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


DAMAGED = {
    "empty": lambda path: path.write_bytes(b""),
    "short": lambda path: path.write_bytes(b"abc"),
    "header longer than the file": lambda path: path.write_bytes(struct.pack("<Q", 2**40) + b"{}"),
    "not JSON": lambda path: header(path, b"{nonsense"),
    "a list": lambda path: header(path, []),
    "no offsets": lambda path: header(path, {"a": {"dtype": "F32", "shape": [1]}}),
    "unknown type": lambda path: header(path, {"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "negative": lambda path: header(path, {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}, b"1234"),
    "another length": lambda path: header(path, {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
    "cut off": lambda path: header(path, {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused(case, tmp_path):
    DAMAGED[case](tmp_path / "x.safetensors")
    with pytest.raises(UserError) as caught:
        read_entries(tmp_path / "x.safetensors")
    assert "safetensors" in caught.value.problems[0].where


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(100)}, path)
    [entry] = read_entries(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="cut off"):
        entry.read()


def test_the_files_of_a_folder(tmp_path):
    with pytest.raises(UserError, match="no safetensors weights"):
        safetensors_files(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    assert [path.name for path in safetensors_files(tmp_path)] == ["model.safetensors"]
    save_file({"b": torch.ones(2)}, tmp_path / "two.safetensors")
    index = shard_index({"model.safetensors": {"a": 8}, "two.safetensors": {"b": 8}})
    assert index["metadata"]["total_size"] == 16
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [path.name for path in safetensors_files(tmp_path)] == ["model.safetensors", "two.safetensors"]
    assert sorted(read_all_entries(safetensors_files(tmp_path))) == ["a", "b"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_found(dtype, value):
    tensor = drawn((70, 33), dtype)
    assert is_finite(tensor) and is_finite(tensor[:0])
    tensor[41, 7] = value
    assert not is_finite(tensor)
