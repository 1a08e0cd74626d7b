"""What a fix says is done, word for word, to the recipe that it was said of: the problem is then gone."""

import copy
import json
import re
from difflib import SequenceMatcher
from typing import get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import peftkit
from peftkit.errors import Problem, UserError
from peftkit.methods.lora import LoraOptions
from peftkit.recipe import load
from peftkit.recipe.schema import Recipe
from tests.conftest import TINY_LLAMA, write_jsonl

BASE = {"base": {"id": "org/model"}, "method": {"name": "lora"}, "data": {"train": "rows.jsonl"}}


def problems_of(function, *arguments):
    """Return the problems that a call raises; none where it does not."""
    try:
        function(*arguments)
    except UserError as error:
        return list(error.problems)
    return []


def options_of(model, path=()):
    """Yield (path, field) of every key of the schema that is not a union of sections."""
    for name, field in model.model_fields.items():
        inner = [part for part in (field.annotation, *get_args(field.annotation)) if hasattr(part, "model_fields")]
        if path == () and name == "method":
            yield from options_of(LoraOptions, ("method",))
        elif len(inner) == 1:
            yield from options_of(inner[0], (*path, name))
        else:
            yield (*path, name), field


KEYS = {path: field for path, field in options_of(Recipe) if path != ("method", "name")}


def words_of(annotation):
    """Return the words that a field may be, as of Literal['auto', 'fp32']."""
    if get_origin(annotation) is None:
        return []
    own = [value for value in get_args(annotation) if isinstance(value, str)]
    return own + [word for part in get_args(annotation) for word in words_of(part)]


@st.composite
def typos(draw, word):
    """A word with one letter left out, doubled, or two exchanged."""
    at = draw(st.integers(0, len(word) - 2))
    changes = {
        "out": word[:at] + word[at + 1 :],
        "twice": word[: at + 1] + word[at:],
        "exchanged": word[:at] + word[at + 1] + word[at] + word[at + 2 :],
    }
    return draw(st.sampled_from(sorted(changes.values())))


def with_value(path, value):
    recipe = copy.deepcopy(BASE)
    section = recipe
    for name in path[:-1]:
        section[name] = section.get(name) if isinstance(section.get(name), dict) else {}
        section = section[name]
    section[path[-1]] = value
    return recipe


def is_right(path, value):
    return not any(path[-1] in problem.where for problem in problems_of(load, with_value(path, value)))


CANDIDATES = [(path, word) for path, field in KEYS.items() for word in words_of(field.annotation) if len(word) > 4]
WORDS = [(path, word) for path, word in CANDIDATES if is_right(path, word)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(st.data())
def test_a_key_with_a_typo_is_named_and_the_name_is_right(data):
    path = data.draw(st.sampled_from(sorted(path for path in KEYS if len(path[-1]) > 4)))
    typo = data.draw(typos(path[-1]))
    siblings = {other[-1] for other in KEYS if other[:-1] == path[:-1]}
    assume(typo not in siblings | {"", path[-1]})
    found = problems_of(load, with_value((*path[:-1], typo), None))
    fixes = [re.fullmatch(r"did you mean (\w+)\?", problem.fix) for problem in found]
    [suggested] = [match.group(1) for match in fixes if match and match.group(1) in siblings]
    likeness = {name: SequenceMatcher(None, typo, name).ratio() for name in (suggested, path[-1])}
    assert suggested == path[-1] or likeness[suggested] >= likeness[path[-1]], "another key is as near"
    fixed = problems_of(load, with_value((*path[:-1], suggested), None))
    assert not any("the key" in problem.got for problem in fixed)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_word_with_a_typo_is_named_and_the_name_loads(data):
    path, word = data.draw(st.sampled_from(WORDS))
    typo = data.draw(typos(word))
    assume(typo not in {other for where, other in WORDS if where == path})
    if is_right(path, typo):  # a key that takes other text as well
        return
    [problem] = [p for p in problems_of(load, with_value(path, typo)) if path[-1] in p.where]
    match = re.match(r"did you mean (\S+)\?", problem.fix)
    assert match is None or is_right(path, match.group(1))
    assert match is not None or word in problem.expected, "the words are listed where none is near"


def overrides_of(problem: Problem):
    """Return what a fix says to set, as overrides: 'set a.b: 1', 'a.b=1', 'try rank: 4', 'leave it out'."""
    at = re.search(r"[a-z_]+(\.[a-z_]+)+$", problem.where)
    key = at.group() if at else ""
    if match := re.search(r"\b([a-z_]+(?:\.[a-z_]+)+)(?:=|: )(\S+)", problem.fix):
        return {match.group(1): yaml.safe_load(match.group(2).rstrip(",;"))}
    if match := re.match(r"try ([a-z_]+): (\S+)$", problem.fix):
        return {f"{key.rpartition('.')[0]}.{match.group(1)}": yaml.safe_load(match.group(2))}
    if match := re.match(r"did you mean (\S+)\?", problem.fix):
        return {key: match.group(1)}
    if re.match("leave it out", problem.fix):
        return {key: None}
    raise AssertionError(f"no fix that can be applied: {problem.fix!r}")


MISTAKES = {
    "an optimizer's short name": {"train.optimizer": "adamw"},
    "pieces that do not divide": {"train.batch_size": 6, "train.micro_batch": 4},
    "stopping without an evaluation": {"train.early_stopping.patience": 2, "data.eval": None},
    "two lengths of a run": {"train.epochs": 2, "train.max_steps": 3},
    "dropout beyond one": {"method.dropout": 1.5},
    "a rate in words": {"train.learning_rate": "high"},
    "a part that is no part": {"method.also_train": ["hed"]},
    "noise behind a prefix": {"method": {"name": "prefix"}, "train.neftune": 5},
    "a plain base dequantized": {"base.dequantize": True},
    "smoothing as a percentage": {"train.label_smoothing": 10},
    "a metric of another task": {"evaluate.metric": "exactmatch"},
    "a file with a typo": {"data.train": "row.jsonl"},
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_fix_that_is_printed_works_as_it_is_printed(name, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"p {n}", "completion": f"c {n}"} for n in range(24)])
    recipe = {"base": str(TINY_LLAMA), "method": "lora", "data": {"train": str(path), "eval": "25%"}, "train": {}}
    mistake = dict(MISTAKES[name])
    if "data.train" in mistake:
        mistake["data.train"] = str(tmp_path / mistake["data.train"])
    found = problems_of(peftkit.make_plan, recipe, mistake)
    assert found
    for problem in found:
        applied = overrides_of(problem)
        if name == "a part that is no part":
            applied = {"method.also_train": list(applied.values())}
        mistake |= applied
    assert problems_of(peftkit.make_plan, recipe, mistake) == [], json.dumps(mistake)
