"""Coverage-guided fuzzing of what reads foreign bytes: recipes, text files, heads of safetensors.

    python benchmarks/chaos/atheris_loaders.py -max_total_time=600 -rss_limit_mb=3000 [FOLDER OF INPUTS]

Needs atheris, which peftkit does not depend on. Every option is libFuzzer's. What raises anything but a
`UserError` ends the run, with the input in a file. The first byte of an input chooses the reader.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

with atheris.instrument_imports(include=["yaml", "json", "csv", "peftkit"]):
    import yaml  # noqa: F401
    from safetensors import SafetensorError, deserialize

    from peftkit.data.read.rows import File
    from peftkit.data.read.texts import read_csv, read_json_array, read_json_lines, read_paragraphs
    from peftkit.errors import UserError
    from peftkit.recipe.document import dump_text, parse_text, parse_value

PLACE = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)) / "rows"  # noqa: PTH112
READERS = (read_json_lines, read_json_array, read_csv, read_paragraphs)


def _recipe(content: bytes) -> None:
    text = content.decode("utf-8", "surrogateescape")
    data = parse_text(text, name="recipe.yaml").data
    again = parse_text(dump_text(data), name="again").data
    assert repr(again) == repr(data), (data, again)


def _value(content: bytes) -> None:
    parse_value(content.decode("utf-8", "surrogateescape"))


def _rows(content: bytes) -> None:
    PLACE.write_bytes(content[1:])
    for _ in READERS[content[0] % len(READERS)](File(PLACE, "rows"), 1000):
        pass


def _safetensors(content: bytes) -> None:
    try:
        deserialize(content)
    except SafetensorError:
        return


TARGETS = (_recipe, _recipe, _rows, _rows, _value, _safetensors)


def one_input(content: bytes) -> None:
    """Run one input. Anything but a UserError ends the run."""
    if len(content) < 2:
        return
    try:
        TARGETS[content[0] % len(TARGETS)](content[1:])
    except UserError as error:
        str(error).encode(errors="surrogateescape")


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
