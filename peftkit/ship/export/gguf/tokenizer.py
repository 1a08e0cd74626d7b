"""Tokenizer as GGUF header keys, where llama.cpp is known to split text as it does; else refused by name.

Checked is what transformers loads, not tokenizer.json: a class may rebuild its rules, and those were
trained with. llama.cpp names its rules; its own converter finds the name by a hash of token ids, which fails
for every vocabulary that was resized or trained anew. Here the structure of the pre-tokenizer is recognised.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.errors import Problem, UserError, first_line
from peftkit.model.load import read_stop_ids
from peftkit.ship.export.gguf import pieces
from peftkit.ship.export.gguf.names import strips_like_phi3

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
_WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE_LEVEL = ("ByteLevel", False, False)
# bytes of assigned characters in UTF-8; SmolLM2's vocabulary lacks others
_TEXT_BYTES = frozenset({9, 10, 13, *range(32, 127), *range(0x80, 0xC0), *range(0xC2, 0xF1), 0xF3, 0xF4})


@dataclass(frozen=True)
class PreTokenizerRules:
    """One of llama.cpp's named pre-tokenizers for byte-level BPE, and the structure that means the same."""

    name: str
    structure: tuple[tuple[Any, ...], ...]
    ignore_merges: bool = False  # a word that is in the vocabulary is taken whole


PRE_TOKENIZERS = (
    PreTokenizerRules("gpt-2", (("ByteLevel", True, False),)),
    PreTokenizerRules("smollm", (("Digits", True), ("ByteLevel", True, False))),
    PreTokenizerRules("qwen2", (("Split", _WORD_PATTERN % "", "Isolated", False), _BYTE_LEVEL)),
    PreTokenizerRules(
        "llama-bpe", (("Split", _WORD_PATTERN % "{1,3}", "Isolated", False), _BYTE_LEVEL), ignore_merges=True
    ),
)


@dataclass
class Vocabulary:
    """A tokenizer as GGUF header keys, with problems as (got, expected) and notes for the user."""

    fields: dict[str, Any] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    strips_spaces: bool = False  # whether special tokens swallow spaces, see names.py


def load_local_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load transformers' tokenizer of a folder. Raises UserError where there is none that it loads."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # tokenizers raises plain Exceptions for a damaged file
        got = f"no tokenizer that transformers loads ({first_line(error)})"
        raise UserError(Problem(str(folder), got, "tokenizer.json beside the weights")) from error


def gguf_vocabulary(folder: Path, num_rows: int | None, *, pre: str | None) -> Vocabulary:
    """Convert the tokenizer of a folder for a model with `num_rows` embeddings.

    `pre` names llama.cpp's rules where the structure is not recognised; they are not verified. Raises
    UserError where there is no tokenizer.
    """
    tokenizer = load_local_tokenizer(folder)
    if not tokenizer.is_fast:
        return Vocabulary(problems=[("a slow tokenizer", "a fast tokenizer with tokenizer.json")])
    num_rows = len(tokenizer) if num_rows is None else num_rows
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        return Vocabulary(problems=[(f"a {model['type']} tokenizer", "BPE")])
    vocabulary = Vocabulary(problems=[*_bpe_problems(spec)])
    if model.get("byte_fallback"):
        _fill_sentencepiece(spec, num_rows, pre, vocabulary)
    else:
        _fill_byte_level(spec, num_rows, pre, vocabulary)
    # fill in ids of special tokens, the tokens added around a text, and the chat template
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for name, key in keys.items():
        if ids[name] is not None:
            vocabulary.fields[f"tokenizer.ggml.{key}_token_id"] = ids[name]
    # llama.cpp stops at end of text, of turn and of message
    extra_stops = [i for i in stop_token_ids(tokenizer, folder) if i != ids["eos"]]
    for key, i in zip(("eot", "eom"), extra_stops, strict=False):
        vocabulary.fields[f"tokenizer.ggml.{key}_token_id"] = i
    if len(extra_stops) > 2:
        vocabulary.notes.append(f"only 3 of {len(extra_stops) + 1} stop tokens fit into the header")
    plain_ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    special_ids = tokenizer("a")["input_ids"]
    adds_bos, adds_eos = (
        special_ids[:1] == [ids["bos"]] != plain_ids[:1],
        special_ids[-1:] == [ids["eos"]] != plain_ids[-1:],
    )
    vocabulary.fields["tokenizer.ggml.add_bos_token"] = adds_bos
    vocabulary.fields["tokenizer.ggml.add_eos_token"] = adds_eos
    if special_ids[adds_bos : len(special_ids) - adds_eos] != plain_ids:
        vocabulary.problems.append((f"tokens {special_ids} around 'a'", "nothing but a start and an end token"))
    template = tokenizer.chat_template
    if isinstance(template, str):
        vocabulary.fields["tokenizer.chat_template"] = template
    elif template:
        vocabulary.fields["tokenizer.chat_templates"] = sorted(template.keys() - {"default"})
        for name, text in template.items():
            suffix = "" if name == "default" else f".{name}"
            vocabulary.fields[f"tokenizer.chat_template{suffix}"] = text
    return vocabulary


def _bpe_problems(spec: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    model = spec["model"]
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            yield f"BPE with {key} {model[key]!r}", f"no {key}"
    for token in spec["added_tokens"]:
        if token["single_word"] or token["lstrip"]:
            flag = "single_word" if token["single_word"] else "lstrip"
            yield f"the added token {token['content']!r} with {flag}", "tokens that match anywhere"


def _token_table(spec: Mapping[str, Any], num_rows: int, vocabulary: Vocabulary) -> tuple[list[str], list[int]]:
    """Return (texts, token types) by id.

    Rows without a token are padded; added tokens without a row are left out.
    """
    texts, token_types = [f"[PAD{i}]" for i in range(num_rows)], [UNUSED] * num_rows
    out_of_range = [text for text, i in spec["model"]["vocab"].items() if i >= num_rows]
    if out_of_range:
        vocabulary.problems.append(
            (f"{len(out_of_range)} tokens beyond the {num_rows} embeddings", "a row for each token")
        )
    for text, i in spec["model"]["vocab"].items():
        if i < num_rows:
            texts[i], token_types[i] = text, NORMAL
    for token in spec["added_tokens"]:
        if token["id"] < num_rows:
            texts[token["id"]] = token["content"]
            token_types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
        else:
            vocabulary.notes.append(f"the token {token['content']!r} has no embedding and is left out")
    return texts, token_types


def pre_tokenizer_structure(pre_tokenizer: Mapping[str, Any] | None) -> tuple[tuple[Any, ...], ...]:
    """Return a pre-tokenizer as a comparable tuple of what changes the cuts, and nothing else."""
    if pre_tokenizer is None:
        return ()
    if pre_tokenizer["type"] == "Sequence":
        return tuple(part for child in pre_tokenizer["pretokenizers"] for part in pre_tokenizer_structure(child))
    kind = pre_tokenizer["type"]
    if kind == "ByteLevel":
        return ((kind, pre_tokenizer["use_regex"], pre_tokenizer["add_prefix_space"]),)
    if kind == "Digits":
        return ((kind, pre_tokenizer["individual_digits"]),)
    if kind == "Split":
        pattern = pre_tokenizer["pattern"].get("Regex")
        return ((kind, pattern, pre_tokenizer["behavior"], pre_tokenizer["invert"]),)
    return ((kind,),)


def _fill_byte_level(spec: Mapping[str, Any], num_rows: int, pre: str | None, vocabulary: Vocabulary) -> None:
    """Fill in byte-level BPE, which llama.cpp calls gpt2."""
    model = spec["model"]
    structure = pre_tokenizer_structure(spec["pre_tokenizer"])
    rules = next((rules for rules in PRE_TOKENIZERS if rules.structure == structure), None)
    if pre is not None:
        if rules is None or rules.name != pre:
            vocabulary.notes.append(
                f"text is split by the rules {pre!r} as requested, not verified against the tokenizer"
            )
    elif rules is None:
        got = f"a pre-tokenizer of unknown structure {structure}"
        names = ", ".join(rules.name for rules in PRE_TOKENIZERS)
        vocabulary.problems.append((got, f"that of {names}; or name llama.cpp's rules with --pre, unverified"))
    elif rules.ignore_merges != bool(model.get("ignore_merges")):
        got = f"ignore_merges {bool(model.get('ignore_merges'))} with the rules {rules.name}"
        vocabulary.problems.append((got, f"ignore_merges {rules.ignore_merges}"))
    normalizer = (spec.get("normalizer") or {}).get("type")
    if normalizer == "NFC":
        vocabulary.notes.append("llama.cpp does not compose accents (NFC): decomposed text gives other tokens there")
    elif normalizer is not None:
        vocabulary.problems.append((f"a normalizer {normalizer}", "none, or NFC"))
    missing = {byte for byte, character in byte_characters().items() if character not in model["vocab"]}
    if missing & _TEXT_BYTES:
        got = f"a vocabulary without {len(missing & _TEXT_BYTES)} of the bytes used in text"
        vocabulary.problems.append((got, "a token for each: without one, tokenizers and llama.cpp differ"))
    elif missing:
        vocabulary.notes.append(f"{len(missing)} bytes, of control characters or outside of text, have no token")
    if stripping_tokens := [token["content"] for token in spec["added_tokens"] if token["rstrip"]]:
        vocabulary.problems.append((f"the added token {stripping_tokens[0]!r} with rstrip", "tokens without rstrip"))
    texts, token_types = _token_table(spec, num_rows, vocabulary)
    vocabulary.fields.update(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre or (rules.name if rules else ""),
            "tokenizer.ggml.tokens": texts,
            "tokenizer.ggml.token_type": token_types,
            "tokenizer.ggml.merges": [" ".join(pair) for pair in pieces.merge_pairs(model)],
        }
    )


def byte_characters() -> dict[int, str]:
    """Return byte -> the character that stands for it (Radford et al. 2019): itself, or one from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _fill_sentencepiece(spec: Mapping[str, Any], num_rows: int, pre: str | None, vocabulary: Vocabulary) -> None:
    """Fill in SentencePiece's BPE with bytes for unknown characters, which llama.cpp calls llama."""
    texts, token_types = _token_table(spec, num_rows, vocabulary)
    rules = pieces.read_piece_rules(spec, forced=pre == "default")
    vocabulary.problems.extend(rules.problems)
    vocabulary.notes.extend(rules.notes)
    if pre not in {None, "default"}:
        vocabulary.problems.append((f"pre {pre} for SentencePiece's BPE", "none, or default"))
    strips = strips_like_phi3(spec)
    if strips is None:
        vocabulary.problems.append(("added tokens with rstrip", "none, or those of Phi-3"))
    vocabulary.strips_spaces = bool(strips)
    unknown_token = spec["model"].get("unk_token")
    for i, text in enumerate(texts):
        if token_types[i] == NORMAL and pieces.is_byte_token(text):
            token_types[i] = BYTE
        elif text == unknown_token:
            token_types[i] = UNKNOWN
    vocabulary.fields.update(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": texts,
            "tokenizer.ggml.scores": [rules.scores.get(text, pieces.UNREACHABLE_SCORE) for text in texts],
            "tokenizer.ggml.token_type": token_types,
            "tokenizer.ggml.add_space_prefix": rules.adds_space,
        }
    )


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[int]:
    """Return the ids that stop generation: the end token, then those of generation_config.json."""
    return sorted(read_stop_ids(str(folder), tokenizer), key=lambda i: (i != tokenizer.eos_token_id, i))
