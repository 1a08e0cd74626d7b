"""Real data in every format, ready to be spoilt: rows, the files and recipes they make, and tiny bases."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, TINY_LLAMA

ASSETS = Path(__file__).parents[1] / "assets" / "data"
_BANKING = ROOT / "recipes" / "data"
_MOST_BYTES = 900  # of a problem with its answer: what the tiny Llama has positions for
_FEWEST_BYTES = 60  # of a speech
_CALCULATION = re.compile(r"<<([0-9.*/+-]+)=([0-9.]+)>>")

TURNS = "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}"
ASK = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
TOOLS_TEMPLATE = (
    "{% for t in tools %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{{ m['content'] }}{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}{{ '<|end|>' }}"
    "{% endfor %}" + ASK
)
THINKING_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['reasoning_content'] %}"
    "{{ '<think>' + m['reasoning_content'] + '</think>' }}{% endif %}{{ m['content'] + '<|end|>' }}"
    "{% endfor %}" + ASK
)


@dataclass(frozen=True)
class Real:
    """GSM8K's problems, BANKING77's messages with their intents, and speeches of Shakespeare."""

    problems: list[dict[str, str]]
    held_problems: list[dict[str, str]]
    messages: list[dict[str, str]]
    held_messages: list[dict[str, str]]
    speeches: list[str]
    held_speeches: list[str]


def load_real(folder: Path | None = None, *, num: int = 200, intents: int = 10) -> Real:
    """`num` rows of each to train on and a quarter of that held out, from `folder` or the samples here."""
    if folder is None:
        sets = (ASSETS / "gsm8k.train.jsonl", ASSETS / "gsm8k.test.jsonl")
        tables = (_BANKING / "banking77.train.csv", _BANKING / "banking77.test.csv")
        plays = ASSETS / "tinyshakespeare.txt"
    else:
        sets = (folder / "gsm8k" / "train.jsonl", folder / "gsm8k" / "test.jsonl")
        tables = (folder / "banking77" / "train.csv", folder / "banking77" / "test.csv")
        plays = folder / "tinyshakespeare" / "input.txt"
    problems, held = (_problems(path) for path in sets)
    messages, held_messages = (_messages(path) for path in tables)
    chosen = sorted({row["category"] for row in messages})[:intents]
    blocks = plays.read_text(encoding="utf-8").split("\n\n")
    speeches = [s.strip() for s in dict.fromkeys(blocks) if len(s) >= _FEWEST_BYTES][:num]
    return Real(
        problems[:num],
        held[: num // 4],
        _of_each(messages, chosen, num // intents),
        _of_each(held_messages, chosen, num // intents // 4),
        speeches[len(speeches) // 4 :],
        speeches[: len(speeches) // 4],
    )


def _problems(path: Path) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if len(row["question"]) + len(row["answer"]) <= _MOST_BYTES]


def _messages(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if "\n" not in row["text"]]


def _of_each(rows: Iterable[dict[str, str]], intents: list[str], num: int) -> list[dict[str, str]]:
    """The first rows of each intent, one after the other in turn."""
    found: dict[str, list[dict[str, str]]] = {name: [] for name in intents}
    for row in rows:
        if row["category"] in found and len(found[row["category"]]) < num:
            found[row["category"]].append(row)
    return [row for group in zip(*found.values(), strict=False) for row in group]


@dataclass
class Rows:
    """A data set in the making. A row is a mapping, a text, or bytes that are written as they are."""

    train: list[Any]
    held_out: list[Any]
    suffix: str = ".jsonl"
    data: dict[str, Any] = field(default_factory=dict)  # the recipe's `data`, but for its files
    settings: dict[str, Any] = field(default_factory=dict)  # the recipe's `train`
    template: str = ""
    more: list[Path] = field(default_factory=list)  # further sources to train on
    base: str = "llama"
    method: dict[str, Any] = field(default_factory=lambda: {"name": "lora", "rank": 8})


@dataclass(frozen=True)
class Written:
    """A data set on disk: its recipe, and 'file:line' of every row."""

    recipe: dict[str, Any]
    train: list[str]
    held_out: list[str]


def write(rows: Rows, folder: Path, bases: Mapping[str, Path]) -> Written:
    """The files of a data set, and the recipe that reads them."""
    data = dict(rows.data)
    places = {}
    for name, listed in (("train", rows.train), ("eval", rows.held_out)):
        if listed:
            path = folder / f"{name}{rows.suffix}"
            places[name] = [f"{path}:{line}" for line in _write(listed, path)]
            data[name] = str(path)
    if rows.more:
        data["train"] = [data["train"], *map(str, rows.more)]
    data.setdefault("eval", None)
    if rows.template:
        path = folder / "chat.jinja"
        path.write_text(rows.template, encoding="utf-8")
        data["chat"] = {**data.get("chat", {}), "template": str(path)}
    recipe = {
        "base": str(bases[rows.base]),
        "method": rows.method,
        "data": data,
        "train": {"micro_batch": 2, "batch_size": 8, **rows.settings},
    }
    return Written(recipe, places["train"], places.get("eval", []))


def _write(rows: list[Any], path: Path) -> list[int]:
    """Write a file. Returns the line of every row."""
    text = path.name.removesuffix(".gz").endswith(".txt")
    table = path.suffix == ".csv"
    first = next(row for row in rows if not isinstance(row, bytes))
    pieces = [_cells(list(first))] if table else []
    lines, line = [], len(pieces) + 1
    for row in rows:
        lines.append(line)
        if isinstance(row, bytes):
            piece = row + b"\n"
        elif text:
            piece = row.encode() + b"\n\n"
        else:
            piece = _cells([*row.values()]) if table else json.dumps(row, ensure_ascii=False).encode() + b"\n"
        pieces.append(piece)
        line += piece.count(b"\n")
    content = b"".join(pieces)
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return lines


def _cells(values: list[Any]) -> bytes:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue().encode()


# ------------------------------------------------------------------------------------------------ clean sets


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    """One turn of a chat."""
    return {"role": role, "content": content, **more}


def _pairs(real: Real, make: Callable[[str, str], Any], **more: Any) -> Rows:
    """GSM8K, each problem with its answer made into a row."""
    both = ([make(p["question"], p["answer"]) for p in rows] for rows in (real.problems, real.held_problems))
    return Rows(*both, **more)


def _chat(real: Real) -> Rows:
    return _pairs(real, lambda q, a: {"messages": [turn("user", q), turn("assistant", a)]})


def _system(real: Real) -> Rows:
    prompt = "Solve the problem step by step."
    return _pairs(real, lambda q, a: {"messages": [turn("system", prompt), turn("user", q), turn("assistant", a)]})


def _talk(real: Real) -> Rows:
    """ShareGPT: two short problems in one conversation."""

    def talks(problems: list[dict[str, str]]) -> list[dict[str, Any]]:
        short = [p for p in problems if len(p["question"]) + len(p["answer"]) <= _MOST_BYTES // 2]
        said = [({"from": "human", "value": p["question"]}, {"from": "gpt", "value": p["answer"]}) for p in short]
        return [{"conversations": [*a, *b]} for a, b in zip(said[::2], said[1::2], strict=False)]

    return Rows(talks(real.problems), talks(real.held_problems))


def _preference(real: Real) -> Rows:
    """The answer of another problem is turned down."""
    draw = random.Random(0)

    def pairs(problems: list[dict[str, str]]) -> list[dict[str, str]]:
        others = [p["answer"] for p in problems]
        draw.shuffle(others)
        return [
            {"prompt": p["question"], "chosen": p["answer"], "rejected": other}
            for p, other in zip(problems, others, strict=True)
            if p["answer"] != other
        ]

    return Rows(pairs(real.problems), pairs(real.held_problems))


_CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculate",
        "description": "Work out an expression",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
    },
}


def _tools(real: Real) -> Rows:
    """The first calculation of an answer as a call of a tool."""

    def called(problem: dict[str, str]) -> dict[str, Any] | None:
        found = _CALCULATION.search(problem["answer"])
        if found is None or len(problem["question"]) + len(problem["answer"]) > 500:
            return None
        call = {"type": "function", "function": {"name": "calculate", "arguments": {"expression": found[1]}}}
        turns = [
            turn("user", problem["question"]),
            turn("assistant", "", tool_calls=[call]),
            turn("tool", found[2]),
            turn("assistant", problem["answer"]),
        ]
        return {"messages": turns, "tools": [_CALCULATOR]}

    sets = ([row for p in rows if (row := called(p))] for rows in (real.problems, real.held_problems))
    return Rows(*sets, template=TOOLS_TEMPLATE)


def _thinking(real: Real) -> Rows:
    """The working is reasoning, the number the answer."""

    def thought(question: str, answer: str) -> dict[str, Any]:
        working, _, number = answer.rpartition("\n#### ")
        return {"messages": [turn("user", question), turn("assistant", number, reasoning_content=working)]}

    return _pairs(real, thought, template=THINKING_TEMPLATE)


def _tags(real: Real) -> Rows:
    """Words of problems: a number or none."""

    def tagged(question: str, answer: str) -> dict[str, Any]:
        words = question.split()
        return {"tokens": words, "tags": ["NUM" if any(map(str.isdigit, w)) else "O" for w in words]}

    return _pairs(real, tagged, base="bert", settings={"max_length": 512})


def _classes(real: Real) -> Rows:
    return Rows(
        list(map(dict, real.messages)),
        list(map(dict, real.held_messages)),
        suffix=".csv",
        data={"columns": {"label": "category"}},
        base="bert",
    )


def _intents(real: Real) -> Rows:
    system = turn("system", "Name the intent of the message.")

    def chat(row: dict[str, str]) -> dict[str, Any]:
        return {"messages": [system, turn("user", row["text"]), turn("assistant", row["category"])]}

    return Rows([*map(chat, real.messages)], [*map(chat, real.held_messages)])


def _mixture(real: Real) -> Rows:
    """Problems and intents: the second source is a file of the recipes."""
    rows = _chat(real)
    rows.more = [_BANKING / "banking77-10.train.jsonl"]
    return rows


SETS: dict[str, Callable[[Real], Rows]] = {
    "question-answer": lambda real: _pairs(real, lambda q, a: {"question": q, "answer": a}),
    "chat": _chat,
    "chat with system": _system,
    "prompt-completion": lambda real: _pairs(
        real,
        lambda q, a: {"question": q, "answer": a},
        data={"columns": {"prompt": "question", "completion": "answer"}},
    ),
    "instruction": lambda real: _pairs(
        real, lambda q, a: {"instruction": "Solve the problem.", "input": q, "output": a}
    ),
    "seq2seq": lambda real: _pairs(real, lambda q, a: {"source": q, "target": a}),
    "seq2seq on T5": lambda real: _pairs(real, lambda q, a: {"source": q, "target": a}, base="t5"),
    "sharegpt": _talk,
    "preference": _preference,
    "tool calls": _tools,
    "reasoning": _thinking,
    "classification": _classes,
    "token-classification": _tags,
    "intents as chats": _intents,
    "text": lambda real: Rows(real.speeches[:], real.held_speeches[:], suffix=".txt"),
    "text packed": lambda real: Rows(real.speeches[:], real.held_speeches[:], suffix=".txt.gz"),
    "text in pieces": lambda real: Rows(
        real.speeches[:], real.held_speeches[:], suffix=".txt", settings={"max_length": 32}
    ),
    "text lines": lambda real: Rows([{"text": s} for s in real.speeches], [{"text": s} for s in real.held_speeches]),
    "a share held out": lambda real: Rows(_chat(real).train, [], data={"eval": "10%"}),
    "mixture": _mixture,
}


# ----------------------------------------------------------------------------------------------------- bases


def make_bases(folder: Path, real: Real) -> dict[str, Path]:
    """Tiny bases by name, all with the tiny Llama's tokenizer or one derived from it.

    bert and t5 are of other tasks; `pad is end` pads with its end token; `start` has a start token and adds
    it; `few embeddings` has fewer than its tokenizer has tokens; `words` knows only what stands in problems;
    `small letters` drops capitals, `composed` composes accents.
    """
    import torch
    from tokenizers import normalizers, processors
    from transformers import AutoTokenizer

    from tests.rigs.tiny import tiny_model

    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    found = {"llama": TINY_LLAMA}
    for name, task in (("bert", "classification"), ("t5", "seq2seq")):
        torch.manual_seed(0)
        sizes = size if name == "bert" else {"vocab_size": len(tokenizer)}
        tiny_model(name, task, **sizes, **ids).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        found[name] = folder / name
    found["few embeddings"] = _derived(folder / "few", vocab_size=len(tokenizer) - 548)
    tokenizer.pad_token = tokenizer.eos_token
    found["pad is end"] = _derived(folder / "pad", tokenizer, pad_token_id=tokenizer.eos_token_id)
    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    tokenizer.add_special_tokens({"bos_token": "<|start|>"})
    start = [("<|start|>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(
        [
            tokenizer.backend_tokenizer.post_processor or processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|start|> $A", special_tokens=start),
        ]
    )
    found["start"] = _derived(folder / "start", tokenizer, vocab_size=len(tokenizer))
    for name, normalizer in (("small letters", normalizers.Lowercase()), ("composed", normalizers.NFC())):
        tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
        tokenizer.backend_tokenizer.normalizer = normalizer
        found[name] = _derived(folder / name, tokenizer)
    found["words"] = _derived(folder / "words", _word_tokenizer(real))
    return found


def _derived(folder: Path, tokenizer: Any = None, **changes: Any) -> Path:
    """A copy of the tiny Llama's folder with another tokenizer or configuration."""
    shutil.copytree(TINY_LLAMA, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def _word_tokenizer(real: Real) -> Any:
    """Words and single characters of problems; what else there is becomes the unknown token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    special = AutoTokenizer.from_pretrained(TINY_LLAMA).all_special_tokens
    words = Tokenizer(models.BPE(unk_token="<|unk|>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    marks = [AddedToken(t, special=True, normalized=False) for t in [*special, *_ROLES, "<|unk|>"]]
    texts = [text for row in [*real.problems, *real.held_problems] for text in row.values()]
    words.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2000, special_tokens=marks))
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|end|>", pad_token="<|pad|>", unk_token="<|unk|>"
    )
    made.chat_template = "{% for m in messages %}" + TURNS + "{% endfor %}" + ASK
    return made


_ROLES = ("<|user|>", "<|assistant|>", "<|system|>")
