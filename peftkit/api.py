"""Public Python functions: each takes a path, a dict or a `Recipe`; the command line only calls these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.plan import Plan
from peftkit.ranks import launched
from peftkit.recipe import LoadedRecipe, Recipe, load, override_texts
from peftkit.report import Summary, read_summary
from peftkit.rundir import RunDir
from peftkit.rundir.events import Observer, ignore_event

if TYPE_CHECKING:
    from peftkit.data.gate.report import DataReport
    from peftkit.diagnose.verdict import Verdict
    from peftkit.model.base.convert import Converted
    from peftkit.plan.inspection import Inspection
    from peftkit.prepare.plan_report import Account
    from peftkit.results.evaluate import Evaluation
    from peftkit.results.generate import Conversation
    from peftkit.run.reproduce import Reproduction
    from peftkit.run.verify import Verification
    from peftkit.ship.export import Exported, ExportOptions
    from peftkit.ship.merge.concat import Combined
    from peftkit.ship.merge.merge import MergeOptions
    from peftkit.ship.merge.report import MergeReport

__all__ = [
    "Account",
    "Combined",
    "Conversation",
    "Converted",
    "DataReport",
    "Evaluation",
    "ExportOptions",
    "Exported",
    "Inspection",
    "MergeOptions",
    "MergeReport",
    "Observer",
    "Overrides",
    "RecipeLike",
    "Verdict",
    "check_data",
    "combine_adapters",
    "convert_weights",
    "diagnose_run",
    "evaluate_run",
    "export_adapter",
    "finetune",
    "generate",
    "inspect_model",
    "load_recipe",
    "make_plan",
    "merge_adapter",
    "open_chat",
    "plan_recipe",
    "reproduce_run",
    "resume_run",
    "summarize_run",
    "verify_run",
]
_LAZY_MODULES = {  # each with what it needs: a mistake in a recipe costs none of them
    "Account": "peftkit.prepare.plan_report",
    "Conversation": "peftkit.results.generate",
    "Combined": "peftkit.ship.merge.concat",
    "Converted": "peftkit.model.base.convert",
    "DataReport": "peftkit.data.gate.report",
    "Evaluation": "peftkit.results.evaluate",
    "Reproduction": "peftkit.run.reproduce",
    "Verification": "peftkit.run.verify",
    "ExportOptions": "peftkit.ship.export",
    "Exported": "peftkit.ship.export",
    "Inspection": "peftkit.plan.inspection",
    "MergeOptions": "peftkit.ship.merge.merge",
    "MergeReport": "peftkit.ship.merge.report",
    "Verdict": "peftkit.diagnose.verdict",
}
Overrides = str | Sequence[str] | Mapping[str, Any]  # "train.epochs=2", several of these, or a mapping of keys
RecipeLike = str | Path | Mapping[str, Any] | Recipe | LoadedRecipe


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        return getattr(import_module(_LAZY_MODULES[name]), name)
    raise AttributeError(f"module 'peftkit.api' has no attribute {name!r}")


@contextmanager
def _shown(observer: Observer | None, *, of_bytes: bool = False) -> Iterator[Observer]:
    """Yield the observer, or where there is none one that shows progress; libraries are quiet meanwhile."""
    from peftkit.report.progress import open_bytes_display, open_display, quiet_libraries

    with quiet_libraries():
        if observer is not None or not launched().is_lead:
            yield observer or ignore_event
        else:
            with open_bytes_display() if of_bytes else open_display() as show:
                yield show


def load_recipe(source: RecipeLike, overrides: Overrides = ()) -> LoadedRecipe:
    """Read and validate a recipe: a file, a shipped recipe's name, a dict, or a `Recipe`.

    `overrides` are dotted key=value texts, typed as in YAML: one, several, or a mapping of keys to values.
    Raises UserError with every problem found.
    """
    overrides = override_texts(overrides)
    if not isinstance(source, LoadedRecipe):
        return load(source, overrides)
    return load(source.recipe, overrides) if overrides else source


def make_plan(source: RecipeLike, overrides: Overrides = ()) -> Plan:
    """Return every decision with its reason, without torch, weights or network where possible."""
    from peftkit.run import dry_run

    return dry_run(load_recipe(source, overrides))


def plan_recipe(
    source: RecipeLike, overrides: Overrides = (), *, gpu: str = "this", trace: bool = False, measure: bool = False
) -> Account:
    """Return what a recipe trains and needs on a device: parameters, peak memory, fit, changes, time.

    `gpu` is a name such as rtx4090, a size such as 24GiB, or `this`. The plan is in closed form, within a
    second and without torch; `trace` runs the real code on shapes alone; `measure` also makes three steps on
    this device, with random weights. Raises UserError for problems that the user can fix.
    """
    from peftkit.prepare.plan_report import plan_report

    loaded = load_recipe(source, overrides)
    if not (trace or measure):
        return plan_report(loaded, gpu=gpu)
    with _shown(ignore_event):
        return plan_report(loaded, gpu=gpu, trace=trace, measure=measure)


def check_data(source: RecipeLike, overrides: Overrides = (), *, full: bool = False) -> DataReport:
    """Check a recipe's data: samples token by token, lengths, totals, and the result of every check.

    No weights are loaded. Near duplicates are searched for in a sample of 10,000 rows, with `full` in all.
    Raises UserError for data that cannot be read at all; problems of single rows are in the report.
    """
    with _shown(ignore_event):
        from peftkit.prepare.data_check import check_data as check

        return check(load_recipe(source, overrides), full=full)


def finetune(
    source: RecipeLike, overrides: Overrides = (), *, out: str | Path | None = None, observer: Observer | None = None
) -> Summary:
    """Train what a recipe describes into a fresh run directory. Returns the run's summary.

    `observer` is called with every event as it is written; without one, progress is shown, as by the command.
    Raises UserError for problems that the user can fix.
    """
    from peftkit import run

    loaded = load_recipe(source, overrides)
    folder = Path(out) if out else None
    if num_ranks := run.num_to_launch(loaded):
        from peftkit.launch.local import launch_recipe

        run.dry_run(loaded)  # a mistake costs a second, and no process
        folder = folder or run.default_out(loaded)
        texts = override_texts(overrides)  # but for these a recipe goes by a file: a command line is seen by all
        is_plain = isinstance(source, str | Path) and all(text.startswith("devices.") for text in texts)
        given = [str(source), *texts] if is_plain else []
        return launch_recipe(loaded, given, num=num_ranks, out=folder, observer=observer)
    with _shown(observer) as observe:
        return run.finetune(loaded, out=folder, observer=observe)


def resume_run(
    path: str | Path,
    *,
    recipe: str | Path | None = None,
    overrides: Overrides = (),
    allow_changed: Sequence[str] = (),
    take_over: bool = False,
    gpus: int | None = None,
    observer: Observer | None = None,
) -> Summary:
    """Resume an interrupted run from its newest checkpoint that verifies, on `gpus` processes, or as many as before.

    `allow_changed` names what may differ from when the run began: data, recipe, base, tokenizer, versions.
    `take_over` takes the lock of a run that another machine, now gone, did not release. `recipe` is the file
    the run was started from, with its `overrides`; it is needed where that file held secrets.
    """
    from peftkit import run

    texts = override_texts(overrides)
    if num_ranks := run.num_to_launch_again(RunDir.open(Path(path)), gpus):
        from peftkit.launch.local import launch_resume

        given = [*(("--recipe", str(recipe)) if recipe else ()), *(("--take-over",) if take_over else ())]
        given += [text for name in allow_changed for text in ("--allow-changed", name)]
        return launch_resume(Path(path), [*given, *texts], num=num_ranks, observer=observer)
    with _shown(observer) as observe:
        return run.resume(
            Path(path),
            recipe=Path(recipe) if recipe else None,
            overrides=texts,
            allow_changed=allow_changed,
            take_over=take_over,
            observer=observe,
        )


def reproduce_run(
    path: str | Path,
    *,
    out: str | Path | None = None,
    recipe: str | Path | None = None,
    overrides: Overrides = (),
    observer: Observer | None = None,
) -> Reproduction:
    """Train a finished run once more, into `out` (default RUN-again), and compare every number.

    `recipe` is the file the run was started from, with its `overrides`; it is needed where that file held
    secrets.
    """
    recipe_path = Path(recipe) if recipe else None
    folder = Path(out) if out else None
    texts = override_texts(overrides)
    with _shown(observer) as observe:
        from peftkit.launch.local import launch_recipe
        from peftkit.run.reproduce import reproduce

        return reproduce(
            Path(path), out=folder, recipe=recipe_path, overrides=texts, observer=observe, train_on_ranks=launch_recipe
        )


def diagnose_run(
    path: str | Path,
    *,
    recipe: str | Path | None = None,
    overrides: Overrides = (),
    out: str | Path | None = None,
    anew: bool = False,
    observer: Observer | None = None,
) -> Verdict:
    """Return a verdict on quality, cause and action: the run's own, or one measured now.

    `path` is a run, or an adapter folder made elsewhere with the `recipe` that describes it; then `out` is a
    new folder for the evidence. `anew` measures again. Raises UserError where there is nothing to judge by.
    """
    recipe_path, folder = Path(recipe) if recipe else None, Path(out) if out else None
    texts = override_texts(overrides)
    with _shown(observer) as observe:
        from peftkit.run.diagnose import diagnose

        return diagnose(Path(path), recipe=recipe_path, overrides=texts, out=folder, anew=anew, observer=observe)


def verify_run(path: str | Path) -> Verification:
    """Verify every file of a run against its manifest or seal. Raises UserError where `path` holds no run."""
    from peftkit.run.verify import verify

    return verify(Path(path))


def summarize_run(path: str | Path) -> Summary:
    """Return the outcome of a run, finished or not, in numbers. Imports no torch."""
    return read_summary(RunDir.open(Path(path)))


def generate(
    path: str | Path,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Generate an answer of a finished run's model to each prompt, asked as a user turn of a chat.

    One prompt may be given as a text: the list then has one answer. At temperature 0 answers are greedy.
    """
    with _shown(ignore_event):
        from peftkit.evaluate.generation import Sampling
        from peftkit.results.generate import answer

        sampling = Sampling(max_new_tokens, temperature, top_p, seed)
        return answer(Path(path), [prompts] if isinstance(prompts, str) else prompts, sampling)


def open_chat(
    path: str | Path, *, max_new_tokens: int = 128, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
) -> Conversation:
    """Load a finished run's model for a conversation: `open_chat(run).ask("hello")`, and so on."""
    with _shown(ignore_event):
        from peftkit.evaluate.generation import Sampling
        from peftkit.results.generate import Conversation

        return Conversation(Path(path), Sampling(max_new_tokens, temperature, top_p, seed))


def inspect_model(
    model: str | Path, *, data: str | Path | None = None, trust_remote_code: bool = False, revision: str | None = None
) -> Inspection:
    """Return a model's size and memory, and the methods that can train it.

    No weights are loaded, and no torch where the family is known. `model` is a hub id, a folder, a
    config.json, a .gguf file or embedded:NAME. `data` is a file whose tokens are compared with the
    compute-optimal number. Trusted code of a hub model needs a commit as `revision`.
    """
    from peftkit.prepare.inspect import inspect

    return inspect(
        str(model), data=Path(data) if data else None, trust_remote_code=trust_remote_code, revision=revision
    )


def evaluate_run(path: str | Path, *, data: str | Path | None = None, contexts: Sequence[int] = ()) -> Evaluation:
    """Evaluate a run or adapter on held-out rows or a file: loss and metrics; by position with `contexts`."""
    with _shown(ignore_event):
        from peftkit.results.evaluate import evaluate

        return evaluate(Path(path), data=str(data) if data else None, contexts=contexts)


def convert_weights(
    path: str | Path, *, out: str | Path, rename: Sequence[str] = (), expert_major: bool = False
) -> Converted:
    """Convert pickled weights to safetensors in a new folder; or an adapter of another trainer to PEFT's form.

    `path` is a folder with pytorch_model*.bin or adapter_model.bin, or one .pt file. They are read in a
    separate process that accepts tensors and nothing else; code in them is never run. Raises UserError where
    they hold anything else, or `out` exists. `rename` are texts OLD=NEW: the first OLD in a name becomes NEW.
    An adapter of mlx-lm is known by its files. `expert_major` says that lora_B of fused experts is packed expert
    by expert, and is written rank by rank.
    """
    from peftkit.model.base.convert import convert_weights as convert

    if rename or expert_major:
        from peftkit.model.adapter.rename import rewrite_adapter

        return rewrite_adapter(Path(path), rename, expert_major=expert_major, out=out)
    from peftkit.model.adapter.mlx import convert_mlx_adapter, is_mlx_adapter

    return (
        convert_mlx_adapter(Path(path), out=out) if is_mlx_adapter(Path(path)) else convert(Path(path), out=Path(out))
    )


def merge_adapter(
    path: str | Path | Sequence[str | Path],
    *,
    out: str | Path,
    options: MergeOptions | None = None,
    observer: Observer | None = None,
) -> MergeReport:
    """Merge a run or adapter into its base in the new folder `out`, and compare the result with the adapter.

    Several paths are added up, with weights, as `options` say. Raises UserError for problems that the user
    can fix, and PeftkitError where the result differs from the adapted model, unless `options` say `force`.
    """
    paths = [path] if isinstance(path, str | Path) else path
    with _shown(observer, of_bytes=True) as observe:
        from peftkit.ship.merge.merge import MergeOptions, merge

        return merge([Path(one) for one in paths], Path(out), options or MergeOptions(), observer=observe)


def export_adapter(path: str | Path, *, options: ExportOptions, observer: Observer | None = None) -> Exported:
    """Export a run, an adapter or a whole model to another format, as `options` say.

    A merge on the way is compared with the adapted model, as by `merge_adapter`. Raises UserError for
    problems that the user can fix: what a format cannot hold is refused by name, with the fix.
    """
    with _shown(observer, of_bytes=True) as observe:
        from peftkit.ship.export import export

        return export(Path(path), options, observe)


def combine_adapters(
    paths: Sequence[str | Path], *, out: str | Path, weights: Sequence[float] | None = None, rank: int | None = None
) -> Combined:
    """Write the weighted sum of LoRA adapters as one adapter into the new folder `out`.

    Exact, with the ranks added up, or the nearest of a smaller `rank`, with the energy left out. Raises
    UserError for adapters of several bases, and for adapters that are not LoRA of weights alone.
    """
    with _shown(ignore_event):
        from peftkit.ship.merge.concat import concat_adapters
        from peftkit.ship.merge.merge import MergeOptions

        options = MergeOptions(weights=tuple(weights) if weights is not None else None)
        return concat_adapters([Path(path) for path in paths], Path(out), options, rank=rank)
