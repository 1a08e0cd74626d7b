"""Cases run one by one in a forked process, which is killed and replaced where it hangs or dies.

A kind of case is a function of a random generator and a folder. It returns "accepted" or "refused", raises
`WrongSuccess` where what it was told is not so, and whatever else it raises is a traceback.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT_SECONDS = 10.0
_MEMORY_BYTES = 6 * 2**30  # a case that takes more dies of a MemoryError, not the machine
VERDICTS = ("accepted", "refused", "traceback", "hang", "wrong success")

Run = Callable[[random.Random, Path], str]


class WrongSuccess(AssertionError):
    """What is broken was taken, what is whole was refused, or something else was read than was written."""


@dataclass(frozen=True)
class Kind:
    """One kind of case. `open` is called once in each process, with a folder for what its cases share."""

    name: str
    open: Callable[[Path], Run]
    num: int  # cases of a full run


@dataclass(frozen=True)
class Outcome:
    """What became of a case; `told` says why, where it failed."""

    index: int
    verdict: str
    seconds: float
    told: str = ""

    @property
    def failed(self) -> bool:
        return self.verdict not in {"accepted", "refused"}


def one(run: Run, seed: int, name: str, index: int, folder: Path) -> Outcome:
    """Run one case in this process. The same seed and index make the same case."""
    from peftkit.errors import UserError

    begin, verdict, told = time.monotonic(), "", ""
    try:
        verdict = run(random.Random(f"{seed} {name} {index}"), folder)
    except UserError as error:
        check_told(error)
        verdict = "refused"
    except WrongSuccess as error:
        verdict, told = "wrong success", str(error)
    except BaseException:  # noqa: BLE001  this is what is looked for
        verdict, told = "traceback", traceback.format_exc()
    return Outcome(index, verdict, time.monotonic() - begin, told)


def check_told(error: Any) -> None:
    """An error has to say where, what and what else; in text that can be written, and is read to its end."""
    if error.exit_code != 2 or not error.problems:
        raise WrongSuccess(f"an error of exit code {error.exit_code} with {len(error.problems)} problems")
    for problem in error.problems:
        text = str(problem)
        if not (problem.where and problem.got and problem.expected) or len(text) > 20_000:
            raise WrongSuccess(f"a problem that says too little or too much: {text[:200]!r}")
        text.encode()


def _serve(kind: Kind, seed: int, work: Path, pipe: Any) -> None:
    """The forked process: a case for every number that comes."""
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    shared = work / "shared"
    shared.mkdir(parents=True, exist_ok=True)
    run = kind.open(shared)
    pipe.send(None)
    while (index := pipe.recv()) is not None:
        folder = work / f"case-{index}"
        folder.mkdir()
        pipe.send(one(run, seed, kind.name, index, folder))


class _Process:
    """The forked process and the pipe to it."""

    def __init__(self, kind: Kind, seed: int, work: Path) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(kind, seed, work, theirs), daemon=True)
        self.process.start()
        theirs.close()
        if not self.pipe.poll(300) or self._answer() is not None:
            raise RuntimeError(f"the process for {kind.name} did not start")

    def _answer(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            return f"died with {self.process.exitcode}"

    def ask(self, index: int, limit_seconds: float) -> Outcome:
        """Run a case, for so long at most."""
        self.pipe.send(index)
        if not self.pipe.poll(limit_seconds):
            self.close()
            return Outcome(index, "hang", limit_seconds, f"no answer in {limit_seconds:g} seconds")
        found = self._answer()
        if isinstance(found, Outcome):
            return found
        return Outcome(index, "traceback", 0.0, f"the process {found}")

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def watched(
    kind: Kind, indices: range, *, seed: int, work: Path, limit_seconds: float = LIMIT_SECONDS
) -> Iterator[Outcome]:
    """The outcomes of cases in order. The folders of those that failed stay: `work`/case-NUMBER."""
    process = _Process(kind, seed, work)
    try:
        for index in indices:
            if not process.alive:
                process = _Process(kind, seed, work)
            outcome = process.ask(index, limit_seconds)
            folder = work / f"case-{index}"
            if outcome.failed:
                (folder / "told.txt").write_text(outcome.told, encoding="utf-8", errors="replace")
            else:
                shutil.rmtree(folder, ignore_errors=True)
            yield outcome
    finally:
        process.close()
