"""Which texts are nearly the same: MinHash with one permutation, bands, and a count of what they share.

Texts are compared as sets of runs of eight bytes, without case, punctuation and repeated blanks; what a fifth
of them share, such as a fixed instruction, is left out. One permutation gives all minima (Li, Owen, Zhang
2012), empty bins borrow from their neighbours (Shrivastava, Li 2014). Bands that agree name candidates
(Broder 1997), which are then compared exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SAME = 0.8  # Jaccard similarity from which two texts are near duplicates
_RUN = 8  # bytes
_FEWEST = 12  # runs that a text must have to be compared: shorter ones are alike by chance
_BINS, _BANDS = 32, 8
_WORTH = 0.6  # of the minima: of texts that are SAME, one in five hundred has fewer in common
_CHUNK = 512
_SHARED = 0.2
_SAMPLE = 1024
_FEW = 64
_EMPTY = np.uint32(0xFFFFFFFF)
_PLAIN = np.array(
    [0, *(ord(chr(b).lower()) if b >= 128 or chr(b).isalnum() else 32 for b in range(1, 256))], np.uint64
)

Hashes = NDArray[np.uint64]


def _runs(texts: Sequence[str]) -> tuple[Hashes, NDArray[np.int64]]:
    """(a hash of every run, the number of the text that it is of)."""
    raw = [b"\0" * (_RUN - 1) + text.encode() for text in texts]
    row = np.repeat(np.arange(len(raw)), [len(text) for text in raw])
    plain = _PLAIN[np.frombuffer(b"".join(raw), np.uint8)]
    blank = plain == 32
    kept = ~(blank & np.concatenate(([False], blank[:-1])))
    plain, row = plain[kept], row[kept]
    num = len(plain) - _RUN + 1
    if num <= 0:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    found = plain[:num].copy()
    for place in range(1, _RUN):
        found |= plain[place : place + num] << np.uint64(8 * place)
    inside = row[:num] == row[_RUN - 1 :]
    found, row = found[inside], row[:num][inside]
    found ^= found >> np.uint64(33)
    found *= np.uint64(0xFF51AFD7ED558CCD)
    found ^= found >> np.uint64(33)
    return found, row


def common_runs(texts: Sequence[str]) -> Hashes:
    """Runs that a fifth of the texts share, sorted: what is said in every row tells nothing."""
    step = max(1, len(texts) // _SAMPLE)
    sample = [texts[i] for i in range(0, len(texts), step)][:_SAMPLE]
    if len(sample) < 10:
        return np.empty(0, np.uint64)
    runs, row = _runs(sample)
    order = np.lexsort((row, runs))
    runs, row = runs[order], row[order]
    first = np.ones(len(runs), bool)
    first[1:] = (runs[1:] != runs[:-1]) | (row[1:] != row[:-1])
    values, counts = np.unique(runs[first], return_counts=True)
    return values[counts > _SHARED * len(sample)]


def _without(runs: Hashes, row: NDArray[np.int64], common: Hashes) -> tuple[Hashes, NDArray[np.int64]]:
    if not len(common):
        return runs, row
    place = np.searchsorted(common, runs)
    kept = common[np.minimum(place, len(common) - 1)] != runs
    return runs[kept], row[kept]


@dataclass(frozen=True)
class Signatures:
    """Of some texts: `minima` of shape (texts, bins), and `bands` of shape (texts, bands).

    Equal numbers in a column of `bands` name candidates; 0 stands for a text that is too short to compare.
    """

    minima: NDArray[np.uint32]
    bands: Hashes

    def alike(self, number: int, other: Signatures, place: int) -> bool:
        """Whether so many minima agree that an exact comparison is worth its time."""
        return bool((self.minima[number] == other.minima[place]).mean() >= _WORTH)


def signatures(texts: Sequence[str], common: Hashes) -> Signatures:
    """The signatures of texts, without what is common."""
    runs, row = _without(*_runs(texts), common)
    flat = np.full(len(texts) * _BINS, _EMPTY, np.uint32)
    np.minimum.at(flat, row * _BINS + (runs & np.uint64(_BINS - 1)).astype(np.int64), _upper(runs))
    minima = flat.reshape(len(texts), _BINS)
    short = np.bincount(row, minlength=len(texts)) < _FEWEST
    for _ in range(_BINS - 1):
        empty = minima == _EMPTY
        if not empty[~short].any():
            break
        minima = np.where(empty, np.roll(minima, -1, axis=1), minima)
    wide = minima.astype(np.uint64).reshape(len(texts), _BANDS, _BINS // _BANDS)
    found = np.full((len(texts), _BANDS), 0x9E3779B97F4A7C15, np.uint64)
    for place in range(_BINS // _BANDS):
        found = (found ^ wide[:, :, place]) * np.uint64(0xC4CEB9FE1A85EC53)
        found ^= found >> np.uint64(29)
    found[short] = 0
    return Signatures(minima, found)


def _all(texts: Iterable[str], common: Hashes) -> Signatures:
    made = [signatures(chunk, common) for chunk in _chunks(texts)]
    return Signatures(np.concatenate([s.minima for s in made]), np.concatenate([s.bands for s in made]))


def _upper(runs: Hashes) -> NDArray[np.uint32]:
    return (runs >> np.uint64(32)).astype(np.uint32)


def similarity(one: str, other: str, common: Hashes) -> float:
    """Jaccard similarity of two texts, without what is common: 0 to 1."""
    runs, row = _without(*_runs([one, other]), common)
    a, b = np.unique(runs[row == 0]), np.unique(runs[row == 1])
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(1, len(a) + len(b) - both)


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    for text in texts:
        chunk.append(text)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def near_duplicates(texts: Sequence[str]) -> list[tuple[int, int, float]]:
    """(number, number of an earlier one, similarity) for every text that nearly repeats another."""
    common = common_runs(texts)
    if not len(texts):
        return []
    made = _all(texts, common)
    found: dict[int, tuple[int, int, float]] = {}
    for band in range(_BANDS):
        order = np.argsort(made.bands[:, band], kind="stable")
        column = made.bands[order, band]
        repeats = np.flatnonzero((column[1:] == column[:-1]) & (column[1:] != 0)) + 1
        leaders = np.searchsorted(column, column[repeats])
        for number, earlier in zip(order[repeats], order[leaders], strict=True):
            if int(number) in found or not made.alike(number, made, earlier):
                continue
            same = similarity(texts[number], texts[earlier], common)
            if same >= SAME:
                found[int(number)] = (int(number), int(earlier), same)
    return [found[number] for number in sorted(found)]


def near_in(held: Sequence[str], others: Iterable[str], common: Hashes) -> dict[int, tuple[int, float]]:
    """For each of `held` that one of `others` nearly repeats: (number of that other, similarity).

    Only the bands of `held` are kept: `others` may be of any length.
    """
    if not len(held):
        return {}
    made = _all(held, common)
    order = np.argsort(made.bands, axis=0, kind="stable")
    columns = np.take_along_axis(made.bands, order, axis=0)
    found: dict[int, tuple[int, float]] = {}
    start = 0
    for chunk in _chunks(others):
        chunked = signatures(chunk, common)
        theirs = chunked.bands
        for band in range(_BANDS):
            place = np.searchsorted(columns[:, band], theirs[:, band])
            place = np.minimum(place, len(held) - 1)
            hits = np.flatnonzero((columns[place, band] == theirs[:, band]) & (theirs[:, band] != 0))
            if len(hits) > _FEW:  # rows made from one mould: one of each stands for all
                hits = hits[np.unique(place[hits], return_index=True)[1]]
            for hit in hits:
                at = int(place[hit])
                while at < len(held) and columns[at, band] == theirs[hit, band]:
                    number = int(order[at, band])
                    if number not in found and made.alike(number, chunked, int(hit)):
                        same = similarity(held[number], chunk[hit], common)
                        if same >= SAME:
                            found[number] = (start + int(hit), same)
                    at += 1
        start += len(chunk)
    return found
