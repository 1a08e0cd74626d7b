"""A PEFT LoRA adapter as the GGUF file that llama.cpp adds to a base while it runs (`--lora`)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.methods.lora import CHANGES_BASE
from peftkit.model.contained import check_adapter_weights, check_folder
from peftkit.model.patterns import effective_scale
from peftkit.model.saved import CONFIG, WEIGHTS, read_adapter_config
from peftkit.ship.gguf.layout import interleave, is_transposed, tensor_names
from peftkit.ship.gguf.names import safe_name
from peftkit.ship.gguf.source import Source, read_source
from peftkit.ship.gguf.writing import Entry, GgufWritten, published, require_gguf, write_file

_PREFIX = "base_model.model."
_LORA = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_PLAIN = frozenset(  # of LoraConfig: what changes no number of a finished adapter, or is folded in here
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r "
    "target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out use_rslora init_lora_weights "
    "layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_core eva_config corda_config "
    "loftq_config lora_ga_config qalora_group_size runtime_config ensure_weight_tying".split()
)
_STARTS = (*CHANGES_BASE, "pissa_niter", "corda", "loftq", "lora_ga")  # inits that change the base weights


def write_adapter(
    adapter: Path, base: Path, out: Path, *, tell: Callable[[str], None] = lambda text: None
) -> GgufWritten:
    """Write a LoRA adapter as GGUF, in fp32. `base` is its base's folder: configuration only.

    llama.cpp knows one alpha for all modules and divides it by each one's rank: where rsLoRA and patterns give
    other scales, the rest is multiplied into B. Raises UserError with everything that llama.cpp's adapters
    cannot carry.
    """
    require_gguf(str(adapter))
    check_folder(adapter)
    check_adapter_weights(adapter)
    config = read_adapter_config(adapter)
    if problems := [*_refusals(adapter, config)]:
        raise UserError(problems)
    source = read_source(base)
    shapes = _shapes(adapter / WEIGHTS)
    modules = _modules(adapter, config, source, shapes)
    alphas = {module: effective_scale(config, module)[1] * rank for module, rank in modules.items()}
    # an alpha of 0 means "no scale" to llama.cpp
    alpha = next((value for value, _ in Counter(alphas.values()).most_common() if value), 1.0)
    entries = [
        entry
        for module in modules
        for entry in _pair(adapter, source, module, shapes, share=alphas[module] / alpha)
    ]
    fields = {
        "general.type": "adapter",
        "general.name": safe_name(adapter.resolve().name, phi3=False),
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    with published(out) as part:
        num_bytes = write_file(part, source.family.architecture, fields, entries, tell)
    return GgufWritten(out, num_bytes, len(entries), "f32")


def _refusals(adapter: Path, config: Mapping[str, Any]) -> Iterator[Problem]:
    """What the configuration says that an adapter of llama.cpp cannot hold."""
    where, expected = str(adapter / CONFIG), "plain LoRA of linear layers, all that llama.cpp's adapters hold"
    fix = f"peftkit merge {adapter} --out DIR, then export DIR"
    kind = config.get("peft_type")
    if kind != "LORA":
        yield Problem(where, f"peft_type {kind}", expected, _instead(str(kind), fix))
        return
    for key, value in config.items():
        if key not in _PLAIN and value not in (None, False, "none", [], {}):
            yield Problem(where, f"{key} {str(value)[:80]}", expected, fix)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_STARTS):
        fix = "convert it to plain LoRA first (PEFT: path_initial_model_for_weight_conversion)"
        yield Problem(where, f"init_lora_weights {start}, which changes the base", expected, fix)


def _instead(kind: str, merge: str) -> str:
    """Prompts are no change of weights."""
    if kind in {"PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"}:
        return "prompts cannot be merged either: serve it with PEFT, or train a LoRA"
    return merge


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as weights:
        return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118


def _modules(
    adapter: Path, config: Mapping[str, Any], source: Source, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """Module -> rank, in the file's order. Raises UserError unless each tensor is half of a fitting pair."""
    where = str(adapter / WEIGHTS)
    fix = f"peftkit merge {adapter} --out DIR, then export DIR"
    problems, modules = [], dict[str, int]()
    for name in shapes:
        found = _LORA.fullmatch(name)
        weight = f"{found[1]}.weight" if found else ""
        if found and weight in source.aliases:
            got = f"{name}: LoRA of an output matrix that is the embedding too"
            problems.append(Problem(where, got, "a matrix of its own", fix))
        elif found is None or len(source.shapes.get(weight, ())) != 2 or weight == _embedding(source):
            problems.append(Problem(where, name, "lora_A and lora_B of the base's linear layers", fix))
        elif found[1] not in modules:
            modules[found[1]] = effective_scale(config, found[1])[0]
    for module, rank in modules.items():
        outer, inner = source.shapes[f"{module}.weight"]
        if is_transposed(source, f"{module}.weight"):
            outer, inner = inner, outer
        for half, shape in (("A", (rank, inner)), ("B", (outer, rank))):
            got = shapes.get(f"{_PREFIX}{module}.lora_{half}.weight")
            if got != shape:
                problems.append(Problem(where, f"{module} lora_{half} {got}", f"{shape}, as the base has it"))
    if problems:
        raise UserError(problems)
    return modules


def _embedding(source: Source) -> str:
    return next(name for name, gguf in tensor_names(source).items() if gguf == "token_embd.weight")


def _pair(
    adapter: Path, source: Source, module: str, shapes: Mapping[str, tuple[int, ...]], *, share: float
) -> Iterator[Entry]:
    """A and B of a module; B takes what llama.cpp's alpha / rank leaves of the scale."""
    name = tensor_names(source)[f"{module}.weight"]

    def load(half: str) -> Any:
        from safetensors import safe_open

        with safe_open(adapter / WEIGHTS, framework="pt") as weights:
            tensor = weights.get_tensor(f"{_PREFIX}{module}.lora_{half}.weight").float()
        return tensor if half == "A" else interleave(source, f"{module}.weight", tensor * share)

    for half in "AB":
        shape = shapes[f"{_PREFIX}{module}.lora_{half}.weight"]
        yield Entry(f"{name}.lora_{half.lower()}", shape, "f32", lambda half=half: load(half))
