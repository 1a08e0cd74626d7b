"""Pickled weights into safetensors, and adapters of other trainers into PEFT's form."""

from __future__ import annotations

import argparse
import sys

from peftkit.cli.command import Command, arg
from peftkit.secrets import redact
from peftkit.units import show_bytes, show_count

COMMAND = Command(
    "convert",
    "convert pickled weights to safetensors, running none of their code, or another trainer's adapter to PEFT's form",
    (
        arg(
            "path",
            metavar="PATH",
            help="a folder with pytorch_model*.bin or adapter_model.bin, one file, or an adapter of mlx-lm",
        ),
        arg("--out", metavar="DIR", required=True, help="a new folder"),
        arg("--rename", metavar="OLD=NEW", action="append", default=[], help="in the names of an adapter's tensors"),
        arg("--expert-major", action="store_true", help="an adapter's lora_B of fused experts is packed as by Unsloth"),
    ),
)


def run(arguments: argparse.Namespace) -> int:
    """Convert pickled weights, or an adapter; print the files written and those left out."""
    from peftkit import api

    conversion = api.convert_weights(
        arguments.path, out=arguments.out, rename=arguments.rename, expert_major=arguments.expert_major
    )
    for name in conversion.left:
        print(redact(f"not converted: {name}"), file=sys.stderr)
    tensors = f"{show_count(conversion.num_tensors)} tensors, {show_bytes(conversion.num_bytes)}"
    print(f"{conversion.out}: {tensors} in {', '.join(conversion.files)}")
    return 0
