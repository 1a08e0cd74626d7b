"""Sizes of a model as small expressions over its config.json: '2*inner + mamba_n_heads'."""

from __future__ import annotations

import ast
import operator
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
_USUAL: dict[str, Expression] = {
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
_LARGEST = 2**31  # more than any size of any model: beyond it, a config.json is broken


class Sizes:
    """Named sizes of one model, worked out on demand.

    A name is looked up among the family's own expressions, the usual ones, the keys of config.json and the
    family's defaults for keys that older files lack. Inside its own definition a name means the key.
    Raises KeyError for what nothing defines and ValueError for what is no size.
    """

    def __init__(self, config: Config, own: Mapping[str, Expression], defaults: Config) -> None:
        self._config = config
        self._expressions: dict[str, Expression] = {**_USUAL, **own}
        self._defaults = defaults
        self._known: dict[str, int] = {}
        self._open: list[str] = []

    def __getitem__(self, expression: str) -> int:
        if expression not in self._known:
            self._known[expression] = self._value(ast.parse(expression, mode="eval").body)
        return self._known[expression]

    def key(self, name: str) -> Any:
        """A plain key of config.json, or the family's default for it; None where neither is there."""
        value = self._config.get(name)
        return self._defaults.get(name) if value is None else value

    def flag(self, name: str) -> bool:
        """A switch of config.json; absent ones are off. Raises ValueError for what is no boolean."""
        value = self.key(name)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}, which is neither true nor false")
        return bool(value)

    def names(self, name: str) -> list[str]:
        """A list of names of config.json; empty where it is absent. Raises ValueError for anything else."""
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
            return self._named(node.id)
        raise ValueError(f"{ast.unparse(node)} is no expression of sizes")

    def _named(self, name: str) -> int:
        if name in self._expressions and name not in self._open:
            found = self._expressions[name]
            self._open.append(name)
            try:
                if callable(found):
                    return found(self)
                return self._first((found,) if isinstance(found, str) else found)
            finally:
                self._open.pop()
        value = self.key(name)
        if value is None:
            raise KeyError(f"{name} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _LARGEST:
            raise ValueError(f"{name} is {value!r}, which is no size")
        return value

    def _first(self, alternatives: tuple[str, ...]) -> int:
        for expression in alternatives[:-1]:
            try:
                return self._value(ast.parse(expression, mode="eval").body)
            except KeyError:
                continue
        return self._value(ast.parse(alternatives[-1], mode="eval").body)
