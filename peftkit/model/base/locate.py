"""Location of a base and its configuration, found before anything heavy is imported."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peftkit.archs import EMBEDDED, KNOWN, Embedded
from peftkit.errors import Problem, UserError, did_you_mean
from peftkit.hub import hub_is_offline, probe_hub
from peftkit.model.base.file_checks import check_model_folder, conversion_fix, pickled_weights, read_json_file
from peftkit.recipe.paths import path_exists
from peftkit.rundir import sha256_of


class BaseNotFoundError(UserError):
    """A base that is neither at the place that is named, nor in the cache, nor on a hub that can be reached."""


BaseKind = Literal["hub", "folder", "gguf", "embedded"]
GATED_FIX = "accept its licence on its hub page and log in (hf auth login)"
_OFFLINE_FIX = "to try peftkit without a hub: peftkit finetune recipes/quickstart.yaml"


@dataclass(frozen=True)
class LocatedBase:
    """A located base. `config` is None for a GGUF file whose header was not read yet."""

    id: str
    kind: BaseKind
    path: Path | None
    config: dict[str, Any] | None
    revision: str | None = None  # on the hub


def find_embedded_file(name: str, where: str) -> tuple[Embedded, Path]:
    """Return (entry, file) of embedded:NAME.

    Raises UserError with the pip line where the package is missing.
    """
    if name not in EMBEDDED:
        raise UserError(Problem(where, f"embedded:{name}", "an embedded model", did_you_mean(name, list(EMBEDDED))))
    entry = EMBEDDED[name]
    module = entry.file.split("/")[0]
    spec = importlib.util.find_spec(module)
    path = Path(spec.origin).parent.parent / entry.file if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(
            Problem(
                where,
                f"embedded:{name} without the package {entry.package}",
                "the package that contains the model",
                entry.pip_line,
            )
        )
    return entry, path


def check_embedded_sha256(base: LocatedBase, where: str) -> None:
    """Raise UserError where an embedded model's file does not have the pinned sha256."""
    entry = EMBEDDED[base.id.removeprefix("embedded:")]
    assert base.path is not None
    path = base.path / Path(entry.file).name if base.path.is_dir() else base.path
    digest = sha256_of(path)
    if digest != entry.sha256:
        got, expected = f"{path} with sha256 {digest[:12]}...", f"the pinned file {entry.sha256[:12]}..."
        raise UserError(Problem(where, got, expected, entry.pip_line))


_MODELOPT_FILE = "hf_quant_config.json"
_LITGPT_FILES = ("lit_model.pth",)


def _read_config_file(path: Path) -> dict[str, Any]:
    """Read a config.json, and what ModelOpt writes beside it. Raises UserError where it has no model_type."""
    config = read_json_file(path.parent, path.name)
    if not isinstance(config.get("model_type"), str):
        expected = "a configuration with model_type"
        raise UserError(Problem(str(path), "no model_type", expected, "check that this is a model folder"))
    if "quantization_config" not in config and (path.parent / _MODELOPT_FILE).is_file():
        settings = read_json_file(path.parent, _MODELOPT_FILE).get("quantization")
        config["quantization_config"] = {**(settings if isinstance(settings, dict) else {}), "quant_method": "modelopt"}
    return config


def _locate_on_hub(model_id: str, revision: str | None, where: str) -> LocatedBase:
    """Locate a hub model: its config.json from the cache or the hub.

    Raises UserError with the reason and a fix.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def refuse(got: str, fix: str, kind: type[UserError] = UserError) -> UserError:
        return kind(Problem(where, f"{model_id!r}, {got}", "a base that can be loaded here", fix))

    try:
        config_path = hf_hub_download(model_id, "config.json", revision=revision, local_files_only=not probe_hub())
        config = read_json_file(Path(config_path).parent, Path(config_path).name)
    except GatedRepoError:
        raise refuse("which is gated, and you have no access", f"{GATED_FIX}; {_OFFLINE_FIX}") from None
    except RevisionNotFoundError:
        raise refuse(f"which has no revision {revision!r}", "check base.revision") from None
    except RepositoryNotFoundError:
        fix = "check the name, or log in"
        raise refuse("which the hub does not have, or which is private", fix, BaseNotFoundError) from None
    except RemoteEntryNotFoundError:
        raise refuse(
            "which has no config.json", "check that it is not a repository of an adapter or of GGUF files"
        ) from None
    except HFValidationError:
        fix = "a hub id has the form owner/name"
        raise refuse("which is neither a folder nor a hub id", fix, BaseNotFoundError) from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise refuse(f"for which the hub answered {status}", "try again later, or give a local folder") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError):
        is_offline = hub_is_offline()
        reason = (
            "which is not in the cache while HF_HUB_OFFLINE is set"
            if is_offline
            else "which is not in the cache while the hub cannot be reached"
        )
        fix = f"give a local folder: base.id=/path/to/model; {_OFFLINE_FIX}"
        raise refuse(reason, fix, BaseNotFoundError) from None
    return LocatedBase(model_id, "hub", None, config, revision)


def locate_base(
    model_id: str, *, revision: str | None, where: str, need_weights: bool = True, shapes_alone: bool = False
) -> LocatedBase:
    """Locate a base. With `need_weights=False` (plans, dry runs) known hub models need no download.

    `shapes_alone` also accepts a folder without weights, or a config.json. Raises UserError, naming `where`,
    for a base that does not exist or cannot be used.
    """
    if model_id.startswith("embedded:"):
        name = model_id.removeprefix("embedded:")
        entry, path = (
            find_embedded_file(name, where) if need_weights or name not in EMBEDDED else (EMBEDDED[name], None)
        )
        if path is not None and path.suffix == ".safetensors":
            path = path.parent
        return LocatedBase(model_id, "embedded", path, entry.config)
    path = Path(model_id)
    exists = path_exists(path)
    if model_id.endswith(".gguf"):
        if not exists or not path.is_file():
            raise BaseNotFoundError(Problem(where, f"{model_id}, which does not exist", "a .gguf file"))
        return LocatedBase(model_id, "gguf", path, None)
    if exists and shapes_alone and path.name == "config.json" and path.is_file():
        return LocatedBase(model_id, "folder", path.parent, _read_config_file(path))
    if exists and path.is_dir():
        # locate a base in a local folder
        config_file = path / "config.json"
        litgpt_file = next((path / name for name in _LITGPT_FILES if (path / name).is_file()), None)
        if litgpt_file is not None:
            raise UserError(
                Problem(
                    where,
                    f"{path}, a LitGPT checkpoint ({litgpt_file.name} is pickled and can run code)",
                    "a Hugging Face folder with *.safetensors",
                    f"litgpt convert_from_litgpt {path} OUT; save OUT/model.pth as safetensors and use that folder",
                )
            )
        if not config_file.is_file() and (path / "adapter_config.json").is_file():
            fix = f"go on training it: start_from: {path}, without base; or stack another one on it: "
            fix += f"peftkit merge {path} --out MERGED, then base: MERGED"
            raise UserError(Problem(where, f"{path}, which is an adapter", "the model that it adapts", fix))
        if not config_file.is_file():
            raise UserError(
                Problem(
                    where,
                    f"the folder {path} without config.json",
                    "a model folder",
                    "a Hugging Face model folder holds config.json, weights and a tokenizer",
                )
            )
        check_model_folder(path)
        config = _read_config_file(config_file)
        if not shapes_alone and not any(path.glob("*.safetensors")):
            pickled = pickled_weights(path)
            got = f"the folder {path} with {pickled[0]} only" if pickled else f"the folder {path} without weights"
            fix = conversion_fix(path) if pickled else "the download may be incomplete"
            raise UserError(Problem(where, got, "weights as *.safetensors", fix))
        return LocatedBase(str(path), "folder", path, config)
    if path.is_absolute():
        raise BaseNotFoundError(Problem(where, f"{model_id}, which does not exist", "a model folder or a .gguf file"))
    if not need_weights and model_id in KNOWN:
        return LocatedBase(model_id, "hub", None, KNOWN[model_id])
    return _locate_on_hub(model_id, revision, where)
