"""Export of a merged model's folder as one GGUF file."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from peftkit.errors import PeftkitError, Problem, UserError, did_you_mean
from peftkit.model.base.file_checks import read_json_file
from peftkit.rundir import require_free_space
from peftkit.ship.export.gguf.layout import gguf_tensor_names, is_transposed, to_gguf_layout
from peftkit.ship.export.gguf.names import safe_model_name
from peftkit.ship.export.gguf.source import (
    GgufSource,
    StoredTensor,
    context_length,
    convert_command,
    dropped_window,
    read_source,
    stored_tensors,
)
from peftkit.ship.export.gguf.tokenizer import Vocabulary, gguf_vocabulary
from peftkit.ship.export.gguf.writing import (
    FILE_TYPES,
    GGUF_DTYPES,
    QUANTIZED_DTYPES,
    GgufFile,
    GgufTensor,
    data_size,
    part_path,
    publish_file,
    require_gguf,
    write_file,
)

_Q8_BLOCK_SIZE = 32  # q8_0 holds 32 numbers of a row under one scale


def check_exportable(folder: Path, *, dtype: str, pre: str | None = None) -> None:
    """Raise UserError with all reasons why a model cannot be exported correctly; reads no weights.

    `folder` has configuration and tokenizer: the base of an adapter will do, before anything is merged.
    """
    _read_model(folder, dtype=dtype, pre=pre)


def _read_model(folder: Path, *, dtype: str, pre: str | None) -> tuple[GgufSource, Vocabulary]:
    """Read configuration and vocabulary. Raises UserError with all reasons why they cannot be exported."""
    require_gguf(str(folder))
    dtypes = (*GGUF_DTYPES, *QUANTIZED_DTYPES)
    if dtype not in dtypes:
        problems = [Problem("dtype", dtype, "a type of GGUF weights", did_you_mean(dtype, dtypes))]
    elif dtype in QUANTIZED_DTYPES and shutil.which("llama-quantize") is None:
        fix = f"export as f16, then: llama-quantize F16.gguf OUT.gguf {dtype.upper()}"
        problems = [Problem("dtype", f"{dtype} without llama-quantize on PATH", "llama.cpp's tools", fix)]
    else:
        problems = []
    source: GgufSource | None = None
    try:
        source = read_source(folder)
    except UserError as error:
        problems += error.problems
    vocabulary = Vocabulary()
    try:
        if source is None and not (folder / "config.json").is_file():
            num_embeddings = None
        else:
            vocab_size = (source.config if source else read_json_file(folder, "config.json")).get("vocab_size")
            num_embeddings = vocab_size if isinstance(vocab_size, int) else None
        vocabulary = gguf_vocabulary(folder, num_embeddings, pre=pre)
    except UserError as error:
        problems += error.problems
    problems += [
        Problem(f"{folder} tokenizer", got, expected, convert_command(folder)) for got, expected in vocabulary.problems
    ]
    if problems or source is None:
        raise UserError(problems)
    return source, vocabulary


def write_model(
    folder: Path,
    out: Path,
    *,
    dtype: str = "f16",
    pre: str | None = None,
    name: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> GgufFile:
    """Write a Hugging Face folder as GGUF, one tensor at a time, to `OUT.part` first.

    `dtype` is f32, f16, bf16, q8_0, or a quantization that `llama-quantize` makes. `pre` names llama.cpp's
    pre-tokenizer where the tokenizer's is not recognised. Raises UserError, with nothing left behind, for
    what llama.cpp would compute differently, an existing `out`, and a disk without room.
    """
    source, vocabulary = _read_model(folder, dtype=dtype, pre=pre)
    import gguf

    tensors = stored_tensors(source)
    # what llama-quantize starts from: bf16 weights lose nothing as bf16
    intermediate_dtype = "bf16" if str(source.config.get("dtype")).endswith("bfloat16") else "f16"
    direct_dtype = dtype if dtype in GGUF_DTYPES else intermediate_dtype
    # the tensors to write, in the order of the files, after the factors of Llama 3's positions
    names = gguf_tensor_names(source)
    entries = []
    if factors := source.rope.factors:
        entries.append(
            GgufTensor("rope_freqs.weight", (len(factors),), "f32", lambda: torch.tensor(factors, dtype=torch.float32))
        )
    for tensor in tensors:
        shape = tensor.shape[::-1] if is_transposed(source, tensor.name) else tensor.shape

        def load(tensor: StoredTensor = tensor) -> torch.Tensor:
            return to_gguf_layout(source, tensor.name, tensor.load())

        gguf_name = names[tensor.name]
        if len(shape) == 1 or gguf_name == "position_embd.weight":
            tensor_dtype = "f32"  # vectors and learned positions: small, and llama.cpp adds them in fp32
        else:
            tensor_dtype = "f16" if direct_dtype == "q8_0" and shape[-1] % _Q8_BLOCK_SIZE else direct_dtype
        entries.append(GgufTensor(gguf_name, shape, tensor_dtype, load))
    name = name or folder.resolve().name
    architecture, family, config = source.family.architecture, source.family, source.config
    model = {
        "context_length": context_length(source),
        **{key: int(config[config_key]) for key, config_key in family.sizes.items()},
        **{key: float(config[config_key]) for key, config_key in family.numbers.items()},
        **source.rope.fields,
        "vocab_size": int(config["vocab_size"]),
    }
    fields = {
        "general.type": "model",
        "general.name": safe_model_name(name, phi3=vocabulary.strips_spaces),
        "general.file_type": int(gguf.LlamaFileType[FILE_TYPES[direct_dtype]]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **{f"{architecture}.{key}": value for key, value in model.items()},
        **vocabulary.fields,
    }
    export_notes = []
    if window := dropped_window(source):
        note = f"llama.cpp has no sliding window for {source.config['model_type']}"
        export_notes.append(
            f"{note}: the context length is limited to the window, {min(window, context_length(source))} tokens"
        )
    f16_names = [entry.name for entry in entries if entry.dtype == "f16"] if direct_dtype == "q8_0" else []
    if f16_names:
        export_notes.append(
            f"{len(f16_names)} tensors are f16: their row length is not a multiple of {_Q8_BLOCK_SIZE} numbers"
        )
    notes = (*vocabulary.notes, *export_notes)
    with publish_file(out) as part:
        if dtype in GGUF_DTYPES:
            num_bytes = write_file(part, source.family.architecture, fields, entries, progress)
        else:
            # 16 bits beside the output, then llama.cpp's own quantization of it
            room = 2 * sum(data_size(entry) for entry in entries)  # both files are there for a while
            fix = "make room, or give an output on another disk"
            require_free_space(part.parent, room, what="a 16-bit file and its quantization", fix=fix)
            intermediate = part_path(part)
            try:
                write_file(intermediate, source.family.architecture, fields, entries, progress)
                command = ["llama-quantize", str(intermediate), str(part), dtype.upper()]
                process = subprocess.run(command, capture_output=True, text=True, check=False)
            finally:
                intermediate.unlink(missing_ok=True)
            if process.returncode or not part.is_file():
                output = "\n".join((process.stdout + process.stderr).strip().splitlines()[-5:])
                raise PeftkitError(f"llama-quantize failed ({process.returncode}): {output}")
            num_bytes = part.stat().st_size
    return GgufFile(out, num_bytes, len(entries), dtype, notes)
