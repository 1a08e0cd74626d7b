"""A PEFT LoRA adapter as the GGUF file that llama.cpp adds to a base while it runs (`--lora`)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.methods.lora import CHANGES_BASE
from peftkit.model.adapter.edits import effective_scale
from peftkit.model.adapter.load import CONFIG, WEIGHTS, read_adapter_config
from peftkit.model.base.file_checks import check_adapter_weights, check_folder
from peftkit.ship.export.gguf.layout import interleave, out_in, tensor_names
from peftkit.ship.export.gguf.names import safe_name
from peftkit.ship.export.gguf.source import Source, read_source, stored_tensors
from peftkit.ship.export.gguf.writing import Entry, GgufWritten, published, require_gguf, write_file

_PREFIX = "base_model.model."
_COPY = ".base_layer.weight"
_LORA = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# settings of LoraConfig that change no number of a finished adapter, or that are folded in here
_PLAIN = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"),
    *("lora_dropout", "eva_config", "corda_config", "loftq_config", "lora_ga_config", "runtime_config"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying"),
}
_STARTS = (*CHANGES_BASE, "pissa_niter", "corda", "loftq", "lora_ga")  # inits that change the base weights


def write_adapter(
    adapter: Path, base: Path, out: Path, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> GgufWritten:
    """Write a LoRA adapter as GGUF, in fp32. `base` is its base's folder: configuration only.

    llama.cpp knows one alpha for all modules and divides it by each one's rank: where rsLoRA and patterns
    give other scales, the rest is multiplied into B. Raises UserError with everything that llama.cpp's
    adapters cannot carry.
    """
    require_gguf(str(adapter))
    check_folder(adapter)
    check_adapter_weights(adapter)
    config = read_adapter_config(adapter)
    if problems := [*_refusals(adapter, config)]:
        raise UserError(problems)
    source = read_source(base)
    shapes = _shapes(adapter / WEIGHTS)
    try:
        modules = _modules(adapter, config, source, shapes)
        alphas = {module: effective_scale(config, module)[1] * rank for module, rank in modules.items()}
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        got = f"ranks and alphas that are no numbers ({error})"
        raise UserError(Problem(str(adapter / CONFIG), got, "PEFT's configuration")) from None
    # an alpha of 0 means "no scale" to llama.cpp
    alpha = next((value for value, _ in Counter(alphas.values()).most_common() if value), 1.0)
    names = tensor_names(source)
    entries = [
        entry
        for module, rank in modules.items()
        for entry in _pair(
            adapter, source, module, names[f"{module}.weight"], rank=rank, share=alphas[module] / alpha
        )
    ]
    fields = {
        "general.type": "adapter",
        "general.name": safe_name(adapter.resolve().name, phi3=False),
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    with published(out) as part:
        num_bytes = write_file(part, source.family.architecture, fields, entries, progress)
    return GgufWritten(out, num_bytes, len(entries), "f32")


def _refusals(adapter: Path, config: Mapping[str, Any]) -> Iterator[Problem]:
    """What the configuration says that an adapter of llama.cpp cannot hold."""
    where, expected = str(adapter / CONFIG), "plain LoRA of linear layers, all that llama.cpp's adapters hold"
    fix = _merge(adapter)
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


def _merge(adapter: Path) -> str:
    return f"peftkit merge {adapter} --out DIR, then export DIR"


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
    where, fix = str(adapter / WEIGHTS), _merge(adapter)
    names = tensor_names(source)
    problems, modules, copies = [], dict[str, int](), []
    for name in shapes:
        found = _LORA.fullmatch(name)
        weight = f"{found[1]}.weight" if found else ""
        if found and weight in source.aliases:
            got = f"{name}: LoRA of an output matrix that is the embedding too"
            problems.append(Problem(where, got, "a matrix of its own", fix))
        elif found and len(source.shapes.get(weight, ())) == 2 and names[weight] != "token_embd.weight":
            modules[found[1]] = effective_scale(config, found[1])[0]
        elif name.endswith(_COPY):
            copies.append(name)
        else:
            problems.append(Problem(where, name, "lora_A and lora_B of the base's linear layers", fix))
    for module, rank in modules.items():
        outer, inner = out_in(source, f"{module}.weight")
        for half, shape in (("A", (rank, inner)), ("B", (outer, rank))):
            given = shapes.get(f"{_PREFIX}{module}.lora_{half}.weight")
            if given != shape:
                got = f"{module} lora_{half} {given}"
                problems.append(Problem(where, got, f"{shape}, as the base has it"))
    problems += _changed_copies(adapter, source, copies)
    if problems:
        raise UserError(problems)
    return modules


def _changed_copies(adapter: Path, source: Source, names: list[str]) -> Iterator[Problem]:
    """PEFT saves the base's matrix beside LoRA of an output matrix: it has to be the base's own."""
    import torch
    from safetensors import safe_open

    stored = {tensor.name: tensor for tensor in stored_tensors(source)} if names else {}
    with safe_open(adapter / WEIGHTS, framework="pt") as weights:
        for name in names:
            base = stored.get(name.removeprefix(_PREFIX).replace(_COPY, ".weight"))
            copy = weights.get_tensor(name)
            if base is None or not torch.equal(copy, base.load().to(copy.dtype)):
                expected = "the base's own matrix (was its vocabulary resized?)"
                yield Problem(str(adapter / WEIGHTS), name, expected, _merge(adapter))


def _pair(
    adapter: Path, source: Source, module: str, name: str, *, rank: int, share: float
) -> Iterator[Entry]:
    """A and B of a module; B takes what llama.cpp's alpha / rank leaves of the scale."""

    def load(half: str) -> Any:
        from safetensors import safe_open

        with safe_open(adapter / WEIGHTS, framework="pt") as weights:
            tensor = weights.get_tensor(f"{_PREFIX}{module}.lora_{half}.weight").float()
        return tensor if half == "A" else interleave(source, f"{module}.weight", tensor * share)

    outer, inner = out_in(source, f"{module}.weight")
    yield Entry(f"{name}.lora_a", (rank, inner), "f32", lambda: load("A"))
    yield Entry(f"{name}.lora_b", (outer, rank), "f32", lambda: load("B"))
