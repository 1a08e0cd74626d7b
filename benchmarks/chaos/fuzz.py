"""Recipes, data files and adapters that are broken in every way: none may end in a traceback, hang, or pass.

    python benchmarks/chaos/fuzz.py [recipes|data|adapters ...] [--num N] [--seed S] [--case I]

Each case is made from the seed and its number, so that `--case I` runs one again, in this process. The files
of every case that fails are kept, and their folder is printed. Ends with 1 where a case fails.
"""

from __future__ import annotations

import argparse
import collections
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there: a case is small

_HEAD = ("kind", "cases", "accepted", "refused", "tracebacks", "hangs", "wrong", "slowest (s)")


def _row(cells: Any) -> str:
    return "  ".join(str(cell).rjust(11) for cell in cells)


def fuzz(kind: Any, indices: range, seed: int, work: Path) -> dict[str, Any]:
    """Run the cases of a kind, telling of those that fail. Returns their counts."""
    from tests.rigs.chaos.watch import VERDICTS, watched

    counts: collections.Counter[str] = collections.Counter()
    slowest = 0.0
    for outcome in watched(kind, indices, seed=seed, work=work):
        counts[outcome.verdict] += 1
        slowest = max(slowest, outcome.seconds)
        if outcome.failed:
            told = (outcome.on_commit.strip().splitlines() or [""])[-1][:300]
            print(f"{outcome.verdict}: {work}/case-{outcome.index}: {told}", file=sys.stderr, flush=True)
    return {
        "cases": len(indices),
        **{name.replace(" ", "_"): counts[name] for name in VERDICTS},
        "slowest_seconds": round(slowest, 2),
    }


def main() -> int:
    """Run what is asked for, print the table, write the results of a full run."""
    from tests.rigs.chaos.kinds import KINDS
    from tests.rigs.chaos.watch import one

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], default=[])
    parser.add_argument(
        "--num",
        type=int,
        help="cases of each kind (default: " + ", ".join(f"{kind.num:,} {name}" for name, kind in KINDS.items()) + ")",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this one again, here")
    arguments = parser.parse_args()
    chosen = {name: KINDS[name] for name in arguments.kinds or KINDS}
    work = Path(tempfile.mkdtemp(prefix="peftkit-fuzz-"))
    if arguments.case is not None:
        for kind in chosen.values():
            (work / "case").mkdir(exist_ok=True)
            outcome = one(kind.open(work), arguments.seed, kind.name, arguments.case, work / "case")
            print(f"{outcome.verdict} in {outcome.seconds:.2f} s, {work}/case\n{outcome.on_commit}")
        return 0
    print(_row(_HEAD))
    found = {}
    for name, kind in chosen.items():
        result = fuzz(kind, range(arguments.num or kind.num), arguments.seed, work / name)
        found[name] = result
        print(_row([name, *result.values()]), flush=True)
    if arguments.num is None and len(chosen) == len(KINDS):
        from common import write_result

        write_result("fuzz", {"seed": arguments.seed, "kinds": found})
    return int(any(r["traceback"] + r["hang"] + r["wrong_success"] for r in found.values()))


if __name__ == "__main__":
    sys.exit(main())
