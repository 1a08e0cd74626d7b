"""Redaction of secrets in texts: tokens, keys, passwords in URLs, and secret environment variables.

Every sink (errors, events, files, cards, tracebacks) passes its text through `redact`. A secret is recognised
by its shape, by the name before it, or as the value of a variable such as HF_TOKEN.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

REDACTED = "REDACTED"  # plain: brackets would steer Markdown, YAML, rich or HTML

# (what it holds in any case, what it is, its shape): known wherever they stand; the data gate looks too.
SHAPES: tuple[tuple[str, str, re.Pattern[str]], ...] = tuple(
    (mark, name, re.compile(pattern))
    for mark, name, pattern in (
        ("-----BEGIN", "a private key", r"-----BEGIN (?:[A-Z]+ ){0,2}PRIVATE KEY(?: BLOCK)?-----"),
        ("AKIA", "an AWS access key", r"\bAKIA[0-9A-Z]{16}\b"),
        ("ASIA", "an AWS access key", r"\bASIA[0-9A-Z]{16}\b"),
        ("sk-", "an API key", r"\bsk-(?:proj-|ant-[a-z0-9]+-)?[A-Za-z0-9_-]{20,}"),
        ("sk_live_", "a Stripe key", r"\bsk_live_[A-Za-z0-9]{16,}"),
        ("gh", "a GitHub token", r"\bgh[pousr]_[A-Za-z0-9]{36,}"),
        ("github_pat_", "a GitHub token", r"\bgithub_pat_[A-Za-z0-9_]{40,}"),
        ("glpat-", "a GitLab token", r"\bglpat-[A-Za-z0-9_-]{20,}"),
        ("hf_", "a Hugging Face token", r"\bhf_(?:oauth_[\w.-]{20,}|[A-Za-z0-9]{30,})"),
        ("api_org_", "a Hugging Face token", r"\bapi_org_[A-Za-z0-9]{30,}"),
        ("wandb_v1_", "a W&B key", r"\bwandb_v1_[A-Za-z0-9_-]{20,}"),
        ("xox", "a Slack token", r"\bxox[abprs]-[A-Za-z0-9-]{10,}"),
        ("AIza", "a Google API key", r"\bAIza[A-Za-z0-9_-]{35}\b"),
        ("ya29.", "a Google access token", r"\bya29\.[A-Za-z0-9_-]{20,}"),
        ("eyJ", "a signed web token", r"(?<![\w-])eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
    )
)

_NAMES = (
    r"(?:access[_-]?key|session_token|security_?token|api[_-]?key|account_?key|access_?signature"
    r"|client[_-]?secret|access[_-]?token|refresh_?token|auth_?token|id_token|hf_token|hub_token|github_token"
    r"|private_?key|passw(?:or)?d)"
)
_NAME_MARKS = (
    "accesskey access_key access-key apikey api_key api-key accountkey account_key session_token "
    "securitytoken security_token access_signature accesssignature clientsecret client_secret client-secret "
    "accesstoken access_token access-token refreshtoken refresh_token authtoken auth_token id_token hf_token "
    "hub_token github_token privatekey private_key passw"
)
_QUERY_NAMES = (
    r"(?:x-(?:amz|goog)-(?:signature|credential|security-token)|awsaccesskeyid|sig|signature|auth"
    r"|authorization|pwd|sas|(?:[\w-]{0,40}[_-])?(?:token|key|secret|password|apikey))"
)


class _Rule(NamedTuple):
    """A pattern tried only if the lower-case text contains one of `marks`; its group 1 is kept."""

    marks: tuple[str, ...]
    pattern: re.Pattern[str]


def _rule(marks: str, pattern: str) -> _Rule:
    return _Rule(tuple(marks.split()), re.compile(pattern, re.IGNORECASE | re.DOTALL))


_RULES: tuple[_Rule, ...] = (
    # whole, or cut off before its end
    _rule("-----begin", r"()-----BEGIN (?:[A-Z]+ ){0,2}PRIVATE KEY[^-]*-----.*?(?:-----END [A-Z ]*KEY[^-]*-----|\Z)"),
    # the password may hold a slash, unless that would make a port and a path of it
    _rule("://", r"(://)(?:[^\s/?#\"'<>]*|[^\s/@\"'<>:]*:(?!\d+/)(?:(?!://)[^\s\"'@<>])*)(?=@)"),
    _rule("=", rf"([?&;]{_QUERY_NAMES}=)[^&\s#\"'<>]+"),
    _rule("sig=", r"(\bsig=)[A-Za-z0-9%+/=_-]{20,}"),
    _rule(
        "authorization", r"(authorization[\"']?\s{0,8}[:=]\s{0,8}[\"']?(?:bearer|basic|token|digest)\s{1,8})[^\s\"',]+"
    ),
    _rule("authorization", r"(authorization[\"']?\s{0,8}[:=]\s{0,8}[\"']?)(?=\S{0,400}\d)[^\s\"',]{16,}"),
    _rule("bearer", r"(\bbearer\s{1,8})(?=\S{0,400}\d)[\w.~+/=-]{16,}"),
    _rule("wandb", r"(wandb(?:(?!commit|revision|sha)[^\n]){0,48}?(?<![0-9a-f]))[0-9a-f]{40}(?![0-9a-f])"),
    _rule(_NAME_MARKS, rf"({_NAMES}(?:[\"']\s{{0,8}}[:=]\s{{0,8}}[\"']|=[\"']?))(?!REDACTED)[^\s\"',;&<>]{{8,}}"),
    _rule(  # as YAML and headers have it; a sentence may go on after `password: `
        "key: session_token:",
        r"((?:secret_?access_?key|session_token|api[_-]?key|account_?key):\s{1,8})[^\s\"',;&]{16,}",
    ),
)
_SECRET_KEY = re.compile(rf"(?:^|[_-]){_NAMES}$", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(
    r"(?:^|_)(?:TOKEN|API_?KEY|SECRET|PASSWORD|PASSWD|SECRET_KEY|ACCESS_KEY|ACCOUNT_KEY|STORAGE_KEY"
    r"|PRIVATE_KEY|CONNECTION_STRING|SAS)$|^AWS_ACCESS_KEY_ID$",
    re.IGNORECASE,
)
_MIN_CHARACTERS = 8  # characters of a value: what is shorter would stand in ordinary texts
_MAX_TOKEN_FILE_BYTES = 2**16
_STALE_SECONDS = 1.0


def _stored_tokens() -> list[str]:
    """Return the tokens in huggingface_hub's files, which hold one token or `name = token` lines."""
    tokens = []
    # where huggingface_hub keeps the tokens of a login
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111  Path's may raise
    home = Path(os.environ.get("HF_HOME") or Path(cache) / "huggingface")
    token_files = [Path(os.environ.get("HF_TOKEN_PATH") or home / "token"), home / "stored_tokens"]
    for path in token_files:
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                lines = file.read(_MAX_TOKEN_FILE_BYTES).splitlines()
        except OSError:
            continue  # no login, which is the usual case
        tokens += [line.rpartition("=")[2].strip() for line in lines if not line.startswith("[")]
    return tokens


class _Environment:
    """Cache of the secret values of the environment and of the login, refreshed when they may have changed.

    Values are never dropped: a variable that is unset now may have been printed before.
    """

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.seen: set[str] = set()
        self.encodings: tuple[str, ...] = ()
        self.size = -1
        self.read_at = 0.0

    def literals(self) -> tuple[str, ...]:
        """Return the texts to redact, longest first, as one may contain another."""
        environ = os.environ
        if (
            len(environ) != self.size
            or time.monotonic() - self.read_at > _STALE_SECONDS
            or any(environ.get(name) != value for name, value in self.values.items())
        ):
            self.size, self.read_at = len(os.environ), time.monotonic()
            self.values = {name: value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)}
            new_secrets = {value.strip() for value in (*self.values.values(), *_stored_tokens())} - self.seen
            if new_secrets:
                self.seen |= new_secrets
                forms = set[str]()
                for value in self.seen:
                    if len(value) >= _MIN_CHARACTERS:  # as it stands in texts, in JSON, in a Python repr, in URLs
                        forms |= {value, json.dumps(value)[1:-1], repr(value)[1:-1], quote(value, safe="")}
                self.encodings = tuple(sorted(forms, key=len, reverse=True))
        return self.encodings


_ENVIRONMENT = _Environment()
_redact_match: Callable[[re.Match[str]], str] = lambda found: found[1] + REDACTED  # noqa: E731


def redact(text: str) -> str:
    """Replace every secret in a text by REDACTED; return it unchanged if there is none.

    Costs some microseconds for a line without secrets: patterns run only if their marks occur.
    """
    for literal in _ENVIRONMENT.literals():
        if literal in text:
            text = text.replace(literal, REDACTED)
    lower = text.lower()
    for marks, pattern in _RULES:
        for mark in marks:
            if mark in lower:
                text = pattern.sub(_redact_match, text)
                break
    for mark, _, pattern in SHAPES:
        if mark in text:
            text = pattern.sub(REDACTED, text)
    return text


def redact_value(value: object) -> Any:
    """Redact every string of a JSON-like value, keys too; strings under names such as api_key wholly."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {
            redact(key) if isinstance(key, str) else key: REDACTED
            if isinstance(key, str) and isinstance(item, str) and item and _SECRET_KEY.search(key)
            else redact_value(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [redact_value(item) for item in value]
    if isinstance(value, tuple):
        return tuple(redact_value(item) for item in value)
    return value
