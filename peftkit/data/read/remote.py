"""Files behind URLs, fetched once into the cache. Nothing that is shown holds a password or a query."""

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

from peftkit.data.read.locate import KNOWN, READERS, chosen, local_files
from peftkit.data.read.rows import File
from peftkit.data.read.streams import suffixes
from peftkit.errors import Problem, UserError, did_you_mean
from peftkit.hub import cache_folder, hub_answers
from peftkit.recipe.paths import shown

TIMEOUT_SECONDS = 30.0
_PIECE = 2**16
# by which of their names filesystems tell that a file changed
_VERSION = (
    *("etag", "last-modified", "lastmodified", "last_modified", "mtime", "modified", "updated", "created"),
    *("generation", "md5hash", "crc32c", "blob_id"),
)


@dataclass
class _Transfer:
    """What the thread that fetches and the one that watches it tell each other."""

    moved: float = field(default_factory=time.monotonic)
    target: Path | None = None
    num_bytes: int = 0
    given_up: bool = False
    outcome: Any = None
    error: BaseException | None = None

    def tick(self) -> None:
        """Something came. Raises where nobody waits for it any more."""
        if self.given_up:
            raise TimeoutError
        self.moved = time.monotonic()

    def look(self) -> None:
        """Some filesystems tell nothing while they copy: what they write shows that they go on."""
        target = self.target
        num_bytes = target.stat().st_size if target is not None and target.exists() else 0
        if num_bytes != self.num_bytes:
            self.num_bytes, self.moved = num_bytes, time.monotonic()


def _watched(work: Callable[[_Transfer], Any], timeout: float) -> Any:
    """The outcome of `work`, done in a thread that is left alone once nothing came for `timeout` seconds."""
    transfer = _Transfer()

    def run() -> None:
        try:
            transfer.outcome = work(transfer)
        except BaseException as error:  # noqa: BLE001  raised again by the thread that waits
            transfer.error = error

    thread = threading.Thread(target=run, name="peftkit-fetch", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.05)
            transfer.look()
            if thread.is_alive() and time.monotonic() - transfer.moved > timeout:
                raise TimeoutError
    finally:
        transfer.given_up = True
        if thread.is_alive() and transfer.target is not None:
            transfer.target.unlink(missing_ok=True)
    if transfer.error is not None:
        raise transfer.error
    return transfer.outcome


def remote_files(url: str, where: str, *, timeout: float | None = None) -> list[File]:
    """The files behind a URL, in the cache. Raises UserError where they cannot be had."""
    timeout = TIMEOUT_SECONDS if timeout is None else timeout
    scheme = urlsplit(url).scheme.lower()
    if scheme in {"file", "local"}:
        return local_files(unquote(url.split("://", 1)[1]), "train", where)
    if scheme == "hf" and not hub_answers():
        fix = "give a file, or see that the hub can be reached and HF_HUB_OFFLINE is not set"
        raise UserError(Problem(where, f"{shown(url)} while the hub cannot be asked", "data at hand", fix))

    def work(transfer: _Transfer) -> list[File]:
        if scheme in {"http", "https"}:
            return [_http(url, where, transfer, timeout)]
        return _filesystem(url, where, transfer)

    try:
        found: list[File] = _watched(work, timeout)
        return found
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  each filesystem raises its own types; their text may hold secrets
        raise UserError(_problem(url, where, error, timeout)) from None


def _problem(url: str, where: str, error: Exception, timeout: float) -> Problem:
    """Why a URL could not be fetched."""
    name = shown(url)
    if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
        got, fix = f"{name}, from which nothing came for {timeout:g} s", "try again, or fetch it by hand"
        return Problem(where, got, "a server that answers", fix)
    if isinstance(error, FileNotFoundError):
        return Problem(where, f"{name}, which is not there", "a data file", "check the address")
    if isinstance(error, ImportError):
        got = f"{name} without the package that reads {urlsplit(url).scheme}://"
        return Problem(where, got, "the package", _pip_line(urlsplit(url).scheme, error))
    said = (str(error).splitlines() or [""])[0] or type(error).__name__
    parts = urlsplit(url)
    login, password = parts.netloc.rpartition("@")[0], parts.password or ""
    for secret in (parts.query, login, password, unquote(password)):
        said = said.replace(secret, "***") if secret else said
    got = f"{name}, which cannot be fetched ({shown(said)[:200]})"
    return Problem(where, got, "a URL that can be read", "check the address and your access to it")


def _pip_line(scheme: str, error: ImportError) -> str:
    from fsspec.registry import known_implementations

    package = known_implementations.get(scheme, {}).get("class", "fsspec").split(".")[0]
    return str(error) if package == "fsspec" else f"pip install {package.replace('_', '-')}"


def _kept(
    address: tuple[str, str],
    facts: Mapping[str, Any],
    transfer: _Transfer,
    write: Callable[[Path], None],
    size: int | None,
) -> Path:
    """The cached copy of what `write` fetches: fetched only where the same version is not there yet.

    `address` is the URL that was asked for and the path of this file behind it.
    """
    known = {name.lower(): value for name, value in facts.items()}
    version = [f"{name}={known[name]}" for name in _VERSION if known.get(name) is not None]
    key = hashlib.sha256("\0".join([*address, *version]).encode()).hexdigest()[:32]
    folder = cache_folder() / "remote" / key
    final = folder / f"content{''.join(suffixes(Path(address[1])))}"
    if version and final.is_file():  # where nothing tells a version, it is fetched again
        return final
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, prefix=".tmp-")
    os.close(handle)
    target = transfer.target = Path(name)
    try:
        write(target)
        got = target.stat().st_size
        if size is not None and got != size:
            raise OSError(f"{got:,} of {size:,} bytes came")
        transfer.tick()
        target.chmod(0o644)
        target.replace(final)
    finally:
        target.unlink(missing_ok=True)
    return final


def _check_kind(name: str, url: str, where: str) -> None:
    if suffixes(Path(name))[0] not in READERS:
        raise UserError(Problem(where, shown(url), f"a file of a known kind: {KNOWN}"))


def _request(parts: SplitResult) -> Any:
    """A request whose password is sent as a header, to no other host than the one named."""
    from urllib.request import Request

    login, _, host = parts.netloc.rpartition("@")
    request = Request(parts._replace(netloc=host, fragment="").geturl(), headers={"User-Agent": "peftkit"})
    if login:
        token = base64.b64encode(unquote(login).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request


def _http(url: str, where: str, transfer: _Transfer, timeout: float) -> File:
    """One file over HTTP, by the standard library: no package is needed for it."""
    from urllib.request import urlopen

    parts = urlsplit(url)
    if "*" in parts.path:
        fix = "name the files one by one in a list"
        raise UserError(Problem(where, shown(url), "one file: a web server lists none", fix))
    _check_kind(parts.path, url, where)
    with urlopen(_request(parts), timeout=timeout) as response:
        transfer.tick()
        if response.headers.get_content_type() == "text/html":
            fix = "use the address of the file itself, often called raw or download"
            raise UserError(Problem(where, f"{shown(url)}, which is a web page", "a data file", fix))

        def write(path: Path) -> None:
            with path.open("wb") as file:
                while piece := response.read1(_PIECE):
                    file.write(piece)
                    transfer.tick()

        size = response.headers.get("Content-Length")
        kept = _kept((url, parts.path), dict(response.headers), transfer, write, int(size) if size else None)
        return File(kept, shown(url))


def _filesystem(url: str, where: str, transfer: _Transfer) -> list[File]:
    """The files behind a URL of any filesystem that fsspec knows: one, a folder's, or a glob's."""
    import fsspec

    scheme = urlsplit(url).scheme
    if scheme not in fsspec.available_protocols():
        fix = did_you_mean(scheme, fsspec.available_protocols())
        raise UserError(Problem(where, shown(url), "a known protocol before ://", fix))
    system, path = fsspec.core.url_to_fs(url)
    transfer.tick()
    if "*" in path or "[" in path:
        found = [name for name, facts in system.glob(path, detail=True).items() if facts["type"] == "file"]
        if not found:
            raise UserError(Problem(where, f"{shown(url)}, which matches no file", "a glob that matches"))
        names = chosen(found, shown(url), where, hidden=True)
    elif system.isdir(path):
        root = path.rstrip("/") + "/"
        below = [name.removeprefix(root) for name in system.find(path)]
        names = [root + name for name in chosen(below, shown(url), where)]
    else:
        _check_kind(path, url, where)
        return [_copied(system, path, (url, url), transfer)]
    return [_copied(system, name, (url, system.unstrip_protocol(name)), transfer) for name in names]


def _copied(system: Any, path: str, urls: tuple[str, str], transfer: _Transfer) -> File:
    """One file of a filesystem; `urls` are the one asked for and the file's own."""
    from fsspec.callbacks import Callback

    def write(target: Path) -> None:
        system.get_file(
            path, str(target), callback=Callback(hooks={"tick": lambda *_, **__: transfer.tick()})
        )

    facts = system.info(path)
    transfer.tick()
    return File(_kept((urls[0], path), facts, transfer, write, facts.get("size")), shown(urls[1]))
