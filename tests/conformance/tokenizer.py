"""These models are random: they have no tokenizer to save beside the result."""

from __future__ import annotations

from typing import Any


class NoTokenizer:
    """Stands where a tokenizer is saved."""

    def save_pretrained(self, folder: Any) -> None:
        """Nothing to save."""
