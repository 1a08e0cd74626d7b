"""Victims: processes with the libraries loaded already, that work on a run and are hurt at a chosen moment.

A nursery imports everything once and forks a victim for each order, so that a victim takes the time of its
run and not of the imports. An order is a JSON line, the answer another:

    {"do": "finetune" | "resume", "recipe": {...}, "out": "...", "hurt": {...}, "log": "..."}
    {"status": exit code, or minus the signal, "points": write points passed, "seconds": ...}

`hurt` says what happens at the `at`-th write point: "kill" (SIGKILL), or an errno by name. Write points are
all that changes the file system below the run or the cache: opening to write, making, renaming and removing
(heard through Python's audit hooks), and fsync before and after. With `after_seconds` it happens then, with
`on` at the first event of that name.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree", "os.chmod"}
_FREES = {"os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC


class Points:
    """Counts write points below some folders and hurts at one of them."""

    def __init__(self, folders: list[str], hurt: Mapping[str, Any]) -> None:
        self.folders, self.hurt, self.passed, self.quiet = folders, hurt, 0, False

    def listen(self) -> None:
        sys.addaudithook(self._heard)
        fsync = os.fsync

        def counted(handle: int) -> None:
            self._point()
            fsync(handle)
            self._point()

        os.fsync = counted

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.quiet or (event != "open" and event not in _CHANGES):
            return
        if event == "open":
            path, mode, flags = arguments
            wants = bool(flags & _WRITING) if isinstance(flags, int) else False
            if not wants and not (isinstance(mode, str) and set(mode) & set("wax+")):
                return
        else:
            path = arguments[0]
        if isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(tuple(self.folders)):
            self._point(frees=event in _FREES)

    def _point(self, *, frees: bool = False) -> None:
        self.passed += 1
        wanted, until = self.hurt.get("at"), self.hurt.get("until")
        if wanted is None or not wanted <= self.passed <= (until or wanted):
            return
        if self.hurt["how"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if frees:  # what gives room back does not lack any
            return
        number = getattr(errno, self.hurt["how"])
        raise OSError(number, os.strerror(number))


def _work(order: Mapping[str, Any], points: Points) -> int:
    """In the victim: run the order as the command line would. Returns its exit code."""
    import peftkit
    from peftkit.errors import PeftkitError

    hurt = order.get("hurt") or {}

    given: list[str] = []

    def observe(event: dict[str, Any]) -> None:
        name = f"{event['event']} {event.get('name', '')}".strip()
        print(json.dumps(event.to_json(), default=str), flush=True)
        wanted = hurt.get("on") in {name, event["event"]} and event.get("step", 0) >= hurt.get("step", 0)
        if wanted and not given:
            given.append(name)
            os.kill(os.getpid(), getattr(signal, hurt["how"]))

    points.listen()
    try:
        if order["do"] == "finetune":
            peftkit.finetune(order["recipe"], out=order["out"], observer=observe)
        else:
            peftkit.resume_run(order["out"], observer=observe)
    except PeftkitError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return error.exit_code
    return 0


def _victim(order: Mapping[str, Any], report: int) -> None:
    handle = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    hurt = order.get("hurt") or {}
    if "cache" in order:
        os.environ["PEFTKIT_CACHE"] = order["cache"]
    if "file_size" in hurt:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (hurt["file_size"], resource.RLIM_INFINITY))
    points = Points([order["out"], order.get("cache", order["out"])], hurt)
    if "after_seconds" in hurt:
        timer = threading.Timer(hurt["after_seconds"], os.kill, (os.getpid(), getattr(signal, hurt["how"])))
        timer.daemon = True
        timer.start()
    status = 1
    try:
        status = _work(order, points)
    except BaseException:  # noqa: BLE001
        import traceback

        traceback.print_exc()
    finally:
        points.quiet = True
        os.write(report, str(points.passed).encode())
        sys.stdout.flush()
        os._exit(status)


def serve() -> None:
    """Load everything once, then fork a victim for each order on stdin."""
    import torch

    torch.set_num_threads(1)
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import trl  # noqa: F401

    import peftkit.run.finetune
    import peftkit.run.recovery
    import peftkit.train.training  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        reading, writing = os.pipe()
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _victim(order, writing)
        os.close(writing)
        _, status = os.waitpid(child, 0)
        passed = os.read(reading, 100).decode()
        os.close(reading)
        answer = {
            "status": os.waitstatus_to_exitcode(status),
            "points": int(passed or 0),
            "seconds": time.monotonic() - started,
        }
        print(json.dumps(answer), flush=True)


class Nursery:
    """The client: one server, one order at a time."""

    def __init__(self) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.rigs.chaos.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        assert self.server.stdout is not None
        assert self.server.stdout.readline() == "ready\n"

    def order(self, **order: Any) -> dict[str, Any]:
        """Have a victim work; the answer, with the victim's output as `log`."""
        assert self.server.stdin is not None and self.server.stdout is not None
        order = {key: str(value) if isinstance(value, Path) else value for key, value in order.items()}
        order["log"] = f"{order['out']}.log"
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        answer = json.loads(self.server.stdout.readline())
        return {**answer, "log": Path(order["log"]).read_text(encoding="utf-8", errors="replace")}

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait()


if __name__ == "__main__":
    serve()
