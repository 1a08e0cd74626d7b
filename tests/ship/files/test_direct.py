"""Files written past the page cache: every byte, whatever the sizes, also where that cannot be."""

import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.ship.files import direct
from peftkit.ship.files.direct import BLOCK, DirectFile

PLACES = [None, "/dev/shm"]  # the disk, and a file system in memory, which refuses direct writes


@settings(max_examples=40)
@given(st.lists(st.integers(0, 3 * BLOCK), max_size=8), st.sampled_from(PLACES), st.integers(1, 3))
def test_what_is_written_is_there(sizes, place, blocks):
    if place and not Path(place).is_dir():
        place = None
    parts = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
    header = os.urandom(blocks * BLOCK)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        file = DirectFile(Path(folder) / "x", room=len(header))
        for part in parts:
            file.write(part)
        file.finish(header)
        file.close()
        assert (Path(folder) / "x").read_bytes() == header + b"".join(bytes(part.tolist()) for part in parts)


def test_more_than_one_buffer(tmp_path):
    whole = torch.arange(3 * direct._BUFFER_BYTES + 5, dtype=torch.int64).to(torch.uint8)
    file = DirectFile(tmp_path / "x", room=BLOCK)
    for part in whole.split(2**20 + 7):
        file.write(part)
    file.finish(bytes(BLOCK))
    file.close()
    assert (tmp_path / "x").read_bytes()[BLOCK:] == whole.numpy().tobytes()


def test_an_error_of_the_disk_is_raised(tmp_path):
    with pytest.raises(FileNotFoundError):
        DirectFile(tmp_path / "nowhere" / "x", room=BLOCK)
