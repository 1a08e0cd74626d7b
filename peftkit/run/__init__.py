"""The flow: facts, plan, model, data, training, result. Readable from top to bottom in flow.py."""

from peftkit.run.flow import Observer, default_out, dry_run, finetune, resume

__all__ = ["Observer", "default_out", "dry_run", "finetune", "resume"]
