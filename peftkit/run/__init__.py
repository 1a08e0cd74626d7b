"""The flow: facts, plan, model, data, training, result. Readable from top to bottom in flow.py."""

from peftkit.prepare.context import Observer
from peftkit.run.finetune import default_out, dry_run, finetune
from peftkit.run.resume import resume

__all__ = ["Observer", "default_out", "dry_run", "finetune", "resume"]
