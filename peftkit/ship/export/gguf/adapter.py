"""Export of a PEFT LoRA adapter as the GGUF file that llama.cpp adds to a base at run time (`--lora`)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from peftkit.errors import Problem, UserError
from peftkit.methods.lora import BASE_CHANGING_INITS
from peftkit.model.adapter.edits import lora_rank_and_scale
from peftkit.model.adapter.load import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter_config
from peftkit.model.base.file_checks import check_adapter_weights, check_model_folder
from peftkit.ship.export.gguf.layout import gguf_tensor_names, interleave, linear_shape
from peftkit.ship.export.gguf.names import safe_model_name
from peftkit.ship.export.gguf.source import GgufSource, read_source, stored_tensors
from peftkit.ship.export.gguf.writing import GgufFile, GgufTensor, publish_file, require_gguf, write_file

_PREFIX = "base_model.model."
_BASE_COPY = ".base_layer.weight"
_LORA = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# settings of LoraConfig that change no number of a finished adapter, or that are folded in here
_HARMLESS_SETTINGS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"),
    *("lora_dropout", "eva_config", "corda_config", "loftq_config", "lora_ga_config", "runtime_config"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying"),
}
_BASE_CHANGING_INITS = (
    *BASE_CHANGING_INITS,
    "pissa_niter",
    "corda",
    "loftq",
    "lora_ga",
)  # inits that change the base weights


def write_adapter(
    adapter: Path, base: Path, out: Path, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> GgufFile:
    """Write a LoRA adapter as GGUF, in fp32. `base` is its base's folder: configuration only.

    llama.cpp knows one alpha for all modules and divides it by each one's rank: where rsLoRA and patterns
    give other scales, the rest is multiplied into B. Raises UserError with everything that llama.cpp's
    adapters cannot hold.
    """
    require_gguf(str(adapter))
    check_model_folder(adapter)
    check_adapter_weights(adapter)
    config = read_adapter_config(adapter)
    if problems := [*_config_problems(adapter, config)]:
        raise UserError(problems)
    source = read_source(base)
    file = adapter / ADAPTER_WEIGHTS
    with safe_open(file, framework="pt") as weights:
        shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    try:
        modules = _module_ranks(adapter, config, source, shapes)
        alphas = {module: lora_rank_and_scale(config, module)[1] * rank for module, rank in modules.items()}
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        got = f"ranks and alphas that are not numbers ({error})"
        raise UserError(Problem(str(adapter / ADAPTER_CONFIG), got, "PEFT's configuration")) from None
    # an alpha of 0 means "no scale" to llama.cpp
    alpha = next((candidate for candidate, _ in Counter(alphas.values()).most_common() if candidate), 1.0)
    names = gguf_tensor_names(source)
    entries = [
        entry
        for module, rank in modules.items()
        for entry in _lora_tensors(
            adapter, source, module, names[f"{module}.weight"], rank=rank, scale=alphas[module] / alpha
        )
    ]
    fields = {
        "general.type": "adapter",
        "general.name": safe_model_name(adapter.resolve().name, phi3=False),
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    with publish_file(out) as part:
        num_bytes = write_file(part, source.family.architecture, fields, entries, progress)
    return GgufFile(out, num_bytes, len(entries), "f32")


def _config_problems(adapter: Path, config: Mapping[str, object]) -> Iterator[Problem]:
    """Yield a problem for each setting that an adapter of llama.cpp cannot hold."""
    where, expected = (str(adapter / ADAPTER_CONFIG), "plain LoRA of linear layers, all that llama.cpp supports")
    fix = _merge_hint(adapter)
    kind = config.get("peft_type")
    if kind != "LORA":
        kind = str(kind)
        if kind in {"PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"}:
            instead = "prompts cannot be merged either: serve it with PEFT, or train a LoRA"
        else:
            instead = fix
        yield Problem(where, f"peft_type {kind}", expected, instead)
        return
    for key, value in config.items():
        if key not in _HARMLESS_SETTINGS and value not in (None, False, "none", [], {}):
            yield Problem(where, f"{key} {str(value)[:80]}", expected, fix)
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        fix = "convert it to plain LoRA first (PEFT: path_initial_model_for_weight_conversion)"
        yield Problem(where, f"init_lora_weights {init}, which changes the base", expected, fix)


def _merge_hint(adapter: Path) -> str:
    return f"peftkit merge {adapter} --out DIR, then export DIR"


def _module_ranks(
    adapter: Path, config: Mapping[str, object], source: GgufSource, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """Return module -> rank in the file's order.

    Raises UserError unless each tensor is half of a fitting pair.
    """
    where, fix = str(adapter / ADAPTER_WEIGHTS), _merge_hint(adapter)
    names = gguf_tensor_names(source)
    problems, modules, copies = [], dict[str, int](), []
    for name in shapes:
        match = _LORA.fullmatch(name)
        weight = f"{match[1]}.weight" if match else ""
        if match and weight in source.aliases:
            got = f"{name}: LoRA of an output matrix that is tied to the embedding"
            problems.append(Problem(where, got, "an untied output matrix", fix))
        elif match and len(source.shapes.get(weight, ())) == 2 and names[weight] != "token_embd.weight":
            modules[match[1]] = lora_rank_and_scale(config, match[1])[0]
        elif name.endswith(_BASE_COPY):
            copies.append(name)
        else:
            problems.append(Problem(where, name, "lora_A and lora_B of the base's linear layers", fix))
    for module, rank in modules.items():
        d_out, d_in = linear_shape(source, f"{module}.weight")
        for half, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
            actual_shape = shapes.get(f"{_PREFIX}{module}.lora_{half}.weight")
            if actual_shape != shape:
                got = f"{module} lora_{half} {actual_shape}"
                problems.append(Problem(where, got, f"{shape}, as the base has it"))
    problems += _base_copy_problems(adapter, source, copies)
    if problems:
        raise UserError(problems)
    return modules


def _base_copy_problems(adapter: Path, source: GgufSource, names: list[str]) -> Iterator[Problem]:
    """Yield a problem for each saved copy of a base matrix that differs from the base's own.

    PEFT saves the base's matrix beside LoRA of an output matrix.
    """
    stored = {tensor.name: tensor for tensor in stored_tensors(source)} if names else {}
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as weights:
        for name in names:
            base = stored.get(name.removeprefix(_PREFIX).replace(_BASE_COPY, ".weight"))
            copy = weights.get_tensor(name)
            if base is None or not torch.equal(copy, base.load().to(copy.dtype)):
                expected = "the base's own matrix (was its vocabulary resized?)"
                yield Problem(str(adapter / ADAPTER_WEIGHTS), name, expected, _merge_hint(adapter))


def _lora_tensors(
    adapter: Path, source: GgufSource, module: str, name: str, *, rank: int, scale: float
) -> Iterator[GgufTensor]:
    """Yield A and B of a module; B takes the part of the scale that llama.cpp's alpha / rank leaves."""

    def load(half: str) -> torch.Tensor:
        with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as weights:
            tensor = weights.get_tensor(f"{_PREFIX}{module}.lora_{half}.weight").float()
        return tensor if half == "A" else interleave(source, f"{module}.weight", tensor * scale)

    d_out, d_in = linear_shape(source, f"{module}.weight")
    yield GgufTensor(f"{name}.lora_a", (rank, d_in), "f32", lambda: load("A"))
    yield GgufTensor(f"{name}.lora_b", (d_out, rank), "f32", lambda: load("B"))
