"""The tokenizer as GGUF header keys, where llama.cpp is known to cut text as it does; else refused by name.

Looked at is what transformers loads, not tokenizer.json: a class may rebuild its rules, and those were
trained with. llama.cpp names its rules; its own converter finds the name by a hash of token ids, which fails
for every vocabulary that was resized or trained anew. Here the structure of the pre-tokenizer is recognised.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.ship.export.gguf import pieces
from peftkit.ship.export.gguf.names import strips_like_phi3
from peftkit.ship.export.gguf.source import first_line

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = ("ByteLevel", False, False)
# bytes of assigned characters in UTF-8; SmolLM2's vocabulary lacks others
_IN_TEXT = frozenset({9, 10, 13, *range(32, 127), *range(0x80, 0xC0), *range(0xC2, 0xF1), 0xF3, 0xF4})


@dataclass(frozen=True)
class Rules:
    """One of llama.cpp's named ways to cut text for byte-level BPE, and the structure that means the same."""

    name: str
    structure: tuple[tuple[Any, ...], ...]
    ignore_merges: bool = False  # a word that is in the vocabulary is taken whole


RULES = (
    Rules("gpt-2", (("ByteLevel", True, False),)),
    Rules("smollm", (("Digits", True), ("ByteLevel", True, False))),
    Rules("qwen2", (("Split", _WORDS % "", "Isolated", False), _BYTES)),
    Rules("llama-bpe", (("Split", _WORDS % "{1,3}", "Isolated", False), _BYTES), ignore_merges=True),
)


@dataclass
class Vocabulary:
    """Header keys, what makes an export wrong as (got, expected), and what to tell."""

    fields: dict[str, Any] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    phi3: bool = False  # whether special tokens swallow spaces, see names.py


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a folder. Raises UserError where there is none that it loads."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # tokenizers raises plain Exceptions for a damaged file
        got = f"no tokenizer that transformers loads ({first_line(error)})"
        raise UserError(Problem(str(folder), got, "tokenizer.json beside the weights")) from error


def vocabulary_of(folder: Path, num_rows: int | None, *, pre: str | None) -> Vocabulary:
    """The tokenizer of a folder for a model with `num_rows` embeddings.

    `pre` names llama.cpp's rules where the structure is not recognised; nobody checks that they are right.
    Raises UserError where there is no tokenizer.
    """
    tokenizer = load_tokenizer(folder)
    if not tokenizer.is_fast:
        return Vocabulary(problems=[("a tokenizer in Python alone", "one with tokenizer.json")])
    num_rows = len(tokenizer) if num_rows is None else num_rows
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        return Vocabulary(problems=[(f"a {model['type']} tokenizer", "BPE")])
    found = Vocabulary(problems=[*_unlike(spec)])
    if model.get("byte_fallback"):
        _as_pieces(spec, num_rows, pre, found)
    else:
        _as_bytes(spec, num_rows, pre, found)
    _special(tokenizer, folder, found)
    return found


def _unlike(spec: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    model = spec["model"]
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            yield f"BPE with {key} {model[key]!r}", f"no {key}"
    for token in spec["added_tokens"]:
        if token["single_word"] or token["lstrip"]:
            odd = "single_word" if token["single_word"] else "lstrip"
            yield f"the added token {token['content']!r} with {odd}", "tokens that are found anywhere"


def _tokens(spec: Mapping[str, Any], num_rows: int, found: Vocabulary) -> tuple[list[str], list[int]]:
    """(texts, kinds) by id. Rows without a token are padded; added tokens without a row are left out."""
    texts, kinds = [f"[PAD{i}]" for i in range(num_rows)], [UNUSED] * num_rows
    beyond = [text for text, i in spec["model"]["vocab"].items() if i >= num_rows]
    if beyond:
        found.problems.append(
            (f"{len(beyond)} tokens beyond the {num_rows} embeddings", "a row for each token")
        )
    for text, i in spec["model"]["vocab"].items():
        if i < num_rows:
            texts[i], kinds[i] = text, NORMAL
    for token in spec["added_tokens"]:
        if token["id"] < num_rows:
            texts[token["id"]] = token["content"]
            kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
        else:
            found.notes.append(f"the token {token['content']!r} has no embedding and is left out")
    return texts, kinds


def structure_of(pre_tokenizer: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], ...]:
    """A pre-tokenizer as a tuple that can be compared, with what changes the cuts and nothing else."""
    if pre_tokenizer is None:
        return ()
    if pre_tokenizer["type"] == "Sequence":
        return tuple(part for one in pre_tokenizer["pretokenizers"] for part in structure_of(one))
    kind = pre_tokenizer["type"]
    if kind == "ByteLevel":
        return ((kind, pre_tokenizer["use_regex"], pre_tokenizer["add_prefix_space"]),)
    if kind == "Digits":
        return ((kind, pre_tokenizer["individual_digits"]),)
    if kind == "Split":
        pattern = pre_tokenizer["pattern"].get("Regex")
        return ((kind, pattern, pre_tokenizer["behavior"], pre_tokenizer["invert"]),)
    return ((kind,),)


def _as_bytes(spec: Mapping[str, Any], num_rows: int, pre: str | None, found: Vocabulary) -> None:
    """Byte-level BPE, what llama.cpp calls gpt2."""
    model = spec["model"]
    structure = structure_of(spec["pre_tokenizer"])
    rules = next((rules for rules in RULES if rules.structure == structure), None)
    if pre is not None:
        if rules is None or rules.name != pre:
            found.notes.append(
                f"text is cut by the rules {pre!r} as asked: not verified against the tokenizer"
            )
    elif rules is None:
        got = f"a pre-tokenizer of an unknown structure {structure}"
        known = ", ".join(rules.name for rules in RULES)
        found.problems.append((got, f"that of {known}; or name llama.cpp's rules yourself (pre), unverified"))
    elif rules.ignore_merges != bool(model.get("ignore_merges")):
        got = f"ignore_merges {bool(model.get('ignore_merges'))} with the rules {rules.name}"
        found.problems.append((got, f"ignore_merges {rules.ignore_merges}"))
    normalizer = (spec.get("normalizer") or {}).get("type")
    if normalizer == "NFC":
        found.notes.append(
            "llama.cpp does not compose accents (NFC): decomposed text gives other tokens there"
        )
    elif normalizer is not None:
        found.problems.append((f"a normalizer {normalizer}", "none, or NFC"))
    lacking = {byte for byte, letter in byte_letters().items() if letter not in model["vocab"]}
    if lacking & _IN_TEXT:
        got = f"a vocabulary without {len(lacking & _IN_TEXT)} of the bytes of text"
        found.problems.append(
            (got, "a token for each: without one, tokenizers and llama.cpp go on differently")
        )
    elif lacking:
        found.notes.append(f"{len(lacking)} bytes, of control characters or of no text, have no token")
    if stripping := [token["content"] for token in spec["added_tokens"] if token["rstrip"]]:
        found.problems.append(
            (f"the added token {stripping[0]!r} with rstrip", "tokens that leave spaces alone")
        )
    texts, kinds = _tokens(spec, num_rows, found)
    found.fields.update(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre or (rules.name if rules else ""),
            "tokenizer.ggml.tokens": texts,
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.merges": [" ".join(pair) for pair in pieces.merge_pairs(model)],
        }
    )


def byte_letters() -> dict[int, str]:
    """Byte -> the character that stands for it (Radford et al. 2019): itself, or one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _as_pieces(spec: Mapping[str, Any], num_rows: int, pre: str | None, found: Vocabulary) -> None:
    """SentencePiece's BPE with bytes for unknown characters, what llama.cpp calls llama."""
    texts, kinds = _tokens(spec, num_rows, found)
    shape = pieces.piece_rules(spec, forced=pre == "default")
    found.problems.extend(shape.problems)
    found.notes.extend(shape.notes)
    if pre not in {None, "default"}:
        found.problems.append((f"pre {pre} for SentencePiece's BPE", "none, or default"))
    strips = strips_like_phi3(spec)
    if strips is None:
        found.problems.append(("added tokens with rstrip", "none, or those of Phi-3"))
    found.phi3 = bool(strips)
    unknown = spec["model"].get("unk_token")
    for i, text in enumerate(texts):
        if kinds[i] == NORMAL and pieces.is_byte(text):
            kinds[i] = BYTE
        elif text == unknown:
            kinds[i] = UNKNOWN
    found.fields.update(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": texts,
            "tokenizer.ggml.scores": [shape.scores.get(text, pieces.NEVER) for text in texts],
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.add_space_prefix": shape.adds_space,
        }
    )


def _special(tokenizer: Any, folder: Path, found: Vocabulary) -> None:
    """Ids of special tokens, what is added around a text, and the chat template."""
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for name, key in keys.items():
        if ids[name] is not None:
            found.fields[f"tokenizer.ggml.{key}_token_id"] = ids[name]
    # llama.cpp stops at end of text, of turn and of message
    others = [i for i in stop_ids(tokenizer, folder) if i != ids["eos"]]
    for key, i in zip(("eot", "eom"), others, strict=False):
        found.fields[f"tokenizer.ggml.{key}_token_id"] = i
    if len(others) > 2:
        found.notes.append(f"only 3 of {len(others) + 1} stop tokens fit into the header")
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts, ends = full[:1] == [ids["bos"]] != bare[:1], full[-1:] == [ids["eos"]] != bare[-1:]
    found.fields["tokenizer.ggml.add_bos_token"] = starts
    found.fields["tokenizer.ggml.add_eos_token"] = ends
    if full[starts : len(full) - ends] != bare:
        found.problems.append((f"tokens {full} around 'a'", "nothing but a start and an end token"))
    template = tokenizer.chat_template
    if isinstance(template, str):
        found.fields["tokenizer.chat_template"] = template
    elif template:
        found.fields["tokenizer.chat_templates"] = sorted(template.keys() - {"default"})
        for name, text in template.items():
            suffix = "" if name == "default" else f".{name}"
            found.fields[f"tokenizer.chat_template{suffix}"] = text


def stop_ids(tokenizer: Any, folder: Path) -> list[int]:
    """Ids at which generation stops: the tokenizer's end token, then those of generation_config.json."""
    from peftkit.model.load import stops_of

    return sorted(stops_of(str(folder), tokenizer), key=lambda i: (i != tokenizer.eos_token_id, i))
