"""Compressed data that expands to gigabytes: refused, with memory bounded by the system itself."""

import gzip
import subprocess
import sys

import pyarrow
import pytest

from peftkit.data.read import read_rows
from peftkit.errors import UserError

PIECE = 16 * 2**20
TIMES = {".gz": 64, ".zst": 256}  # 1 and 4 GiB: gzip cannot shrink below a thousandth
SUFFIXES = {".gz": (".jsonl", ".json"), ".zst": (".jsonl", ".json", ".csv", ".txt", ".parquet")}
HEADS = {".jsonl": b'{"text": "', ".json": b'[{"text": "', ".csv": b"text\n", ".txt": b"", ".parquet": b"PAR1"}

PROGRAM = """
import resource, sys
import pyarrow, pyarrow.parquet
from peftkit.data.read import read_rows
from peftkit.errors import UserError
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 800 * 2**20,) * 2)
for path in sys.argv[1:]:
    try:
        print(sum(1 for row in read_rows([path], where="data.train")), "rows")
    except UserError as error:
        print("expand to more than" in str(error))
"""


def packed(text, packer):
    return gzip.compress(text, 9) if packer == ".gz" else pyarrow.compress(text, "zstd", asbytes=True)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is capped through Linux")
@pytest.mark.parametrize("packer", [".gz", ".zst"])
def test_bombs_are_refused_in_bounded_memory(packer, tmp_path):
    member = packed(b"a" * PIECE, packer)
    paths = []
    for suffix in SUFFIXES[packer]:
        paths.append(tmp_path / f"bomb{suffix}{packer}")
        paths[-1].write_bytes(packed(HEADS[suffix], packer) + member * TIMES[packer])
        assert paths[-1].stat().st_size < 2**23
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, paths)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout.split() == ["True"] * len(paths), (done.stdout, done.stderr)


@pytest.mark.parametrize("packer", [".gz", ".zst"])
def test_data_that_compresses_well_is_read(packer, tmp_path):
    row = b'{"text": "' + b"word " * 200 + b'"}\n'
    path = tmp_path / f"rows.jsonl{packer}"
    path.write_bytes(packed(row * 20_000, packer))
    assert path.stat().st_size * 200 < len(row) * 20_000, "more than the ratio, but little in all"
    assert sum(1 for _ in read_rows([str(path)], where="data.train")) == 20_000


def test_a_bomb_says_what_to_do(tmp_path):
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b"") + gzip.compress(b"a" * PIECE, 9) * 20)
    with pytest.raises(UserError, match=r"bytes that expand to more than.*decompress it yourself"):
        list(read_rows([str(path)], where="data.train"))
