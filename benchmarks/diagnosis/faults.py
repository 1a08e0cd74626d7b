"""Healthy recipes, and what is planted into them: one fault at a time, its true cause beside it.

That each fault lags and that its remedy helps was measured: results/diagnosis_faults.jsonl, by measure.py.
Training the tiny model's embeddings, a quarter of it, helps nearly everything as well.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tasks import Row, Task, write_rows
from tiny_model import RESERVED

FEW_TOKENS, FEW_EPOCHS = 2000, 60
NUM_NOISY = 40
_TURNS = "{% for m in messages %}{% if m['role'] == 'assistant' %}"
# the end token stands behind a line break, and so outside of what is learnt
NO_END_TEMPLATE = (
    _TURNS + "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '\\n<|end|>' }}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
# turns as they are, the end token behind each answer
PLAIN_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|end|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Healthy:
    """What was found to be well tuned for a task, and the loss that a run must reach."""

    learning_rate: float
    steps: int
    target: float
    target_of_new_tokens: float  # the same where answers are reserved tokens: fewer and other tokens


# Evaluation losses of the sweep, seed 0. intents (200 steps): 6e-3 0.161, 1e-2 0.151. working (150 steps):
# 1e-3 3.030, 3e-3 2.656, 5e-3 2.601, 1e-2 2.704, 3e-2 4.349. intents takes the lower of two alike, as three
# times 1e-2 is over the edge. Healthy, seeds 0, 1, 2: intents 0.136, 0.123, 0.155; working 2.601, 2.620,
# 2.607. The targets lie between these and the least of the faults that lag (intents, few-rows: 0.312;
# working, labels of seed 1: 2.695). For new tokens they lie above runs that train their rows: 0.933, 2.584.
HEALTHY = {
    "intents": Healthy(learning_rate=6e-3, steps=240, target=0.18, target_of_new_tokens=1.05),
    "working": Healthy(learning_rate=5e-3, steps=150, target=2.66, target_of_new_tokens=2.66),
}


@dataclass(frozen=True)
class Draft:
    """A run in the making: its recipe without files, and its rows."""

    recipe: Mapping[str, Any]
    train: tuple[Row, ...]
    held_out: tuple[Row, ...]
    seed: int
    template: str = ""  # rows are written as chats, where there is one
    swapped: bool = False  # such chats learn the prompt and mask the answer
    classes: tuple[str, ...] = ()

    def having(self, **changes: Any) -> Draft:
        """With other values in the recipe; `method__rank=2` is method.rank=2."""
        recipe = copy.deepcopy(dict(self.recipe))
        for path, value in changes.items():
            *sections, key = path.split("__")
            place = recipe
            for section in sections:
                place = place.setdefault(section, {})
            place[key] = value
        return replace(self, recipe=recipe)

    def scaled(self, *, rate: float = 1.0, steps: float = 1.0) -> Draft:
        """With the learning rate or the number of steps times so much."""
        train = self.recipe["train"]
        num_steps = max(2, round(train["max_steps"] * steps))
        return self.having(
            train__learning_rate=train["learning_rate"] * rate,
            train__max_steps=num_steps,
            train__eval_steps=max(1, num_steps // 6),
        )

    def write(self, folder: Path) -> dict[str, Any]:
        """The files, and the recipe that reads them."""
        rows = [self.train, self.held_out]
        if self.template:
            rows = [[_as_chat(row, self.swapped) for row in group] for group in rows]
        data = {
            **self.recipe.get("data", {}),
            "train": str(write_rows(folder / "train.jsonl", rows[0])),
            "eval": str(write_rows(folder / "eval.jsonl", rows[1])),
        }
        if self.template:
            path = folder / "chat.jinja"
            path.write_text(self.template, encoding="utf-8")
            data["chat"] = {"template": str(path)}
        return {**self.recipe, "data": data}


def _as_chat(row: Row, swapped: bool) -> dict[str, Any]:
    asked, answered = row["prompt"], row["completion"]
    if not swapped:
        return {"messages": [_turn("user", asked), _turn("assistant", answered)]}
    learnt, masked = _turn("assistant", asked, weight=1), _turn("assistant", answered, weight=0)
    return {"messages": [_turn("user", "Read:"), learnt, _turn("user", "Answer:"), masked]}


def _turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def healthy(task: Task, *, base: Path, seed: int) -> Draft:
    """All linear layers at rank 16, a tuned learning rate, enough steps."""
    tuned = HEALTHY[task.name]
    recipe = {
        "base": str(base),
        "method": {"name": "lora", "rank": 16, "targets": "all-linear"},
        "train": {
            "learning_rate": tuned.learning_rate,
            "max_steps": tuned.steps,
            "batch_size": 16,
            "micro_batch": 16,
            "packing": False,
            "max_length": 96,
            "eval_steps": tuned.steps // 6,
        },
        "seed": seed,
    }
    return Draft(recipe, task.train, task.held_out, seed, classes=task.classes)


# ------------------------------------------------------------------------------------------------ the faults


def _few_rows(draft: Draft) -> Draft:
    """So many tokens of answers and questions, some 3 characters each, for many epochs."""
    draw = random.Random(draft.seed)
    rows = draw.sample(list(draft.train), len(draft.train))
    kept: list[Row] = []
    for row in rows:
        size = sum((len(r["prompt"]) + len(r["completion"])) // 3 for r in kept)
        if size >= FEW_TOKENS:
            break
        kept.append(row)
    num_steps = FEW_EPOCHS * len(kept) // draft.recipe["train"]["batch_size"]
    changed = draft.having(train__max_steps=num_steps, train__eval_steps=num_steps // 6)
    return replace(changed, train=tuple(kept))


def _permuted(rows: tuple[Row, ...], seed: int) -> tuple[Row, ...]:
    completions = [row["completion"] for row in rows]
    random.Random(seed).shuffle(completions)
    return tuple({**row, "completion": completion} for row, completion in zip(rows, completions, strict=True))


def _shuffled(draft: Draft) -> Draft:
    """Answers of other rows. What is held out stays right: a clean test set is what shows the harm."""
    return replace(draft, train=_permuted(draft.train, draft.seed))


def _shuffled_both(draft: Draft) -> Draft:
    """The same where the held-out rows are of the same make, as with a share of the training data."""
    return replace(_shuffled(draft), held_out=_permuted(draft.held_out, draft.seed + 1))


def _swapped(draft: Draft) -> Draft:
    """The prompt is learnt and the answer masked, by weights of turns, in training and evaluation alike.

    Generation markers around the wrong turn are no such fault: the data gate sees through them, and learns
    the answer.
    """
    # each chat begins alike, which looks like leakage
    chat = draft.having(data__mask="assistant", data__waive=["leakage", "near-leakage"])
    return replace(chat, template=PLAIN_TEMPLATE, swapped=True)


def _no_end(draft: Draft) -> Draft:
    """Answers whose end is never learnt. The run's own loss leaves it out too, and so reaches the target.

    What it does to answers with their end shows apart: intents 1.364 for 0.136, working 2.997 for 2.601.
    """
    chat = draft.having(data__mask="assistant", data__waive=["end-token"])
    return replace(chat, template=NO_END_TEMPLATE)


def _new_tokens(draft: Draft) -> Draft:
    """Answers in tokens whose embeddings, tied to the head, were never trained."""
    names = {text: RESERVED[number] for number, text in enumerate(draft.classes)}
    change = names.__getitem__ if names else _in_new_digits
    return replace(draft, train=_renamed(draft.train, change), held_out=_renamed(draft.held_out, change))


def _renamed(rows: tuple[Row, ...], change: Callable[[str], str]) -> tuple[Row, ...]:
    return tuple({**row, "completion": change(row["completion"])} for row in rows)


def _in_new_digits(text: str) -> str:
    return "".join(RESERVED[int(c)] if c in "0123456789" else c for c in text)


@dataclass(frozen=True)
class Fault:
    """What is planted, the true cause, and the action that mends it."""

    name: str
    cause: str
    change: Callable[[Draft], Draft]
    remedy: str = ""


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("healthy", "none", lambda draft: draft),
        Fault("noisy-eval", "none", lambda draft: replace(draft, held_out=draft.held_out[:NUM_NOISY])),
        Fault("rate-low", "learning rate too low", lambda d: d.scaled(rate=0.1), "lr x10"),
        Fault("rate-high", "learning rate too high", lambda d: d.scaled(rate=10.0), "lr /10"),
        Fault("few-steps", "too few steps", lambda d: d.scaled(steps=1 / 3), "steps x3"),
        Fault("few-rows", "data: overfitting", _few_rows),
        Fault("labels", "data: labels or masks broken", _shuffled),
        Fault("labels-both", "data: labels or masks broken", _shuffled_both),
        Fault("mask", "data: labels or masks broken", _swapped),
        Fault("no-end", "data: labels or masks broken", _no_end),
        Fault("modules", "target modules", lambda d: d.having(method__targets=["q", "v"]), "all-linear"),
        Fault("rank", "rank", lambda d: d.having(method__rank=1), "rank x16"),
        Fault("embeddings", "embeddings or head", _new_tokens, "embeddings"),
    )
}


def tokens_of(draft: Draft) -> list[str]:
    """The reserved tokens that stand in a draft's answers."""
    text = "".join(row["completion"] for row in draft.train)
    return [token for token in RESERVED if token in text]


# ----------------------------------------------------------------------------------------------- the actions


def _with_embeddings(draft: Draft) -> Draft:
    """Train the rows of the reserved tokens in use; where there are none, the whole table."""
    tokens = tokens_of(draft)
    return draft.having(method__also_train=[{"tokens": tokens}] if tokens else ["embeddings"])


ACTIONS: dict[str, Callable[[Draft], Draft]] = {
    "nothing": lambda draft: draft,
    "lr x3": lambda draft: draft.scaled(rate=3.0),
    "lr /3": lambda draft: draft.scaled(rate=1 / 3),
    "lr x10": lambda draft: draft.scaled(rate=10.0),
    "lr /10": lambda draft: draft.scaled(rate=0.1),
    "steps x2": lambda draft: draft.scaled(steps=2.0),
    "steps x3": lambda draft: draft.scaled(steps=3.0),
    "all-linear": lambda draft: draft.having(method__targets="all-linear"),
    "rank x4": lambda draft: draft.having(method__rank=4 * draft.recipe["method"]["rank"]),
    "rank x16": lambda draft: draft.having(method__rank=16 * draft.recipe["method"]["rank"]),
    "embeddings": _with_embeddings,
}
