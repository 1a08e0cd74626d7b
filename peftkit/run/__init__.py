"""A training from start to end: facts, plan, model, data, training, result. See finetune.py."""

from peftkit.run.along import num_to_launch
from peftkit.run.finetune import default_out, dry_run, finetune
from peftkit.run.resume import num_to_launch_again, resume
from peftkit.rundir.events import Observer

__all__ = ["Observer", "default_out", "dry_run", "finetune", "num_to_launch", "num_to_launch_again", "resume"]
