"""peftkit: parameter-efficient fine-tuning from one short recipe.

    import peftkit
    summary = peftkit.finetune("recipes/quickstart.yaml")

Every public function is imported on first use, so that `import peftkit` costs nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The libraries underneath report usage unless told not to, before they are imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which measures the preflight, writes to stderr

if TYPE_CHECKING:
    from peftkit.api import *  # noqa: F403
    from peftkit.errors import Interrupted, PeftkitError, Problem, UserError  # noqa: F401

_HOMES = dict.fromkeys(("Interrupted", "PeftkitError", "Problem", "UserError"), "peftkit.errors") | dict.fromkeys(
    (
        *("load_recipe", "make_plan", "plan_recipe", "check_data", "inspect_model", "finetune", "resume_run"),
        *("diagnose_run", "verify_run", "reproduce_run", "summarize_run", "generate", "open_chat"),
        "evaluate_run",
        *("merge_adapter", "combine_adapters", "export_adapter", "convert_weights", "MergeOptions", "ExportOptions"),
    ),
    "peftkit.api",
)
__all__ = sorted(_HOMES)  # noqa: PLE0605  frozen by tests/test_api.py


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'peftkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
