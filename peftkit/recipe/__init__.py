"""What the user wrote, validated: the schema, the loader, and the rules across fields."""

from peftkit.recipe.check import check
from peftkit.recipe.load import LoadedRecipe, Source, load
from peftkit.recipe.schema import Recipe

__all__ = ["LoadedRecipe", "Recipe", "Source", "check", "load"]
