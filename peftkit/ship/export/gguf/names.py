"""`general.name` of a GGUF file, which llama.cpp does more with than show it.

A name with "phi3" or "phi-3" makes every special token swallow the spaces after it, `</s>` too, and
`<unk>`, `<s>` and `<|endoftext|>` not; where one of these is no token, loading aborts with `_Map_base::at`.
The real Phi-3 needs that, and nothing else may have it (llama.cpp, src/llama-vocab.cpp).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_PHI3_TOKENS = frozenset({"<unk>", "<s>", "</s>", "<|endoftext|>"})
_KEEP_SPACES = _PHI3_TOKENS - {"</s>"}
_PHI3_NAME = re.compile(r"phi(-?)3", re.IGNORECASE)


def strips_like_phi3(spec: Mapping[str, Any]) -> bool | None:
    """Return whether added tokens swallow the spaces after them as llama.cpp does it for Phi-3.

    False where none does; None where some do in another way, which llama.cpp cannot follow.
    """
    strip = {token["content"]: bool(token["rstrip"]) for token in spec["added_tokens"]}
    if not any(strip.values()):
        return False
    same = all(value == (content not in _KEEP_SPACES) for content, value in strip.items())
    return True if same and strip.keys() >= _PHI3_TOKENS else None


def safe_model_name(name: str, *, phi3: bool) -> str:
    """Return a `general.name` with the wanted effect on special tokens, and no other."""
    safe = _PHI3_NAME.sub(r"phi\g<1>_3", name)
    return f"{safe} (phi-3)" if phi3 else safe
