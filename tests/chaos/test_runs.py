"""Kills, signals, full disks and damage, sampled: `python benchmarks/chaos/runs.py` does all of it."""

import random

import pytest

from tests.rigs.chaos.nursery import Nursery
from tests.rigs.chaos.scenes import DAMAGES, Scenes, files_of, flipped

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    nursery = Nursery()
    yield Scenes.at(tmp_path_factory.mktemp("chaos"), nursery)
    nursery.close()


@pytest.fixture(scope="module")
def stopped(scenes):
    return scenes.stopped_run()


@pytest.mark.parametrize("share", [0.45, *(pytest.param(one, marks=SLOW) for one in (0.02, 0.2, 0.7, 0.9, 0.99))])
def test_killed_at_a_write_point(scenes, share):
    assert scenes.killed_at(max(1, round(share * scenes.num_points))) is None


@SLOW
@pytest.mark.parametrize("number", range(25))
def test_killed_at_more_write_points(scenes, number):
    assert scenes.killed_at(1 + (number * scenes.num_points) // 25) is None


@SLOW
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_any_moment(scenes, seed):
    assert scenes.killed_after(random.Random(seed).uniform(0, scenes.seconds)) is None


@pytest.mark.parametrize(
    ("event", "step"),
    [
        ("eval", 8),
        pytest.param("phase data", 0, marks=SLOW),
        pytest.param("phase model", 0, marks=SLOW),
        pytest.param("preflight", 0, marks=SLOW),
        pytest.param("step", 7, marks=SLOW),
    ],
)
def test_terminated_in_each_phase(scenes, event, step):
    assert scenes.terminated(event, step=step) is None


@SLOW
@pytest.mark.parametrize("event", ["phase base", "data", "checkpoint", "memory", "phase publish"])
def test_interrupted_in_other_phases(scenes, event):
    assert scenes.terminated(event, "SIGINT") is None


@pytest.mark.parametrize(("how", "share"), [("ENOSPC", 0.5), pytest.param("EDQUOT", 0.8, marks=SLOW)])
def test_no_room_at_a_write(scenes, how, share):
    point = round(share * scenes.num_points)
    assert scenes.without_room(how, point, point + 20) is None


@SLOW
@pytest.mark.parametrize("number", range(15))
def test_no_room_at_more_writes(scenes, number):
    point = 1 + (number * scenes.num_points) // 15
    assert scenes.without_room("ENOSPC", point, point + 10**9) is None


@pytest.mark.parametrize("num_bytes", [100_000, pytest.param(3_000, marks=SLOW)])
def test_files_that_may_not_grow(scenes, num_bytes):
    assert scenes.with_small_files(num_bytes) is None


def test_a_damaged_file_of_a_checkpoint_is_missed(scenes, stopped):
    assert scenes.damaged(stopped, "optimizer.safetensors", flipped) is None


@SLOW
@pytest.mark.parametrize("damage", DAMAGES)
def test_each_file_of_a_checkpoint_damaged_in_each_way(scenes, stopped, damage):
    for file in files_of(stopped):
        assert scenes.damaged(stopped, file, damage) is None, file
