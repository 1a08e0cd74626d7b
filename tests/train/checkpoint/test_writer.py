"""Checkpoints written beside the training: whole, in order, of the state as it was, told when they fail."""

import errno
import os
import shutil
import threading

import pytest
import torch

from peftkit.rundir import RunDir, verify_folder
from peftkit.train.checkpoint import snapshot as snapshots
from peftkit.train.checkpoint import writer as writers
from peftkit.train.checkpoint.snapshot import TrainingSnapshot, load_tensors
from peftkit.train.checkpoint.writer import CheckpointWriter


def snapshot_of(step, tensor):
    return TrainingSnapshot(step, {"trained": {"w": tensor}, "random": {}}, {"a": 1}, {"epoch": 1.0}, {"data": "x"})


@pytest.fixture
def told():
    return []


@pytest.fixture
def writer(tmp_path, told):
    writer = CheckpointWriter(RunDir(tmp_path), told.append)
    yield writer
    writer.close()


def test_what_is_written_is_the_state_at_the_step_and_not_a_later_one(writer, told):
    weights = torch.zeros(1_000_000)
    for step in range(1, 6):
        weights.fill_(step)
        writer.submit(snapshot_of(step, weights), best_step=1)
        weights.fill_(-1)  # the next step has begun
    writer.close()
    assert [commit.step for commit in told] == [1, 2, 3, 4, 5]
    assert writer.run.checkpoint_steps() == [1, 4, 5]
    for step in (1, 4, 5):
        assert verify_folder(writer.run.checkpoint(step)) == []
        assert load_tensors(writer.run.checkpoint(step), "trained")["w"].eq(step).all()


def test_a_copy_that_would_take_much_memory_is_not_made(writer, told, monkeypatch):
    monkeypatch.setattr(writers, "_MAX_MEMORY_SHARE", 0.0)
    writer.submit(snapshot_of(7, torch.ones(3)), best_step=None)
    assert [commit.step for commit in told] == [7], "written before training goes on"


def test_large_tensors_are_cut_into_pieces_and_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "SHARD_BYTES", 1000)
    tensors = {f"t{number}": torch.randn(number * 40) for number in range(1, 12)}
    folder = TrainingSnapshot(3, {"trained": tensors}, {}, {}, {}).commit(RunDir(tmp_path))
    assert len(list(folder.glob("trained*.safetensors"))) > 5
    back = load_tensors(folder, "trained")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_is_told_and_leaves_the_earlier_ones(writer, told, monkeypatch, number):
    writer.submit(snapshot_of(1, torch.ones(3)), best_step=None)
    writer.finish()

    def full(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    writer.submit(snapshot_of(2, torch.ones(3)), best_step=None)
    writer.finish()
    assert told[1].error.errno == number
    assert writer.run.checkpoint_steps() == [1]
    assert [path.name for path in writer.run.checkpoints.iterdir()] == ["step-000001"]
    monkeypatch.undo()
    writer.submit(snapshot_of(3, torch.ones(3)), best_step=None)
    writer.finish()
    assert told[2].error is None


def test_other_faults_of_a_disk_are_not_taken_for_a_full_one(writer, monkeypatch):
    def broken(handle):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    writer.submit(snapshot_of(2, torch.ones(3)), best_step=None)
    with pytest.raises(OSError, match="input/output error"):
        writer.finish()


def test_older_ones_stay_while_fewer_than_two_are_whole(writer):
    for step in (1, 2):
        writer.submit(snapshot_of(step, torch.ones(3)), best_step=None)
    writer.finish()
    shutil.rmtree(writer.run.checkpoint(2))
    writer.submit(snapshot_of(3, torch.ones(3)), best_step=None)
    writer.finish()
    assert writer.run.checkpoint_steps() == [1, 3]
    (writer.run.checkpoint(3) / "trained.safetensors").write_bytes(b"")
    writer.submit(snapshot_of(4, torch.ones(3)), best_step=None)
    writer.finish()
    assert writer.run.checkpoint_steps() == [1, 3, 4], "3 is not whole: 1 is still needed"


def test_no_thread_is_left(writer):
    before = threading.active_count()
    writer.submit(snapshot_of(1, torch.ones(3)), best_step=None)
    writer.close()
    assert threading.active_count() <= before
