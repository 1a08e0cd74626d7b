"""What stands beside the weights of a model that leaves: tokenizer, template, generation, licence."""

from __future__ import annotations

import shutil
from pathlib import Path

from peftkit.model.base.file_checks import contained_file

TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
)
_BASE = ("generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")
_CODE = ("*.py",)


def copy_beside(adapter: Path | None, base: Path, out: Path, *, with_code: bool) -> list[str]:
    """Copy the tokenizer that was trained with, or else the base's, and what else belongs to the model.

    Returns the names. Symlinks of a hub cache are followed, those that lead out of the folder refused.
    """
    own = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    copied: list[str] = []
    for folder, patterns in (
        (adapter if own else base, TOKENIZER),
        (base, _BASE),
        (base, _CODE if with_code else ()),
    ):
        assert folder is not None
        for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
            if path.is_file() and not (out / path.name).exists():
                shutil.copyfile(contained_file(folder, path.name), out / path.name)
                copied.append(path.name)
    return copied
