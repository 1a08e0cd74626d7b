"""A result in the form that another program reads."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from peftkit.cli.command import Command, arg
from peftkit.units import printable

if TYPE_CHECKING:
    from peftkit.api import Exported

COMMAND = Command(
    "export",
    "export a run, adapter or model for PEFT, vLLM, GGUF, Ollama or the hub",
    (
        arg("path", metavar="RUN|ADAPTER|MODEL"),
        arg("--to", required=True, metavar="FORMAT", help="adapter, safetensors, gguf, ollama or hub"),
        arg("--out", metavar="DIR", help="a new folder"),
        arg("--for", dest="engine", metavar="ENGINE", help="for adapter: vllm"),
        arg("--dtype", metavar="TYPE", help="weight type; gguf: f32, f16, bf16, q8_0, q4_k_m, ..."),
        arg("--base", choices=("dequantized", "original"), help="for QLoRA, as in merge"),
        arg("--base-model", metavar="PATH|ID", help="another copy of the same base"),
        arg("--data", metavar="FILE", help="rows to compare a merged model on"),
        arg("--lora", action="store_true", help="for gguf and ollama: the adapter alone"),
        arg("--pre", metavar="NAME", help="for gguf: the pre-tokenizer, if not recognised"),
        arg("--repo", metavar="OWNER/NAME", help="for hub: repository to push to"),
        arg("--public", action="store_true", help="for hub: make it public (default: private)"),
        arg("--revision", metavar="BRANCH", help="for hub: branch to push to"),
        arg("--force", action="store_true", help="keep a result that differs, as in merge"),
    ),
)


def run(arguments: argparse.Namespace) -> int:
    """Export to another format; print the files written."""
    from peftkit import api

    option_names = ("to", "out", "dtype", "base", "base_model", "data", "force", "lora", "pre", "repo", "public")
    options = api.ExportOptions(
        engine=arguments.engine,
        revision=arguments.revision,
        **{name: getattr(arguments, name) for name in option_names},
    )
    result = api.export_adapter(arguments.path, options=options)
    print_export(result)
    return 0


def print_export(result: Exported) -> None:
    """Print the files of an export, and notes on their use."""
    from peftkit.cli.tables import print_rows

    print_rows(result.rows())
    for text in result.said:
        print(printable(text))
    print(f"\n{result.where}")
