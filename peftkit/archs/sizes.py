"""Model sizes as small expressions over config.json: '2*inner + mamba_n_heads'."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, Union

Config = Mapping[str, Any]
# An expression, alternatives of which the first known one counts, or a function where a switch decides.
Expression = Union[str, tuple[str, ...], "Callable[[Sizes], int]"]

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
_COMMON: dict[str, Expression] = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": ("num_key_value_heads", "heads"),
    "head_dim": ("head_dim", "hidden//heads"),
    "ffn": ("intermediate_size", "4*hidden"),
    "vocab": "vocab_size",
    "positions": ("max_position_embeddings", "0"),
    "experts_per_token": ("num_experts_per_tok", "num_experts_per_token", "1"),
    "q": "heads*head_dim",
    "kv": "kv_heads*head_dim",
}
_LIKE_A_SIZE = re.compile(r"(^|_)(size|dim|rank|heads|layers|experts|groups|intermediate|width)(_|$)|^(n|num|d)_")
# Like sizes by name, and of no tensor's shape where a family does not read them: how attention is cut up, other names
# of what is read, and settings of generation that old files hold.
_NO_SHAPE = frozenset(
    [
        "max_window_layers",
        "chunk_size",
        "mamba_chunk_size",
        "attention_chunk_size",
        "global_attn_every_n_layers",
        "n_positions",
        "n_ctx",
        "n_group",
        "num_key_value_heads",
        "num_kv_heads",
        "num_query_groups",
        "num_hidden_layers",
        "head_dim",
        "qk_head_dim",
        "attention_head_dim",
        "encoder_attention_heads",
        "experts_per_token",
        "intermediate_size_mlp",
        "attention_hidden_size",
        "time_step_rank",
        "num_labels",
        "num_beams",
        "num_beam_groups",
        "num_return_sequences",
        "num_logits_to_keep",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "num_nextn_predict_layers",
    ]
)
_MAX_SIZE = 2**31  # more than any size of any model: beyond it, a config.json is broken


class Sizes:
    """Named sizes of one model, computed on demand.

    A name is looked up among the family's own expressions, the common ones, the keys of config.json and the
    family's defaults for keys that older files lack. Inside its own definition a name means the key. Raises
    KeyError for undefined names and ValueError for values that are no size.
    """

    def __init__(self, config: Config, family_sizes: Mapping[str, Expression], defaults: Config) -> None:
        self._config = config
        self._expressions: dict[str, Expression] = {**_COMMON, **family_sizes}
        self._defaults = defaults
        self._values: dict[str, int] = {}
        self._read: set[str] = set()
        self._resolving: list[str] = []

    def __getitem__(self, expression: str) -> int:
        if expression not in self._values:
            self._values[expression] = self._value(ast.parse(expression, mode="eval").body)
        return self._values[expression]

    def key(self, name: str) -> Any:
        """Return a key of config.json, or the family's default for it; None if there is neither."""
        self._read.add(name)
        value = self._config.get(name)
        return self._defaults.get(name) if value is None else value

    def unread(self) -> tuple[str, ...]:
        """Return the keys of config.json that look like sizes, and that nothing has read yet."""
        return tuple(
            name
            for name, value in self._config.items()
            if isinstance(value, int) and value > 1 and name not in self._read | _NO_SHAPE and _LIKE_A_SIZE.search(name)
        )

    def flag(self, name: str) -> bool:
        """Return a Boolean of config.json; False if absent. Raises ValueError for other values."""
        value = self.key(name)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}, which is neither true nor false")
        return bool(value)

    def names(self, name: str) -> list[str]:
        """Return a list of names of config.json; empty if absent. Raises ValueError for other values."""
        value = self.key(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"{name} is {value!r:.60}, which is no list of names")
        return value

    def _value(self, node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](self._value(node.left), self._value(node.right))
        if isinstance(node, ast.Name):
            return self._resolve(node.id)
        raise ValueError(f"{ast.unparse(node)} is no expression of sizes")

    def _resolve(self, name: str) -> int:
        """Resolve a name to its size: the family's expression, else the key of config.json."""
        if name in self._expressions and name not in self._resolving:
            expression = self._expressions[name]
            self._resolving.append(name)
            try:
                if callable(expression):
                    return expression(self)
                alternatives = (expression,) if isinstance(expression, str) else expression
                for expression in alternatives[:-1]:
                    try:
                        return self._value(ast.parse(expression, mode="eval").body)
                    except KeyError:
                        continue
                return self._value(ast.parse(alternatives[-1], mode="eval").body)
            finally:
                self._resolving.pop()
        value = self.key(name)
        if value is None:
            raise KeyError(f"{name} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MAX_SIZE:
            raise ValueError(f"{name} is {value!r}, which is no size")
        return value
