"""The identity of an adapter's base: fingerprints of configuration and weights, not the name alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.plan.plan import BasePlan
from peftkit.rundir import MANIFEST, read_json, read_sealed

IDENTITY_FILE = "peftkit.json"  # beside the adapter's weights
_PIECE_BYTES = 2**16
_PIECES_PER_FILE = 16  # of each file, from end to end
_BLOCK_SIZE = 64  # bitsandbytes' own, which transformers leaves as it is
# of no weight: where it was loaded from, by which version, in which type it is held
_UNSTABLE_KEYS = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}


def local_base_folder(source: str, revision: str | None) -> Path | None:
    """Return the folder of a base's files.

    The local one, or the hub cache's; None where it is not downloaded.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config_path = try_to_load_from_cache(source, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(config_path).parent if isinstance(config_path, str) else None


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files in order: those of the index, or the single one.

    Empty where not all are downloaded. Others may lie beside them (consolidated.safetensors of a hub
    repository).
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()))
        files = [folder / str(name) for name in names]
        return files if all(file.is_file() for file in files) else []
    if single.is_file():
        return [single]
    return sorted(path for path in folder.glob("*.safetensors") if path.is_file())


def weights_fingerprint(folder: Path) -> str | None:
    """Hash the size and 17 evenly spaced 64 KiB pieces of each weight file: milliseconds for 8B."""
    files, digest = weight_files(folder), hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{size} bytes".encode())
        with path.open("rb") as file:
            for number in range(_PIECES_PER_FILE + 1):
                file.seek(max(0, size - _PIECE_BYTES) * number // _PIECES_PER_FILE)
                digest.update(file.read(_PIECE_BYTES))
    return digest.hexdigest() if files else None


def _converted_from(folder: Path) -> str | None:
    """Return the fingerprint of the GGUF file or quantized weights that a folder was converted from, else None.

    It identifies the base better than the conversion, which depends on library versions.
    """
    manifest = folder / MANIFEST
    digest = read_json(manifest).get("source_sha256") if manifest.is_file() else None
    return str(digest) if digest else None


def base_identity(source: str, plan: BasePlan) -> dict[str, Any]:
    """Return the base's name, revision, quantization, and fingerprints of configuration and weights.

    Fingerprints of files that are not downloaded yet are None. The quantization is recorded in full: PEFT's
    configuration does not hold it, and a merge must not guess.
    """
    folder = local_base_folder(source, plan.revision)
    source_sha256 = _converted_from(folder) if folder else None
    is_local = Path(source).is_dir()
    quantized = plan.quant_type is not None
    config_sha256 = None
    if folder and not source_sha256:  # without the keys that differ between equal models
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stable = {key: value for key, value in config.items() if key not in _UNSTABLE_KEYS}
        config_sha256 = hashlib.sha256(json.dumps(stable, sort_keys=True).encode()).hexdigest()
    return {
        "id": plan.id,
        "revision": plan.revision if is_local or folder is None else folder.name,
        "config_sha256": config_sha256,
        "weights_sha256": source_sha256 or (weights_fingerprint(folder) if folder else None),
        "quantization": {
            "type": plan.quant_type,
            "double": plan.double_quant,
            "block_size": _BLOCK_SIZE,
            "dtype": plan.dtype,
            "compute_dtype": plan.compute_dtype,
            "skip_modules": list(plan.skip_4bit),
            "experts": list(plan.experts_4bit),
        }
        if quantized
        else None,
        "overrides": dict(plan.overrides),
    }


def base_plan_fields(identity: Mapping[str, object]) -> dict[str, Any]:
    """Return an adapter's recorded overrides and quantization of its base, as fields of a `BasePlan`.

    Early adapters recorded only the type of 4-bit: see `lacks_4bit_details`.
    """
    overrides = identity.get("overrides")
    fields: dict[str, Any] = {"overrides": dict(overrides)} if isinstance(overrides, Mapping) else {}
    quantization = identity.get("quantization")
    if not isinstance(quantization, Mapping) or "skip_modules" not in quantization:
        return fields
    return fields | {
        "quant_type": str(quantization["type"]),
        "double_quant": bool(quantization["double"]),
        "dtype": str(quantization["dtype"]),
        "compute_dtype": str(quantization["compute_dtype"]),
        "skip_4bit": tuple(str(name) for name in quantization["skip_modules"]),
        "experts_4bit": tuple(str(name) for name in quantization["experts"]),
    }


def changed_parts(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """Return which of configuration and weights differ between two bases, where both sides know them.

    Names and revisions are not compared.
    """
    keys = ("config_sha256", "weights_sha256")
    names = {"config_sha256": "configuration", "weights_sha256": "weights"}
    return [names[key] for key in keys if old.get(key) and new.get(key) and old[key] != new[key]]


def lacks_4bit_details(identity: Mapping[str, object]) -> bool:
    """Return whether an adapter's base was in 4-bit and its identity does not say which layers and how."""
    quantization = identity.get("quantization")
    return isinstance(quantization, Mapping) and "skip_modules" not in quantization


def read_identity(folder: Path) -> dict[str, Any]:
    """Read an adapter's record of its base; empty for foreign adapters.

    Raises UserError where it is broken.
    """
    file = folder / IDENTITY_FILE
    if not file.is_file():
        return {}
    base = read_sealed(file).get("base")
    if not isinstance(base, dict):
        raise UserError(Problem(str(file), "no record of the base", "the file that peftkit wrote"))
    return base


def refuse_other_base(folder: Path, source: str, plan: BasePlan) -> None:
    """Raise UserError where the base is not the one that the adapter in `folder` was trained on."""
    trained_base, base = read_identity(folder), base_identity(source, plan)
    changed = changed_parts(trained_base, base)
    if changed:
        got = f"the base {base['id']} with different {' and '.join(changed)}"
        fix = f"use that base; if it is the same model in other files, remove {folder / IDENTITY_FILE}"
        raise UserError(Problem(str(folder), got, f"the base {trained_base['id']} that it was trained on", fix))
