"""Where a base stands and what its configuration says, before anything heavy is imported."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peftkit.archs import EMBEDDED, KNOWN, Embedded
from peftkit.errors import Problem, UserError, did_you_mean
from peftkit.hub import hub_answers, hub_is_off
from peftkit.model.base.file_checks import check_folder, how_to_convert, pickled_weights, read_json_file
from peftkit.recipe.paths import stands
from peftkit.rundir import sha256_of

Kind = Literal["hub", "folder", "gguf", "embedded"]
GATED_FIX = "accept its licence on its hub page and log in (hf auth login)"
_TRY_HERE = "what runs here without a hub: peftkit finetune recipes/quickstart.yaml"


@dataclass(frozen=True)
class Base:
    """A base that was found. `config` is None for a GGUF file whose header was not read yet."""

    id: str
    kind: Kind
    path: Path | None
    config: dict[str, Any] | None


def embedded_file(name: str, where: str) -> tuple[Embedded, Path]:
    """The file behind embedded:NAME. Raises UserError with the pip line where the package is missing."""
    if name not in EMBEDDED:
        raise UserError(
            Problem(where, f"embedded:{name}", "an embedded model", did_you_mean(name, list(EMBEDDED)))
        )
    entry = EMBEDDED[name]
    module = entry.file.split("/")[0]
    spec = importlib.util.find_spec(module)
    path = Path(spec.origin).parent.parent / entry.file if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(
            Problem(
                where,
                f"embedded:{name} without the package {entry.package}",
                "the package that carries the model",
                entry.pip_line,
            )
        )
    return entry, path


def check_pin(base: Base, where: str) -> None:
    """Raises UserError where an embedded model's file is not the pinned one."""
    entry = EMBEDDED[base.id.removeprefix("embedded:")]
    assert base.path is not None
    path = base.path / Path(entry.file).name if base.path.is_dir() else base.path
    digest = sha256_of(path)
    if digest != entry.sha256:
        got, wanted = f"{path} with sha256 {digest[:12]}...", f"the pinned file {entry.sha256[:12]}..."
        raise UserError(Problem(where, got, wanted, entry.pip_line))


_LITGPT = ("lit_model.pth",)


def _config_file(path: Path, where: str) -> dict[str, Any]:
    """A config.json read and found to be one."""
    config = read_json_file(path.parent, path.name)
    if not isinstance(config.get("model_type"), str):
        expected = "a configuration with model_type"
        raise UserError(Problem(str(path), "no model_type", expected, "is this a model's folder?"))
    return config


def _folder(path: Path, where: str, *, shapes_alone: bool) -> Base:
    config_file = path / "config.json"
    lit = next((path / name for name in _LITGPT if (path / name).is_file()), None)
    if lit is not None:
        raise UserError(
            Problem(
                where,
                f"{path}, a LitGPT checkpoint ({lit.name} is pickled and can run code)",
                "a Hugging Face folder with *.safetensors",
                f"litgpt convert_from_litgpt {path} OUT; save OUT/model.pth as safetensors, give that folder",
            )
        )
    if not config_file.is_file():
        raise UserError(
            Problem(
                where,
                f"the folder {path} without config.json",
                "a model folder",
                "a Hugging Face model folder holds config.json, weights and a tokenizer",
            )
        )
    check_folder(path)
    config = _config_file(config_file, where)
    if not shapes_alone and not any(path.glob("*.safetensors")):
        pickles = pickled_weights(path)
        got = f"the folder {path} with {pickles[0]} only" if pickles else f"the folder {path} without weights"
        fix = how_to_convert(path) if pickles else "the download may be incomplete"
        raise UserError(Problem(where, got, "weights as *.safetensors", fix))
    return Base(str(path), "folder", path, config)


def _hub(model_id: str, revision: str | None, where: str) -> Base:
    """A hub model: its configuration from the cache, from the hub, or from the shapes shipped here."""
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

    def refuse(got: str, fix: str) -> UserError:
        return UserError(Problem(where, f"{model_id!r}, {got}", "a base that can be loaded here", fix))

    try:
        cached = hf_hub_download(
            model_id, "config.json", revision=revision, local_files_only=not hub_answers()
        )
        config = read_json_file(Path(cached).parent, Path(cached).name)
    except GatedRepoError:
        raise refuse(
            "which is gated and not open to you",
            f"{GATED_FIX}; {_TRY_HERE}",
        ) from None
    except RevisionNotFoundError:
        raise refuse(f"which has no revision {revision!r}", "check base.revision") from None
    except RepositoryNotFoundError:
        raise refuse("which the hub does not know (or it is private)", "check the name, or log in") from None
    except RemoteEntryNotFoundError:
        raise refuse(
            "which has no config.json", "is it a repository of an adapter or of GGUF files?"
        ) from None
    except HFValidationError:
        raise refuse("which is neither a folder nor a hub id", "a hub id reads owner/name") from None
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise refuse(
            f"for which the hub answered {status}", "try again later, or give a local folder"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError):
        offline = hub_is_off()
        reason = (
            "which is not in the cache while HF_HUB_OFFLINE is set"
            if offline
            else "which is not in the cache while the hub cannot be reached"
        )
        raise refuse(reason, f"give a local folder: base.id=/path/to/model; {_TRY_HERE}") from None
    return Base(model_id, "hub", None, config)


def locate(
    model_id: str, *, revision: str | None, where: str, need_weights: bool = True, shapes_alone: bool = False
) -> Base:
    """Find a base. `need_weights=False` (plans, dry runs) settles for hub models whose shapes are known.

    `shapes_alone` also takes a folder without weights, or a config.json. Raises UserError, naming `where`,
    for what is not there or cannot be used.
    """
    if model_id.startswith("embedded:"):
        name = model_id.removeprefix("embedded:")
        entry, path = (
            embedded_file(name, where) if need_weights or name not in EMBEDDED else (EMBEDDED[name], None)
        )
        if path is not None and path.suffix == ".safetensors":
            path = path.parent
        return Base(model_id, "embedded", path, entry.config)
    path = Path(model_id)
    there = stands(path)
    if model_id.endswith(".gguf"):
        if not there or not path.is_file():
            raise UserError(Problem(where, f"{model_id}, which is not there", "a .gguf file"))
        return Base(model_id, "gguf", path, None)
    if there and shapes_alone and path.name == "config.json" and path.is_file():
        return Base(model_id, "folder", path.parent, _config_file(path, where))
    if there and path.is_dir():
        return _folder(path, where, shapes_alone=shapes_alone)
    if path.is_absolute():
        raise UserError(Problem(where, f"{model_id}, which is not there", "a model folder or a .gguf file"))
    if not need_weights and model_id in KNOWN:
        return Base(model_id, "hub", None, KNOWN[model_id])
    return _hub(model_id, revision, where)
