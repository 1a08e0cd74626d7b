"""Events are written as lines and read back typed; unknown and old ones lose nothing."""

import copy
import json
from dataclasses import MISSING, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkit.rundir import RunDir
from peftkit.rundir.events import (
    EVENT_TYPES,
    UNSET,
    StepEvent,
    UnknownEvent,
    WarningEvent,
    last_of,
    of_type,
    read_event,
)

VALUES = st.integers() | st.text() | st.none() | st.floats(allow_nan=False) | st.lists(st.integers(), max_size=3)
TYPES = sorted(set(EVENT_TYPES.values()) - {UnknownEvent}, key=lambda event_type: event_type.kind)


@pytest.mark.parametrize("event_type", TYPES)
@given(data=st.data())
def test_an_event_comes_back_as_written(event_type, data, tmp_path_factory):
    names = [f.name for f in fields(event_type) if f.name not in {"extra", "at_seconds"}]
    event = event_type(at_seconds=1.5, **{name: data.draw(VALUES) for name in names})
    run = RunDir(tmp_path_factory.mktemp("run"))
    shown = run.emit(event)
    [read] = run.events()
    assert type(read) is type(shown) is event_type
    assert read == shown == event == json.loads(run.events_file.read_text())
    assert list(event.to_json())[:2] == ["event", "at_seconds"], "as lines were always written"


@given(st.dictionaries(st.text(min_size=1).filter(lambda key: key != "event"), VALUES, max_size=4), st.text())
def test_lines_of_other_versions_lose_nothing(record, kind):
    record = {"event": kind, **record}
    event = read_event(record)
    assert event.to_json() == record
    assert read_event(event.to_json()) == event


@pytest.mark.parametrize("event_type", TYPES)
def test_more_or_fewer_fields_than_today_lose_nothing(event_type):
    needed = [f.name for f in fields(event_type) if f.default is MISSING and f.name != "extra"]
    whole = {"event": event_type.kind, **dict.fromkeys(needed, 1), "of tomorrow": 2}
    assert type(read_event(whole)) is event_type
    assert read_event(whole).to_json() == whole
    assert isinstance(read_event({"event": event_type.kind}), UnknownEvent) == bool(needed)


def test_events_are_found_by_type():
    events = [WarningEvent(text="a"), WarningEvent(text="b")]
    assert of_type(events, WarningEvent) == events
    assert last_of(events, WarningEvent) == {"event": "warning", "text": "b"}
    assert last_of(events, WarningEvent, text="a") is events[0]
    assert last_of(events, StepEvent) is None
    assert events[0].get("text") == events[0]["text"] == "a"


def test_what_is_not_set_is_false_and_stays_unset_in_a_copy():
    assert not UNSET and copy.deepcopy(UNSET) is UNSET
