"""The tokens that a recipe trains, looked up in the base's vocabulary."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.model.base.file_checks import read_json_file
from peftkit.plan import Plan
from peftkit.recipe import LoadedRecipe
from peftkit.recipe.paths import path_exists


def require_tokens(loaded: LoadedRecipe, plan: Plan, vocabulary: Collection[str]) -> None:
    """Raise UserError for tokens to train that the vocabulary lacks, and for new ones that it has."""
    where, problems = loaded.where(("method", "also_train")), []
    for token in plan.method.token_rows:
        is_new = token in plan.base.new_tokens
        if is_new and token in vocabulary:
            fix = f"train its row: also_train: [{{tokens: [{json.dumps(token)}]}}]"
            problems.append(Problem(where, f"{token!r}, which the vocabulary has", "a new token", fix))
        elif not is_new and token not in vocabulary:
            fix = f"add it: also_train: [{{new_tokens: [{json.dumps(token)}]}}]"
            problems.append(Problem(where, f"{token!r}", "a token of the vocabulary", fix))
    if problems:
        raise UserError(problems)


def require_tokens_of_folder(loaded: LoadedRecipe, plan: Plan) -> None:
    """Raise as `require_tokens` for a base in a local folder with tokenizer.json; others are looked up by the run."""
    file = Path(plan.base.id) / "tokenizer.json"
    if not plan.method.token_rows or not path_exists(file):
        return
    from tokenizers import Tokenizer

    try:
        vocabulary = Tokenizer.from_file(str(file)).get_vocab()
    except Exception:  # noqa: BLE001
        return  # its Rust part raises this class itself; the run says what is wrong with the file
    names = [name for name in _BESIDE if (file.parent / name).is_file()]
    added = [_texts_of(read_json_file(file.parent, name)) for name in names]
    new = set(plan.base.new_tokens)  # for these a text that is perhaps no token counts as none
    require_tokens(loaded, plan, set(vocabulary).union(set().union(*added) - new))


_BESIDE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)  # from which transformers adds tokens


def _texts_of(value: Any) -> set[str]:
    """Return all texts and keys in JSON: whichever of them are tokens, transformers adds."""
    if isinstance(value, dict):
        return set(value).union(*map(_texts_of, value.values()))
    if isinstance(value, list):
        return set().union(*map(_texts_of, value))
    return {value} if isinstance(value, str) else set()
