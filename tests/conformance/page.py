"""docs/families.md from the suite's results:  python -m tests.conformance.page"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from peftkit.archs import FAMILIES, ROLES, Family, shape_from_config
from tests.conformance.cells import CELLS, STEPS, VARIANTS, Cell, key, mergeable_text, read_results
from tests.rigs.tiny import TINY

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "families.md"
SLOW_PATHS = ROOT / "benchmarks" / "results" / "slow_paths.json"
_MARKS = {"works": "yes", "works, changed": "yes*", "refused": "no"}

_HEAD = """\
# Families and methods

Written by `python -m tests.conformance.page` from the results of the conformance suite, never by hand.
`python -m tests.conformance.measure` runs its {num} cells again: tiny models with random weights, on a CPU.

Each cell goes the whole way through peftkit's own functions: plan, load, adapter, preflight, {steps} steps,
save, load, merge. **yes** means that all of this holds:

- trainable parameters are exactly those that the plan predicted, by role;
- every trained tensor gets a finite gradient that is not zero, once what starts at zero has moved;
- {steps} steps lower the loss, and every frozen tensor is bit-equal afterwards;
- saved and loaded by PEFT, logits are equal; merged, they are equal (where there are weights to merge into);
- gradients with checkpointing equal those without (prefix tuning excepted: the plan turns it off);
- cached generation gives the tokens of uncached generation;
- for QLoRA, exactly the planned share is in 4-bit, and merging into the dequantised base is equal.

**yes\\*** is the same with changes that the plan makes and explains; they stand below by family. **no** is
refused in the plan, before anything is loaded, with the reason and the nearest method that works. An empty
cell means that the variant says nothing of that family.
"""


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _mark(results: dict[str, Cell], model_type: str, task: str, variant: str) -> str:
    cell = results.get(key(model_type, task, variant))
    return "" if cell is None else _MARKS[cell.answer]


def _matrix(results: dict[str, Cell]) -> list[str]:
    lines = [_row(["family", "task", *VARIANTS]), _row(["---"] * (2 + len(VARIANTS)))]
    for family in FAMILIES:
        for model_type in family.model_types:
            name = family.name if len(family.model_types) == 1 else f"{family.name} ({model_type})"
            for task in family.heads:
                marks = [_mark(results, model_type, task, variant) for variant in VARIANTS]
                lines.append(_row([name, task, *marks]))
    return lines


def _names(family: Family) -> str:
    """Roles and the modules that play them."""
    roles: dict[str, list[str]] = {}
    for linear in family.linears:
        last = linear.name.rsplit(".", 1)[-1]
        names = roles.setdefault(linear.role, [])
        if last not in names:
            names.append(last)
    return "; ".join(f"{role}: {', '.join(names)}" for role, names in roles.items())


def _facts() -> list[str]:
    head = ["family", "model types", "attention (tiny)", "positions", "packing", "roles and their layers"]
    lines = [_row(head), _row(["---"] * len(head))]
    for family in FAMILIES:
        shape = shape_from_config({**TINY[family.model_types[0]], "model_type": family.model_types[0]})
        assert shape is not None
        apart = "apart" if family.packs else "refused"
        types = ", ".join(family.model_types)
        lines.append(_row([family.name, types, shape.attention, shape.positions, apart, _names(family)]))
    return lines


def _notes(results: dict[str, Cell]) -> list[str]:
    lines = []
    for family in FAMILIES:
        own = [cell for cell in results.values() if cell.family == family.name]
        changed = dict.fromkeys(c.reason for c in own if c.answer == "works, changed")
        refused = dict.fromkeys(c.reason for c in own if c.answer == "refused")
        minded = [f"to mind: {text}" for text in family.mind]
        stated = [f"changed: {text}" for text in changed] + [f"refused: {text}" for text in refused]
        unmerged = mergeable_text(family)
        if minded or stated or unmerged:
            lines += [f"**{family.name}**", ""]
            lines += [f"- {text}" for text in [*stated, *unmerged, *minded]]
            lines.append("")
    return lines


def _slow_paths() -> list[str]:
    if not SLOW_PATHS.is_file():
        return []
    found = json.loads(SLOW_PATHS.read_text(encoding="utf-8"))
    lines = [
        "## What the slow paths cost",
        "",
        "State layers have fused kernels for GPUs (`mamba_ssm`, `causal_conv1d`, `fla`). Without them",
        "transformers runs plain torch, as it always does on a CPU. Steps of models of about one size,",
        f"measured by `python benchmarks/slow_paths.py` on {found['cpu']}:",
        "",
        _row(["model", "parameters", "tokens per second", "against the transformer"]),
        _row(["---"] * 4),
    ]
    lines += [
        _row([r["name"], f"{r['num_parameters']:,}", f"{r['tokens_per_second']:,.0f}", f"{r['ratio']:.2f} x"])
        for r in found["rows"]
    ]
    return [*lines, ""]


def page() -> str:
    """The whole page."""
    results = read_results()
    parts = [
        _HEAD.format(num=f"{len(CELLS):,}", steps=STEPS),
        "## The matrix\n",
        *_matrix(results),
        "\n## What each family is\n",
        *_facts(),
        f"\nRoles: {'; '.join(f'{role}: {text}' for role, text in ROLES.items())}.",
        "\nPacking: whether packed documents stay apart in the family (packing is not a recipe key yet).\n",
        "## Changes, refusals, and what to mind\n",
        *_notes(results),
        *_slow_paths(),
    ]
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
