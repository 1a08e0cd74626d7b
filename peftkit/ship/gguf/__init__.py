"""Models and LoRA adapters as GGUF files, for llama.cpp and what is built on it, without a checkout of it."""

from peftkit.ship.gguf.adapter import write_adapter
from peftkit.ship.gguf.families import FAMILIES, GgufFamily, gguf_family
from peftkit.ship.gguf.model import check_exportable, write_model
from peftkit.ship.gguf.writing import DTYPES, GgufWritten

__all__ = [
    "DTYPES",
    "FAMILIES",
    "GgufFamily",
    "GgufWritten",
    "check_exportable",
    "gguf_family",
    "write_adapter",
    "write_model",
]
