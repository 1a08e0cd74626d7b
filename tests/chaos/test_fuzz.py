"""A share of what benchmarks/chaos/fuzz.py runs: nothing ends in a traceback, hangs, or passes wrongly."""

import json
import os
import random
import signal
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.recipe.document import dump_text, parse_text
from tests.rigs.chaos import rows as data_files
from tests.rigs.chaos.kinds import KINDS
from tests.rigs.chaos.recipes import make
from tests.rigs.chaos.schema_values import plain
from tests.rigs.chaos.watch import Kind, WrongSuccess, one, watched
from tests.rigs.chaos.yaml_text import document


@pytest.fixture
def _same_environment(monkeypatch):
    """Cases choose a cache of their own."""
    for name in ("PEFTKIT_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, os.environ[name])


def run(name, num, tmp_path, seed):
    """Run cases in this process: one that hung would be stopped by the suite's own limit."""
    shared = tmp_path / "shared"
    shared.mkdir()
    case, verdicts = KINDS[name].open(shared), set()
    for index in range(num):
        folder = tmp_path / f"case-{index}"
        folder.mkdir()
        outcome = one(case, seed, name, index, folder)
        assert not outcome.failed, f"{folder}: {outcome.told}"
        assert outcome.seconds < 10
        verdicts.add(outcome.verdict)
    assert verdicts == {"accepted", "refused"}


@pytest.mark.parametrize(("name", "num"), [("recipes", 200), ("data", 100)])
@pytest.mark.usefixtures("_same_environment")
def test_few_of_each_kind(name, num, tmp_path):
    run(name, num, tmp_path, seed=11)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_same_environment")
def test_few_adapters(tmp_path):
    run("adapters", 20, tmp_path, seed=11)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num"), [("recipes", 1500), ("data", 600), ("adapters", 250)])
def test_many_of_each_kind_under_watch(name, num, tmp_path):
    failed = [each for each in watched(KINDS[name], range(num), seed=12, work=tmp_path) if each.failed]
    assert not failed, failed[0].told


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), VALUES, min_size=1, max_size=4),
    st.integers(0, 2**32),
)
def test_yaml_is_read_as_it_was_written(data, seed):
    """Text that no YAML library wrote, in many styles, and text of our own."""
    text = document(random.Random(seed), data).decode("utf-8-sig")
    assert repr(parse_text(text, name="r.yaml").data) == repr(data)
    assert repr(parse_text(dump_text(data), name="r.yaml").data) == repr(data)


@given(st.integers(0, 2**32))
@settings(max_examples=30)
def test_a_case_is_the_same_each_time(seed):
    assert make(random.Random(seed)) == make(random.Random(seed))
    assert plain(random.Random(seed)) == plain(random.Random(seed))


def _misbehave(shared):
    """Cases that do each of the things that are looked for."""

    def case(rng, folder):
        (folder / "input").write_text("kept")
        what = int(folder.name.rpartition("-")[2])
        if what == 1:
            raise KeyError("not a UserError")
        if what == 2:
            time.sleep(60)
        if what == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if what == 4:
            raise WrongSuccess("broken, and taken")
        if what == 5:
            bytearray(2**34)
        return "accepted"

    return case


def test_what_goes_wrong_is_seen_and_its_input_kept(tmp_path):
    kind = Kind("bad", _misbehave, 7)
    found = list(watched(kind, range(7), seed=0, work=tmp_path, limit_seconds=1.0))
    verdicts = ["accepted", "traceback", "hang", "traceback", "wrong success", "traceback", "accepted"]
    assert [each.verdict for each in found] == verdicts
    assert "died with -9" in found[3].told
    assert "MemoryError" in found[5].told
    kept = {path.parent.name for path in tmp_path.glob("case-*/input")}
    assert kept == {f"case-{number}" for number in (1, 2, 3, 4, 5)}


def test_a_reader_that_loses_a_row_is_found_out(tmp_path, _same_environment):
    """The oracle itself: it has to see what it is for."""
    content = b"".join(json.dumps({"text": f"row {number}"}).encode() + b"\n" for number in range(3))
    rows = [{"text": f"row {number}"} for number in range(4)]
    os.environ["PEFTKIT_CACHE"] = str(tmp_path / "cache")
    with pytest.raises(WrongSuccess, match="not those that were written"):
        data_files.check(data_files.Case("whole", "rows.jsonl", content, rows), tmp_path, gate=False)
    with pytest.raises(WrongSuccess, match="3 rows kept and 0 left out"):
        data_files.check(data_files.Case("planted", "rows.jsonl", content, rows[:2], 1), tmp_path, gate=False)
