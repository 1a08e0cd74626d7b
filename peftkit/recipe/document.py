"""YAML with positions: the data of a recipe file, and the line of each key.

YAML 1.2's core types only: `off` and `no` are strings, 1e-4 is a number, 12:30 is a string; beyond them,
1_000 is a number. Tags, duplicate keys, merge keys and alias bombs are refused, with their lines.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from peftkit.errors import Problem, UserError
from peftkit.units import shorten

Key = tuple[str | int, ...]
MAX_BYTES = 1_000_000
MAX_NODES = 10_000
MAX_DEPTH = 50
INVALID_CHARS = re.compile("[\0\ud800-\udfff]")  # no file and no terminal takes NUL, or half of a surrogate pair
_MAX_DIGITS = 1000  # Python refuses to read, and to show, numbers of more than 4300


@dataclass(frozen=True)
class Document:
    """A parsed mapping. `lines` maps the path of each key to its line, counted from 1."""

    name: str
    data: dict[str, Any]
    lines: dict[Key, int]
    text: str = ""


class _TooManyNodesError(Exception):
    """More nodes than a recipe has: composing a megabyte of them would take many seconds."""


class _Loader(yaml.SafeLoader):
    """A YAML loader that only composes nodes and resolves plain scalars; PyYAML constructs nothing."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.num_nodes = 0
        self.tags: list[tuple[str, int]] = []  # as they were written, with their lines

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node without its tag, and record the tags that were written, with their lines."""
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            self.tags.append((event.tag, event.start_mark.line + 1))
            event.tag = None
        self.num_nodes += 1
        if self.num_nodes > 2 * MAX_NODES + 1:  # keys are nodes too
            raise _TooManyNodesError
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^(?:[-+]?[0-9]+(?:_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", list("-+.")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


_SCALARS = {
    "tag:yaml.org,2002:null": lambda text: None,
    "tag:yaml.org,2002:bool": lambda text: text.lower() == "true",
    "tag:yaml.org,2002:int": lambda text: int(text.replace("_", ""), {"0o": 8, "0x": 16}.get(text[:2], 10)),
    "tag:yaml.org,2002:float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    "tag:yaml.org,2002:str": lambda text: text,
}


@dataclass
class _NodeReader:
    name: str
    lines: dict[Key, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    num_nodes: int = 0

    def refuse(self, node: yaml.Node, got: str, expected: str, fix: str = "") -> None:
        self.problems.append(Problem(f"{self.name}:{node.start_mark.line + 1}", got, expected, fix))

    def value(self, node: yaml.Node, key: Key) -> Any:
        self.num_nodes += 1
        if len(key) > MAX_DEPTH:
            raise UserError(Problem(self.name, "values nested too deep", "a short recipe"))
        if self.num_nodes > MAX_NODES:
            problem = Problem(self.name, f"more than {MAX_NODES} values (aliases repeat them)", "a short recipe")
            raise UserError(problem)
        if isinstance(node, yaml.MappingNode):
            return self.read_mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*key, i)) for i, item in enumerate(node.value)]
        if node.tag.endswith(":int") and len(node.value) > _MAX_DIGITS:
            self.refuse(node, f"a number of {len(node.value):,} digits", "a number with fewer digits")
            return None
        return _SCALARS[node.tag](node.value)

    def read_mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.value == "<<" and key_node.style is None:
                self.refuse(key_node, "the merge key <<", "plain keys", "use extends: other-recipe.yaml")
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self.refuse(key_node, "a key that is not text", "text keys")
                continue
            name = str(key_node.value)
            if name in values:
                first_line = self.lines[(*key, name)]
                self.refuse(
                    key_node,
                    f"the key {dotted((*key, name))} again",
                    "each key once",
                    f"it is already on line {first_line}",
                )
                continue
            self.lines[(*key, name)] = key_node.start_mark.line + 1
            values[name] = self.value(value_node, (*key, name))
        return values


def dotted(key: Key) -> str:
    """Return a key as 'method.rank', with unknown parts clipped to fit a line."""
    return ".".join(shorten(str(part)) for part in key)


def _yaml_problem(name: str, text: str, error: Exception) -> Problem:
    """Return the problem of text that cannot be composed."""
    if isinstance(error, RecursionError):
        return Problem(name, "values nested too deep", "a short recipe")
    if isinstance(error, _TooManyNodesError):
        return Problem(name, f"more than {MAX_NODES} values", "a short recipe")
    mark = getattr(error, "problem_mark", None)
    where = f"{name}:{mark.line + 1}" if mark else name
    lines = text.splitlines()
    line = lines[mark.line] if mark and mark.line < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return Problem(where, "a tab in the indentation", "spaces", "YAML allows no tabs there: use two spaces")
    message = getattr(error, "problem", None) or str(error).splitlines()[0]
    detail = getattr(error, "context", None)
    context = f" {detail}" if detail else ""
    return Problem(
        where,
        f"text that is not YAML ({f'{message}{context}'[:200]})",
        "YAML",
        line.strip() and f"near: {line.strip()[:60]}",
    )


def _compose(text: str, walk: _NodeReader) -> yaml.Node | None:
    """Compose the root node of a text; None if it is empty. Raises UserError for what is not YAML."""
    try:
        loader = _Loader(text)
        node: yaml.Node | None = loader.get_single_node()
    # ValueError, OverflowError: characters beyond Unicode, and numbers too long to be read
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError, _TooManyNodesError) as error:
        raise UserError(_yaml_problem(walk.name, text, error)) from None
    for tag, line in loader.tags:
        short_tag = tag.replace("tag:yaml.org,2002:", "!!")
        fix = "tags can run code; peftkit allows none"
        walk.problems.append(Problem(f"{walk.name}:{line}", f"the tag {short_tag}", "plain values", fix))
    return node


def parse_text(text: str, *, name: str) -> Document:
    """Parse a recipe's text. Raises UserError with every problem that was found."""
    walk = _NodeReader(name)
    node = _compose(text, walk)
    if node is None:
        fix = "start from one: peftkit recipes new MODEL METHOD"
        raise UserError(Problem(name, "an empty file", "a recipe with base, method and data", fix))
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        raise UserError(Problem(name, kind, "a mapping with base, method and data"))
    data = walk.value(node, ())
    if walk.problems:
        raise UserError(walk.problems)
    return Document(name, data, walk.lines, text)


def parse_value(text: str) -> Any:
    """Parse one value with YAML's types: '8' -> 8, 'null' -> None, '[q, v]' -> a list. Raises UserError."""
    walk = _NodeReader(text)
    node = _compose(text, walk)
    value = None if node is None or walk.problems else walk.value(node, ())
    if walk.problems:
        raise UserError(walk.problems)
    return value


class _Dumper(yaml.SafeDumper):
    """A YAML dumper that quotes every text that this module would read as something else."""


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *_Loader.yaml_implicit_resolvers.get(first, [])]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
}


def plain_value(value: object, depth: int = 0) -> object:
    """Return a value from Python as YAML holds it: arrays, sets and tuples as lists, paths as texts.

    NumPy's numbers become Python's. Anything else is left as it is, and so is what is nested too deep.
    """
    if depth > MAX_DEPTH:
        return value
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: plain_value(item, depth + 1) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((plain_value(item, depth + 1) for item in value), key=str)
    if isinstance(value, list | tuple):
        return [plain_value(item, depth + 1) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def dump_value(value: object) -> str:
    """Return a value on one line, as `parse_value` reads it back. Raises yaml.YAMLError for what YAML cannot hold."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=math.inf)
    return str(text).removesuffix("...\n").strip()


def dump_text(data: dict[str, Any]) -> str:
    """Return YAML text that `parse_text` reads back as the same values."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False))


def read_document(path: Path) -> Document:
    """Read and parse a recipe file. Raises UserError if it is not a readable YAML mapping."""
    name = str(path)
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(Problem(name, "no such file", "a recipe", _suggest_files(path))) from None
    except IsADirectoryError:
        raise UserError(Problem(name, "a folder", "a recipe file", _suggest_files(path / "x"))) from None
    except OSError as error:
        raise UserError(Problem(name, f"a file that cannot be read ({error.strerror})", "a recipe")) from None
    if len(raw) > MAX_BYTES:
        got = f"more than {MAX_BYTES:,} bytes"
        raise UserError(Problem(name, got, f"a recipe of at most {MAX_BYTES:,} bytes"))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(Problem(f"{name}:{line}", f"the byte 0x{raw[error.start]:02x}", "UTF-8 text")) from None
    return parse_text(text, name=name)


def _suggest_files(path: Path) -> str:
    if not path.parent.is_dir():
        return "see the shipped ones: peftkit recipes list"
    names = sorted(p.name for p in path.parent.iterdir() if p.suffix in {".yaml", ".yml"})
    return f"there is: {', '.join(names[:5])}" if names else "see the shipped ones: peftkit recipes list"
