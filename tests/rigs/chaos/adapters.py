"""Adapter folders, whole and broken, opened as `peftkit generate` and `peftkit eval` open them.

Checkpoints are a kind of their own; here it is what a run, or another tool, leaves at its end.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.rigs.chaos.schema_values import TINY
from tests.rigs.chaos.watch import Run, WrongSuccess

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
METHODS: dict[str, Any] = {
    "lora": {"name": "lora", "rank": 4},
    "dora": {"name": "lora", "rank": 4, "dora": True},
    "norms": {"name": "lora", "rank": 2, "also_train": ["norms"]},
    "ia3": {"name": "ia3"},
    "prefix": {"name": "prefix", "virtual_tokens": 4},
    "prompt": {"name": "prompt", "virtual_tokens": 4},
    "vera": {"name": "vera", "rank": 16},
    "adalora": {"name": "adalora", "initial_rank": 4, "rank": 2},
}
RUN = "run"  # a finished run of LoRA, with its plan


@dataclass
class Tensors:
    """A safetensors file in parts, by its published layout: length, JSON head, data."""

    head: dict[str, Any]
    data: bytes

    @classmethod
    def of(cls, content: bytes) -> Tensors:
        (length,) = struct.unpack("<Q", content[:8])
        return cls(json.loads(content[8 : 8 + length]), content[8 + length :])

    def content(self) -> bytes:
        head = json.dumps(self.head).encode()
        return struct.pack("<Q", len(head)) + head + self.data

    def names(self) -> list[str]:
        return [name for name in self.head if name != "__metadata__"]

    def bytes_of(self, name: str) -> bytes:
        start, stop = self.head[name]["data_offsets"]
        return self.data[start:stop]

    def add(self, name: str, shape: list[int], values: bytes) -> None:
        start = len(self.data)
        self.head[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, start + len(values)]}
        self.data += values

    def drop(self, name: str) -> None:
        """Without a tensor, its bytes taken out too."""
        start, stop = self.head.pop(name)["data_offsets"]
        self.data = self.data[:start] + self.data[stop:]
        for other in self.names():
            offsets = self.head[other]["data_offsets"]
            if offsets[0] >= stop:
                self.head[other]["data_offsets"] = [offset - (stop - start) for offset in offsets]


# --- ways to break the weights; each gives the content of the file

Break = Callable[[random.Random, Tensors], bytes]


def _missing(rng: random.Random, found: Tensors) -> bytes:
    for name in rng.sample(found.names(), rng.choice([1, 1, len(found.names()) // 2 or 1, len(found.names())])):
        found.drop(name)
    return found.content()


def _renamed(rng: random.Random, found: Tensors) -> bytes:
    name = rng.choice(found.names())
    wrong = rng.choice([name.upper(), name + "x", f"x.{name}", name[1:], name.replace("e", "a"), "x", ""])
    found.head[wrong if wrong not in found.head else f"{name}.x"] = found.head.pop(name)
    return found.content()


def _extra(rng: random.Random, found: Tensors) -> bytes:
    base = "base_model.model.model.layers.0.self_attn.q_proj"
    name = rng.choice([f"{base}.weight", f"{base}.base_layer.weight", "x", "base_model.model.model.norm.weight.x"])
    found.add(name, [2, 2], struct.pack("<4f", 1, 2, 3, 4))
    return found.content()


def _reshaped(rng: random.Random, found: Tensors) -> bytes:
    name = rng.choice(found.names())
    shape = found.head[name]["shape"]
    total = math.prod(shape)
    other = [s for s in ([total], [1, total], [total, 1], shape[::-1], [*shape, 1], [2, total // 2]) if s != shape]
    found.head[name]["shape"] = rng.choice([s for s in other if math.prod(s) == total])
    return found.content()


def _not_finite(rng: random.Random, found: Tensors) -> bytes:
    name = rng.choice(found.names())
    start, stop = found.head[name]["data_offsets"]
    at = start + 4 * rng.randrange((stop - start) // 4)
    value = struct.pack("<f", rng.choice([math.nan, math.inf, -math.inf]))
    found.data = found.data[:at] + value + found.data[at + 4 :]
    return found.content()


def _retyped(rng: random.Random, found: Tensors) -> bytes:
    found.head[rng.choice(found.names())]["dtype"] = rng.choice(["I32", "U32", "F64", "F16", "BOOL", "F32x", "C64", 1])
    return found.content()


def _offsets(rng: random.Random, found: Tensors) -> bytes:
    name = rng.choice(found.names())
    start, stop = found.head[name]["data_offsets"]
    wrong = [[start, stop + 4], [stop, start], [0, 2**63], [-4, stop], [start + 2, stop + 2], [], ["a", "b"], None]
    found.head[name]["data_offsets"] = rng.choice([w for w in wrong if w != [start, stop]])
    return found.content()


def _head(rng: random.Random, found: Tensors) -> bytes:
    content = found.content()
    lengths = [0, 1, 7, 2**31, 2**63, 2**64 - 1, len(content), len(content) - 8, 100_000_001]
    if rng.random() < 0.5:
        return struct.pack("<Q", rng.choice(lengths)) + content[8:]
    head = rng.choice([b"{", b"[]", b"null", b"{}", b"[" * 100_000, b'{"a":' * 50_000, b"\xff" * 50, b'{"a": 1}'])
    return struct.pack("<Q", len(head)) + head + found.data


def _cut(rng: random.Random, found: Tensors) -> bytes:
    content = found.content()
    return content[: rng.choice([0, 1, 8, rng.randrange(len(content)), len(content) - 1])]


def _longer(rng: random.Random, found: Tensors) -> bytes:
    return found.content() + rng.choice([b"\0", bytes(4096), b"PK\x03\x04"])


def _other_file(rng: random.Random, found: Tensors) -> bytes:
    return rng.choice(
        [b"", b"PK\x03\x04" + bytes(100), b"\x80\x02}q\x00.", b"{}", b"version https://git-lfs", bytes(64)]
    )


WEIGHT_BREAKS: dict[str, Break] = {
    "tensors missing": _missing,
    "a tensor renamed": _renamed,
    "a tensor too many": _extra,
    "a shape changed": _reshaped,
    "not finite": _not_finite,
    "a type changed": _retyped,
    "offsets that lie": _offsets,
    "a head that lies": _head,
    "cut": _cut,
    "longer": _longer,
    "another file": _other_file,
}

# --- ways to break the configuration; each gives its text


def _changed_rank(rng: random.Random, config: dict[str, Any]) -> None:
    for name in ("r", "num_virtual_tokens"):
        if isinstance(config.get(name), int) and config.get("peft_type") not in {"ADALORA", "IA3"}:
            config[name] = rng.choice([0, -1, 1, 3, 10**4, 10**9, 10**30, "4", None, 1.5, [4], {}])
            return
    config["peft_type"] = "LOHA"


def _changed_targets(rng: random.Random, config: dict[str, Any]) -> None:
    if config.get("target_modules") and config["peft_type"] != "VERA":
        config["target_modules"] = rng.choice([["q_proj"], [], ["nowhere"], "(", 5, {"a": 1}, [5], ["lm_head"]])
    else:
        config["peft_type"] = "LOHA"


def _changed_type(rng: random.Random, config: dict[str, Any]) -> None:
    types = ["LORA", "IA3", "PREFIX_TUNING", "PROMPT_TUNING", "LOHA", "BOFT", "NO_SUCH", "", 5, [], "lora"]
    config["peft_type"] = rng.choice([t for t in types if t != config["peft_type"]])


def _not_finite_number(rng: random.Random, config: dict[str, Any]) -> None:
    config[rng.choice(["lora_alpha", "lora_dropout", "d_initial"])] = rng.choice([math.nan, math.inf, -math.inf])


def _added(rng: random.Random, config: dict[str, Any]) -> None:
    """What makes PEFT look for tensors that are not there."""
    if config["peft_type"] in {"LORA", "IA3"} and not config.get("modules_to_save"):
        config["modules_to_save"] = ["lm_head"]
    else:
        config["peft_type"] = "LOHA"


def _no_base(rng: random.Random, config: dict[str, Any]) -> None:
    config["base_model_name_or_path"] = rng.choice(
        [
            None,
            "",
            " ",
            5,
            ["a"],
            "/no/such/folder",
            "./no",
            "a\0b",
            "x" * 5000,
            "no/such-model",
            "embedded:no",
            "\ud800",
        ]
    )


CONFIG_BREAKS: dict[str, Callable[[random.Random, dict[str, Any]], None]] = {
    "another rank": _changed_rank,
    "other targets": _changed_targets,
    "another type": _changed_type,
    "a number that is not finite": _not_finite_number,
    "modules added": _added,
    "no such base": _no_base,
}
_NOT_JSON = (b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"r": 1,}', b"\0", b"1")
_UNTOLD: dict[str, list[Any]] = {  # what no one can tell from the file, or changes nothing; and what is nonsense
    "lora_alpha": [1, 8.5, "x", None, [], 10**400, -1],
    "lora_dropout": [0.5, "x", 2, -1, None],
    "use_rslora": [True, "x", None],
    "bias": ["all", "lora_only", "x", 5],
    "task_type": [None, "CAUSAL_LM", "SEQ_CLS", "x", 5],
    "rank_pattern": [{}, {"q_proj": 4}, {"(": 4}, {"q_proj": "x"}, 5, {"q_proj": 10**9}],
    "alpha_pattern": [{"q_proj": 4}, {"q_proj": "x"}, 5],
    "layers_to_transform": [[0], 0, [99], "x"],
    "init_lora_weights": ["pissa", "eva", "loftq", "x", False, 5],
    "inference_mode": [False, "x"],
    "fan_in_fan_out": [True, 5],
    "revision": ["main", 5, [], "x" * 3000],
    "auto_mapping": [{"base_model_class": "x", "parent_library": "os"}, 5],
    "peft_version": ["99.0", 5, None],
    "no_such_key": [1, "x", None],
    "target_parameters": [["x"], 5],
    "megatron_config": [{}, 5],
    "corda_config": [{}, 5],
    "trainable_token_indices": [[1], {"embed_tokens": [1]}, 5],
    "encoder_hidden_size": [3, "x", None],
    "prefix_projection": [True, "x"],
    "num_layers": [1, 0, "x", None],
    "token_dim": [1, 0, "x", None],
}


def _flipped(rng: random.Random, content: bytes) -> bytes:
    found = bytearray(content)
    for _ in range(rng.choice([1, 1, 3, 20])):
        found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


@dataclass(frozen=True)
class Case:
    """What was done to an adapter, and whether it has to be "accepted" or "refused"; or "any"."""

    of: str
    what: str
    expected: str


def _whole(rng: random.Random, folder: Path) -> str:
    """Changes that change nothing."""
    found = Tensors.of((folder / WEIGHTS).read_bytes())
    way = rng.randrange(4)
    if way == 0:
        found.head["__metadata__"] = {"format": "pt", "more": "text"}
    if way == 1:
        found.head = {name: found.head[name] for name in rng.sample(list(found.head), len(found.head))}
    (folder / WEIGHTS).write_bytes(found.content())
    config = json.loads((folder / CONFIG).read_text())
    names = rng.sample(list(config), len(config)) if way == 2 else list(config)
    (folder / CONFIG).write_text(json.dumps({name: config[name] for name in names}, indent=rng.choice([None, 2])))
    return ("metadata", "another order of tensors", "another order of keys", "whole")[way]


def spoil(rng: random.Random, folder: Path, of: str) -> Case:
    """Break an adapter folder in one way. A run may know its files by hash: then nothing may change."""
    way, weights = rng.random(), (folder / WEIGHTS).read_bytes()
    if way < 0.12:
        if of == RUN:
            return Case(of, "whole", "accepted")
        return Case(of, _whole(rng, folder), "accepted")
    if way < 0.55:
        what = rng.choice(sorted(WEIGHT_BREAKS))
        (folder / WEIGHTS).write_bytes(WEIGHT_BREAKS[what](rng, Tensors.of(weights)))
        return Case(of, what, "refused")
    if way < 0.65:
        (folder / WEIGHTS).write_bytes(_flipped(rng, weights))
        return Case(of, "bits of the weights flipped", "any")
    return _spoil_config(rng, folder, of)


def _spoil_config(rng: random.Random, folder: Path, of: str) -> Case:
    way, text = rng.random(), (folder / CONFIG).read_bytes()
    if way < 0.1:
        gone = rng.choice([CONFIG, WEIGHTS])
        (folder / gone).unlink()
        if rng.random() < 0.5:
            (folder / gone).mkdir()
        return Case(of, f"no {gone}", "refused")
    if way < 0.25:
        (folder / CONFIG).write_bytes(rng.choice([*_NOT_JSON, text[: rng.randrange(len(text) - 2)]]))
        return Case(of, "a configuration that is not JSON", "refused")
    if way < 0.35:
        (folder / CONFIG).write_bytes(_flipped(rng, text))
        return Case(of, "bits of the configuration flipped", "any")
    config = json.loads(text)
    if way < 0.65:
        name = rng.choice(sorted(_UNTOLD))
        config[name] = rng.choice(_UNTOLD[name])
        what, expected = f"{name} {str(config[name])[:30]}", "any"
    else:
        what, expected = rng.choice(sorted(CONFIG_BREAKS)), "refused"
        CONFIG_BREAKS[what](rng, config)
        if what == "no such base" and of == RUN:
            expected = "any"  # the plan names the base
    (folder / CONFIG).write_text(json.dumps(config))
    return Case(of, what, expected)


# --- what has to come of a case


def _same(model: Any, content: bytes) -> None:
    """Every tensor of the file is in the model, as it is in the file, and the model has no other."""
    import torch
    from peft import get_peft_model_state_dict

    found = Tensors.of(content)
    held = get_peft_model_state_dict(model, save_embedding_layers=False)
    if set(held) != set(found.names()):
        raise WrongSuccess(f"tensors without a place or without weights: {sorted(set(held) ^ set(found.names()))}")
    for name, tensor in held.items():
        if not bool(tensor.isfinite().all()):
            raise WrongSuccess(f"{name} is not finite")
        if found.head[name]["dtype"] == "F32" and tensor.dtype == torch.float32:
            saved = torch.frombuffer(bytearray(found.bytes_of(name)), dtype=torch.float32)
            if list(tensor.shape) != found.head[name]["shape"] or not torch.equal(tensor.flatten(), saved):
                raise WrongSuccess(f"{name} is not what the file holds")


def check(case: Case, place: Path, folder: Path) -> str:
    """Open a case. Returns what became of it; raises where that is wrong."""
    from peftkit.errors import UserError
    from peftkit.results.load import open_result
    from tests.rigs.chaos.watch import check_told

    try:
        found = open_result(place)
    except UserError as error:
        check_told(error)
        if case.expected == "accepted":
            raise WrongSuccess(f"{case.of}, {case.what}, and it is refused: {error}") from None
        return "refused"
    if case.expected == "refused":
        raise WrongSuccess(f"{case.of}, {case.what}, and it is opened")
    _same(found.model, (folder / WEIGHTS).read_bytes())
    return "accepted"


def make_adapters(shared: Path) -> None:
    """One adapter of each method, every tensor moved, and a finished run."""
    import torch

    from peftkit.api import finetune
    from peftkit.model.adapter.attach import attach_adapter, save_trained, trainable_tensors
    from peftkit.model.load import load_model, load_tokenizer
    from tests.rigs.plans import cpu_plan

    for name, method in METHODS.items():
        plan = cpu_plan(method)
        tokenizer = load_tokenizer(str(TINY), plan.base)
        model = attach_adapter(load_model(str(TINY), plan.base, device="cpu"), plan, tokenizer)
        torch.manual_seed(1)
        with torch.no_grad():
            for tensor in trainable_tensors(model).values():
                tensor.add_(torch.randn_like(tensor) * 0.05)
        save_trained(model, plan, tokenizer, shared / name, initial_adapter=shared / "none")
    rows = "".join(json.dumps({"prompt": f"Say {i}", "completion": f"it is {i}"}) + "\n" for i in range(8))
    (shared / "rows.jsonl").write_text(rows)
    recipe = {
        "base": str(TINY),
        "method": {"name": "lora", "rank": 4},
        "data": {"train": str(shared / "rows.jsonl"), "eval": None, "waive": ["enough-data"]},
        "train": {"max_steps": 2, "batch_size": 2, "max_length": 32, "learning_rate": 1e-3},
    }
    finetune(recipe, out=shared / RUN)


def open_adapters(shared: Path) -> Run:
    """Ready to run cases on copies of real adapters."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["PEFTKIT_CACHE"] = str(shared / "cache")
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if not (shared / RUN).is_dir():
        make_adapters(shared)

    def run(rng: random.Random, folder: Path) -> str:
        of = rng.choice([*METHODS, "lora", "lora", RUN])
        place = folder / of
        shutil.copytree(shared / of, place)
        inside = place / "adapter" if of == RUN else place
        case = spoil(rng, inside, of)
        (folder / "case.json").write_text(json.dumps([case.of, case.what, case.expected]))
        return check(case, place, inside)

    return run
