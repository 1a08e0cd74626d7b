"""Which Jinja templates take time and memory in proportion to the chat: seen in their syntax, nothing is run.

Jinja's sandbox, which transformers uses, keeps a template from Python's insides. It does not keep it from
loops in loops, from 'a' * 10**9, nor from doubling a text line by line. A template is plain where none of
that can be said in it. The rules are narrow on purpose: what they do not know is not plain, and is rendered
in a process with limits (`peftkit.data.chat.render`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension

_LONGEST = 2**16  # characters of a template: the largest in use have some 30,000
_INPUTS = {"messages", "tools", "documents", "builtin_tools"}
# fmt: off
_NODES = {
    "Template", "Output", "TemplateData", "Const", "Name", "NSRef", "If", "For", "Assign", "Macro",
    "Call", "Filter", "Test", "Compare", "Operand", "Not", "And", "Or", "Add", "Sub", "Concat",
    "Neg", "Mod", "Getattr", "Getitem", "Slice", "List", "Tuple", "Dict", "Pair", "Keyword",
    "CondExpr", "Scope", "Break", "Continue",
}
_SAME_SIZE = {
    "trim", "list", "first", "last", "upper", "lower", "title", "capitalize", "string", "safe",
    "selectattr", "rejectattr", "select", "reject", "items", "dictsort", "sort", "reverse",
    "unique", "default", "d",
}
_FILTERS = _SAME_SIZE | {"length", "count", "int", "tojson", "replace", "join", "map"}
_METHODS = {
    "get", "items", "keys", "values", "strip", "lstrip", "rstrip", "split", "rsplit", "splitlines",
    "upper", "lower", "title", "capitalize", "startswith", "endswith", "find", "rfind", "isdigit",
    "isspace", "replace", "partition", "rpartition",
}
# fmt: on
_LISTS = {
    "list",
    "map",
    "sort",
    "unique",
    "select",
    "reject",
    "selectattr",
    "rejectattr",
    "items",
    "dictsort",
}
_LIST_METHODS = {"split", "rsplit", "splitlines", "items", "keys", "values", "partition", "rpartition"}
_TEXTS = {
    "trim",
    "upper",
    "lower",
    "title",
    "capitalize",
    "safe",
    "string",
    "replace",
}  # they write lists out
_TEXT_METHODS = {"strip", "lstrip", "rstrip", "upper", "lower", "title", "capitalize", "replace"}
_Key = str | tuple[str, str]  # a name, or a namespace and its attribute


class Generation(Extension):
    """transformers' tag around what the assistant says, for parsing alone."""

    tags = {"generation"}  # noqa: RUF012  Jinja's own way

    def parse(self, parser: Any) -> nodes.Node:
        """The body as it stands."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


_ENVIRONMENT = jinja2.Environment(extensions=[Generation, "jinja2.ext.loopcontrols"])


def _key(node: Any) -> _Key | None:
    """What a name or a namespace's attribute is known by."""
    if isinstance(node, nodes.Name):
        return str(node.name)
    if isinstance(node, nodes.NSRef):
        return (node.name, node.attr)
    if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
        return (node.node.name, node.attr)
    return None


class _Look:
    """One template: what is assigned in it, and what speaks against it."""

    def __init__(self, tree: nodes.Template) -> None:
        self.tree = tree
        self.assigned: dict[_Key, list[nodes.Node]] = {}
        self.macros = {macro.name for macro in tree.find_all(nodes.Macro)}
        self.arguments = {arg.name for macro in tree.find_all(nodes.Macro) for arg in macro.args}
        self.targets = {n.name for loop in tree.find_all(nodes.For) for n in _names(loop.target)}
        for node in tree.find_all(nodes.Assign):
            key = _key(node.target)
            if key is None:
                continue
            self.assigned.setdefault(key, []).append(node.node)
            made = node.node
            if isinstance(made, nodes.Call) and getattr(made.node, "name", "") == "namespace":
                for pair in made.kwargs:
                    self.assigned.setdefault((str(key), pair.key), []).append(pair.value)
        self.lists: set[_Key] = set()
        for _ in self.assigned:  # a list set to another's name is found in as many rounds as there are names
            self.lists |= {key for key, values in self.assigned.items() if any(map(self.is_list, values))}
        # the largest sets of assigned keys whose every value is such, given the sets themselves
        self.parts: set[_Key] = set()
        self.numbers = set(self.assigned) - self.targets - self.arguments
        while wrong := {key for key in self.numbers if not all(map(self.is_number, self.assigned[key]))}:
            self.numbers -= wrong
        self.parts = set(self.assigned) - self.arguments
        while wrong := {key for key in self.parts if not all(map(self.is_part, self.assigned[key]))}:
            self.parts -= wrong

    def is_number(self, node: Any) -> bool:
        """Surely a number: of something's length, counted in a loop, or written so."""
        if isinstance(node, nodes.Const):
            return isinstance(node.value, bool | int | float)
        if isinstance(node, nodes.Filter):
            return node.name in {"length", "count"} or (node.name == "int" and not node.args)
        if isinstance(node, nodes.Add | nodes.Sub):
            return self.is_number(node.left) and self.is_number(node.right)
        if isinstance(node, nodes.Compare | nodes.Test | nodes.Not):
            return True
        if isinstance(node, nodes.Getattr) and getattr(node.node, "name", "") == "loop":
            return node.attr in {"index", "index0", "revindex", "revindex0", "length", "first", "last"}
        return _key(node) in self.numbers

    def is_part(self, node: Any) -> bool:
        """Surely no larger than what the chat brings, or the template's own text."""
        if isinstance(node, nodes.Const | nodes.Compare | nodes.Test | nodes.Not) or self.is_number(node):
            return True
        if isinstance(node, nodes.Name):
            return node.name not in self.arguments and (
                node.name not in self.assigned or node.name in self.parts
            )
        if isinstance(node, nodes.Getattr | nodes.Getitem):
            return _key(node) in self.parts or self.is_part(node.node)
        if isinstance(node, nodes.Filter):
            return node.name in _SAME_SIZE and all(self.is_part(n) for n in (node.node, *node.args))
        if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
            same = node.node.attr in _METHODS - {"replace"}
            return same and all(self.is_part(n) for n in (node.node.node, *node.args))
        if isinstance(node, nodes.CondExpr):
            return self.is_part(node.expr1) and (node.expr2 is None or self.is_part(node.expr2))
        if isinstance(node, nodes.And | nodes.Or):
            return self.is_part(node.left) and self.is_part(node.right)
        return isinstance(node, nodes.List | nodes.Tuple) and all(
            isinstance(i, nodes.Const) for i in node.items
        )

    def is_list(self, node: Any) -> bool:
        """Perhaps a list that the template made: written out as text, it doubles the backslashes in it."""
        if isinstance(node, nodes.List | nodes.Tuple | nodes.Dict):
            return True
        if isinstance(node, nodes.Filter):
            return node.name in _LISTS or (
                node.name in {"reverse", "default", "d"} and self.is_list(node.node)
            )
        if isinstance(node, nodes.Call):
            return isinstance(node.node, nodes.Getattr) and node.node.attr in _LIST_METHODS
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Slice) and self.is_list(node.node)
        if isinstance(node, nodes.CondExpr):
            return any(map(self.is_list, (node.expr1, node.expr2)))
        if isinstance(node, nodes.Add | nodes.And | nodes.Or):
            return any(map(self.is_list, (node.left, node.right)))
        return _key(node) in self.lists

    def tame(self, node: Any) -> bool:
        """Whether an expression only adds to a text, or takes from it."""
        if self.is_part(node) or _key(node) is not None:
            return True
        if isinstance(node, nodes.Add):
            return self.tame(node.left) and self.tame(node.right)
        if isinstance(node, nodes.Concat):
            return all(map(self.tame, node.nodes))
        if isinstance(node, nodes.CondExpr):
            return self.tame(node.expr1) and (node.expr2 is None or self.tame(node.expr2))
        if isinstance(node, nodes.List):
            return all(map(self.is_part, node.items))
        if isinstance(node, nodes.Filter):
            return node.name in _TEXTS and self.tame(node.node)
        if isinstance(node, nodes.Call):
            made = node.node
            return isinstance(made, nodes.Getattr) and made.attr in _TEXT_METHODS and self.tame(made.node)
        return False

    def grown(self, node: Any) -> int:
        """How often an expression names what may have grown: macros' arguments, and what is added up."""
        found = [node, *node.find_all((nodes.Name, nodes.Getattr))]
        keys = [_key(n) for n in found if not isinstance(n, nodes.NSRef)]
        small = self.parts | self.numbers
        return sum(
            key is not None and (key in self.assigned or key in self.arguments) and key not in small
            for key in keys
        ) - sum(isinstance(key, tuple) and key in self.assigned and key[0] in self.assigned for key in keys)

    def against(self) -> Iterator[str]:
        """What may take more than its share, in words."""
        for node in self.tree.find_all(nodes.Node):
            if type(node).__name__ not in _NODES:
                yield type(node).__name__.lower()
            elif isinstance(node, nodes.Mod) and not (
                self.is_number(node.left) and self.is_number(node.right)
            ):
                yield "% of what may be a text"
            elif isinstance(node, nodes.Concat) and any(map(self.is_list, node.nodes)):
                yield "a list written out"
            elif isinstance(node, nodes.Assign):
                yield from self._assign(node)
            elif isinstance(node, nodes.Call):
                yield from self._call(node)
            elif isinstance(node, nodes.Filter):
                yield from self._filter(node)
        yield from self._loops(self.tree, [])
        for macro in self.tree.find_all(nodes.Macro):
            if any(getattr(call.node, "name", "") in self.macros for call in macro.find_all(nodes.Call)):
                yield "a macro that calls macros"

    def _assign(self, node: nodes.Assign) -> Iterator[str]:
        if _key(node.target) is None:
            yield "several names set at once"
        elif self.grown(node.node) > 1:
            yield "a text that may double"
        elif self.grown(node.node) and not self.tame(node.node):
            yield "a text made of what may have grown"
        elif any(getattr(call.node, "name", "") in self.macros for call in node.find_all(nodes.Call)):
            yield "a macro's text kept"

    def _call(self, node: nodes.Call) -> Iterator[str]:
        called = node.node
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            yield "a call with stars"
        elif isinstance(called, nodes.Name):
            first = node.args[0] if node.args else None
            plain_time = isinstance(first, nodes.Const) and not re.search(r"%\W*\d", str(first.value))
            if called.name == "strftime_now" and not plain_time:
                yield "a time of any width"
            elif called.name not in {"raise_exception", "namespace", "strftime_now", *self.macros}:
                yield f"{called.name}()"
        elif not isinstance(called, nodes.Getattr) or called.attr not in _METHODS:
            yield f".{getattr(called, 'attr', '')}()"
        elif called.attr == "replace" and not _shrinks(node.args):
            yield "replace with a longer text"

    def _filter(self, node: nodes.Filter) -> Iterator[str]:
        constant = all(isinstance(arg, nodes.Const) for arg in node.args)
        if node.name not in _FILTERS or node.dyn_args is not None or node.dyn_kwargs is not None:
            yield f"the filter {node.name}"
        elif node.name in _TEXTS and self.is_list(node.node):
            yield "a list written out"
        elif node.name == "replace" and not _shrinks(node.args):
            yield "replace with a longer text"
        elif node.name == "tojson":
            inner: Any = node.node
            again = isinstance(inner, nodes.Filter) or any(
                f.name == "tojson" for f in inner.find_all(nodes.Filter)
            )
            widths = [pair.value for pair in node.kwargs if pair.key == "indent"] + node.args
            narrow = all(isinstance(w, nodes.Const) and w.value in (None, *range(9)) for w in widths)
            if again or self.grown(inner) or not narrow:
                yield "tojson of what may have grown"
        elif node.name == "join" and (not constant or node.kwargs or self.grown(node.node) > 1):
            yield "join"
        elif node.name == "map" and (node.args or [pair.key for pair in node.kwargs] != ["attribute"]):
            yield "map"

    def _loops(self, node: nodes.Node, outer: list[set[str]]) -> Iterator[str]:
        """Loops walk the chat as a tree, each part of it once; what they write is of that part."""
        for child in node.iter_child_nodes():
            if not isinstance(child, nodes.For):
                yield from self._loops(child, outer)
                continue
            targets = {name.name for name in _names(child.target)}
            root = _root(child.iter)
            if child.recursive:
                yield "a recursive loop"
            elif not outer and self.is_part(child.iter) and self._is_input(child.iter):
                pass
            elif not self.is_part(child.iter) or (outer and root not in outer[-1]):
                yield "a loop over what may be long"
            elif set(_written(child)) - targets - self._small():
                yield "a loop that writes more than its part"
            yield from self._loops(child, [*outer, targets | self._from(targets)])

    def _is_input(self, node: Any) -> bool:
        """Whether a loop goes over turns or tools: there are no more of them than lines in a row."""
        while isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            node = node.node
        if not isinstance(node, nodes.Name):
            return isinstance(node, nodes.List | nodes.Tuple)
        values = self.assigned.get(node.name)
        if values is None:
            return node.name in _INPUTS
        others = [value for value in values if _root(value) != node.name]
        return bool(others) and all(self._is_input(value) for value in others)

    def _from(self, targets: set[str]) -> set[str]:
        """Names that are only ever set to parts of these."""
        return {
            key
            for key, values in self.assigned.items()
            if isinstance(key, str) and key in self.parts and all(_root(value) in targets for value in values)
        }

    def _small(self) -> set[str]:
        return {
            "loop",
            "bos_token",
            "eos_token",
            "pad_token",
            "",
            *(k for k in self.numbers if isinstance(k, str)),
        }


def _names(node: nodes.Node) -> list[nodes.Name]:
    return [node] if isinstance(node, nodes.Name) else list(node.find_all(nodes.Name))


def _root(node: Any) -> str:
    """The name that an expression takes a part of; empty for a constant."""
    while not isinstance(node, nodes.Name):
        inner = getattr(node, "node", None)
        if inner is None:
            return "" if isinstance(node, nodes.Const) else "?"
        node = inner
    return str(node.name)


def _written(loop: nodes.For) -> Iterator[str]:
    """Roots of everything that a loop's body writes or keeps."""
    values: list[Any] = [assign.node for assign in loop.find_all(nodes.Assign)]
    values += [value for output in loop.find_all(nodes.Output) for value in output.nodes]
    for value in values:
        for name in _names(value):
            yield name.name


def _shrinks(args: list[Any]) -> bool:
    """Whether a replacement is no longer than what it replaces."""
    texts = [arg.value for arg in args if isinstance(arg, nodes.Const) and isinstance(arg.value, str)]
    return len(args) == 2 == len(texts) and len(texts[0]) > 0 and len(texts[1]) <= len(texts[0])


@lru_cache(maxsize=64)
def why_not_plain(template: str) -> str:
    """What in a template or a line may take more time or memory than its row asks for; empty for nothing."""
    if len(template) > _LONGEST:
        return f"{len(template):,} characters"
    try:
        return next(_Look(_ENVIRONMENT.parse(template)).against(), "")
    except (jinja2.TemplateSyntaxError, RecursionError) as error:
        return f"no Jinja that is known here ({str(error)[:100]})"
