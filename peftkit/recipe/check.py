"""Rules across fields: conflicts that the recipe alone shows. All are reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from peftkit.errors import Problem
from peftkit.methods import METHODS, NewTokens
from peftkit.methods.lora import BASE_CHANGING_INITS, LoraOptions
from peftkit.methods.prefix import PrefixOptions
from peftkit.recipe.load import LoadedRecipe
from peftkit.recipe.paths import is_commit
from peftkit.recipe.schema import SCHEDULE_KEYS, Bounds, Recipe
from peftkit.units import divisors

Rule = Callable[[Recipe, LoadedRecipe], Iterator[Problem]]
RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    """Register a rule; problems are reported in the order of the rules in this file."""
    RULES.append(function)
    return function


@rule
def _unpinned_code(recipe: Recipe, loaded: LoadedRecipe) -> Iterator[Problem]:
    """Require a pinned commit for trusted code: a branch may hold other code tomorrow."""
    base = recipe.base
    is_local = base.id.startswith("embedded:") or Path(base.id).is_absolute()  # paths are absolute by now
    if base.trust_remote_code and not is_local and not is_commit(base.revision):
        yield Problem(
            loaded.where(("base", "trust_remote_code")),
            f"true with {f'revision {base.revision!r}' if base.revision else 'no revision'}",
            "a pinned commit, or a local folder",
            "read that commit's code, then set base.revision: COMMIT (40 hex digits)",
        )


@rule
def _prefix_without_checkpointing(recipe: Recipe, loaded: LoadedRecipe) -> Iterator[Problem]:
    if (
        recipe.train.gradient_checkpointing in {True, "selective"}
        and not METHODS[recipe.method.name].allows_checkpointing
    ):
        yield Problem(
            loaded.where(("train", "gradient_checkpointing")),
            f"{recipe.train.gradient_checkpointing} with method {recipe.method.name}",
            "false",
            "recomputation would lose the prefix's cache: leave it at auto",
        )


@rule
def _lora_conflicts(recipe: Recipe, loaded: LoadedRecipe) -> Iterator[Problem]:
    method = recipe.method
    if not isinstance(method, LoraOptions):
        return
    if method.init in BASE_CHANGING_INITS and (method.dora or method.also_train):
        with_what = "dora" if method.dora else "also_train"
        yield Problem(
            loaded.where(("method", "init")),
            f"{method.init} with {with_what}",
            "default",
            f"PEFT converts only A and B of such an adapter: what {with_what} trains would be lost",
        )
    for item in method.also_train:
        unknown = sorted(item.init.keys() - set(item.new_tokens)) if isinstance(item, NewTokens) else []
        if unknown:
            where = loaded.where(("method", "also_train"))
            yield Problem(where, f"init of {unknown[0]!r}", "one of new_tokens", "name it there, or leave it out")
    tokens = [item for item in method.also_train if not isinstance(item, str)]
    if tokens and "embeddings" in method.also_train:
        yield Problem(
            loaded.where(("method", "also_train")),
            "tokens together with embeddings",
            "one of them",
            "training the embeddings trains every token's row",
        )
    if METHODS[method.name].quantized and method.init in BASE_CHANGING_INITS:
        yield Problem(
            loaded.where(("method", "init")),
            f"{method.init} with qlora",
            "default, gaussian or eva",
            f"{method.init} changes the base weights, which are 4-bit here; or use method lora",
        )


@rule
def _init_of_a_start(recipe: Recipe, loaded: LoadedRecipe) -> Iterator[Problem]:
    key = ("method", "init")
    init = getattr(recipe.method, "init", "default")
    if recipe.start_from is not None and key in loaded.sources and init != "default":
        yield Problem(loaded.where(key), f"{init} with start_from", "one of them", "leave init out")


@rule
def _loraplus_optimizer(recipe: Recipe, loaded: LoadedRecipe) -> Iterator[Problem]:
    method = recipe.method
    if (
        isinstance(method, LoraOptions)
        and method.lr_ratio is not None
        and recipe.train.optimizer not in {"auto", "adamw_torch"}
    ):
        yield Problem(
            loaded.where(("train", "optimizer")),
            f"{recipe.train.optimizer} with method.lr_ratio",
            "auto or adamw_torch",
            "LoRA+ builds its own AdamW",
        )


@rule
def _adalora_optimizer(recipe: Recipe, loaded: LoadedRecipe) -> Iterator[Problem]:
    if recipe.method.name == "adalora" and recipe.train.optimizer == "schedule_free_adamw":
        where, got = loaded.where(("train", "optimizer")), "schedule_free_adamw with adalora"
        yield Problem(where, got, "auto", "a mean of the weights has no ranks that are cut off")


@rule
def _loraplus_alone(recipe: Recipe, loaded: LoadedRecipe) -> Iterator[Problem]:
    method = recipe.method
    if isinstance(method, LoraOptions) and method.lr_ratio is not None and (method.dora or method.also_train):
        with_what = "dora" if method.dora else "also_train"
        yield Problem(
            loaded.where(("method", "lr_ratio")),
            f"a ratio with {with_what}",
            "one of them",
            f"PEFT's LoRA+ would give what {with_what} trains the larger rate too",
        )


@rule
def _prefix_projection(recipe: Recipe, loaded: LoadedRecipe) -> Iterator[Problem]:
    method = recipe.method
    if isinstance(method, PrefixOptions) and method.projection_hidden and not method.projection:
        yield Problem(
            loaded.where(("method", "projection_hidden")),
            "a hidden size without projection",
            "projection: true, or no projection_hidden",
        )


@rule
def _micro_batch_divisor(recipe: Recipe, loaded: LoadedRecipe) -> Iterator[Problem]:
    batch, micro = recipe.train.batch_size, recipe.train.micro_batch
    counts_packs = recipe.train.packing is True  # then the plan knows how many there are in a step
    if isinstance(batch, int) and isinstance(micro, int) and batch % micro and not counts_packs:
        yield Problem(
            loaded.where(("train", "micro_batch")),
            f"{micro} with batch_size {batch}",
            "a divisor of batch_size",
            f"try micro_batch: {next(size for size in divisors(batch) if size <= micro)}",
        )


@rule
def _without_effect(recipe: Recipe, loaded: LoadedRecipe) -> Iterator[Problem]:
    """Report settings that would change nothing."""
    train, data = recipe.train, recipe.data
    epochs, max_steps = (loaded.sources.get(("train", key)) for key in ("epochs", "max_steps"))
    if epochs and max_steps and train.max_steps is not None and epochs.rank >= max_steps.rank:
        yield Problem(
            loaded.where(("train", "epochs")),
            f"epochs together with max_steps ({max_steps.where})",
            "one of them",
            "remove one of them, or set train.max_steps: null",
        )
    if not data.eval:
        if train.early_stopping is not None:
            yield Problem(
                loaded.where(("train", "early_stopping")),
                "early stopping without data.eval",
                "held-out data",
                "set data.eval: 5%",
            )
        if isinstance(train.eval_steps, int):
            yield Problem(
                loaded.where(("train", "eval_steps")), "a number without data.eval", "auto", "set data.eval: 5%"
            )
        diagnose = recipe.diagnose
        for key, is_set, setting in (
            ("escalate", diagnose.escalate == "auto", "auto"),
            ("target", diagnose.target is not None, "a target"),
            ("reference", diagnose.reference is not None, "a reference"),
        ):
            if is_set:
                yield Problem(
                    loaded.where(("diagnose", key)),
                    f"{setting} without data.eval",
                    "held-out data to measure on",
                    "set data.eval: 5%",
                )
        if recipe.evaluate.metric not in {None, "auto"}:
            yield Problem(
                loaded.where(("evaluate", "metric")), "a metric without data.eval", "held-out data", "set data.eval: 5%"
            )
    if data.group is not None and not isinstance(data.eval, float):
        fix = "set data.eval: 5%, or remove data.group"
        yield Problem(loaded.where(("data", "group")), "a group without a share to hold out", "a share", fix)
    if data.format == "text" and ("data", "mask") in loaded.sources and data.mask != "all":
        yield Problem(
            loaded.where(("data", "mask")),
            f"{data.mask} with format text",
            "all",
            "raw text has no completion: every token is in the loss",
        )


@rule
def _diagnose_without_effect(recipe: Recipe, loaded: LoadedRecipe) -> Iterator[Problem]:
    """Report keys that have no effect beside `escalate: off` or `recommend`."""
    key_of_bound = ("diagnose", "bounds", "max_escalations")
    is_set = recipe.diagnose.bounds.max_escalations != Bounds().max_escalations
    if recipe.diagnose.escalate == "recommend" and is_set:
        yield Problem(loaded.where(key_of_bound), "a limit on growths with escalate: recommend", "escalate: auto")
    if recipe.diagnose.escalate != "off":
        return
    for key in ("target", "reference", "bounds"):
        if ("diagnose", key) in loaded.sources:
            fix = f"set escalate: recommend, or remove {key}"
            yield Problem(loaded.where(("diagnose", key)), f"{key} with escalate: off", "no such key", fix)


@rule
def _schedule_settings(recipe: Recipe, loaded: LoadedRecipe) -> Iterator[Problem]:
    """Report settings of a schedule that its kind does not have."""
    schedule = recipe.train.schedule
    for key, takers in SCHEDULE_KEYS.items():
        if ("train", "schedule", key) in loaded.sources and schedule.kind not in takers:
            fix = f"set kind: {' or '.join(sorted(takers))}, or remove {key}"
            yield Problem(loaded.where(("train", "schedule", key)), f"{key} with {schedule.kind}", "no such key", fix)
    if schedule.warmup_steps is not None and ("train", "schedule", "warmup") in loaded.sources:
        where = loaded.where(("train", "schedule", "warmup"))
        yield Problem(where, "warmup and warmup_steps", "one of them", "remove warmup")


@rule
def _target_in_range(recipe: Recipe, loaded: LoadedRecipe) -> Iterator[Problem]:
    """Report a target that no run can reach or miss."""
    target = recipe.diagnose.target
    if target is None or 0 < target.value <= (1 if target.metric != "eval_loss" else float("inf")):
        return
    expected = "a loss above 0, in nats" if target.metric == "eval_loss" else "a share above 0, of at most 1"
    yield Problem(loaded.where(("diagnose", "target", "value")), f"{target.value:g}", expected)


def check_recipe(loaded: LoadedRecipe) -> list[Problem]:
    """Return every problem that the rules find; empty if the recipe is consistent."""
    return [problem for rule in RULES for problem in rule(loaded.recipe, loaded)]
