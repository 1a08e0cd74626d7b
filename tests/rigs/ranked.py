"""Trainings one after another in processes that train together: the libraries are imported once.

    python -m torch.distributed.run --nproc_per_node N tests/rigs/ranked.py JOBS

JOBS is a JSON file: a list of {"recipe": ..., "out": ...}.
"""

import json
import sys
from pathlib import Path

import peftkit
from peftkit.rundir.events import ignore_event


def main() -> int:
    import torch

    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        peftkit.finetune(job["recipe"], out=job["out"], observer=ignore_event)
    return 0


if __name__ == "__main__":
    sys.exit(main())
