"""The processes that train one run together: which leads, what it tells the others, what is added up over them.

One process alone is the common case: every function then returns its argument, and no group is made. torch.distributed
is imported nowhere else. Words go through the group's store as JSON and are polled, so that no collective waits while
the lead reads data or looks for a cause; the numbers of a step go through one all-reduce.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any

from peftkit import interrupt
from peftkit.errors import Interrupted, PeftkitError, Problem, UserError, first_line

LAUNCH_ID = "peftkit"  # by which torchrun's processes know that we started them
_TIMEOUT = timedelta(minutes=30)  # of a collective: a rank that hangs longer ends the run; so may a checkpoint's disk
_STOP_SECONDS = 20.0  # after a signal, for another rank to say what follows from it
_POLL_SECONDS = 0.02
_LEAVE_SECONDS = 10.0
_FAILURE = "failure"


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those that train together."""

    rank: int = 0
    num: int = 1
    local_rank: int = 0

    @property
    def is_lead(self) -> bool:
        """Return True for the one that plans, writes the run directory, and talks to the user."""
        return self.rank == 0


def launched() -> Ranks:
    """Return the place that a launcher gave this process in torchrun's variables; alone without one."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks()
    rank, num = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return Ranks(rank, num, int(os.environ.get("LOCAL_RANK", "0")))


class _Group:
    """A joined group: its place, its store, and the number of words and answers so far."""

    def __init__(self, place: Ranks, store: Any) -> None:
        self.place, self.store, self.num_words, self.num_answers = place, store, 0, 0


_group: _Group | None = None
_join_numbers = count()  # a group of this process after another has names of its own


def current() -> Ranks:
    """Return the place of this process in the group that it joined; alone outside one."""
    return _group.place if _group is not None else Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the group of this process's launcher while the block runs; alone, do nothing.

    An error of the lead, or of any other rank, is told to all. The group is ours, with a store per attempt: after a
    restart torchrun's still has the addresses of the dead (pytorch#167288).
    """
    global _group  # noqa: PLW0603
    place = launched()
    if place.num == 1 or _group is not None:
        yield current()
        return
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank)
    hub = _open_hub(place)
    store = PrefixStore(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{next(_join_numbers)}", hub)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.num, timeout=_TIMEOUT)
    _group = _Group(place, PrefixStore("words", store))
    try:
        yield place
    except Exception as error:
        is_lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        if is_lost and not isinstance(error, PeftkitError):  # another rank is gone: what was told says more
            with suppress(dist.DistError):
                _raise_failure(_group)
            raise PeftkitError(f"rank {place.rank} lost the others ({first_line(error)})") from error
        if not _group.store.check([_FAILURE]):
            failure: dict[str, Any] = {"rank": place.rank, "kind": type(error).__name__, "text": str(error)}
            if isinstance(error, UserError):
                failure["problems"] = [[p.where, p.got, p.expected, p.fix] for p in error.problems]
            if isinstance(error, Interrupted):
                failure["exit_code"] = error.exit_code
            _group.store.set(_FAILURE, json.dumps(failure))
        raise
    finally:
        with suppress(dist.DistError):
            _leave(_group)
        dist.destroy_process_group()
        _group = None


@cache
def _open_hub(place: Ranks) -> Any:
    """Return the store of this process's launch: torchrun's, or one that rank 0 keeps as long as it lives."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    is_host = _hosts_store(place)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, place.num, is_master=is_host, timeout=_TIMEOUT, wait_for_workers=False)


def _hosts_store(place: Ranks) -> bool:
    return place.is_lead and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _leave(group: _Group) -> None:
    """Say that this rank leaves. Whose store it is waits for those that still read from it."""
    group.store.set(f"left-{group.place.rank}", "")
    everyone, waited = [f"left-{rank}" for rank in range(group.place.num)], 0.0
    while _hosts_store(group.place) and waited < _LEAVE_SECONDS and not group.store.check(everyone):
        time.sleep(_POLL_SECONDS)
        waited += _POLL_SECONDS


def _raise_failure(group: _Group) -> None:
    """Raise the error that another rank told of, if one did."""
    if not group.store.check([_FAILURE]):
        return
    failure = json.loads(group.store.get(_FAILURE))
    error: PeftkitError
    if "problems" in failure:
        error = UserError([Problem(*fields) for fields in failure["problems"]])
    elif "exit_code" in failure:
        error = Interrupted(failure["text"], exit_code=failure["exit_code"])
    else:
        error = PeftkitError(f"rank {failure['rank']} failed ({failure['kind']}: {failure['text']})")
    error.is_heard = True
    raise error


def from_lead(work: Callable[[], Any]) -> Any:
    """Return what `work` returns on the lead, in JSON's values, on every rank; only the lead does it.

    The others wait as long as it takes. Every rank has to come here in the same order. What fails on the lead is
    raised by all.
    """
    if _group is None:
        return work()
    key = f"word-{_group.num_words}"
    _group.num_words += 1
    if _group.place.is_lead:
        _raise_failure(_group)
        _group.store.set(key, json.dumps(work()))
    _wait_for(_group, [key])
    return json.loads(_group.store.get(key))


def gathered(value: Any) -> list[Any]:
    """Return the values of all ranks, in JSON's, on the lead; an empty list elsewhere. All have to come here."""
    if _group is None:
        return [value]
    _group.num_answers += 1
    keys = [f"answer-{_group.num_answers}-{rank}" for rank in range(_group.place.num)]
    _group.store.set(keys[_group.place.rank], json.dumps(value))
    if not _group.place.is_lead:
        return []
    _wait_for(_group, keys)
    values = [json.loads(_group.store.get(key)) for key in keys]
    for key in keys:
        _group.store.delete_key(key)
    return values


def _wait_for(group: _Group, keys: Sequence[str]) -> None:
    """Wait until other ranks have set all keys. Raises what one of them told of, and Interrupted on a signal."""
    stop_seconds = 0.0
    while not group.store.check(list(keys)):
        _raise_failure(group)
        if interrupt.stop_requested():
            stop_seconds += _POLL_SECONDS
        if stop_seconds > _STOP_SECONDS:
            interrupt.stop_if_requested("stopped while waiting for another rank")
        time.sleep(_POLL_SECONDS)


def total(values: Sequence[float]) -> list[float]:
    """Return the sums of all ranks' values, in double precision; a collective. Alone, the values themselves."""
    if _group is None:
        return list(values)
    import torch
    import torch.distributed as dist

    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()
