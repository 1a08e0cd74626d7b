"""Files beside the weights of a model: tokenizer, template, generation settings, licence."""

from __future__ import annotations

import shutil
from pathlib import Path

from peftkit.model.base.file_checks import contained_file

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
)
_BASE_FILES = ("generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")
_CODE_FILES = ("*.py",)


def copy_model_files(adapter: Path | None, base: Path, out: Path, *, with_code: bool) -> list[str]:
    """Copy the adapter's tokenizer, or else the base's, and the base's other files; return their names.

    Symlinks of a hub cache are followed, those that lead out of the folder refused.
    """
    has_tokenizer = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    copied: list[str] = []
    for folder, patterns in (
        (adapter if has_tokenizer else base, TOKENIZER_FILES),
        (base, _BASE_FILES),
        (base, _CODE_FILES if with_code else ()),
    ):
        assert folder is not None
        for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
            if path.is_file() and not (out / path.name).exists():
                shutil.copyfile(contained_file(folder, path.name), out / path.name)
                copied.append(path.name)
    return copied
