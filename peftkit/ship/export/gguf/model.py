"""A merged model's folder as one GGUF file."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peftkit.errors import PeftkitError, Problem, UserError, did_you_mean
from peftkit.model.base.file_checks import read_json_file
from peftkit.rundir import refuse_without_room
from peftkit.ship.export.gguf.layout import is_transposed, laid_out, tensor_names
from peftkit.ship.export.gguf.names import safe_name
from peftkit.ship.export.gguf.source import (
    Source,
    Stored,
    context_of,
    convert_command,
    read_source,
    stored_tensors,
    window_of,
)
from peftkit.ship.export.gguf.tokenizer import Vocabulary, vocabulary_of
from peftkit.ship.export.gguf.writing import (
    DTYPES,
    FILE_TYPES,
    QUANTS,
    Entry,
    GgufWritten,
    num_bytes_of,
    part_of,
    published,
    require_gguf,
    write_file,
)

_PER_BLOCK = 32  # q8_0 holds 32 numbers of a row under one scale


def check_exportable(folder: Path, *, dtype: str, pre: str | None = None) -> None:
    """Raises UserError with all reasons why a model cannot be written right; looks at no weights.

    `folder` has configuration and tokenizer: the base of an adapter will do, before anything is merged.
    """
    _look(folder, dtype=dtype, pre=pre)


def _look(folder: Path, *, dtype: str, pre: str | None) -> tuple[Source, Vocabulary]:
    """What is to be written. Raises UserError with all reasons why not."""
    require_gguf(str(folder))
    problems = [*_dtype_problems(dtype)]
    source: Source | None = None
    try:
        source = read_source(folder)
    except UserError as error:
        problems += error.problems
    vocabulary = Vocabulary()
    try:
        vocabulary = vocabulary_of(folder, _num_rows(folder, source), pre=pre)
    except UserError as error:
        problems += error.problems
    problems += [
        Problem(f"{folder} tokenizer", got, expected, convert_command(folder))
        for got, expected in vocabulary.problems
    ]
    if problems or source is None:
        raise UserError(problems)
    return source, vocabulary


def _num_rows(folder: Path, source: Source | None) -> int | None:
    """Rows of the embedding; None where even config.json does not tell."""
    if source is None and not (folder / "config.json").is_file():
        return None
    found = (source.config if source else read_json_file(folder, "config.json")).get("vocab_size")
    return found if isinstance(found, int) else None


def _dtype_problems(dtype: str) -> list[Problem]:
    known = (*DTYPES, *QUANTS)
    if dtype not in known:
        return [Problem("dtype", dtype, "a type of GGUF weights", did_you_mean(dtype, known))]
    if dtype in QUANTS and shutil.which("llama-quantize") is None:
        fix = f"export as f16, then: llama-quantize F16.gguf OUT.gguf {dtype.upper()}"
        return [Problem("dtype", f"{dtype} without llama-quantize on PATH", "llama.cpp's tools", fix)]
    return []


def write_model(
    folder: Path,
    out: Path,
    *,
    dtype: str = "f16",
    pre: str | None = None,
    name: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> GgufWritten:
    """Write a Hugging Face folder as GGUF, one tensor at a time, to `OUT.part` first.

    `dtype` is f32, f16, bf16, q8_0, or a quantization that `llama-quantize` makes. `pre` names llama.cpp's
    pre-tokenizer where the tokenizer's is not recognised. Raises UserError, with nothing left behind, for
    what llama.cpp would compute differently, an existing `out`, and a disk without room.
    """
    source, vocabulary = _look(folder, dtype=dtype, pre=pre)
    stored = stored_tensors(source)
    # what llama-quantize starts from: bf16 weights lose nothing as bf16
    start = "bf16" if str(source.config.get("dtype")).endswith("bfloat16") else "f16"
    plain = dtype if dtype in DTYPES else start
    entries = _entries(source, stored, plain)
    fields = _fields(source, vocabulary, plain, name or folder.resolve().name)
    notes = (*vocabulary.notes, *_notes(source, entries, plain))
    with published(out) as part:
        if dtype in DTYPES:
            num_bytes = write_file(part, source.family.architecture, fields, entries, progress)
        else:
            num_bytes = _quantized(part, source.family.architecture, fields, entries, dtype, progress)
    return GgufWritten(out, num_bytes, len(entries), dtype, notes)


def _quantized(
    part: Path,
    architecture: str,
    fields: dict[str, Any],
    entries: list[Entry],
    dtype: str,
    progress: Callable[[int, int], None],
) -> int:
    """16 bits beside the output, then llama.cpp's own quantization of it."""
    room = 2 * sum(num_bytes_of(entry) for entry in entries)  # both files are there for a while
    fix = "make room, or give an output on another disk"
    refuse_without_room(part.parent, room, what="a file of 16 bits and what is made of it", fix=fix)
    plain = part_of(part)
    try:
        write_file(plain, architecture, fields, entries, progress)
        command = ["llama-quantize", str(plain), str(part), dtype.upper()]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        plain.unlink(missing_ok=True)
    if done.returncode or not part.is_file():
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        raise PeftkitError(f"llama-quantize failed ({done.returncode}): {said}")
    return part.stat().st_size


def _fields(source: Source, vocabulary: Vocabulary, dtype: str, name: str) -> dict[str, Any]:
    """The header: sizes under llama.cpp's names, positions, tokenizer."""
    import gguf

    architecture, family, config = source.family.architecture, source.family, source.config
    model = {
        "context_length": context_of(source),
        **{key: int(config[of]) for key, of in family.sizes.items()},
        **{key: float(config[of]) for key, of in family.numbers.items()},
        **source.rope.fields,
        "vocab_size": int(config["vocab_size"]),
    }
    return {
        "general.type": "model",
        "general.name": safe_name(name, phi3=vocabulary.phi3),
        "general.file_type": int(gguf.LlamaFileType[FILE_TYPES[dtype]]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **{f"{architecture}.{key}": value for key, value in model.items()},
        **vocabulary.fields,
    }


def _entries(source: Source, stored: list[Stored], dtype: str) -> list[Entry]:
    """The tensors to write, in the order of the files, after the factors of Llama 3's positions."""
    names = tensor_names(source)
    entries = []
    if factors := source.rope.factors:
        entries.append(Entry("rope_freqs.weight", (len(factors),), "f32", lambda: _vector(factors)))
    for tensor in stored:
        shape = tensor.shape[::-1] if is_transposed(source, tensor.name) else tensor.shape

        def load(tensor: Stored = tensor) -> Any:
            return laid_out(source, tensor.name, tensor.load())

        entries.append(
            Entry(names[tensor.name], shape, _tensor_dtype(names[tensor.name], shape, dtype), load)
        )
    return entries


def _vector(numbers: list[float]) -> Any:
    import torch

    return torch.tensor(numbers, dtype=torch.float32)


def _tensor_dtype(name: str, shape: tuple[int, ...], dtype: str) -> str:
    """Vectors and learnt positions stay exact: they are small, and llama.cpp adds them in fp32."""
    if len(shape) == 1 or name == "position_embd.weight":
        return "f32"
    return "f16" if dtype == "q8_0" and shape[-1] % _PER_BLOCK else dtype


def _notes(source: Source, entries: list[Entry], dtype: str) -> list[str]:
    notes = []
    if window := window_of(source):
        told = f"llama.cpp has no sliding window for {source.config['model_type']}"
        notes.append(
            f"{told}: the context length is set to the window, {min(window, context_of(source))} tokens"
        )
    whole = [entry.name for entry in entries if entry.dtype == "f16"] if dtype == "q8_0" else []
    if whole:
        notes.append(f"{len(whole)} tensors are f16: their rows are no multiple of {_PER_BLOCK} numbers")
    return notes
