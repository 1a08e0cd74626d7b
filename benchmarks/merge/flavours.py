"""Every kind of adapter on every kind of base: how far merged weights are from the adapter, ours and PEFT's.

    python benchmarks/merge/flavours.py      # some 2 minutes

Tiny random models in fp32 and bf16, those of the tests. The largest difference in a logit between the base
with its adapter and the merged model, read back; `effect` is what the adapter itself moves a logit by.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
from common import write_result

from tests.rigs.adapters import FLAVOURS, base_plan, inputs, load, load_adapted, make, merge


def measured(name: str, dtype: str, folder: Path) -> dict[str, Any]:
    """One row."""
    import torch

    flavour = FLAVOURS[name]
    base, adapter = make(flavour, folder, dtype)
    plan = merge(base, adapter, folder / "out", base_plan(base, dtype, flavour.task))
    adapted = load_adapted(base, adapter, flavour.task, dtype)
    asked = inputs(adapted, flavour.task)
    with torch.no_grad():
        expected = adapted(**asked).logits.float()
        with adapted.disable_adapter():
            alone = adapted(**asked).logits.float()
        ours = load(folder / "out", flavour.task, dtype)(**asked).logits.float()
        adapted.merge_and_unload().save_pretrained(folder / "theirs")
        theirs = load(folder / "theirs", flavour.task, dtype)(**asked).logits.float()
    one, two = (load(folder / each, flavour.task, dtype).state_dict() for each in ("out", "theirs"))
    return {
        "adapter": name,
        "family": flavour.model_type,
        "dtype": dtype,
        "effect": float((expected - alone).abs().max()),
        "ours": float((expected - ours).abs().max()),
        "peft": float((expected - theirs).abs().max()),
        "different_tensors": sum(not torch.equal(one[key], two[key]) for key in one),
        "tensors": len(one),
        "untied": plan.untied,
    }


def main() -> None:
    """All rows, as a table and as a result file."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        for name in FLAVOURS:
            with tempfile.TemporaryDirectory() as place:
                row = measured(name, dtype, Path(place))
            rows.append(row)
            print(
                f"| {name} | {row['family']} | {dtype} | {row['effect']:.2f} | {row['ours']:.1e} | "
                f"{row['peft']:.1e} | {row['different_tensors']} of {row['tensors']} |",
                flush=True,
            )
    write_result("merge_flavours", {"rows": rows})


if __name__ == "__main__":
    main()
