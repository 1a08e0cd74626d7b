"""What processes that train together tell each other, and that one alone is told nothing."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from peftkit import ranks

ROOT = Path(__file__).parents[1]
PART = """
import json, sys
from peftkit import ranks
from peftkit.errors import Interrupted, PeftkitError, Problem, UserError

def lead_fails():
    raise UserError(Problem("a", "b", "c", "d"))

said = {}
with ranks.joined() as place:
    said["place"] = [place.rank, place.num, ranks.current().is_lead]
    said["word"] = ranks.from_lead(lambda: {"of": place.rank})
    said["gathered"] = ranks.gathered(["rank", place.rank])
    said["total"] = ranks.total([1.0, place.rank, 0.1])
with ranks.joined() as place:  # again, in the same process
    said["again"] = ranks.from_lead(lambda: "anew")
try:
    with ranks.joined():
        ranks.from_lead(lead_fails)
except UserError as error:
    said["problem"] = str(error)
try:
    with ranks.joined() as place:
        if place.rank == 1:
            raise ValueError("of rank 1")
        ranks.gathered(None)
except PeftkitError as error:
    said["failure"] = str(error)
except ValueError as error:
    said["failure"] = "its own"
print(json.dumps(said))
"""


def test_one_process_alone_has_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert ranks.launched() == ranks.current() == ranks.Ranks(0, 1, 0)
    with ranks.joined() as place:
        assert place.is_lead and place.num == 1
        assert ranks.from_lead(lambda: place) is place, "nothing is made JSON of"
        assert ranks.gathered(place) == [place]
        assert ranks.total([1, 0.1]) == [1, 0.1]
    with pytest.raises(ZeroDivisionError):
        ranks.from_lead(lambda: 1 / 0)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ranks.launched() == ranks.Ranks(3, 4, 1)
    assert ranks.current().num == 1, "launched is not joined"


def test_two_processes_agree_and_hear_of_each_other_s_errors():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PART],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    lead, other = (json.loads(process.communicate(timeout=120)[0]) for process in processes)
    assert (lead["place"], other["place"]) == ([0, 2, True], [1, 2, False])
    assert lead["word"] == other["word"] == {"of": 0}
    assert (lead["gathered"], other["gathered"]) == ([["rank", 0], ["rank", 1]], [])
    assert lead["total"] == other["total"] == [2.0, 1.0, 0.2]
    assert lead["again"] == other["again"] == "anew"
    assert lead["problem"] == other["problem"] == "a: got b, expected c; d"
    assert lead["failure"] == "rank 1 failed (ValueError: of rank 1)"
    assert other["failure"] == "its own"
