"""`general.name`, which llama.cpp does more with than show it.

A name with "phi3" or "phi-3" makes every special token swallow the spaces behind it, `</s>` too, and
`<unk>`, `<s>` and `<|endoftext|>` not; where one of these is no token, loading aborts with `_Map_base::at`.
That is what the real Phi-3 needs, and what nothing else may have (llama.cpp, src/llama-vocab.cpp).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_NEEDED = frozenset({"<unk>", "<s>", "</s>", "<|endoftext|>"})
_KEEP_SPACES = _NEEDED - {"</s>"}
_PHI3 = re.compile(r"phi(-?)3", re.IGNORECASE)


def strips_like_phi3(spec: Mapping[str, Any]) -> bool | None:
    """Whether added tokens swallow the spaces behind them as llama.cpp does it for Phi-3.

    False where none does; None where some do in another way, which llama.cpp cannot follow.
    """
    strip = {token["content"]: bool(token["rstrip"]) for token in spec["added_tokens"]}
    if not any(strip.values()):
        return False
    same = all(value == (content not in _KEEP_SPACES) for content, value in strip.items())
    return True if same and strip.keys() >= _NEEDED else None


def safe_name(name: str, *, phi3: bool) -> str:
    """A `general.name` that has the effect wanted, and no other."""
    plain = _PHI3.sub(r"phi\g<1>_3", name)
    return f"{plain} (phi-3)" if phi3 else plain
