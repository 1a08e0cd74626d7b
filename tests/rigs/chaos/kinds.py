"""The kinds of cases there are, by name. A new kind is a module with an `open_...`, and a line here."""

from __future__ import annotations

from tests.rigs.chaos.adapters import open_adapters
from tests.rigs.chaos.recipes_judged import open_recipes
from tests.rigs.chaos.rows import open_data
from tests.rigs.chaos.watch import Kind

KINDS = {
    kind.name: kind
    for kind in (
        Kind("recipes", open_recipes, 20_000),
        Kind("data", open_data, 5_000),
        Kind("adapters", open_adapters, 2_000),
    )
}
