"""Models and LoRA adapters as GGUF files, for llama.cpp and what is built on it, without a checkout of it."""

from peftkit.ship.export.gguf.adapter import write_adapter
from peftkit.ship.export.gguf.families import FAMILIES, GgufFamily, gguf_family
from peftkit.ship.export.gguf.model import check_exportable, write_model
from peftkit.ship.export.gguf.writing import GGUF_DTYPES, GgufFile

__all__ = [
    "FAMILIES",
    "GGUF_DTYPES",
    "GgufFamily",
    "GgufFile",
    "check_exportable",
    "gguf_family",
    "write_adapter",
    "write_model",
]
