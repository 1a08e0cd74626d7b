"""Faults to plant in real data, and what the data gate must say of each: the check, its status, the rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from peftkit import api
from peftkit.data.gate.report import DataReport
from peftkit.errors import UserError
from tests.rigs.realdata import ASK, SETS, TURNS, Real, Rows, turn, write

SHOWN = 20  # rows that a check names
Plant = Callable[[Rows, Random], Sequence[int]]


@dataclass(frozen=True)
class Fault:
    """One fault. `plant` spoils a clean set and returns the numbers of the rows that must be named.

    The status "refused" is for data of which nothing is left: an error that names the rows. They are rows of
    the file `of`; `also` names other checks that fail because of it.
    """

    name: str
    set: str
    check: str
    status: str
    plant: Plant
    of: str = "train"  # "train" | "held" | "both": every row of both
    also: frozenset[str] = frozenset()


FAULTS: list[Fault] = []


def _fault(name: str, set: str, check: str, status: str, *, of: str = "train", also: str = "") -> Any:
    def keep(plant: Plant) -> Plant:
        FAULTS.append(Fault(name, set, check, status, plant, of, frozenset(also.split())))
        return plant

    return keep


def _one(rows: Sequence[Any], draw: Random) -> int:
    """A row behind the first, which tells the format."""
    return draw.randrange(1, len(rows))


def _some(rows: Sequence[Any], draw: Random, share: float) -> list[int]:
    return sorted(draw.sample(range(1, len(rows)), round(share * len(rows))))


def _line(row: Any) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


def _say(row: dict[str, Any], at: int, change: Callable[[str], str]) -> None:
    """Change what one turn of a chat says."""
    row["messages"][at]["content"] = change(row["messages"][at]["content"])


# ---------------------------------------------------------------------------------- rows that cannot be read


@_fault("a line of JSON is cut off", "chat", "malformed-rows", "fail")
def _cut_line(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train[at] = _line(rows.train[at])[:-20]
    return [at]


@_fault("a key twice in an object", "question-answer", "malformed-rows", "fail")
def _key_twice(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train[at] = _line(rows.train[at])[:-1] + b', "answer": "another"}'
    return [at]


@_fault("a row that is a list", "question-answer", "malformed-rows", "fail")
def _list(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train[at] = _line([*rows.train[at].values()])
    return [at]


@_fault("NaN for a number", "question-answer", "malformed-rows", "fail")
def _nan(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train[at]["score"] = float("nan")
    return [at]


@_fault("a row of a table with too few cells", "classification", "malformed-rows", "fail")
def _few_cells(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train[at] = b"where is my card"
    return [at]


@_fault("a comma that is not quoted", "classification", "malformed-rows", "fail")
def _comma(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train[at] = b"hello, where is my card,card_arrival"
    return [at]


@_fault("a byte that is not UTF-8", "chat", "encoding", "fail")
def _latin(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    _say(rows.train[at], 0, lambda text: "The café: " + text)
    rows.train[at] = _line(rows.train[at]).replace("é".encode(), "é".encode("latin-1"))
    return [at]


@_fault("a NUL byte", "classification", "encoding", "fail")
def _nul(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train[at] = b"where is my\0 card,card_arrival"
    return [at]


@_fault("half of a surrogate pair", "question-answer", "encoding", "fail")
def _surrogate(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train[at] = _line(rows.train[at])[:-2] + rb' \ud83d"}'
    return [at]


@_fault("an answer that is rated", "chat", "rated-answers", "fail")
def _rated(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train[at]["label"] = False
    return [at]


@_fault("a picture beside the text", "chat", "media", "fail")
def _picture(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train[at]["images"] = ["cat.png"]
    return [at]


@_fault("a column that looks like a mask", "chat", "unused-columns", "warn")
def _mask_column(rows: Rows, draw: Random) -> list[int]:
    for row in rows.train:
        row["loss_mask"] = [0, 1]
    return list(range(len(rows.train)))


# ------------------------------------------------------------------------------------------ fields and turns


@_fault("a key is missing", "chat", "missing-fields", "fail")
def _no_key(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train[at] = {"turns": rows.train[at]["messages"]}
    return [at]


@_fault("a list where text is expected", "prompt-completion", "missing-fields", "fail")
def _list_for_text(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train[at]["answer"] = rows.train[at]["answer"].split("\n")
    return [at]


@_fault("nested lists in a column of text", "text lines", "missing-fields", "fail")
def _nested(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train[at]["text"] = [[rows.train[at]["text"]]]
    return [at]


@_fault("null for a question", "instruction", "missing-fields", "fail")
def _null(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train[at]["instruction"] = None
    return [at]


@_fault("more words than tags", "token-classification", "missing-fields", "fail")
def _few_tags(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train[at]["tags"].pop()
    return [at]


@_fault("a tool call without a name", "tool calls", "missing-fields", "fail")
def _nameless_call(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    del rows.train[at]["messages"][1]["tool_calls"][0]["function"]["name"]
    return [at]


@_fault("a held-out row without its answer", "question-answer", "missing-fields", "fail", of="held")
def _held_without(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.held_out, draw)
    del rows.held_out[at]["answer"]
    return [at]


@_fault("an empty answer", "chat", "empty-answers", "fail")
def _empty(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    _say(rows.train[at], -1, lambda text: "  ")
    return [at]


@_fault("an empty answer in the middle", "sharegpt", "empty-answers", "fail")
def _empty_middle(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train[at]["conversations"][1]["value"] = ""
    return [at]


@_fault("many empty answers", "question-answer", "empty-answers", "fail", also="rows-dropped")
def _many_empty(rows: Rows, draw: Random) -> list[int]:
    places = _some(rows.train, draw, 0.25)
    for at in places:
        rows.train[at]["answer"] = ""
    return places


@_fault("an empty class", "classification", "empty-answers", "fail")
def _no_class(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train[at]["category"] = ""
    return [at]


@_fault("the assistant speaks first", "chat", "repairs", "warn")
def _assistant_first(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train[at]["messages"].insert(0, turn("assistant", "How can I help?"))
    return [at]


@_fault("two user turns in a row", "chat", "repairs", "warn")
def _two_users(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train[at]["messages"].insert(0, turn("user", "Hello!"))
    return [at]


@_fault("a system turn in the middle", "sharegpt", "roles", "fail")
def _system_middle(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train[at]["conversations"].insert(2, {"from": "system", "value": "Be short."})
    return [at]


@_fault("a chat that ends with the user", "sharegpt", "roles", "fail")
def _user_last(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train[at]["conversations"].pop()
    return [at]


@_fault("an unknown role", "chat", "roles", "fail")
def _wizard(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train[at]["messages"][0]["role"] = "wizard"
    return [at]


@_fault("a tool's turn that no call asked for", "tool calls", "roles", "fail")
def _stray_tool(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    del rows.train[at]["messages"][1]
    return [at]


@_fault("chosen equals rejected", "preference", "chosen-equals-rejected", "fail")
def _same_answers(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train[at]["rejected"] = rows.train[at]["chosen"] + "\n"
    return [at]


@_fault("the chosen answer is always longer", "preference", "preference-length", "warn")
def _longer(rows: Rows, draw: Random) -> list[int]:
    for row in rows.train:
        row["rejected"] = row["rejected"][: len(row["chosen"]) // 2]
    return []


# ---------------------------------------------------------------------------------------- what the text says


@_fault("an AWS key", "chat", "secrets", "fail")
def _aws(rows: Rows, draw: Random) -> list[int]:
    return _told(rows, draw, "AK" + "IA" + "Q3EGRT5XNW7ZPL2K")


@_fault("a private key", "chat", "secrets", "fail")
def _private(rows: Rows, draw: Random) -> list[int]:
    return _told(rows, draw, "-----BEGIN " + "RSA PRIVATE KEY-----\nMIIEow")


@_fault("a GitHub token", "chat", "secrets", "fail")
def _github(rows: Rows, draw: Random) -> list[int]:
    return _told(rows, draw, "gh" + "p_" + "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1eF3hJ5")


@_fault("a signed web token", "chat", "secrets", "fail")
def _web_token(rows: Rows, draw: Random) -> list[int]:
    return _told(rows, draw, "ey" + "JhbGciOiJIUzI1NiJ9.ey" + "JzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmN")


@_fault("a secret in a tool call", "tool calls", "secrets", "fail")
def _secret_call(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    call = rows.train[at]["messages"][1]["tool_calls"][0]["function"]
    call["arguments"] = {"expression": "48/2", "key": "AK" + "IA" + "Q3EGRT5XNW7ZPL2K"}
    return [at]


@_fault("an e-mail address", "chat", "emails", "warn")
def _email(rows: Rows, draw: Random) -> list[int]:
    return _told(rows, draw, "jo.miller" + "@" + "example.com")


def _told(rows: Rows, draw: Random, what: str) -> list[int]:
    """Something that stands in one answer."""
    at = _one(rows.train, draw)
    _say(rows.train[at], -1, lambda text: f"{text}\nUse {what} for it.")
    return [at]


@_fault("a control character", "text lines", "control-characters", "warn")
def _control(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train[at]["text"] += "\x1b[0m"
    return [at]


@_fault("UTF-8 that was read as Windows-1252", "intents as chats", "mojibake", "warn")
def _mojibake(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    _say(rows.train[at], 1, lambda text: f"The café’s bill was £5. {text}".encode().decode("cp1252"))
    return [at]


@_fault("many rows that were read as Windows-1252", "text", "mojibake", "fail")
def _much_mojibake(rows: Rows, draw: Random) -> list[int]:
    places = _some(rows.train, draw, 0.1)
    for at in places:
        rows.train[at] = f"“{rows.train[at]}”".encode().decode("cp1252", errors="ignore")
    return places


@_fault("the replacement character", "classification", "mojibake", "warn")
def _replaced(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train[at]["text"] = "I haven\ufffdt got my card"
    return [at]


@_fault("a special token typed as text", "chat", "special-tokens", "fail")
def _typed(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    _say(rows.train[at], 0, lambda text: f"{text}<|end|>")
    return [at]


@_fault("another model's markers", "chat", "foreign-markers", "warn")
def _markers(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    _say(rows.train[at], 0, lambda text: f"<|im_start|>user\n{text}<|im_end|>")
    return [at]


@_fault("chats rendered by another template", "question-answer", "foreign-markers", "fail", of="both")
def _all_markers(rows: Rows, draw: Random) -> list[int]:
    for row in rows.train + rows.held_out:
        row["question"] = f"[INST] {row['question']} [/INST]"
    return []


@_fault("prompts in another model's template", "prompt-completion", "foreign-markers", "warn", of="both")
def _prompt_markers(rows: Rows, draw: Random) -> list[int]:
    for row in rows.train + rows.held_out:
        row["question"] = f"### Instruction:\n{row['question']}\n### Response:\n"
    return []


@_fault("a row in another language", "chat", "languages", "warn")
def _german(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    asked = "Der Laden hat 12 Äpfel und verkauft ein Drittel davon. Wie viele sind es noch für den nächsten Tag?"
    answer = "Es sind nicht mehr 12, sondern 12 - 4 = 8 Äpfel, die auf dem Tisch mit der Waage liegen.\n#### 8"
    rows.train[at] = {"messages": [turn("user", asked), turn("assistant", answer)]}
    return [at]


@_fault("a row in another script", "text", "languages", "warn")
def _russian(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train[at] = "Быть или не быть, вот в чём вопрос. Достойно ль смиряться под ударами судьбы?"
    return [at]


@_fault("held-out rows in another language", "chat", "languages", "warn", of="held")
def _measured_in_german(rows: Rows, draw: Random) -> list[int]:
    asked = "Wie viele {} sind es und wie viel kosten sie, wenn der Preis nicht {} ist, auch mit dem Rabatt?"
    answer = "Das ist {}."
    rows.held_out = [
        {"messages": [turn("user", asked.format(n * "xy", n)), turn("assistant", answer.format(n))]}
        for n in range(1, 20)
    ]
    return []


@_fault("many rows joined into one", "text lines", "lengths", "warn")
def _joined(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train[:20], draw)
    joined = "\n".join(row["text"] for row in rows.train[at : at + 60])
    rows.train[at : at + 60] = [{"text": joined}]
    return [at]


# ------------------------------------------------------------------------------------ rows that say the same


@_fault("a row twice", "chat", "duplicates", "warn")
def _twice(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train.append(rows.train[at])
    return [len(rows.train) - 1]


@_fault("half of all rows twice", "question-answer", "duplicates", "fail")
def _half_twice(rows: Rows, draw: Random) -> list[int]:
    num = len(rows.train)
    rows.train += rows.train[: num // 2]
    return list(range(num, len(rows.train)))


@_fault("a row again with a word changed", "chat", "near-duplicates", "warn")
def _nearly_twice(rows: Rows, draw: Random) -> list[int]:
    at = max(range(len(rows.train)), key=lambda n: len(rows.train[n]["messages"][1]["content"]))
    again = json.loads(_line(rows.train[at]))
    _say(again, 1, lambda text: text + " Done")
    _say(again, 0, lambda text: text.replace(" the ", " a ", 1))
    rows.train.append(again)
    return [len(rows.train) - 1]


@_fault("a speech again with a word changed", "text", "near-duplicates", "warn")
def _nearly_text(rows: Rows, draw: Random) -> list[int]:
    at = max(range(len(rows.train)), key=lambda n: len(rows.train[n]))
    first, _, rest = rows.train[at].partition(" ")
    rows.train.append(f"{first} forsooth {rest}")
    return [len(rows.train) - 1]


@_fault("half of all rows again with a word changed", "prompt-completion", "near-duplicates", "fail")
def _half_nearly_twice(rows: Rows, draw: Random) -> list[int]:
    num = len(rows.train)
    rows.train += [{**row, "question": f"{row['question']} Why?"} for row in rows.train[: num // 2]]
    return list(range(num, len(rows.train)))


@_fault("held-out rows that are trained on", "chat", "leakage", "fail", of="held")
def _leaks(rows: Rows, draw: Random) -> list[int]:
    places = _some(rows.held_out, draw, 0.02)
    for at, source in _sources(rows, places, draw):
        rows.held_out[at] = source
    return places


@_fault("held-out questions with other answers", "question-answer", "leakage", "fail", of="held")
def _leaked_questions(rows: Rows, draw: Random) -> list[int]:
    places = _some(rows.held_out, draw, 0.02)
    for at, source in _sources(rows, places, draw):
        rows.held_out[at]["question"] = source["question"].upper()
    return places


def _sources(rows: Rows, places: Sequence[int], draw: Random) -> Iterable[tuple[int, Any]]:
    """A row to train on for each of some held-out rows."""
    return zip(places, draw.sample(rows.train, len(places)), strict=True)


@_fault("a held-out row that is nearly trained on", "chat", "near-leakage", "warn", of="held")
def _near_leak(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.held_out, draw)
    rows.held_out[at] = json.loads(_line(rows.train[_one(rows.train, draw)]))
    _say(rows.held_out[at], 0, lambda text: text + " Why?")
    return [at]


@_fault("many held-out rows nearly trained on", "question-answer", "near-leakage", "fail", of="held")
def _near_leaks(rows: Rows, draw: Random) -> list[int]:
    places = _some(rows.held_out, draw, 0.2)
    for at, source in _sources(rows, places, draw):
        rows.held_out[at] = {**source, "question": f"Now {source['question']}"}
    return places


@_fault("nothing is held out", "chat", "held-out", "warn")
def _nothing_held(rows: Rows, draw: Random) -> list[int]:
    rows.held_out = []
    return []


# --------------------------------------------------------------------------------------------------- classes


def _of_class(rows: Sequence[Any], name: str) -> list[int]:
    return [at for at, row in enumerate(rows) if row["category"] == name]


@_fault("a class that is never learnt", "classification", "unseen-labels", "warn", of="held")
def _never_learnt(rows: Rows, draw: Random) -> list[int]:
    name = draw.choice(rows.held_out)["category"]
    rows.train = [row for row in rows.train if row["category"] != name]
    return _of_class(rows.held_out, name)


@_fault("a class that is never measured", "classification", "unseen-labels", "warn", of="held")
def _never_measured(rows: Rows, draw: Random) -> list[int]:
    name = draw.choice(rows.held_out)["category"]
    rows.held_out = [row for row in rows.held_out if row["category"] != name]
    return []


@_fault("a class of one row", "classification", "labels", "warn")
def _rare(rows: Rows, draw: Random) -> list[int]:
    name = rows.train[0]["category"]
    only = draw.choice(_of_class(rows.train, name)[1:])
    kept = [at for at, row in enumerate(rows.train) if at == only or row["category"] != name]
    rows.train = [rows.train[at] for at in kept]
    return [kept.index(only)]


@_fault("a class that is misspelt in one row", "intents as chats", "labels", "warn")
def _misspelt(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    _say(rows.train[at], -1, lambda text: text.replace("_", "-"))
    return [at]


@_fault("a class that is nearly everything", "classification", "labels", "warn")
def _majority(rows: Rows, draw: Random) -> list[int]:
    for row in rows.train:
        row["category"] = rows.train[0]["category"]
    places = _some(rows.train, draw, 0.06)
    for at in places:
        rows.train[at]["category"] = rows.train[0]["category"] + "_not"
    for row in rows.held_out[::2]:
        row["category"] = rows.train[0]["category"]
    for row in rows.held_out[1::2]:
        row["category"] = rows.train[0]["category"] + "_not"
    return places


# -------------------------------------------------------------------------------- template, masks and tokens


def _template(turns: str) -> str:
    return "{% for m in messages %}" + turns + "{% endfor %}" + ASK


@_fault("the template leaves tools' turns out", "tool calls", "template", "fail", of="both")
def _no_tools(rows: Rows, draw: Random) -> list[int]:
    rows.template = rows.template.replace(
        "{{ m['content'] }}", "{% if m['role'] != 'tool' %}{{ m['content'] }}{% endif %}"
    )
    return []


@_fault("the template leaves tool calls out", "tool calls", "template", "fail", of="both")
def _no_calls(rows: Rows, draw: Random) -> list[int]:
    rows.template = _template(TURNS)
    return []


@_fault("the template leaves the reasoning out", "reasoning", "reasoning", "warn", of="both")
def _no_reasoning(rows: Rows, draw: Random) -> list[int]:
    rows.template = _template(TURNS)
    return []


@_fault("a template that starts twice", "chat", "double-bos", "fail", of="both")
def _starts_twice(rows: Rows, draw: Random) -> list[int]:
    rows.base, rows.template = "start", "{{ bos_token }}{{ bos_token }}" + _template(TURNS)
    return []


@_fault("a template and a tokenizer that both start", "chat", "double-bos", "pass")
def _both_start(rows: Rows, draw: Random) -> list[int]:
    rows.base, rows.template = "start", "{{ bos_token }}" + _template(TURNS)
    return []


@_fault("padding that is the end token", "chat", "pad-token", "pass")
def _pad_is_end(rows: Rows, draw: Random) -> list[int]:
    rows.base = "pad is end"
    return []


@_fault("markers that hide the end token", "chat", "end-token", "fail", of="both")
def _no_end(rows: Rows, draw: Random) -> list[int]:
    answer = "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '\\n.<|end|>' }}"
    rows.template = _template(
        "{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}" + answer
        + "{% else %}{{ m['content'] + '<|end|>' }}{% endif %}"
    )  # fmt: skip
    return []


@_fault("a template that ends no turn", "sharegpt", "end-token", "fail", of="both")
def _ends_no_turn(rows: Rows, draw: Random) -> list[int]:
    rows.template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    return []


@_fault("another end token than generation's", "chat", "end-agreement", "warn")
def _other_end(rows: Rows, draw: Random) -> list[int]:
    rows.template = _template(TURNS.replace("<|end|>", "<|system|>"))
    return []


@_fault("a template of another model", "chat", "round-trip", "warn")
def _other_template(rows: Rows, draw: Random) -> list[int]:
    rows.template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    return []


@_fault("a tokenizer that drops capitals", "chat", "round-trip", "fail")
def _small_letters(rows: Rows, draw: Random) -> list[int]:
    rows.base, rows.train, rows.held_out = "small letters", rows.train[:100], []
    return list(range(4))  # a few of every 512 are looked at


@_fault("a tokenizer that composes accents", "chat", "round-trip", "pass")
def _composed(rows: Rows, draw: Random) -> list[int]:
    rows.base = "composed"
    _say(rows.train[0], 0, lambda text: f"The cafe\u0301: {text}")
    return []


@_fault("a row of weight 0", "chat", "masked-rows", "fail")
def _weightless(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train[at]["weight"] = 0
    return [at]


@_fault("a row whose answers all weigh 0", "sharegpt", "masked-rows", "fail")
def _weightless_turns(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    for said in rows.train[at]["conversations"]:
        said["weight"] = 0
    return [at]


@_fault("every row of weight 0", "prompt-completion", "masked-rows", "refused")
def _all_weightless(rows: Rows, draw: Random) -> list[int]:
    for row in rows.train:
        row["weight"] = 0
    return list(range(len(rows.train)))


@_fault("a row that is one token", "text lines", "masked-rows", "fail", also="special-tokens")
def _one_token(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.train[at]["text"] = "<|end|>"
    return [at]


@_fault("token ids beyond the embedding", "chat", "vocabulary", "fail")
def _few_embeddings(rows: Rows, draw: Random) -> list[int]:
    rows.base = "few embeddings"
    return []


@_fault("a row of unknown tokens", "prompt-completion", "unknown-tokens", "warn")
def _unknown(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    rows.base = "words"
    rows.train[at]["answer"] += " ☃☃☃"
    return [at]


@_fault("a tokenizer that does not know the script", "prompt-completion", "unknown-tokens", "fail")
def _unknown_script(rows: Rows, draw: Random) -> list[int]:
    rows.base = "words"
    places = _some(rows.train, draw, 0.5)
    for at in places:
        rows.train[at]["answer"] += " ответ ясен"
    return places


# --------------------------------------------------------------------------------------- lengths and amounts


def _long(row: dict[str, Any], times: int = 12) -> None:
    _say(row, -1, lambda text: "\n".join(f"{n}. {text}" for n in range(times)))


@_fault("a row too long to use", "chat", "rows-dropped", "warn")
def _dropped(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    _long(rows.train[at])
    return [at]


@_fault("many rows too long to use", "chat", "rows-dropped", "fail")
def _many_dropped(rows: Rows, draw: Random) -> list[int]:
    places = _some(rows.train, draw, 0.25)
    for at in places:
        _long(rows.train[at])
    return places


@_fault("answers of which most is cut away", "chat", "cut-answers", "fail")
def _cut_answers(rows: Rows, draw: Random) -> list[int]:
    places = _some(rows.train, draw, 0.01)
    for at in places:
        _long(rows.train[at], 20)
    rows.data["truncation"] = "keep_end"
    return places


@_fault("a question that is cut at its front", "chat", "cut-answers", "warn")
def _cut_question(rows: Rows, draw: Random) -> list[int]:
    at = _one(rows.train, draw)
    _say(rows.train[at], 0, lambda text: "\n".join(f"{n}. {text}" for n in range(20)))
    rows.data["truncation"] = "keep_end"
    return [at]


@_fault("few rows", "chat", "enough-data", "warn")
def _few_rows(rows: Rows, draw: Random) -> list[int]:
    rows.train = rows.train[:20]
    return []


@_fault("many passes over the data", "chat", "enough-data", "warn")
def _many_epochs(rows: Rows, draw: Random) -> list[int]:
    rows.settings["epochs"] = 40
    return []


@_fault("few tokens for the parameters", "classification", "enough-data", "warn")
def _few_tokens(rows: Rows, draw: Random) -> list[int]:
    rows.train = rows.train[:100]
    rows.settings["epochs"], rows.method = 1, {"name": "full"}
    return []


# --------------------------------------------------------------------------------------------------- judging


@dataclass(frozen=True)
class Outcome:
    """What the gate says of one fault. `wrong` tells where that is not as it must be."""

    status: str
    said: str
    num_rows: int
    wrong: tuple[str, ...]


def try_fault(fault: Fault, real: Real, folder: Path, bases: Mapping[str, Path]) -> Outcome:
    """Plant a fault in a clean set, and hold what the gate says against what it must say."""
    rows = SETS[fault.set](real)
    places = fault.plant(rows, Random(fault.name))
    written = write(rows, folder, bases)
    if fault.of == "both":
        wheres = written.train + written.held_out
    else:
        wheres = [(written.held_out if fault.of == "held" else written.train)[at] for at in places]
    try:
        report = api.check_data(written.recipe)
    except UserError as error:
        return _refused(fault, wheres, error)
    [found] = [finding for finding in report.findings if finding.check == fault.check]
    wrong = []
    if found.status != fault.status:
        wrong.append(f"{found.check} says {found.status} ({found.said}), not {fault.status}")
    if fault.check == "unused-columns":  # it names columns, whose rows it counts
        wheres = ["loss_mask"]
        wrong += [text for _, text in found.rows if f"in {len(places):,} rows" not in text]
    if [where for where, _ in found.rows] != wheres[:SHOWN]:
        wrong.append(f"it names {[w for w, _ in found.rows]}, not {wheres[:SHOWN]}")
    if wheres and found.num_rows != len(wheres):
        wrong.append(f"it counts {found.num_rows} rows, not {len(wheres)}")
    others = {finding.check for finding in report.failed} - fault.also - {fault.check}
    if others:
        wrong.append(f"{', '.join(sorted(others))} fails as well")
    return Outcome(found.status, found.said, found.num_rows, tuple(wrong))


def _refused(fault: Fault, wheres: list[str], error: UserError) -> Outcome:
    named = [problem.where for problem in error.problems]
    wrong = [] if fault.status == "refused" else [f"refused: {error}"]
    if named != wheres[:SHOWN]:
        wrong.append(f"it names {named}, not {wheres[:SHOWN]}")
    return Outcome("refused", str(error), len(named), tuple(wrong))


def try_clean(name: str, real: Real, folder: Path, bases: Mapping[str, Path]) -> DataReport:
    """What the gate says of a clean set."""
    return api.check_data(write(SETS[name](real), folder, bases).recipe)
