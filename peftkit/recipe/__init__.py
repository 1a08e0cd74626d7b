"""The recipe: its schema, its loader, and the rules across its fields."""

from peftkit.recipe.check import check_recipe
from peftkit.recipe.load import LoadedRecipe, ValueSource, load, override_texts
from peftkit.recipe.schema import Recipe

__all__ = ["LoadedRecipe", "Recipe", "ValueSource", "check_recipe", "load", "override_texts"]
