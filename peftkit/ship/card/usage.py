"""Usage section of a card, from `usage.md.jinja`: code for transformers and PEFT, commands for vLLM and Ollama.

The tests execute the Python of a generated card as it stands. Commands that they do not run name a source.
"""

from __future__ import annotations

from pathlib import Path

import jinja2

FOLDER_PLACEHOLDER = "path/to/this/folder"  # what a card calls a folder that is not on the Hub
_TEMPLATE = Path(__file__).with_name("usage.md.jinja")
_DOCS = {
    "vllm_lora_docs": "https://docs.vllm.ai/en/v0.8.5/features/lora.html",
    "vllm_serve_docs": "https://docs.vllm.ai/en/v0.8.4/serving/openai_compatible_server.html",
    "ollama_docs": "https://github.com/ollama/ollama/blob/v0.1.43/docs/import.md",
}
_VLLM_RANKS = (8, 16, 32, 64, 128, 256)  # what --max-lora-rank takes
_AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "multi-label": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
}


def render_usage(*, name: str, task: str, rank: int | None, plain_lora: bool, **facts: object) -> str:
    """Render the last section of a card: how to load the model.

    `facts` are layout, base, revision, num_labels, chats, dtype, quant_type, double_quant and compute_dtype.
    All of them must be safe to stand in code.
    """
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        **_DOCS,
        **facts,
        name=name,
        task=task,
        auto=_AUTO_CLASSES.get(task, "AutoModel"),
        vllm_rank=next((size for size in _VLLM_RANKS if size >= (rank or 0)), None) if plain_lora else None,
        ollama_name=name.rpartition("/")[2].lower() if name != FOLDER_PLACEHOLDER else "mine",
    )
