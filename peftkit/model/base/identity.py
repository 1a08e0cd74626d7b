"""Which base an adapter belongs to: told by what the base's files hold, not by its name alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.plan.plan import BasePlan
from peftkit.rundir import MANIFEST, read_json, read_sealed

IDENTITY = "peftkit.json"  # beside the adapter's weights
_PIECE = 2**16
_PIECES = 16  # of each file, from end to end
_BLOCK_SIZE = 64  # bitsandbytes' own, which transformers leaves as it is
# of no weight: where it was loaded from, by which version, in which type it is held
_VOLATILE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}


def folder_of(source: str, revision: str | None) -> Path | None:
    """Where the files of a base lie: a local folder, or the hub cache's; None where they do not yet."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(source, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _config_sha256(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, in order: those of the index, or the only one; none before they came.

    Others may lie beside them (consolidated.safetensors of a hub repository) or not.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()))
        files = [folder / str(name) for name in names]
        return files if all(file.is_file() for file in files) else []
    if single.is_file():
        return [single]
    return sorted(path for path in folder.glob("*.safetensors") if path.is_file())


def _weights_sha256(folder: Path) -> str | None:
    """Of each weights file its size and pieces from end to end: an 8B model takes milliseconds."""
    files, digest = weight_files(folder), hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{size} bytes".encode())
        with path.open("rb") as file:
            for number in range(_PIECES + 1):
                file.seek(max(0, size - _PIECE) * number // _PIECES)
                digest.update(file.read(_PIECE))
    return digest.hexdigest() if files else None


def _made_from(folder: Path) -> str | None:
    """The sha256 of the GGUF file that a folder was converted from: the conversion follows our versions."""
    manifest = folder / MANIFEST
    found = read_json(manifest).get("source_sha256") if manifest.is_file() else None
    return str(found) if found else None


def base_identity(source: str, plan: BasePlan) -> dict[str, Any]:
    """The base's name, revision and quantization, and fingerprints of its configuration and weights.

    Those of weights that are still to be downloaded are None.
    """
    folder = folder_of(source, plan.revision)
    made_from = _made_from(folder) if folder else None
    local = Path(source).is_dir()
    quantized = plan.quant_type is not None
    return {
        "id": plan.id,
        "revision": plan.revision if local or folder is None else folder.name,
        "config_sha256": _config_sha256(folder) if folder and not made_from else None,
        "weights_sha256": made_from or (_weights_sha256(folder) if folder else None),
        "quantization": _quantization(plan) if quantized else None,
        "overrides": dict(plan.overrides),
    }


def _quantization(plan: BasePlan) -> dict[str, Any]:
    """How the base was held in 4-bit: PEFT's configuration does not say, and a merge must not guess."""
    return {
        "type": plan.quant_type,
        "double": plan.double_quant,
        "block_size": _BLOCK_SIZE,
        "dtype": plan.dtype,
        "compute_dtype": plan.compute_dtype,
        "skip_modules": list(plan.skip_4bit),
        "experts": list(plan.experts_4bit),
    }


def held_as(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter's identity says of how its base was held, as fields of a `BasePlan`.

    Adapters written before the whole of it was kept say the type of 4-bit alone: `is_4bit_unknown`.
    """
    changed = identity.get("overrides")
    fields: dict[str, Any] = {"overrides": dict(changed)} if isinstance(changed, Mapping) else {}
    found = identity.get("quantization")
    if not isinstance(found, Mapping) or "skip_modules" not in found:
        return fields
    return fields | {
        "quant_type": str(found["type"]),
        "double_quant": bool(found["double"]),
        "dtype": str(found["dtype"]),
        "compute_dtype": str(found["compute_dtype"]),
        "skip_4bit": tuple(str(name) for name in found["skip_modules"]),
        "experts_4bit": tuple(str(name) for name in found["experts"]),
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In which of what is known on both sides two bases differ; a name or a revision alone is none."""
    keys = ("config_sha256", "weights_sha256")
    names = {"config_sha256": "configuration", "weights_sha256": "weights"}
    return [names[key] for key in keys if before.get(key) and now.get(key) and before[key] != now[key]]


def is_4bit_unknown(identity: Mapping[str, Any]) -> bool:
    """Whether an adapter's base was held in 4-bit, and its identity does not tell which layers and how."""
    found = identity.get("quantization")
    return isinstance(found, Mapping) and "skip_modules" not in found


def read_identity(folder: Path) -> dict[str, Any]:
    """What an adapter says of its base; empty for one that was made elsewhere. Raises UserError if broken."""
    file = folder / IDENTITY
    if not file.is_file():
        return {}
    base = read_sealed(file).get("base")
    if not isinstance(base, dict):
        raise UserError(Problem(str(file), "no identity of a base", "the file that peftkit wrote"))
    return base


def refuse_other_base(folder: Path, source: str, plan: BasePlan) -> None:
    """Raises UserError where the base is not the one that the adapter in `folder` was trained on."""
    before, now = read_identity(folder), base_identity(source, plan)
    differ = differences(before, now)
    if differ:
        got = f"the base {now['id']} with other {' and '.join(differ)}"
        fix = f"give that base; if it is the same model in other files, remove {folder / IDENTITY}"
        raise UserError(Problem(str(folder), got, f"the base {before['id']} that it was trained on", fix))
