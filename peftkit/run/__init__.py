"""The flow: facts, plan, model, data, training, result. Readable from top to bottom in flow.py."""

from peftkit.run.flow import default_out, dry_run, finetune
from peftkit.run.resume import resume
from peftkit.run.stage import Observer

__all__ = ["Observer", "default_out", "dry_run", "finetune", "resume"]
