"""Whether the data gate finds what is wrong with data, and leaves alone what is not.

    python benchmarks/data_gate.py [--data FOLDER] [--rows 2000]

Every fault of tests/rigs/planted.py is planted in real data (GSM8K, BANKING77, tiny Shakespeare) and must be
found by its check, with its status and its rows; no clean set may fail. FOLDER holds
gsm8k/{train,test}.jsonl, banking77/{train,test}.csv and tinyshakespeare/input.txt; without it the samples in
tests/assets/data serve. Ends with 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import write_result

sys.path.insert(0, str(Path(__file__).parent.parent))  # tests/ is no package that is installed


def _row(cells: list[str], widths: tuple[int, ...]) -> str:
    return " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def faults(real: Any, folder: Path, bases: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Plant every fault, and print what became of it."""
    from tests.rigs.planted import FAULTS, try_fault

    widths = (46, 20, 22, 7, 8, 1)
    print(_row(["fault", "format", "check", "status", "rows", "right?"], widths))
    found = []
    for number, fault in enumerate(FAULTS):
        place = folder / f"fault-{number}"
        place.mkdir()
        outcome = try_fault(fault, real, place, bases)
        right = "yes" if not outcome.wrong else "NO: " + "; ".join(outcome.wrong)
        told = [fault.name, fault.set, fault.check, outcome.status, f"{outcome.num_rows:,}", right]
        print(_row(told, widths), flush=True)
        names = ("fault", "format", "check", "status", "rows", "right")
        found.append(dict(zip(names, [*told[:4], outcome.num_rows, not outcome.wrong], strict=True)))
    return found


def clean_sets(real: Any, folder: Path, bases: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Look at every clean set, and print what is said of it."""
    from tests.rigs.planted import try_clean
    from tests.rigs.realdata import SETS

    widths = (24, 8, 8, 8, 1)
    print()
    print(_row(["clean set", "rows", "seconds", "fails", "warnings"], widths))
    found = []
    for number, name in enumerate(SETS):
        place = folder / f"clean-{number}"
        place.mkdir()
        started = time.perf_counter()
        report = try_clean(name, real, place, bases)
        seconds = time.perf_counter() - started
        warned = {f.check: f.said for f in report.findings if f.status == "warn"}
        failed = {f.check: f.said for f in report.failed}
        rows = report.totals.num_train + report.totals.num_eval
        told = "; ".join(f"{check}: {said}" for check, said in (failed | warned).items())
        print(_row([name, f"{rows:,}", f"{seconds:.1f}", str(len(failed)), told], widths), flush=True)
        found.append({"set": name, "rows": rows, "seconds": round(seconds, 2), "fails": failed, "warnings": warned})
    return found


def main() -> int:
    """Run the tables. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the whole data sets")
    parser.add_argument("--rows", type=int, default=2000, help="rows to train on of each set")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["PEFTKIT_CACHE"] = str(folder / "cache")  # nothing of an earlier run is taken
        from tests.rigs.realdata import load_real, make_bases

        started = time.perf_counter()
        real = load_real(arguments.data, num=arguments.rows)
        bases = make_bases(folder, real)
        planted = faults(real, folder, bases)
        clean = clean_sets(real, folder, bases)
    wrong = sum(not row["right"] for row in planted)
    failing = sum(bool(row["fails"]) for row in clean)
    seconds = time.perf_counter() - started
    print(f"\n{len(planted) - wrong} of {len(planted)} faults found with the right rows", end="; ")
    print(f"{failing} of {len(clean)} clean sets fail; {seconds:.0f} s")
    data = str(arguments.data.name) if arguments.data else "the samples in tests/assets/data"
    result = {"data": data, "rows": arguments.rows, "seconds": round(seconds, 1)}
    write_result("data_gate", {**result, "faults": planted, "clean": clean})
    return 1 if wrong or failing else 0


if __name__ == "__main__":
    sys.exit(main())
