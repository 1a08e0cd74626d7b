"""A folder pushed to a repository of the Hub, whole and in one commit, or not at all.

The token is read by huggingface_hub from where it keeps it, and never passes through here. Its
`upload_folder` commits large folders in several pieces (seen in 2.4), so that a push cut short leaves half a
model there: the files are committed through `create_commit`, one request after everything was uploaded.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftkit.errors import Problem, UserError
from peftkit.hub import hub_answers, hub_is_off
from peftkit.model.adapter.load import CONFIG, read_adapter_config
from peftkit.model.base.file_checks import PICKLED, check_folder, how_to_convert
from peftkit.results.find import is_away, run_of
from peftkit.rundir import MANIFEST, verify_folder
from peftkit.secrets import redact
from peftkit.ship.card.card import is_hub_id
from peftkit.ship.card.usage import HERE
from peftkit.ship.export import adapter
from peftkit.ship.export.base import Exported, ExportOptions, Observer, files_in, whole_model
from peftkit.units import listed

ALLOWED = (".safetensors", ".gguf", ".json", ".jinja", ".md", ".txt", ".model")
_NAMES = ("Modelfile",)
_WEIGHTS = (".safetensors", ".gguf")
_TEXTS = (".json", ".jinja", ".md", ".txt")
_MOST_TEXT_BYTES = 2**18  # vocabularies are larger, and hold no secrets
_LOG_IN = "hf auth login, with a token that may write"


def push(
    folder: Path,
    repo: str,
    *,
    private: bool = True,
    revision: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> str:
    """Push what a folder holds of a model or an adapter; the URL of the commit.

    `repo` is made where it is missing, and so is the branch `revision`. Pushing the same files again commits
    nothing. `tell` hears what is left out. Raises UserError, before anything is sent, for pickles, files that
    are not whole or hold secrets, and where the Hub may not be asked; and for what the Hub refuses.
    """
    names, left_out = _files(folder)
    _refuse_unreachable(repo)
    if left_out:
        tell(f"left out, of a kind that is not pushed: {listed(left_out)}")
    if (base := _local_base(folder)) is not None:
        tell(f"{CONFIG} names its base by a path, {base}: others cannot load it, and it shows your folders")
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of its transport

    try:
        return _commit(folder, names, repo, private=private, revision=revision, tell=tell)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        problem = _problem(error, repo, revision)
    raise UserError(problem)  # outside: the client's errors hold the request, with its token


def _commit(
    folder: Path,
    names: list[str],
    repo: str,
    *,
    private: bool,
    revision: str | None,
    tell: Callable[[str], None],
) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    api.whoami()  # first: without a login the Hub says of everything that it is not there
    repo_id = api.create_repo(repo, private=private, exist_ok=True).repo_id
    is_private = bool(api.model_info(repo_id).private)
    if private and not is_private:
        got, expected = f"{repo_id}, which is public", "a private repository, as was asked for"
        fix = "push to another name, say that it may be public, or make it private on its settings page"
        raise UserError(Problem("hub", got, expected, fix))
    if is_private and not private:
        tell(f"{repo_id} was there before, and stays private")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    done = api.create_commit(
        repo_id,
        [CommitOperationAdd(path_in_repo=n, path_or_fileobj=_content(folder, n, repo_id)) for n in names],
        commit_message="Pushed by peftkit",
        revision=revision,
    )
    return str(done.commit_url)


def _content(folder: Path, name: str, repo_id: str) -> Path | bytes:
    """A file as it is; but a card's code loads from where it is pushed to, unless a manifest has its hash."""
    if name != "README.md" or (folder / MANIFEST).is_file():
        return folder / name
    return (folder / name).read_text(encoding="utf-8").replace(HERE, repo_id).encode()


def _files(folder: Path) -> tuple[list[str], list[str]]:
    """(names to push, names left out). Raises UserError, all at once, where something must not leave."""
    if not folder.is_dir():
        raise UserError(Problem(str(folder), "no folder", "a folder with an adapter or a model"))
    check_folder(folder)
    found = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path, folder))
    kept = [path for path in found if path.suffix in ALLOWED or path.name in _NAMES]
    problems = list(_problems(folder, found, kept))
    if problems:
        raise UserError(problems)
    names = [[path.relative_to(folder).as_posix() for path in some] for some in (kept, found)]
    return names[0], sorted(set(names[1]) - set(names[0]))


def _local_base(folder: Path) -> str | None:
    """The base that an adapter names, where that is a path of this machine."""
    named = (
        read_adapter_config(folder).get("base_model_name_or_path") if (folder / CONFIG).is_file() else None
    )
    return named if isinstance(named, str) and named and not is_hub_id(named) else None


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _problems(folder: Path, found: list[Path], kept: list[Path]) -> Iterator[Problem]:
    for path in found:
        if path.suffix in PICKLED:
            expected, fix = "safetensors: pickled files run code where they are read", how_to_convert(folder)
            yield Problem(str(path), "a pickled file", expected, fix)
        elif not path.resolve().is_relative_to(folder.resolve()):
            yield Problem(str(path), "a link to a file elsewhere", "files of the folder itself", "copy it")
    if (folder / MANIFEST).is_file():
        for fault in verify_folder(folder):
            yield Problem(str(folder), fault, "files as they were written", "export or merge again")
    if not any(path.suffix in _WEIGHTS for path in kept):
        yield Problem(str(folder), "no weights", f"a file of the kinds {', '.join(_WEIGHTS)}")
    for path in kept:
        if path.suffix == ".safetensors" and (fault := _unlike_safetensors(path)):
            yield Problem(
                str(path), f"weights that are not whole ({fault})", "a whole file", "write it again"
            )
        if path.suffix in _TEXTS and path.stat().st_size <= _MOST_TEXT_BYTES:
            text = path.read_text(encoding="utf-8", errors="replace")
            if redact(text) != text:
                yield Problem(
                    str(path), "a text with a secret in it", "no token, key or password", "take it out"
                )


def _unlike_safetensors(path: Path) -> str:
    """Why a file is not safetensors from its first byte to its last; empty where it is."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            return ""
    except (SafetensorError, OSError) as error:
        return str(error)


def _refuse_unreachable(repo: str) -> None:
    """Raises UserError where the Hub must not or cannot be asked: its client would retry for a while."""
    if hub_is_off():
        fix = "unset it to push"
        raise UserError(Problem("hub", f"{repo} while HF_HUB_OFFLINE is set", "a Hub that may be asked", fix))
    if not hub_answers():
        address = redact(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
        got, fix = f"{address}, which cannot be reached", "look at the network, a proxy, and HF_ENDPOINT"
        raise UserError(Problem("hub", got, "a Hub that answers", fix))


def _problem(error: Any, repo: str, revision: str | None) -> Problem:
    """What the Hub or its client refused, as something to mend."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = getattr(getattr(error, "response", None), "status_code", None)
    target = f"{repo} at {revision}" if revision else repo
    if isinstance(error, LocalTokenNotFoundError):
        return Problem("hub", "no login", "a login of huggingface_hub", _LOG_IN)
    if isinstance(error, HFValidationError):
        return Problem("hub", f"{repo!r}", "a repository's name as owner/name", _said(error))
    if isinstance(error, GatedRepoError):
        fix = "ask for access on its page; to push, choose a repository of your own"
        return Problem("hub", f"{repo}, which is gated and not open to you", "a repository of yours", fix)
    if status == 401:
        return Problem("hub", "a login that the Hub does not take", "a valid token", _LOG_IN)
    if status == 403:
        got, fix = (
            f"no permission to write to {target}",
            f"choose a name under your own account, or {_LOG_IN}",
        )
        return Problem("hub", got, "a token that may write there", fix)
    if isinstance(error, RevisionNotFoundError):
        return Problem("hub", f"{repo} without revision {revision!r}", "the name of a branch")
    if isinstance(error, RepositoryNotFoundError):
        return Problem(
            "hub", f"{repo}, which is not there or not open to you", "a repository of yours", _LOG_IN
        )
    got = f"a push to {target} that failed ({_said(error)})"
    return Problem("hub", got, "a commit", "nothing was committed, unless the answer was lost: try again")


def _said(error: BaseException) -> str:
    """The first lines of an error without secrets, and of what it came from."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = f" <- {_said(error.__cause__)}" if error.__cause__ is not None and len(lines) < 2 else ""
    return redact(" ".join(lines[:3])[:400] or type(error).__name__) + cause


def export(path: Path, options: ExportOptions, observer: Observer) -> Exported:
    """One commit with everything. Raises UserError where the hub refuses, or nothing is there to push."""
    if not is_hub_id(options.repo) or str(options.repo).count("/") != 1:
        raise UserError(Problem("--repo", str(options.repo), "OWNER/NAME on the hub"))
    whole = whole_model(path)
    if whole is not None:
        return _pushed(whole, options, observer)
    if is_away(path) or (run_of(path) / "plan.json").is_file():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / str(options.repo).rsplit("/", 1)[-1]
            adapter.export(path, replace(options, to="adapter", out=str(folder)), observer)
            return _pushed(folder, options, observer)
    if path.is_dir() and any(path.glob("*.gguf")):
        return _pushed(path, options, observer)
    expected = "a run, an adapter, a merged or an exported folder"
    raise UserError(Problem(str(path), "nothing that can be pushed", expected))


def _pushed(folder: Path, options: ExportOptions, observer: Observer) -> Exported:
    assert options.repo is not None

    def tell(text: str) -> None:
        observer({"event": "notice", "text": text})

    where = push(folder, options.repo, private=not options.public, revision=options.revision, tell=tell)
    return Exported(where, files_in(folder))
