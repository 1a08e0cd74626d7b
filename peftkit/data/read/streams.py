"""Bytes of a file: decompressed, found to be what the name says, and cut into lines of bounded length."""

from __future__ import annotations

import contextlib
import gzip
import io
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from peftkit.data.read.rows import Fault, File, malformed, misencoded
from peftkit.recipe.paths import COMPRESSED_SUFFIXES

MAX_LINE_BYTES = 64 * 2**20
_PIECE = 2**20
_EXPANDS = 200  # times: texts compress to a third to a twentieth, very repetitive ones to a hundredth
_EXPANDS_FREELY = 256 * 2**20  # bytes

# how files begin that are not text
_MAGIC = {
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"\xfd7zXZ\x00": "xz",
    b"BZh91AY&SY": "bzip2",
    b"%PDF-": "PDF",
    b"SQLite format 3\x00": "SQLite",
}
_WIDE_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


class Line(NamedTuple):
    """A line with its end. `fault` says why its text must not be used; `text` is then a stand-in."""

    number: int
    text: str
    num_bytes: int
    fault: Fault | None = None


def suffixes(path: Path) -> tuple[str, str]:
    """(what it holds, how it is compressed): 'rows.JSONL.gz' -> ('.jsonl', '.gz')."""
    name = path.name.lower()
    packed = next((suffix for suffix in COMPRESSED_SUFFIXES if name.endswith(suffix)), "")
    return Path(name.removesuffix(packed)).suffix, packed


def seems(head: bytes) -> str:
    """What a file is by its first bytes, in words; empty where they tell nothing."""
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return f"{kind} (it begins with {' '.join(f'0x{byte:02x}' for byte in magic[:4])})"
    return ""


@contextlib.contextmanager
def reading(file: File) -> Iterator[None]:
    """Tell what the system and the decompressors raise as an error of the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        got = f"a file that cannot be read to its end ({error})"
        raise file.refuse(got, "a whole file", "fetch or write it again") from None


@contextlib.contextmanager
def opened(file: File) -> Iterator[io.BufferedReader]:
    """The file's bytes, decompressed as its suffix says."""
    packed = suffixes(file.path)[1]
    with contextlib.ExitStack() as stack:
        raw: io.BufferedReader = stack.enter_context(io.BufferedReader(io.FileIO(file.path), _PIECE))
        if not packed:
            yield raw
            return
        head = raw.peek(8)[:8]
        kind = {".gz": "gzip", ".zst": "zstd"}[packed]
        if head and not seems(head).startswith(kind):
            got = f"content that is not {kind}"
            raise file.refuse(
                f"{got} but {seems(head)}" if seems(head) else got,
                f"{kind}, as the name says",
                f"was it decompressed already? drop {packed} from its name",
            )
        yield io.BufferedReader(_Measured(stack.enter_context(_decompressed(raw, packed)), file), _PIECE)


class _Measured(io.RawIOBase):
    """What is decompressed, as long as it does not expand beyond all that data does."""

    def __init__(self, inner: Any, file: File) -> None:
        self._inner, self._file, self._num_bytes = inner, file, 0
        self._most = max(_EXPANDS_FREELY, _EXPANDS * file.path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """As the standard library asks. Raises UserError where the file expands too far."""
        found = self._inner.read(min(len(buffer), _PIECE))
        self._num_bytes += len(found)
        if self._num_bytes > self._most:
            packed = self._file.path.stat().st_size
            got = f"{packed:,} bytes that expand to more than {self._most:,}"
            fix = "if this is right, decompress it yourself and name the file that comes out"
            raise self._file.refuse(got, f"data that expands {_EXPANDS} times at most", fix)
        buffer[: len(found)] = found
        return len(found)


def _decompressed(raw: BinaryIO, packed: str) -> Any:
    if packed == ".gz":
        return gzip.GzipFile(fileobj=raw)
    import pyarrow

    return pyarrow.CompressedInputStream(raw, "zstd")


@contextlib.contextmanager
def unpacked(file: File) -> Iterator[Path]:
    """A file that can be read at any place: of a compressed one, its content in a temporary file."""
    if not suffixes(file.path)[1]:
        yield file.path
        return
    with opened(file) as stream, tempfile.NamedTemporaryFile() as whole:
        shutil.copyfileobj(stream, whole, _PIECE)
        whole.flush()
        yield Path(whole.name)


def wide(file: File, stream: io.BufferedReader) -> Fault | None:
    """The one fault of a text file that is UTF-16 or UTF-32. Raises UserError where it is no text at all."""
    head = stream.peek(16)[:16]
    kind = next((kind for mark, kind in _WIDE_MARKS.items() if head.startswith(mark)), "")
    if kind:
        fix = f"convert it: iconv -f {kind} -t UTF-8 IN > OUT"
        return misencoded(f"{file.name}:1", f"a file in {kind}", fix)
    if binary := seems(head):
        suffix = suffixes(file.path)[0]
        raise file.refuse(
            f"content that is {binary}", f"text, as {suffix} says", "name the file for what it holds"
        )
    return None


def lines(stream: io.BufferedReader, name: str, limit: int) -> Iterator[Line]:
    """Every line, in flat memory: what is longer than `limit` bytes is passed over in pieces."""
    number = 0
    while raw := stream.readline(limit + 1):
        number += 1
        num_bytes = len(raw)
        if num_bytes > limit and not raw.endswith(b"\n"):
            del raw
            while piece := stream.readline(_PIECE):
                num_bytes += len(piece)
                if piece.endswith(b"\n"):
                    break
            got, expected = f"a line of {num_bytes:,} bytes", f"at most {limit:,} bytes"
            fix = "break it up; is it one record a line?"
            yield Line(number, "", num_bytes, malformed(f"{name}:{number}", got, expected, fix))
            continue
        line = decoded(raw, number, name)
        yield line._replace(text=line.text.removeprefix("\ufeff")) if number == 1 else line


def decoded(raw: bytes, number: int, name: str) -> Line:
    """The text that begins on a line; with a fault, on its own line, for wrong UTF-8 and for NUL bytes."""

    def where(at: int) -> str:
        return f"{name}:{number + raw[:at].count(10)}"

    fault = None
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        fault = misencoded(where(error.start), f"the byte 0x{raw[error.start]:02x}")
        text = raw.decode(errors="replace")
    if (at := raw.find(0)) >= 0:
        fix = "remove it; if every second byte is one, convert the file from UTF-16 to UTF-8"
        fault = misencoded(where(at), "a NUL byte", fix)
    return Line(number, text, len(raw), fault)
