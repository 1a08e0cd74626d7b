"""Files of URLs, fetched once into the cache. No message shows a password or a query."""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from peftkit.data.read.locate import KNOWN_KINDS, READERS, local_files, select_data_files
from peftkit.data.read.rows import File
from peftkit.data.read.streams import split_suffixes
from peftkit.errors import Problem, UserError, did_you_mean
from peftkit.hub import cache_folder, probe_hub
from peftkit.recipe.paths import redact_url

STALL_TIMEOUT_SECONDS = 30.0
_CHUNK_BYTES = 2**16
# by which of their names filesystems tell that a file changed
_VERSION_FIELDS = (
    *("etag", "last-modified", "lastmodified", "last_modified", "mtime", "modified", "updated", "created"),
    *("generation", "md5hash", "crc32c", "blob_id"),
)


@dataclass
class _Transfer:
    """The state shared by the thread that fetches and the thread that watches its progress."""

    last_progress: float = field(default_factory=time.monotonic)
    target: Path | None = None
    num_bytes: int = 0
    is_cancelled: bool = False
    outcome: Any = None
    error: BaseException | None = None

    def record_progress(self) -> None:
        """Record that data arrived. Raises TimeoutError once the transfer is cancelled."""
        if self.is_cancelled:
            raise TimeoutError
        self.last_progress = time.monotonic()

    def look(self) -> None:
        """Record progress if the target file grew: some filesystems report nothing while they copy."""
        target = self.target
        num_bytes = target.stat().st_size if target is not None and target.exists() else 0
        if num_bytes != self.num_bytes:
            self.num_bytes, self.last_progress = num_bytes, time.monotonic()


def _run_with_stall_timeout(fetch: Callable[[_Transfer], Any], timeout: float) -> Any:
    """Return the result of `fetch`, run in a thread that is abandoned after `timeout` seconds without data.

    Raises TimeoutError then, and otherwise whatever `fetch` raised. An abandoned thread ends at its next
    `record_progress`; its partial file is removed.
    """
    transfer = _Transfer()

    def run() -> None:
        try:
            transfer.outcome = fetch(transfer)
        except BaseException as error:  # noqa: BLE001  raised again by the thread that waits
            transfer.error = error

    thread = threading.Thread(target=run, name="peftkit-fetch", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.05)
            transfer.look()
            if thread.is_alive() and time.monotonic() - transfer.last_progress > timeout:
                raise TimeoutError
    finally:
        transfer.is_cancelled = True
        if thread.is_alive() and transfer.target is not None:
            transfer.target.unlink(missing_ok=True)
    if transfer.error is not None:
        raise transfer.error
    return transfer.outcome


def remote_files(url: str, where: str, *, timeout: float | None = None) -> list[File]:
    """Return the files of a URL, in the cache. Raises UserError if they cannot be fetched."""
    timeout = STALL_TIMEOUT_SECONDS if timeout is None else timeout
    scheme = urlsplit(url).scheme.lower()
    if scheme in {"file", "local"}:
        return local_files(unquote(url.split("://", 1)[1]), "train", where)
    if scheme == "hf" and not probe_hub():
        fix = "give a file, or see that the hub can be reached and HF_HUB_OFFLINE is not set"
        raise UserError(
            Problem(where, f"{redact_url(url)} while the hub cannot be reached", "data that is available", fix)
        )

    def fetch(transfer: _Transfer) -> list[File]:
        if scheme in {"http", "https"}:
            # one file over HTTP, with the standard library
            parts = urlsplit(url)
            if "*" in parts.path:
                fix = "name the files one by one in a list"
                raise UserError(Problem(where, redact_url(url), "one file: a web server has no file list", fix))
            _check_kind(parts.path, url, where)
            with _open_http(parts, timeout) as response:
                transfer.record_progress()
                if response.headers.get_content_type() == "text/html":
                    fix = "use the address of the file itself, often called raw or download"
                    raise UserError(Problem(where, f"{redact_url(url)}, which is a web page", "a data file", fix))

                def write(path: Path) -> None:
                    with path.open("wb") as file:
                        while chunk := response.read1(_CHUNK_BYTES):
                            file.write(chunk)
                            transfer.record_progress()

                size = response.headers.get("Content-Length")
                cached = _fetch_to_cache(
                    (url, parts.path), dict(response.headers), transfer, write, int(size) if size else None
                )
                return [File(cached, redact_url(url))]
        # any filesystem that fsspec knows
        import fsspec

        if scheme not in fsspec.available_protocols():
            fix = did_you_mean(scheme, fsspec.available_protocols())
            raise UserError(Problem(where, redact_url(url), "a known protocol before ://", fix))
        system, path = fsspec.core.url_to_fs(url)
        transfer.record_progress()
        if "*" in path or "[" in path:
            matches = [name for name, facts in system.glob(path, detail=True).items() if facts["type"] == "file"]
            if not matches:
                raise UserError(Problem(where, f"{redact_url(url)}, which matches no file", "a glob that matches"))
            names = select_data_files(matches, redact_url(url), where, include_hidden=True)
        elif system.isdir(path):
            root = path.rstrip("/") + "/"
            relative_names = [name.removeprefix(root) for name in system.find(path)]
            names = [root + name for name in select_data_files(relative_names, redact_url(url), where)]
        else:
            _check_kind(path, url, where)
            return [_fetch_one(system, path, (url, url), transfer)]
        return [_fetch_one(system, name, (url, system.unstrip_protocol(name)), transfer) for name in names]

    try:
        files: list[File] = _run_with_stall_timeout(fetch, timeout)
        return files
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  each filesystem raises its own types; their text may hold secrets
        raise UserError(_fetch_problem(url, where, error, timeout)) from None


def _fetch_problem(url: str, where: str, error: Exception, timeout: float) -> Problem:
    """Explain why a URL could not be fetched, without the secrets of the URL."""
    name = redact_url(url)
    if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
        got, fix = f"{name}, which sent nothing for {timeout:g} s", "try again, or fetch it by hand"
        return Problem(where, got, "a server that answers", fix)
    if isinstance(error, FileNotFoundError):
        return Problem(where, f"{name}, which does not exist", "a data file", "check the address")
    if isinstance(error, ImportError):
        scheme = urlsplit(url).scheme
        got = f"{name} without the package that reads {scheme}://"
        from fsspec.registry import known_implementations

        package = known_implementations.get(scheme, {}).get("class", "fsspec").split(".")[0]
        pip_line = str(error) if package == "fsspec" else f"pip install {package.replace('_', '-')}"
        return Problem(where, got, "the package", pip_line)
    message = (str(error).splitlines() or [""])[0] or type(error).__name__
    parts = urlsplit(url)
    login, password = parts.netloc.rpartition("@")[0], parts.password or ""
    for secret in (parts.query, login, password, unquote(password)):
        message = message.replace(secret, "***") if secret else message
    got = f"{name}, which cannot be fetched ({redact_url(message)[:200]})"
    return Problem(where, got, "a URL that can be read", "check the address and your access to it")


def _fetch_to_cache(
    address: tuple[str, str],
    facts: Mapping[str, object],
    transfer: _Transfer,
    write: Callable[[Path], None],
    size: int | None,
) -> Path:
    """Return the cached copy of what `write` fetches; fetch it only if that version is not there yet.

    `address` is the URL that was asked for and the path of this file behind it. `facts` are headers or file
    info, of which _VERSION_FIELDS tell the version. Raises OSError if not `size` bytes arrived.
    """
    metadata = {name.lower(): value for name, value in facts.items()}
    version = [f"{name}={metadata[name]}" for name in _VERSION_FIELDS if metadata.get(name) is not None]
    key = hashlib.sha256("\0".join([*address, *version]).encode()).hexdigest()[:32]
    folder = cache_folder() / "remote" / key
    final = folder / f"content{''.join(split_suffixes(Path(address[1])))}"
    if version and final.is_file():  # where nothing tells a version, it is fetched again
        return final
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, prefix=".tmp-")
    os.close(handle)
    target = transfer.target = Path(name)
    try:
        write(target)
        num_received = target.stat().st_size
        if size is not None and num_received != size:
            raise OSError(f"{num_received:,} of {size:,} bytes received")
        transfer.record_progress()
        target.chmod(0o644)
        target.replace(final)
    finally:
        target.unlink(missing_ok=True)
    return final


def _check_kind(name: str, url: str, where: str) -> None:
    if split_suffixes(Path(name))[0] not in READERS:
        raise UserError(Problem(where, redact_url(url), f"a file of a known kind: {KNOWN_KINDS}"))


def _open_http(parts: SplitResult, timeout: float) -> Any:
    """Open a URL, whose password is sent as a header, only to the named host. Returns the response."""
    from urllib.request import Request, urlopen

    login, _, host = parts.netloc.rpartition("@")
    request = Request(parts._replace(netloc=host, fragment="").geturl(), headers={"User-Agent": "peftkit"})
    if login:
        token = base64.b64encode(unquote(login).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return urlopen(request, timeout=timeout)


def _fetch_one(system: Any, path: str, urls: tuple[str, str], transfer: _Transfer) -> File:
    """Fetch one file of a filesystem; `urls` are the one asked for and the file's own."""
    from fsspec.callbacks import Callback

    def write(target: Path) -> None:
        system.get_file(
            path, str(target), callback=Callback(hooks={"tick": lambda *_, **__: transfer.record_progress()})
        )

    facts = system.info(path)
    transfer.record_progress()
    return File(_fetch_to_cache((urls[0], path), facts, transfer, write, facts.get("size")), redact_url(urls[1]))
