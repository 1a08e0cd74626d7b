"""A training from start to end: facts, plan, model, data, training, result. See finetune.py."""

from peftkit.run.finetune import default_out, dry_run, finetune
from peftkit.run.resume import resume
from peftkit.rundir.events import Observer

__all__ = ["Observer", "default_out", "dry_run", "finetune", "resume"]
