"""Push of a folder to a repository of the Hub, whole and in one commit, or not at all.

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

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is its transport's
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from peftkit.errors import Problem, UserError
from peftkit.hub import hub_is_offline, probe_hub
from peftkit.model.adapter.load import ADAPTER_CONFIG, read_adapter_config
from peftkit.model.base.file_checks import PICKLE_SUFFIXES, check_model_folder, conversion_fix
from peftkit.results.find import is_standalone_adapter, run_folder
from peftkit.rundir import MANIFEST, verify_folder
from peftkit.rundir.events import NoticeEvent, Observer
from peftkit.secrets import redact
from peftkit.ship.card.card import is_hub_id
from peftkit.ship.card.usage import FOLDER_PLACEHOLDER
from peftkit.ship.export import adapter
from peftkit.ship.export.base import Exported, ExportOptions, file_sizes, full_model_folder
from peftkit.units import join_names

ALLOWED_SUFFIXES = (".safetensors", ".gguf", ".json", ".jinja", ".md", ".txt", ".model")
_ALLOWED_NAMES = ("Modelfile",)
_WEIGHT_SUFFIXES = (".safetensors", ".gguf")
_TEXT_SUFFIXES = (".json", ".jinja", ".md", ".txt")
_MAX_TEXT_BYTES = 2**18  # vocabularies are larger, and hold no secrets
_LOGIN_HINT = "hf auth login, with a write token"


def push_folder(
    folder: Path,
    repo: str,
    *,
    private: bool = True,
    revision: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> str:
    """Push the files of a model or an adapter; return the URL of the commit.

    `repo` is created where it is missing, and so is the branch `revision`. Pushing the same files again
    commits nothing. `tell` is called with notes on what is left out. Raises UserError, before anything is
    sent, for pickles, files that are incomplete or hold secrets, and where the Hub may not be contacted; and
    for what the Hub refuses.
    """
    if not folder.is_dir():
        raise UserError(Problem(str(folder), "no folder", "a folder with an adapter or a model"))
    check_model_folder(folder)
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    allowed = [path for path in paths if path.suffix in ALLOWED_SUFFIXES or path.name in _ALLOWED_NAMES]
    problems = list(_file_problems(folder, paths, allowed))
    if problems:
        raise UserError(problems)
    listings = [[path.relative_to(folder).as_posix() for path in selection] for selection in (allowed, paths)]
    names, left_out = listings[0], sorted(set(listings[1]) - set(listings[0]))
    if hub_is_offline():
        fix = "unset it to push"
        raise UserError(Problem("hub", f"{repo} while HF_HUB_OFFLINE is set", "online access to the Hub", fix))
    if not probe_hub():
        address = redact(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
        got, fix = f"{address}, which cannot be reached", "check the network, the proxy and HF_ENDPOINT"
        raise UserError(Problem("hub", got, "a Hub that answers", fix))
    if left_out:
        tell(f"not pushed, as their type is not allowed: {join_names(left_out)}")
    named_base = (
        read_adapter_config(folder).get("base_model_name_or_path") if (folder / ADAPTER_CONFIG).is_file() else None
    )
    local_base = named_base if isinstance(named_base, str) and named_base and not is_hub_id(named_base) else None
    if local_base is not None:
        note = "others cannot load it, and it reveals your folders"
        tell(f"{ADAPTER_CONFIG} names its base by a path, {local_base}: {note}")

    try:
        # one commit; repository and branch are created where they are missing
        api = HfApi()
        api.whoami()  # first: without a login the Hub says of everything that it is not there
        repo_id = api.create_repo(repo, private=private, exist_ok=True).repo_id
        is_private = bool(api.model_info(repo_id).private)
        if private and not is_private:
            got, expected = f"{repo_id}, which is public", "a private repository, as requested"
            fix = "push to another name, allow a public one (--public), or make it private in its settings"
            raise UserError(Problem("hub", got, expected, fix))
        if is_private and not private:
            tell(f"{repo_id} exists and stays private")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            [
                CommitOperationAdd(
                    path_in_repo=name,
                    path_or_fileobj=(
                        folder / name
                        if name != "README.md" or (folder / MANIFEST).is_file()
                        else (folder / name).read_text(encoding="utf-8").replace(FOLDER_PLACEHOLDER, repo_id).encode()
                    ),
                )
                for name in names
            ],
            commit_message="Pushed by peftkit",
            revision=revision,
        )
        return str(commit.commit_url)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        problem = _hub_problem(error, repo, revision)
    raise UserError(problem)  # outside: the client's errors hold the request, with its token


def _file_problems(folder: Path, paths: list[Path], allowed: list[Path]) -> Iterator[Problem]:
    """Yield the problems that forbid a push: pickles, links, damaged files, no weights, secrets."""
    for path in paths:
        if path.suffix in PICKLE_SUFFIXES:
            expected, fix = "safetensors: loading pickled files runs code", conversion_fix(folder)
            yield Problem(str(path), "a pickled file", expected, fix)
        elif not path.resolve().is_relative_to(folder.resolve()):
            yield Problem(
                str(path), "a link to a file outside the folder", "files of the folder itself", "copy the file"
            )
    if (folder / MANIFEST).is_file():
        for fault in verify_folder(folder):
            yield Problem(str(folder), fault, "files as they were written", "export or merge again")
    if not any(path.suffix in _WEIGHT_SUFFIXES for path in allowed):
        yield Problem(str(folder), "no weights", f"a file of the kinds {', '.join(_WEIGHT_SUFFIXES)}")
    for path in allowed:
        if path.suffix == ".safetensors" and (fault := _safetensors_fault(path)):
            yield Problem(str(path), f"damaged weights ({fault})", "a complete file", "export or merge again")
        if path.suffix in _TEXT_SUFFIXES and path.stat().st_size <= _MAX_TEXT_BYTES:
            text = path.read_text(encoding="utf-8", errors="replace")
            if redact(text) != text:
                yield Problem(str(path), "a text file with a secret", "no token, key or password", "remove it")


def _safetensors_fault(path: Path) -> str:
    """Return why a file is not complete safetensors; empty where it is."""
    try:
        with safe_open(path, framework="np"):
            return ""
    except (SafetensorError, OSError) as error:
        return str(error)


def _hub_problem(error: Any, repo: str, revision: str | None) -> Problem:
    """Return an error of the Hub or its client as a Problem with a fix."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    target = f"{repo} at {revision}" if revision else repo
    if isinstance(error, LocalTokenNotFoundError):
        return Problem("hub", "no login", "a Hugging Face login", _LOGIN_HINT)
    if isinstance(error, HFValidationError):
        return Problem("hub", f"{repo!r}", "a repository's name as owner/name", _error_text(error))
    if isinstance(error, GatedRepoError):
        fix = "ask for access on its page; to push, choose a repository of your own"
        return Problem("hub", f"{repo}, which is gated and not accessible to you", "a repository of yours", fix)
    if status == 401:
        return Problem("hub", "a login that the Hub rejects", "a valid token", _LOGIN_HINT)
    if status == 403:
        got, fix = (f"no permission to write to {target}", f"choose a name under your own account, or {_LOGIN_HINT}")
        return Problem("hub", got, "a token that may write there", fix)
    if isinstance(error, RevisionNotFoundError):
        return Problem("hub", f"{repo} without revision {revision!r}", "the name of a branch")
    if isinstance(error, RepositoryNotFoundError):
        return Problem(
            "hub", f"{repo}, which does not exist or is not accessible to you", "a repository of yours", _LOGIN_HINT
        )
    got = f"a push to {target} that failed ({_error_text(error)})"
    return Problem("hub", got, "a commit", "nothing was committed, unless the answer was lost: try again")


def _error_text(error: BaseException) -> str:
    """Return the first lines of an error without secrets, and of its cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = f" <- {_error_text(error.__cause__)}" if error.__cause__ is not None and len(lines) < 2 else ""
    return redact(" ".join(lines[:3])[:400] or type(error).__name__) + cause


def export(path: Path, options: ExportOptions, observer: Observer) -> Exported:
    """Push everything in one commit. Raises UserError where the hub refuses, or there is nothing to push."""
    if not is_hub_id(options.repo) or str(options.repo).count("/") != 1:
        raise UserError(Problem("--repo", str(options.repo), "OWNER/NAME on the hub"))
    full_model = full_model_folder(path)
    if full_model is not None:
        return _push(full_model, options, observer)
    if is_standalone_adapter(path) or (run_folder(path) / "plan.json").is_file():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / str(options.repo).rsplit("/", 1)[-1]
            adapter.export(path, replace(options, to="adapter", out=str(folder)), observer)
            return _push(folder, options, observer)
    if path.is_dir() and any(path.glob("*.gguf")):
        return _push(path, options, observer)
    expected = "a run, an adapter, a merged or an exported folder"
    raise UserError(Problem(str(path), "nothing that can be pushed", expected))


def _push(folder: Path, options: ExportOptions, observer: Observer) -> Exported:
    assert options.repo is not None

    def tell(text: str) -> None:
        observer(NoticeEvent(text=text))

    url = push_folder(folder, options.repo, private=not options.public, revision=options.revision, tell=tell)
    return Exported(url, file_sizes(folder))
