"""What is kept beside the runs (calibration, traces) never stops a run, and never answers nonsense."""

import json
import multiprocessing

import pytest

import peftkit
from peftkit.plan import Memory, read_plan
from peftkit.prepare.calibration import add_run, calibration_file, read_calibration
from peftkit.rundir import RunDir, write_sealed

DAMAGED = [
    '{"speeds": {"AMD EPYC": {"float32 none": "abc"}}, "memory": []}',
    '{"speeds": {"AMD EPYC": 5}, "memory": [7]}',
    '{"speeds": {"AMD EPYC": {"float32 none": NaN}}, "memory": []}',
    '{"speeds": {"AMD EPYC": {"float32 none": -5}}, "memory": []}',
    "null",
    "",
]


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_calibration_counts_for_nothing(text, monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path))
    calibration_file().write_text(text)
    assert not any(read_calibration().speeds.values())
    add_run("AMD EPYC", "kind", flops_per_second=2.0, memory={})
    assert read_calibration().speeds["AMD EPYC"] == {"kind": 2.0}


def _add_many(name):
    for _ in range(20):
        add_run(name, "kind", flops_per_second=1.0, memory={"measured_bytes": 1})


def test_two_processes_lose_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path))
    both = [multiprocessing.get_context("fork").Process(target=_add_many, args=(name,)) for name in "ab"]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert len(read_calibration().memory) == 40


def test_a_cache_that_cannot_be_written_stops_nothing(recipe, monkeypatch, tmp_path):
    file = tmp_path / "a-file"
    file.write_text("")
    monkeypatch.setenv("PEFTKIT_CACHE", str(file / "below"))
    recipe["train"]["max_steps"] = 2
    summary = peftkit.finetune(recipe, out=tmp_path / "run")
    assert summary.result is not None
    run = RunDir(tmp_path / "run")
    assert run.events()[-1]["event"] == "done"
    stored = json.loads((run.path / "plan.json").read_text())
    assert stored["memory"]["depth"] == "traced"
    del stored["method"]["trainable_by_layers"]  # as an earlier version wrote it
    write_sealed(run.path / "plan.json", stored)
    assert read_plan(run).method.num_trainable == summary.num_trainable


@pytest.mark.parametrize("change", [{"peaks": []}, {"reserved_bytes": float("nan")}, {"host_bytes": "1"}])
def test_a_memory_that_is_none_is_refused(change):
    whole = {
        "depth": "traced",
        "peaks": [{"phase": "forward", "components": {"adapter": 1}}],
        "reserved_bytes": 1,
        "context_bytes": 1,
        "host_bytes": 0,
        "bound": "",
    }
    assert Memory.from_json(whole).peak.allocated_bytes == 1
    with pytest.raises(ValueError, match=r"bytes are expected|valid integer"):
        Memory.from_json({**whole, **change})
