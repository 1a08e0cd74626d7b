"""Run every cell and write results.json:  python -m tests.conformance.measure [PART OF A CELL'S NAME ...]"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["OMP_NUM_THREADS"] = "1"

from tests.conformance.cells import CELLS, RESULTS, Cell, key, read_results, run_cell, write_results


def one(cell: tuple[str, str, str]) -> Cell:
    """A cell's result; an exception is a result too."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    try:
        return run_cell(*cell)
    except Exception as error:  # noqa: BLE001  whatever a library raises is what this cell shows
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {str(error)[:200]} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})"
        return Cell(cell[0], answer="raised", reason=text, checks={"runs": text})


def main() -> None:
    """Measure what the arguments name, or everything."""
    wanted = [c for c in CELLS if not sys.argv[1:] or any(part in key(*c) for part in sys.argv[1:])]
    found = read_results() if RESULTS.exists() and sys.argv[1:] else {}
    with ProcessPoolExecutor(max_workers=2) as pool:
        for cell, result in zip(wanted, pool.map(one, wanted), strict=True):
            found[key(*cell)] = result
            if result.failed:
                print(key(*cell), result.failed, flush=True)
    write_results({key(*c): found[key(*c)] for c in CELLS if key(*c) in found})
    print(len(wanted), "cells", sum(bool(c.failed) for c in found.values()), "failing")


if __name__ == "__main__":
    main()
