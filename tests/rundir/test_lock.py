import json
import os
import signal
import subprocess
import sys
import time

import pytest

from peftkit.errors import UserError
from peftkit.rundir.lock import LOCK, boot_id, lock_run

HOLD = """
import sys, time
from pathlib import Path
from peftkit.rundir import lock_run
with lock_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def held_elsewhere(folder):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_owner_is_refused_and_told_of_the_first(tmp_path):
    process = held_elsewhere(tmp_path)
    try:
        with pytest.raises(UserError, match=f"process {process.pid} on"), lock_run(tmp_path, take_over=True):
            pass
    finally:
        process.kill()
        process.wait()


def test_a_killed_owner_lets_go(tmp_path):
    process = held_elsewhere(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == process.pid
    with lock_run(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert (tmp_path / LOCK).read_bytes() == b""


def test_two_owners_in_one_process_are_told_apart(tmp_path):
    with lock_run(tmp_path), pytest.raises(UserError, match="no other process owns"), lock_run(tmp_path):
        pass


def test_another_machine_that_did_not_release_is_believed_until_it_is_gone(tmp_path):
    holder = {"pid": 1, "host": "elsewhere", "boot_id": "another", "since": "2026-01-01"}
    (tmp_path / LOCK).write_text(json.dumps(holder))
    with pytest.raises(UserError, match="--take-over"), lock_run(tmp_path):
        pass
    with lock_run(tmp_path, take_over=True):
        pass


def test_the_same_machine_under_another_name_is_stale(tmp_path):
    """A container that was made anew has another host name on the same boot: flock tells the truth there."""
    (tmp_path / LOCK).write_text(json.dumps({"pid": 1, "host": "old-container", "boot_id": boot_id()}))
    with lock_run(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"{}"])
def test_a_lock_cut_short_holds_nobody_up(tmp_path, content):
    (tmp_path / LOCK).write_bytes(content)
    with lock_run(tmp_path):
        pass


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    (tmp_path / LOCK).symlink_to(tmp_path / "mine.txt")
    with pytest.raises(UserError, match="cannot be written"), lock_run(tmp_path):
        pass
    assert (tmp_path / "mine.txt").read_text() == "keep me"


def test_a_crash_inside_releases(tmp_path):
    with pytest.raises(RuntimeError), lock_run(tmp_path):
        raise RuntimeError
    started = time.monotonic()
    with lock_run(tmp_path):
        assert time.monotonic() - started < 1
