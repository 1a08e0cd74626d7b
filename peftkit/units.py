"""Numbers as people read them: bytes, counts, shares, durations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from math import isqrt

_SHARE = re.compile(r"^(\d+(?:\.\d+)?)\s*%$")


def parse_share(text: str) -> float:
    """'5%' -> 0.05. Raises ValueError for anything that is not a percentage from 0% to 100%."""
    found = _SHARE.match(text.strip())
    if not found or not 0 <= float(found[1]) <= 100:
        raise ValueError(f"{text!r} is not a percentage such as 5%")
    return float(found[1]) / 100


def clipped(text: str, most: int = 60) -> str:
    """A foreign text as a message shows it: not longer than a line holds."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def listed(names: Sequence[str], most: int = 20) -> str:
    """Foreign names in a row: the first few, each clipped, and how many more there are."""
    more = [f"{len(names) - most:,} more"] if len(names) > most else []
    return ", ".join([*(clipped(name) for name in names[:most]), *more])


def divisors(number: int) -> list[int]:
    """All divisors, the largest first. Takes as long as the number's root is large."""
    small = [size for size in range(1, isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)}, reverse=True)


def show_bytes(num_bytes: float) -> str:
    """Binary units: 3 GiB is 3 * 2**30 bytes."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def show_count(count: int) -> str:
    """1234567 -> '1,234,567'."""
    return f"{count:,}"


def show_percent(share: float) -> str:
    """0.00123 -> '0.123 %', with enough digits for small shares."""
    percent = share * 100
    digits = 1 if percent >= 10 else 2 if percent >= 1 else 3
    return f"{percent:.{digits}f} %"


def show_seconds(seconds: float) -> str:
    """75 -> '1 min 15 s'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """A text that a terminal only shows: what would steer it, or turn its direction, becomes <1B>."""
    return _UNPRINTABLE.sub(lambda found: f"<{ord(found[0]):02X}>", text)


def html_table(rows: Iterable[Sequence[str]]) -> str:
    """Rows of texts as a table for notebooks, escaped."""
    cells = ("".join(f"<td style='text-align:left'>{escape(text)}</td>" for text in row) for row in rows)
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in cells) + "</table>"
