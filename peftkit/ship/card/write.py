"""Model cards of merges and exports, from the run or from the adapter's own files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftkit.results.find import is_standalone_adapter, run_folder
from peftkit.rundir import RunDir
from peftkit.ship.card.card import Layout, TrainingDataFacts, render_card
from peftkit.ship.card.facts import read_adapter_facts, read_run_facts


def write_card(
    folder: Path, path: Path, *, name: str, layout: Layout, merge_report: Mapping[str, Any] | None = None
) -> None:
    """Write README.md into `folder` for what was made from the run or adapter at `path`.

    A folder made from anything else keeps its own card.
    """
    folder_of_run = run_folder(path)
    if (folder_of_run / "plan.json").is_file():
        facts = read_run_facts(RunDir.open(folder_of_run), name=name, layout=layout, merge_report=merge_report)
    elif is_standalone_adapter(path):
        facts = read_adapter_facts(path, name=name, layout=layout, merge_report=merge_report)
    else:
        return
    adapters = (merge_report or {}).get("adapters", ())
    if len(adapters) > 1 or any(weight != 1 for _, weight in adapters):
        # drop the facts that hold for one adapter only, and list the combined adapters with their
        # weights
        how = str((merge_report or {}).get("how"))
        parts = {f"adapter {number + 1}": f"{name} x {weight:g}" for number, (name, weight) in enumerate(adapters)}
        facts = replace(
            facts,
            method=None,
            settings={"combined by": how, **parts},
            data=TrainingDataFacts(),
            num_trainable=None,
            planned_bytes=None,
            measured_bytes=None,
            scores=(),
            verdict=None,
            relation="merge",
        )
    (folder / "README.md").write_text(render_card(facts), encoding="utf-8")
