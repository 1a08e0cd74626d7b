"""Versions and the device."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from peftkit.cli.command import Command, arg, print_json

COMMAND = Command("env", "print versions and the device", (arg("--json", action="store_true"),))


def run(arguments: argparse.Namespace) -> int:
    """Print versions and the device."""

    from peftkit.model.hardware import detect_device_without_torch
    from peftkit.prepare.environment import versions

    environment = {"versions": versions(), "device": asdict(detect_device_without_torch())}
    if arguments.json:
        print_json(environment)
        return 0
    for section, values in environment.items():
        print(section)
        for name, value in values.items():
            print(f"  {name:<18} {'not installed' if value is None else value}")
    return 0
