"""The card of what leaves: from the run that it came from, or from the adapter's own files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftkit.results.find import is_away, run_of
from peftkit.rundir import RunDir
from peftkit.ship.card.card import CardFacts, DataFacts, Layout


def write_card(
    folder: Path, path: Path, *, name: str, layout: Layout, merge_report: Mapping[str, Any] | None = None
) -> None:
    """README.md in `folder`, of what was made of the run or adapter at `path`; others keep their own."""
    from peftkit.ship.card.card import card_of
    from peftkit.ship.card.facts import facts_of_adapter, facts_of_run

    place = run_of(path)
    if (place / "plan.json").is_file():
        facts = facts_of_run(RunDir.open(place), name=name, layout=layout, merge_report=merge_report)
    elif is_away(path):
        facts = facts_of_adapter(path, name=name, layout=layout, merge_report=merge_report)
    else:
        return
    adapters = (merge_report or {}).get("adapters", ())
    if len(adapters) > 1 or any(weight != 1 for _, weight in adapters):
        facts = _combined(facts, adapters, str((merge_report or {}).get("how")))
    (folder / "README.md").write_text(card_of(facts), encoding="utf-8")


def _combined(facts: CardFacts, adapters: Sequence[tuple[str, float]], how: str) -> CardFacts:
    """Of several adapters, or a part of one: what holds for one of them alone is not said of all."""
    parts = {f"adapter {number + 1}": f"{name} x {w:g}" for number, (name, w) in enumerate(adapters)}
    return replace(
        facts,
        method=None,
        settings={"combined by": how, **parts},
        data=DataFacts(),
        num_trainable=None,
        planned_bytes=None,
        measured_bytes=None,
        scores=(),
        verdict=None,
        relation="merge",
    )
