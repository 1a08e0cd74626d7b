"""Recipes, valid and broken: made from the schema, written in many styles, then broken in one known way."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.rigs.chaos.schema_values import Slot, bounds_of, plain, put, slots_of, valid
from tests.rigs.chaos.yaml_text import document


@dataclass(frozen=True)
class Case:
    """A recipe's files and overrides, and what has to come of it.

    `expected`: "plans", "loads" (a plan may refuse what it says), "refused", or "any".
    """

    what: str
    text: bytes
    expected: str
    data: dict[str, Any] | None = None  # what is written, where it loads
    overrides: tuple[str, ...] = ()
    files: dict[str, bytes] = field(default_factory=dict)


# --- ways to break a recipe


def _long(data: dict[str, Any]) -> dict[str, Any]:
    """A copy with `base` and `method` as mappings."""
    copy = json.loads(json.dumps(data))
    for key, inner in (("base", "id"), ("method", "name")):
        if isinstance(copy[key], str):
            copy[key] = {inner: copy[key]}
    return copy


def _slot(rng: random.Random, data: dict[str, Any], fits: Callable[[Slot], bool]) -> Slot:
    return rng.choice([s for s in slots_of(data["method"]["name"]) if fits(s)])


_STRICT = {int, float, bool, "choice", type(None)}


def _wrong_type(rng: random.Random, data: dict[str, Any]) -> None:
    slot = _slot(rng, data, lambda s: s.kinds <= _STRICT)
    wrong: list[Any] = [[1], {"a": 1}, "no such value", "", "2024-01-01", "on", "1e5x"]
    if bool not in slot.kinds:
        wrong += [True, False]
    if int not in slot.kinds and float not in slot.kinds:
        wrong += [7, 0.5]
    if float not in slot.kinds:
        wrong += [1.5, 2.0]
    if type(None) not in slot.kinds:
        wrong += [None]
    put(data, slot.path, rng.choice(wrong))


def _out_of_range(rng: random.Random, data: dict[str, Any]) -> None:
    slot = _slot(rng, data, lambda s: s.kinds <= _STRICT and bounds_of(s.bounds)[:2] != (-math.inf, math.inf))
    low, high, at_low, _ = bounds_of(slot.bounds)
    values = [low - 1, -(10**30), -0.5 if float in slot.kinds else -2] + ([] if at_low else [low, -0.0])
    if high < math.inf:
        values += [high, high + 1, 10**40]
    value = rng.choice(values)
    put(data, slot.path, int(value) if float not in slot.kinds else value)


def _not_finite(rng: random.Random, data: dict[str, Any]) -> None:
    slot = _slot(rng, data, lambda s: float in s.kinds)
    put(data, slot.path, rng.choice([math.inf, -math.inf, math.nan]))


def _missing(rng: random.Random, data: dict[str, Any]) -> None:
    section, key = rng.choice([("base", None), ("method", None), ("data", None), ("method", "name"), ("data", "train")])
    if key is None:
        del data[section]
    else:
        del data[section][key]


_LOOKALIKES = str.maketrans({"a": "а", "e": "е", "o": "о", "p": "р", "c": "с", "i": "і"})


def _misspelled(rng: random.Random, data: dict[str, Any]) -> None:
    place = rng.choice([data, *(value for key, value in data.items() if isinstance(value, dict))])
    known = {s.path[-1] for s in slots_of(data["method"]["name"])} | {"extends", "method", "name"}
    name = rng.choice(sorted(known))
    at = rng.randrange(len(name))
    wrong = rng.choice(
        [
            name[:at] + name[at + 1 :],
            name[:at] + rng.choice("xq_") + name[at:],
            name.upper(),
            name.translate(_LOOKALIKES),
            name + rng.choice([" ", "\u200b", "\u00a0", "\ufeff"]),
            "".join(reversed(name)),
            rng.choice(["__class__", "__init__", "model_config", "model_fields", "x" * 300, "constructor", "1", "-"]),
        ]
    )
    place[wrong if wrong not in known and wrong else f"{name}_x"] = rng.choice([1, "a", None, {"a": 1}])


_IN_DATA = {
    "a misspelled key": _misspelled,
    "a wrong type": _wrong_type,
    "a number out of range": _out_of_range,
    "a number that is not finite": _not_finite,
    "a key missing": _missing,
}


def _conflict(rng: random.Random, data: dict[str, Any]) -> None:
    """What the rules across keys refuse when it is planned."""
    which = rng.randrange(7)
    train = data.setdefault("train", {})
    if which == 0:
        train |= {"epochs": 2, "max_steps": 5}
    elif which == 1:
        data["data"]["eval"] = None
        train["early_stopping"] = {"patience": 2}
    elif which == 2:
        train |= {"batch_size": 6, "micro_batch": 4}
        train.pop("packing", None)
    elif which == 3:
        data["data"] |= {"eval": None, "group": "topic"}
    elif which == 4:
        place = rng.choice([("base",), ("data", "train"), ("data", "eval")])
        put(data, place, rng.choice(["/", "./", "*/", "~nobody/"]) + "x" * 5000)
    elif which == 5:
        nowhere = ["no/such", "./no.gguf", "embedded:no", "", "/dev/zero", "no such", "..", "a" * 300]
        data["base"] = rng.choice(nowhere)
    else:
        data["method"] = {"name": "prefix"}
        train["gradient_checkpointing"] = True


def _insert(rng: random.Random, text: bytes, piece: bytes) -> bytes:
    at = rng.randint(0, len(text))
    return text[:at] + piece + text[at:]


def _line(text: bytes, extra: str) -> bytes:
    """The text and a line after it: block style only."""
    return text.rstrip(b"\r\n. ") + b"\n" + extra.encode() + b"\n"


def _bomb(rng: random.Random) -> str:
    width, depth = rng.randint(5, 12), rng.randint(6, 9)
    first = "a0: &a0 [" + ", ".join(["x"] * width) + "]\n"
    return first + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * width)}]\n" for i in range(1, depth))


def _tagged(rng: random.Random) -> str:
    tag = rng.choice(
        [
            *("!!python/object/apply:os.system", "!!python/name:os.system", "!!binary", "!!timestamp", "!!set"),
            *("!x", "!", "!<tag:yaml.org,2002:int>", "!!int", "!!float", "!!bool", "!!null", "!!str", "!!map"),
        ]
    )
    return rng.choice([f"seed: {tag} 3", f"{tag} seed: 3", f"seed: {tag}", f"train: {tag} {{epochs: 1}}"])


_LINES: dict[str, Callable[[random.Random], str]] = {
    "a tag": _tagged,
    "a key twice": lambda rng: "seed: 1\nseed: 1" if rng.random() < 0.5 else "train: {epochs: 1, epochs: 1}",
    "a merge key": lambda rng: rng.choice(["x: &x {seed: 1}\n<<: *x", "train: {<<: {epochs: 1}}"]),
    "a tab": lambda rng: "train:\n\tepochs: 1",
    "an alias bomb": _bomb,
    "an alias of itself": lambda rng: rng.choice(["train: &x [*x]", "train: &x {epochs: *x}", "seed: *nowhere"]),
    "deep nesting": lambda rng: "seed: " + rng.choice(["[", "{a: ", "- ", "? "]) * rng.choice([60, 500, 50_000]),
    "many values": lambda rng: "seed: [" + "1," * rng.choice([12_000, 200_000]) + "]",
    "many keys": lambda rng: "data: {columns: {" + "".join(f"k{i}: a, " for i in range(12_000)) + "}}",
    "a huge number": lambda rng: "seed: " + rng.choice(["9" * 5000, "-" + "1" * 900_000, "1e400", "0x" + "f" * 5000]),
    "a character beyond Unicode": lambda rng: rng.choice(['seed: "\\U00110000"', 'base: "\\UFFFFFFFF"']),
    "half a character": lambda rng: rng.choice(['evaluate: {metric: "\\ud800"}', '"\\udfff": 1']),
    "two documents": lambda rng: "---\nseed: 1",
    "a quote left open": lambda rng: rng.choice(["seed: '1", 'seed: "1', "seed: [1", "seed: {a: 1"]),
    "a key that is no text": lambda rng: rng.choice(["? [a]\n: 1", "? {a: 1}\n: 1", "[a]: 1"]),
    "a list of a mapping": lambda rng: "- a",
    "too many bytes": lambda rng: "# " + "x" * 1_100_000,
    "a directive": lambda rng: "%YAML 9.9\n---\na: 1",
    "a long unknown key": lambda rng: "x" * 1000 + ": 1\n? " + "y" * 200_000 + "\n: 1",
}
_BYTES = {
    "a NUL byte": [b"\0"],
    "a control character": [b"\x01", b"\x1b[2J", b"\x08", b"\x7f", b"\xc2\x80", b"\xef\xbf\xbe"],
    "a byte that is not UTF-8": [b"\xff", b"\xc3", b"\xe9", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xc0\xaf"],
}


def broken(rng: random.Random) -> Case:
    """A recipe with one planted fault: it has to be refused when it is loaded."""
    data, way = _long(valid(rng)), rng.random()
    if way < 0.45:
        what = rng.choice(sorted(_IN_DATA))
        _IN_DATA[what](rng, data)
        return Case(what, document_of(rng, data), "refused")
    if way < 0.8:
        what = rng.choice(sorted(_LINES))
        for key in ("seed", "train", "evaluate"):
            data.pop(key, None)
        if what == "many keys":
            data.pop("data")
        text = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in _printable(data).items())
        line = _LINES[what](rng)
        if rng.random() < 0.5 and what in {"a tag", "a key twice", "many values", "a huge number"}:
            return Case(what, (line + "\n" + text).encode(), "refused")
        return Case(what, _line(text.encode(), line), "refused")
    if way < 0.9:
        what = rng.choice(sorted(_BYTES))
        return Case(what, _insert(rng, document_of(rng, data), rng.choice(_BYTES[what])), "refused")
    return _extended(rng, data)


def _printable(data: Any) -> Any:
    """Without characters that a flow-style line cannot hold as they are."""
    if isinstance(data, dict):
        return {_printable(name): _printable(value) for name, value in data.items()}
    if isinstance(data, list):
        return [_printable(value) for value in data]
    return data.encode("ascii", "ignore").decode().replace("\x7f", "") if isinstance(data, str) else data


def document_of(rng: random.Random, data: dict[str, Any]) -> bytes:
    """The text of a recipe; numbers that are not finite as YAML writes them."""
    text = document(rng, data)
    for ours, theirs in ((b"-inf", b"-.inf"), (b" inf", b" .inf"), (b" nan", b" .nan"), (b"-INF", b"-.INF")):
        text = text.replace(ours, theirs)
    return text.replace(b" INF", b" .INF").replace(b" NAN", b" .NAN")


def _extended(rng: random.Random, data: dict[str, Any]) -> Case:
    """`extends` that leads nowhere, in a circle, or too far."""
    which = rng.choice(["itself", "circle", "missing", "folder", "long", "list", "NUL", "far", "broken"])
    files: dict[str, bytes] = {}
    target: Any = {"itself": "recipe.yaml", "missing": "no.yaml", "folder": ".", "long": "x" * 5000, "list": ["a"]}.get(
        which, "a.yaml"
    )
    if which == "NUL":
        target = "a\0.yaml"
    if which == "circle":
        files = {"a.yaml": b"extends: b.yaml", "b.yaml": b"extends: ./recipe.yaml"}
    if which == "far":
        files = {f"{n}.yaml": f"extends: {n + 1}.yaml".encode() for n in range(120)}
        target = "0.yaml"
    if which == "broken":
        files = {"a.yaml": rng.choice([b"", b"- a", b"\xff", b"a: [", b"no_such_key: 1"])}
    written = {"extends": target, **_printable(data)}
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in written.items())
    return Case(f"extends: {which}", lines.encode(), "refused", files=files)


def mutated(rng: random.Random) -> Case:
    """A recipe whose bytes were changed at random: it may load or not."""
    text = bytearray(document_of(rng, valid(rng)))
    for _ in range(rng.randint(1, 6)):
        at, which = rng.randrange(len(text) or 1), rng.randrange(5)
        if which == 0 and text:
            text[at] ^= 1 << rng.randrange(8)
        elif which == 1:
            del text[at : at + rng.randint(1, 20)]
        elif which == 2:
            text[at:at] = rng.choice([*b"[]{}:,&*!|>'\"%@`#-?~\n\t \\", b"0"[0], 0xEF]).to_bytes(1, "little")
        elif which == 3:
            start = rng.randrange(len(text) or 1)
            text[at:at] = text[start : start + rng.randint(1, 200)]
        else:
            text = text[:at]
    return Case("bytes changed", bytes(text), "any")


def overridden(rng: random.Random) -> Case:
    """A good recipe with overrides, good or bad."""
    data = plain(rng)
    if rng.random() < 0.5:
        steps = rng.randint(1, 50)
        text = f"train.max_steps={rng.choice([str(steps), f' {steps}', hex(steps)])}"
        data["train"].pop("epochs", None)
        written = document(rng, data)
        return Case("a good override", written, "plans", _with(data, ("train", "max_steps"), steps), (text,))
    wrong = rng.choice(
        [
            *("seed", "=1", "seed.=1", ".seed=1", "seed=-1", "seed=x", "seed=[", "seed=!!int 1", "seed=\0", "=", ""),
            *("method.rnak=1", "method=nothing", "method.name=lore", "data.train=", "data.train=[]"),
            *(".".join("a" * 3000) + "=1", "a" * 100_000 + "=1", "seed=" + "9" * 5000, "seed=" + "[" * 5000),
            *("train.epochs.x=1", "base.id.x=2", "train=1", "train.epochs=.nan", "train.epochs=1e999", "seed=1: 2: 3"),
            *("seed=\ud800", "\ud800=1", "base=\x1b[2J", "seed=1\nseed=2", "method.targets=[]", "<<={seed: 1}"),
        ]
    )
    return Case("a bad override", document(rng, data), "refused", overrides=(wrong,))


def _with(data: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    copy = _long(data)
    put(copy, path, value)
    return copy


def extending(rng: random.Random) -> Case:
    """A recipe cut in two: one part extends the other."""
    data = plain(rng)
    keys = rng.sample(sorted(data), rng.randint(1, len(data) - 1))
    parent = {key: data[key] for key in keys}
    child = {"extends": "parent.yaml", **{key: value for key, value in data.items() if key not in keys}}
    files = {"parent.yaml": document(rng, parent)}
    return Case("a recipe that extends", document(rng, child), "plans", _long(data), files=files)


def make(rng: random.Random) -> Case:
    """One case: a third of them whole, the others broken in one way or another."""
    way = rng.random()
    if way < 0.12:
        data = plain(rng)
        return Case("plain", document(rng, data), "plans", _long(data))
    if way < 0.3:
        data = valid(rng)
        return Case("valid", document(rng, data), "loads", _long(data))
    if way < 0.35:
        return extending(rng)
    if way < 0.4:
        data = plain(rng)
        _conflict(rng, data)
        return Case("keys in conflict", document(rng, data), "refused when planned")
    if way < 0.5:
        return overridden(rng)
    return mutated(rng) if way < 0.65 else broken(rng)
