"""The ranks of a run on this machine, by torchrun's Python API: started, watched, and named where one dies.

Every rank is a `peftkit` command of its own. Rank 0 talks to the user; the others' output goes to files.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from peftkit.errors import Interrupted, PeftkitError, UserError
from peftkit.ranks import LAUNCH_ID
from peftkit.recipe import LoadedRecipe, load
from peftkit.recipe.document import dump_text
from peftkit.report import Summary, read_summary
from peftkit.rundir import RunDir, write_text
from peftkit.rundir.events import Observer
from peftkit.secrets import redact

_SHUTDOWN_SECONDS = 300  # for a step and its checkpoint, after a signal
_EVENTS_SECONDS = 0.2  # between looks at the events
_TOLD_CODES = {UserError.exit_code, 130, 143}  # of problems and stops, which rank 0 tells of
_LAUNCHER_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_LOG_LINES = 15  # of a rank that failed, to show


class RanksFailed(PeftkitError):
    """The ranks ended with an error. `exit_code` is theirs."""

    def __init__(self, message: str, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(message)


def _blame(exit_code: int) -> int:
    """Return how likely a rank with this exit code is not the first that failed: the lowest is named."""
    if exit_code < 0 and exit_code != -signal.SIGTERM:
        return 0
    return {UserError.exit_code: 1, 1: 2}.get(exit_code, 3)


def launch_recipe(
    loaded: LoadedRecipe, given: Sequence[str] = (), *, num: int, out: Path, observer: Observer | None
) -> Summary:
    """Train a recipe in `num` processes into a fresh run directory. Returns the run's summary.

    `given` are its file and overrides as they were typed, where it has one.
    """
    with tempfile.TemporaryDirectory(prefix="peftkit-recipe-") as folder:
        if not given:
            file = Path(folder) / "recipe.yaml"
            write_text(file, dump_text(loaded.recipe.model_dump(mode="json", exclude_unset=True)))
            given = [str(file)]
        with reported(out, observer):
            restarts = loaded.recipe.devices.restarts
            launch_ranks(["finetune", *given, "--out", str(out)], num=num, run=out, restarts=restarts)
    return read_summary(RunDir.open(out))


def launch_resume(path: Path, given: Sequence[str], *, num: int, observer: Observer | None) -> Summary:
    """Resume a run in `num` processes. Returns its summary."""
    restarts = load(path / "resolved.yaml").recipe.devices.restarts
    with reported(path, observer):
        launch_ranks(["resume", str(path), *given], num=num, run=path, restarts=restarts)
    return read_summary(RunDir.open(path))


@contextmanager
def reported(run: Path, observer: Observer | None) -> Iterator[None]:
    """Pass the events that rank 0 writes to an observer while the block runs."""
    if observer is None:
        yield
        return
    has_ended = threading.Event()
    num_before = len(RunDir(run).events())

    def follow_events() -> None:
        num_seen, is_last = num_before, False
        while not is_last:
            is_last = has_ended.wait(_EVENTS_SECONDS)
            events = RunDir(run).events()
            for event in events[num_seen:]:
                observer(event)
            num_seen = len(events)

    thread = threading.Thread(target=follow_events, daemon=True)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()


def launch_ranks(arguments: Sequence[str], *, num: int, run: Path, restarts: int = 0) -> None:
    """Run `peftkit ARGUMENTS` in `num` processes that train together into `run`.

    Where one dies, all end; the run is resumed in new processes, up to `restarts` times. Raises RanksFailed with the
    first failure by name, and Interrupted on a signal.
    """
    while True:
        failure = _launch_once(arguments, num=num, run=run)
        if failure is None:
            return
        if restarts == 0 or failure.exit_code in _TOLD_CODES or not (run / "plan.json").exists():
            raise failure
        restarts -= 1
        print(redact(f"peftkit: {failure}: resuming, {restarts} restarts left"), file=sys.stderr)
        arguments = ("resume", str(run))


def _launch_once(arguments: Sequence[str], *, num: int, run: Path) -> RanksFailed | None:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it says is said below, in short
    logs = tempfile.mkdtemp(prefix="peftkit-ranks-")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num,
        run_id=LAUNCH_ID,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",  # a free port
        local_addr="127.0.0.1",
        max_restarts=0,  # a restart is a new launch: torchrun's own finds the addresses of the dead
        # rank 0 shows progress; its result is printed here
        logs_specs=DefaultLogsSpecs(log_dir=logs, redirects={0: Std.OUT, **dict.fromkeys(range(1, num), Std.ALL)}),
        shutdown_timeout=_SHUTDOWN_SECONDS,
    )
    handlers = {number: signal.getsignal(number) for number in _LAUNCHER_SIGNALS}  # torchrun leaves its own
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num)))
    resume_hint = f"continue with: peftkit resume {run}"
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "peftkit", *arguments)
    except SignalException as error:
        # of a run rank 0 said how to go on
        text = "" if (run / "resolved.yaml").exists() else "stopped before the run began"
        raise Interrupted(text, exit_code=128 + error.sigval) from None
    except ChildFailedError as error:
        # torchrun ends the others by SIGTERM, which they answer as a stop: a rank that another signal ended was first
        rank, first = min(error.failures.items(), key=lambda item: (_blame(item[1].exitcode), item[1].timestamp))
        written = [file.read_text("utf-8", "replace") for file in Path(logs).glob(f"**/{rank}/stderr.log")]
        lines = [f"  rank {rank}: {line}" for text in written for line in text.splitlines()[-_LOG_LINES:]]
        if first.exitcode in _TOLD_CODES:  # by rank 0, unless another was alone with it
            return RanksFailed("\n".join(lines), first.exitcode)
        how = f"was ended by {first.signal_name()}" if first.exitcode < 0 else f"ended with exit code {first.exitcode}"
        message = f"rank {rank} of {num} (process {first.pid}) {how}; {resume_hint}"
        return RanksFailed("\n".join([message, *lines]), exit_code=1)
    finally:
        for number, handler in handlers.items():
            with suppress(ValueError):  # not the main thread, where torchrun set none
                signal.signal(number, handler)
        if threads is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        shutil.rmtree(logs, ignore_errors=True)
    return None
