"""Pickled weights into safetensors."""

from __future__ import annotations

import argparse
import sys

from peftkit.cli.command import Command, arg
from peftkit.secrets import redact
from peftkit.units import show_bytes, show_count

COMMAND = Command(
    "convert",
    "convert pickled weights to safetensors, in a process that runs none of their code",
    (
        arg("path", metavar="PATH", help="a folder with pytorch_model*.bin or adapter_model.bin, or one file"),
        arg("--out", metavar="DIR", required=True, help="a new folder"),
    ),
)


def run(arguments: argparse.Namespace) -> int:
    """Convert pickled weights; print the files written and those left out."""
    from peftkit import api

    conversion = api.convert_weights(arguments.path, out=arguments.out)
    for name in conversion.left:
        print(redact(f"not converted: {name}"), file=sys.stderr)
    tensors = f"{show_count(conversion.num_tensors)} tensors, {show_bytes(conversion.num_bytes)}"
    print(f"{conversion.out}: {tensors} in {', '.join(conversion.files)}")
    return 0
