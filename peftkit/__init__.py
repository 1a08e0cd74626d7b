"""peftkit: parameter-efficient fine-tuning from one short recipe.

    import peftkit
    summary = peftkit.finetune("recipes/quickstart.yaml")

Every public function is imported on first use, so that `import peftkit` costs nothing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The libraries underneath report usage unless told not to, before they are imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from peftkit.api import (
        ExportOptions,
        MergeOptions,
        check_data,
        combine_adapters,
        convert_weights,
        diagnose_run,
        evaluate_run,
        export_adapter,
        finetune,
        generate,
        inspect_model,
        load_recipe,
        make_plan,
        merge_adapter,
        plan_recipe,
        reproduce_run,
        resume_run,
        summarize_run,
        verify_run,
    )
    from peftkit.errors import Interrupted, PeftkitError, Problem, UserError

_API = (
    "ExportOptions",
    "MergeOptions",
    "check_data",
    "combine_adapters",
    "convert_weights",
    "evaluate_run",
    "export_adapter",
    "finetune",
    "generate",
    "inspect_model",
    "load_recipe",
    "make_plan",
    "merge_adapter",
    "plan_recipe",
    "diagnose_run",
    "reproduce_run",
    "resume_run",
    "summarize_run",
    "verify_run",
)
_ERRORS = ("Interrupted", "PeftkitError", "Problem", "UserError")
__all__ = [
    "ExportOptions",
    "Interrupted",
    "MergeOptions",
    "PeftkitError",
    "Problem",
    "UserError",
    "check_data",
    "combine_adapters",
    "convert_weights",
    "diagnose_run",
    "evaluate_run",
    "export_adapter",
    "finetune",
    "generate",
    "inspect_model",
    "load_recipe",
    "make_plan",
    "merge_adapter",
    "plan_recipe",
    "reproduce_run",
    "resume_run",
    "summarize_run",
    "verify_run",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _API:
        return getattr(import_module("peftkit.api"), name)
    if name in _ERRORS:
        return getattr(import_module("peftkit.errors"), name)
    raise AttributeError(f"module 'peftkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_API, *_ERRORS])
