"""The JSON Schema of a recipe as people write it, with the short forms and `extends`."""

from __future__ import annotations

from typing import Any

from peftkit.methods import METHODS
from peftkit.recipe.schema import Recipe


def recipe_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe, for completion and checks in editors."""
    schema = Recipe.model_json_schema()
    properties = schema["properties"]
    properties["base"] = {
        "anyOf": [{"type": "string"}, properties["base"]],
        "description": "hub id, folder, .gguf file or embedded:NAME; or a mapping",
    }
    properties["method"] = {
        "anyOf": [{"enum": sorted(METHODS)}, properties["method"]],
        "description": "; ".join(f"{method.name}: {method.summary}" for method in METHODS.values()),
    }
    properties["extends"] = {"type": "string", "description": "another recipe to inherit from"}
    for definition in schema["$defs"].values():
        for spec in definition.get("properties", {}).values():
            if (
                spec.get("type") == "number"
                and spec.get("exclusiveMaximum") == 1
                and "warmup" in str(spec.get("title", "")).lower()
            ):
                number = {key: spec.pop(key) for key in ("type", "minimum", "exclusiveMaximum") if key in spec}
                spec["anyOf"] = [number, {"type": "string", "pattern": r"^\d+(\.\d+)?\s*%$"}]
    schema["required"] = []  # what a recipe lacks may come from the one that it extends
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "peftkit recipe",
        **{key: value for key, value in schema.items() if key != "title"},
    }
