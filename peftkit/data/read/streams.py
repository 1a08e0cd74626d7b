"""The bytes of a file: decompressed, checked against its name, and split into lines of bounded length."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from peftkit.data.read.rows import Fault, File, encoding_fault, malformed_fault
from peftkit.recipe.paths import COMPRESSED_SUFFIXES

MAX_LINE_BYTES = 64 * 2**20
_CHUNK_BYTES = 2**20
_MAX_EXPANSION = 200  # times: texts compress to a third to a twentieth, very repetitive ones to a hundredth
_FREE_EXPANSION_BYTES = 256 * 2**20  # bytes

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
_BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


class Line(NamedTuple):
    """A line with its end. `fault` says why its text must not be used; `text` is then a placeholder."""

    number: int
    text: str
    num_bytes: int
    fault: Fault | None = None


def split_suffixes(path: Path) -> tuple[str, str]:
    """Return (data suffix, compression suffix): 'rows.JSONL.gz' -> ('.jsonl', '.gz')."""
    name = path.name.lower()
    compression = next((suffix for suffix in COMPRESSED_SUFFIXES if name.endswith(suffix)), "")
    return Path(name.removesuffix(compression)).suffix, compression


def detect_binary(head: bytes) -> str:
    """Return what a binary file is by its first bytes, in words; empty if they match no known format."""
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return f"{kind} (it begins with {' '.join(f'0x{byte:02x}' for byte in magic[:4])})"
    return ""


@contextlib.contextmanager
def translate_read_errors(file: File) -> Iterator[None]:
    """Turn the errors of the system and of decompressors into a UserError of the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        got = f"a file that cannot be read to its end ({error})"
        raise file.refuse(got, "a whole file", "fetch or write it again") from None


@contextlib.contextmanager
def open_decompressed(file: File) -> Iterator[io.BufferedReader]:
    """Open the file's bytes, decompressed as its suffix says. Raises UserError if the content is another."""
    compression = split_suffixes(file.path)[1]
    with contextlib.ExitStack() as stack:
        raw: io.BufferedReader = stack.enter_context(io.BufferedReader(io.FileIO(file.path), _CHUNK_BYTES))
        if not compression:
            yield _as_utf_8(raw, file)
            return
        head = raw.peek(8)[:8]
        kind = {".gz": "gzip", ".zst": "zstd"}[compression]
        if head and not detect_binary(head).startswith(kind):
            got = f"content that is not {kind}"
            raise file.refuse(
                f"{got} but {detect_binary(head)}" if detect_binary(head) else got,
                f"{kind}, as the name says",
                f"was it decompressed already? drop {compression} from its name",
            )
        if compression == ".gz":
            decompressor = gzip.GzipFile(fileobj=raw)
        else:
            import pyarrow

            decompressor = pyarrow.CompressedInputStream(raw, "zstd")
        bounded = io.BufferedReader(_BoundedReader(stack.enter_context(decompressor), file), _CHUNK_BYTES)
        yield _as_utf_8(bounded, file)


def _as_utf_8(stream: Any, file: File) -> io.BufferedReader:
    """Return the stream as UTF-8, where the recipe names another encoding of the file."""
    return stream if file.encoding is None else io.BufferedReader(_TranscodedReader(stream, file), _CHUNK_BYTES)


class _TranscodedReader(io.RawIOBase):
    """A stream of the file's text in UTF-8. Raises UserError for bytes that its encoding does not have."""

    def __init__(self, inner: io.BufferedReader, file: File) -> None:
        assert file.encoding is not None
        self._inner, self._file, self._ready = inner, file, b""
        self._decoder = codecs.getincrementaldecoder(file.encoding)()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` and return the number of bytes; 0 at the end."""
        while not self._ready:
            chunk = self._inner.read(_CHUNK_BYTES)
            try:
                self._ready = self._decoder.decode(chunk, final=not chunk).encode()
            except UnicodeError as error:
                got = f"bytes that are no {self._file.encoding} ({error})"
                raise self._file.refuse(
                    got, f"text in {self._file.encoding}", "name its encoding, or leave it out: UTF-8"
                ) from None
            if not chunk:
                break
        num_bytes = min(len(buffer), len(self._ready))
        buffer[:num_bytes], self._ready = self._ready[:num_bytes], self._ready[num_bytes:]
        return num_bytes


class _BoundedReader(io.RawIOBase):
    """A stream of decompressed bytes that refuses to expand more than data does (decompression bombs)."""

    def __init__(self, inner: Any, file: File) -> None:
        self._inner, self._file, self._num_bytes = inner, file, 0
        self._max_bytes = max(_FREE_EXPANSION_BYTES, _MAX_EXPANSION * file.path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` and return the number of bytes. Raises UserError if the file expands too far."""
        chunk = self._inner.read(min(len(buffer), _CHUNK_BYTES))
        self._num_bytes += len(chunk)
        if self._num_bytes > self._max_bytes:
            num_compressed = self._file.path.stat().st_size
            got = f"{num_compressed:,} bytes that expand to more than {self._max_bytes:,}"
            fix = "if this is right, decompress it yourself and name the file that comes out"
            raise self._file.refuse(got, f"data that expands {_MAX_EXPANSION} times at most", fix)
        buffer[: len(chunk)] = chunk
        return len(chunk)


@contextlib.contextmanager
def seekable_path(file: File) -> Iterator[Path]:
    """Return the path of a seekable file; a compressed one is unpacked to a temporary file."""
    if not split_suffixes(file.path)[1]:
        yield file.path
        return
    with open_decompressed(file) as stream, tempfile.NamedTemporaryFile() as temporary:
        shutil.copyfileobj(stream, temporary, _CHUNK_BYTES)
        temporary.flush()
        yield Path(temporary.name)


def check_encoding(file: File, stream: io.BufferedReader) -> Fault | None:
    """Return the fault of a UTF-16 or UTF-32 text file, else None. Raises UserError for a binary file."""
    head = stream.peek(16)[:16]
    kind = next((kind for mark, kind in _BYTE_ORDER_MARKS.items() if head.startswith(mark)), "")
    if kind:
        fix = f"name it: {{path: {file.name}, encoding: {kind.lower()}}}; or iconv -f {kind} -t UTF-8 IN > OUT"
        return encoding_fault(f"{file.name}:1", f"a file in {kind}", fix)
    if binary := detect_binary(head):
        suffix = split_suffixes(file.path)[0]
        raise file.refuse(f"content that is {binary}", f"text, as {suffix} says", "name the file for what it holds")
    return None


def read_lines(stream: io.BufferedReader, name: str, limit: int) -> Iterator[Line]:
    """Yield every line, in bounded memory: a line longer than `limit` bytes has a fault and no text."""
    number = 0
    while raw := stream.readline(limit + 1):
        number += 1
        num_bytes = len(raw)
        if num_bytes > limit and not raw.endswith(b"\n"):
            del raw
            while chunk := stream.readline(_CHUNK_BYTES):
                num_bytes += len(chunk)
                if chunk.endswith(b"\n"):
                    break
            got, expected = f"a line of {num_bytes:,} bytes", f"at most {limit:,} bytes"
            fix = "break it up; is it one record a line?"
            yield Line(number, "", num_bytes, malformed_fault(f"{name}:{number}", got, expected, fix))
            continue
        line = decode_line(raw, number, name)
        yield line._replace(text=line.text.removeprefix("\ufeff")) if number == 1 else line


def decode_line(raw: bytes, number: int, name: str) -> Line:
    """Decode text that begins on line `number`; wrong UTF-8 and NUL bytes give a fault, on its own line."""

    def where(at: int) -> str:
        return f"{name}:{number + raw[:at].count(10)}"

    fault = None
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        fix = "convert the file to UTF-8, or name its encoding, if it is of a Western Windows: "
        fix += f"{{path: {name}, encoding: windows-1252}}"
        fault = encoding_fault(where(error.start), f"the byte 0x{raw[error.start]:02x}", fix)
        text = raw.decode(errors="replace")
    if (at := raw.find(0)) >= 0:
        fix = "remove it; if every second byte is one, convert the file from UTF-16 to UTF-8"
        fault = encoding_fault(where(at), "a NUL byte", fix)
    return Line(number, text, len(raw), fault)
