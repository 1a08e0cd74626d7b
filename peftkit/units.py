"""Human-readable numbers and texts: bytes, counts, shares, durations, tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from math import isqrt

_PERCENTAGE = re.compile(r"^(\d+(?:\.\d+)?)\s*%$")


def parse_share(text: str) -> float:
    """Parse a percentage: '5%' -> 0.05. Raises ValueError for anything but 0% to 100%."""
    match = _PERCENTAGE.match(text.strip())
    if not match or not 0 <= float(match[1]) <= 100:
        raise ValueError(f"{text!r} is not a percentage such as 5%")
    return float(match[1]) / 100


def shorten(text: str, max_characters: int = 60) -> str:
    """Shorten a foreign text for a message to `max_characters`, ending with three dots."""
    return text if len(text) <= max_characters else f"{text[: max_characters - 3]}..."


def join_names(names: Sequence[str], max_names: int = 20) -> str:
    """Join foreign names by commas: the first few, each shortened, and the number of the rest."""
    remainder = [f"{len(names) - max_names:,} more"] if len(names) > max_names else []
    return ", ".join([*(shorten(name) for name in names[:max_names]), *remainder])


def divisors(number: int) -> list[int]:
    """Return all divisors of `number`, largest first, in O(sqrt(number))."""
    small = [size for size in range(1, isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)}, reverse=True)


def show_bytes(num_bytes: float) -> str:
    """Format bytes in binary units: 3 * 2**30 -> '3.00 GiB'."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def show_count(count: int) -> str:
    """Format an integer with thousands separators: 1234567 -> '1,234,567'."""
    return f"{count:,}"


def show_percent(share: float) -> str:
    """Format a share as a percentage, with more digits for small ones: 0.00123 -> '0.123 %'."""
    percent = share * 100
    digits = 1 if percent >= 10 else 2 if percent >= 1 else 3
    return f"{percent:.{digits}f} %"


def show_seconds(seconds: float) -> str:
    """Format a duration: 75 -> '1 min 15 s'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Escape control and bidirectional characters as <1B>, so that a terminal only displays the text."""
    return _UNPRINTABLE.sub(lambda found: f"<{ord(found[0]):02X}>", text)


def html_table(rows: Iterable[Sequence[str]]) -> str:
    """Return rows of texts as an escaped HTML table for notebooks."""
    cells = ("".join(f"<td style='text-align:left'>{escape(text)}</td>" for text in row) for row in rows)
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in cells) + "</table>"
