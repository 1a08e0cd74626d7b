"""Tokenizers recognised by their structure, or refused; test_parity holds them against llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from peftkit.ship.export.gguf.names import safe_model_name, strips_like_phi3
from peftkit.ship.export.gguf.pieces import read_piece_rules
from peftkit.ship.export.gguf.tokenizer import PRE_TOKENIZERS, Vocabulary, byte_characters, gguf_vocabulary
from tests.ship.export.gguf.models import SPECIAL, VOCAB, byte_tokenizer, piece_tokenizer


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    made = {rules.name: byte_tokenizer(rules.name) for rules in PRE_TOKENIZERS}
    return {**made, "pieces": piece_tokenizer()}


def changed(tokenizer: Any, **changes: Any) -> Any:
    """A tokenizer with other parts of its tokenizer.json; `model` and `tokens` are merged into theirs."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in spec["added_tokens"]:
        token.update(changes.get("tokens", {}).get(token["content"], {}))
    spec["model"] |= changes.pop("model", {})
    changes.pop("tokens", None)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps({**spec, **changes})),
        **{f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "pad", "unk")},
    )


def seen(tokenizer: Any, folder: Path, *, rows: int = VOCAB, pre: str | None = None) -> Vocabulary:
    tokenizer.save_pretrained(folder)
    return gguf_vocabulary(folder, rows, pre=pre)


def told(found: Vocabulary) -> str:
    return "\n".join(f"got {got}, expected {expected}" for got, expected in found.problems)


@pytest.mark.parametrize("rules", PRE_TOKENIZERS, ids=lambda rules: rules.name)
def test_each_structure_is_known_by_its_name(rules: Any, tokenizers: dict[str, Any], tmp_path: Path) -> None:
    found = seen(tokenizers[rules.name], tmp_path)
    assert not found.problems
    assert found.fields["tokenizer.ggml.model"] == "gpt2"
    assert found.fields["tokenizer.ggml.pre"] == rules.name


def test_an_unknown_structure_is_refused_unless_it_is_named(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    odd = changed(
        tokenizers["gpt-2"],
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Whitespace"},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True, "trim_offsets": True},
            ],
        },
    )
    assert "unknown structure (('Whitespace',), ('ByteLevel', True, False))" in told(seen(odd, tmp_path))
    named = seen(odd, tmp_path, pre="deepseek-llm")
    assert not named.problems
    assert named.fields["tokenizer.ggml.pre"] == "deepseek-llm"
    assert any("not verified" in note for note in named.notes)


def _byte_level(**changes: Any) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True, "trim_offsets": True, **changes}


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a space in front": ("gpt-2", {"pre_tokenizer": _byte_level(add_prefix_space=True)}, "unknown structure"),
    "lowercase": ("gpt-2", {"normalizer": {"type": "Lowercase"}}, "a normalizer Lowercase"),
    "dropout": ("gpt-2", {"model": {"dropout": 0.5}}, "BPE with dropout 0.5"),
    "merges ignored": ("qwen2", {"model": {"ignore_merges": True}}, "ignore_merges True with the rules qwen2"),
    "merges heeded": ("llama-bpe", {"model": {"ignore_merges": False}}, "ignore_merges False"),
    "lstrip": ("gpt-2", {"tokens": {"<|user|>": {"lstrip": True}}}, "'<|user|>' with lstrip"),
    "rstrip": ("gpt-2", {"tokens": {"<|user|>": {"rstrip": True}}}, "'<|user|>' with rstrip"),
    "single word": ("gpt-2", {"tokens": {"<|user|>": {"single_word": True}}}, "'<|user|>' with single_word"),
    "first space": (
        "pieces",
        {
            "normalizer": None,
            "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False},
        },
        "Metaspace with prepend_scheme first",
    ),
    "other spaces": ("pieces", {"normalizer": {"type": "NFKC"}}, "SentencePiece's handling of spaces"),
    "normalized": ("pieces", {"tokens": {"<|user|>": {"normalized": True}}}, "'<|user|>' with normalized"),
    "some strip": ("pieces", {"tokens": {"<|user|>": {"rstrip": True}}}, "added tokens with rstrip"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_llama_cpp_cuts_differently_is_refused(name: str, tokenizers: dict[str, Any], tmp_path: Path) -> None:
    kind, changes, said = REFUSED[name]
    assert not seen(tokenizers[kind], tmp_path / "plain").problems
    assert said in told(seen(changed(tokenizers[kind], **changes), tmp_path / "changed"))


def test_a_byte_of_text_without_a_token_is_refused(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    spec = json.loads(tokenizers["gpt-2"].backend_tokenizer.to_str())["model"]
    for byte, bad in ((0x04, False), (0xFF, False), (ord("~"), True)):
        letter = byte_characters()[byte]
        merges = [pair for pair in spec["merges"] if letter not in "".join(pair)]
        vocab = {text: i for text, i in spec["vocab"].items() if letter not in text}
        found = seen(changed(tokenizers["gpt-2"], model={"vocab": vocab, "merges": merges}), tmp_path / str(byte))
        assert bool(found.problems) is bad
        assert any("1 bytes" in note for note in found.notes) is not bad


def test_letters_of_bytes_are_those_of_tokenizers() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(byte_characters().values()) == set(ByteLevel.alphabet())
    plain = ByteLevel(add_prefix_space=False, use_regex=False)
    for byte in range(128):
        assert plain.pre_tokenize_str(chr(byte))[0][0] == byte_characters()[byte]


def test_scores_follow_the_merges(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    found = seen(tokenizers["pieces"], tmp_path)
    assert not found.problems
    assert found.fields["tokenizer.ggml.model"] == "llama"
    assert found.fields["tokenizer.ggml.add_space_prefix"] is True
    texts, kinds = found.fields["tokenizer.ggml.tokens"], found.fields["tokenizer.ggml.token_type"]
    score = dict(zip(texts, found.fields["tokenizer.ggml.scores"], strict=True))
    merges = json.loads(tokenizers["pieces"].backend_tokenizer.to_str())["model"]["merges"]
    by_rank = [score["".join(pair)] for pair in merges]
    assert by_rank == sorted(by_rank, reverse=True)
    assert kinds[texts.index("<0x0A>")] == 6
    assert kinds[texts.index("<unk>")] == 2


def test_a_vocabulary_with_one_merge_a_token_is_refused() -> None:
    """What `tokenizers` trains: llama.cpp would also join pairs that are no merges."""
    spec = json.loads(piece_tokenizer(complete=False).backend_tokenizer.to_str())
    assert any("whose union is a token" in got for got, _ in read_piece_rules(spec).problems)


def test_a_byte_without_a_token_is_refused_unless_its_letter_is_one() -> None:
    spec = json.loads(piece_tokenizer(tab=True).backend_tokenizer.to_str())
    assert "<0x09>" not in spec["model"]["vocab"]
    assert not read_piece_rules(spec).problems
    del spec["model"]["vocab"]["<0xE2>"]
    assert any("without 1 of the 256 bytes" in got for got, _ in read_piece_rules(spec).problems)


def test_merges_out_of_order_are_refused() -> None:
    spec = json.loads(piece_tokenizer().backend_tokenizer.to_str())
    merges = spec["model"]["merges"]
    place = next(i for i in range(len(merges) - 1) if "".join(merges[i]) == "".join(merges[i + 1]))
    merges.append(merges.pop(place))
    assert any("are not adjacent" in got for got, _ in read_piece_rules(spec).problems)


def test_pre_default_takes_the_difference_of_a_metaspace(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    _, changes, _ = REFUSED["first space"]
    found = seen(changed(tokenizers["pieces"], **changes), tmp_path, pre="default")
    assert not found.problems
    assert any("as requested by --pre" in note for note in found.notes)
    assert "pre qwen2" in told(seen(tokenizers["pieces"], tmp_path, pre="qwen2"))


def test_tokens_beyond_the_embeddings(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    """An added one is left out (Gemma 3's <image_soft_token>), one of the vocabulary is a fault."""
    base = tokenizers["gpt-2"]
    more = changed(base)
    more.add_tokens(["<image>"])
    found = seen(more, tmp_path, rows=len(base))
    assert not found.problems
    assert any("'<image>' has no embedding" in note for note in found.notes)
    assert "2 tokens beyond" in told(seen(base, tmp_path, rows=len(base) - 2))


def test_added_tokens_are_found_in_text_or_are_control(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    more = changed(tokenizers["gpt-2"])
    more.add_tokens(["<think>"])
    found = seen(more, tmp_path)
    kinds = dict(zip(found.fields["tokenizer.ggml.tokens"], found.fields["tokenizer.ggml.token_type"], strict=True))
    assert kinds["<think>"] == 4
    assert {kinds[text] for text in SPECIAL} == {3}


def test_what_is_put_around_a_text_is_what_the_tokenizer_does(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    def template(*pieces: Any) -> dict[str, Any]:
        ids = {"<s>": 1, "</s>": 2, "<|user|>": 3}
        return {
            "type": "TemplateProcessing",
            "single": list(pieces),
            "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {text: {"id": text, "ids": [i], "tokens": [text]} for text, i in ids.items()},
        }

    text = {"Sequence": {"id": "A", "type_id": 0}}
    start, end, user = ({"SpecialToken": {"id": t, "type_id": 0}} for t in ("<s>", "</s>", "<|user|>"))
    for around, expected in (
        ((text,), (False, False)),
        ((start, text), (True, False)),
        ((start, text, end), (True, True)),
    ):
        found = seen(changed(tokenizers["gpt-2"], post_processor=template(*around)), tmp_path)
        fields = found.fields
        assert (fields["tokenizer.ggml.add_bos_token"], fields["tokenizer.ggml.add_eos_token"]) == expected
        assert not found.problems
    odd = seen(changed(tokenizers["gpt-2"], post_processor=template(user, text)), tmp_path)
    assert "around 'a'" in told(odd)


def test_stop_tokens_of_generation_config_travel(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    fields = seen(tokenizers["gpt-2"], tmp_path).fields
    assert (fields["tokenizer.ggml.eos_token_id"], fields["tokenizer.ggml.eot_token_id"]) == (2, 3)
    assert "tokenizer.ggml.eom_token_id" not in fields
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3, 4, 5]}))
    found = seen(tokenizers["gpt-2"], tmp_path)
    assert found.fields["tokenizer.ggml.eom_token_id"] == 4
    assert any("only 3 of 4 stop tokens" in note for note in found.notes)


def test_several_chat_templates_travel(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    more = changed(tokenizers["gpt-2"])
    more.chat_template = {"default": "one", "tool_use": "two"}
    fields = seen(more, tmp_path).fields
    assert fields["tokenizer.chat_template"] == "one"
    assert fields["tokenizer.chat_template.tool_use"] == "two"
    assert fields["tokenizer.chat_templates"] == ["tool_use"]


def test_a_class_that_rebuilds_its_rules_is_exported_as_it_works(tokenizers: dict[str, Any], tmp_path: Path) -> None:
    """transformers loads a Qwen2 folder as Qwen2Tokenizer, with its own cuts: these were trained with."""
    tokenizers["gpt-2"].save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    loaded = json.loads(AutoTokenizer.from_pretrained(tmp_path).backend_tokenizer.to_str())
    assert loaded["pre_tokenizer"]["type"] == "Sequence"
    assert gguf_vocabulary(tmp_path, VOCAB, pre=None).fields["tokenizer.ggml.pre"] == "qwen2"


def test_phi3_is_known_by_its_tokens() -> None:
    def spec(**strip: bool) -> dict[str, Any]:
        names = ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|user|>")
        return {"added_tokens": [{"content": n, "rstrip": s} for n, s in zip(names, strip.values(), strict=True)]}

    assert strips_like_phi3(spec(a=False, b=False, c=True, d=False, e=True)) is True
    assert strips_like_phi3(spec(a=False, b=False, c=False, d=False, e=False)) is False
    assert strips_like_phi3(spec(a=False, b=False, c=False, d=False, e=True)) is None
    assert strips_like_phi3({"added_tokens": [{"content": "<|user|>", "rstrip": True}]}) is None
    assert safe_model_name("my-Phi-3-mini", phi3=False) == "my-phi-_3-mini"
    assert safe_model_name("mine", phi3=True) == "mine (phi-3)"
