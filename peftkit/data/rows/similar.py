"""Near duplicates of texts: MinHash with one permutation, banded LSH, then exact Jaccard similarity.

Texts are compared as sets of shingles of eight bytes, without case, punctuation and repeated blanks; shingles
that a fifth of the texts share, such as a fixed instruction, are left out. One permutation gives all minima
(Li, Owen, Zhang 2012), empty bins borrow from their neighbours (Shrivastava, Li 2014). Equal bands name
candidates (Broder 1997), which are then compared exactly: |A & B| / |A | B|.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DUPLICATE_SIMILARITY = 0.8  # Jaccard similarity from which two texts are near duplicates
_SHINGLE_BYTES = 8  # bytes
_MIN_SHINGLES = 12  # shingles that a text must have to be compared: shorter ones are alike by chance
_BINS, _BANDS = 32, 8
_MIN_EQUAL_MINIMA = 0.6  # of the minima: of near duplicates, one in five hundred has fewer in common
_CHUNK_TEXTS = 512
_COMMON_SHARE = 0.2
_SAMPLE_TEXTS = 1024
_MAX_HITS = 64
_EMPTY = np.uint32(0xFFFFFFFF)
_NORMALIZED_BYTES = np.array(
    [0, *(ord(chr(b).lower()) if b >= 128 or chr(b).isalnum() else 32 for b in range(1, 256))], np.uint64
)

Hashes = NDArray[np.uint64]


def _shingle_hashes(texts: Sequence[str]) -> tuple[Hashes, NDArray[np.int64]]:
    """Hash every shingle of the texts. Returns (hashes, number of the text of each), both 1-D."""
    raw = [b"\0" * (_SHINGLE_BYTES - 1) + text.encode() for text in texts]
    text_numbers = np.repeat(np.arange(len(raw)), [len(text) for text in raw])
    normalized = _NORMALIZED_BYTES[np.frombuffer(b"".join(raw), np.uint8)]
    blank = normalized == 32
    keep_mask = ~(blank & np.concatenate(([False], blank[:-1])))
    normalized, text_numbers = normalized[keep_mask], text_numbers[keep_mask]
    num_windows = len(normalized) - _SHINGLE_BYTES + 1
    if num_windows <= 0:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    hashes = normalized[:num_windows].copy()
    for offset in range(1, _SHINGLE_BYTES):
        hashes |= normalized[offset : offset + num_windows] << np.uint64(8 * offset)
    within_text = text_numbers[:num_windows] == text_numbers[_SHINGLE_BYTES - 1 :]
    hashes, text_numbers = hashes[within_text], text_numbers[:num_windows][within_text]
    hashes ^= hashes >> np.uint64(33)
    hashes *= np.uint64(0xFF51AFD7ED558CCD)
    hashes ^= hashes >> np.uint64(33)
    return hashes, text_numbers


def common_shingles(texts: Sequence[str]) -> Hashes:
    """Return the shingles that a fifth of the texts share, sorted: they tell nothing about likeness."""
    step = max(1, len(texts) // _SAMPLE_TEXTS)
    sample = [texts[i] for i in range(0, len(texts), step)][:_SAMPLE_TEXTS]
    if len(sample) < 10:
        return np.empty(0, np.uint64)
    shingles, text_numbers = _shingle_hashes(sample)
    order = np.lexsort((text_numbers, shingles))
    shingles, text_numbers = shingles[order], text_numbers[order]
    is_first = np.ones(len(shingles), bool)
    is_first[1:] = (shingles[1:] != shingles[:-1]) | (text_numbers[1:] != text_numbers[:-1])
    values, counts = np.unique(shingles[is_first], return_counts=True)
    return values[counts > _COMMON_SHARE * len(sample)]


def _without_common(
    shingles: Hashes, text_numbers: NDArray[np.int64], common: Hashes
) -> tuple[Hashes, NDArray[np.int64]]:
    if not len(common):
        return shingles, text_numbers
    index = np.searchsorted(common, shingles)
    keep_mask = common[np.minimum(index, len(common) - 1)] != shingles
    return shingles[keep_mask], text_numbers[keep_mask]


@dataclass(frozen=True)
class Signatures:
    """MinHash signatures of texts: `minima` of shape (texts, bins), `bands` of shape (texts, bands).

    Equal numbers in a column of `bands` name candidates; 0 marks a text that is too short to compare.
    """

    minima: NDArray[np.uint32]
    bands: Hashes

    def is_candidate(self, number: int, other: Signatures, other_number: int) -> bool:
        """Return True where enough minima agree to make an exact comparison worth its time."""
        return bool((self.minima[number] == other.minima[other_number]).mean() >= _MIN_EQUAL_MINIMA)


def compute_signatures(texts: Sequence[str], common: Hashes) -> Signatures:
    """Compute the MinHash signatures of texts, without `common` shingles."""
    shingles, text_numbers = _without_common(*_shingle_hashes(texts), common)
    flat = np.full(len(texts) * _BINS, _EMPTY, np.uint32)
    np.minimum.at(
        flat,
        text_numbers * _BINS + (shingles & np.uint64(_BINS - 1)).astype(np.int64),
        (shingles >> np.uint64(32)).astype(np.uint32),
    )
    minima = flat.reshape(len(texts), _BINS)
    is_short = np.bincount(text_numbers, minlength=len(texts)) < _MIN_SHINGLES
    for _ in range(_BINS - 1):
        is_empty = minima == _EMPTY
        if not is_empty[~is_short].any():
            break
        minima = np.where(is_empty, np.roll(minima, -1, axis=1), minima)
    band_minima = minima.astype(np.uint64).reshape(len(texts), _BANDS, _BINS // _BANDS)
    bands = np.full((len(texts), _BANDS), 0x9E3779B97F4A7C15, np.uint64)
    for column in range(_BINS // _BANDS):
        bands = (bands ^ band_minima[:, :, column]) * np.uint64(0xC4CEB9FE1A85EC53)
        bands ^= bands >> np.uint64(29)
    bands[is_short] = 0
    return Signatures(minima, bands)


def _chunked_signatures(texts: Iterable[str], common: Hashes) -> Signatures:
    chunk_signatures = [compute_signatures(chunk, common) for chunk in _chunks(texts)]
    return Signatures(
        np.concatenate([s.minima for s in chunk_signatures]), np.concatenate([s.bands for s in chunk_signatures])
    )


def jaccard_similarity(one: str, other: str, common: Hashes) -> float:
    """Compute the Jaccard similarity of two texts, 0 to 1, without `common` shingles."""
    shingles, text_numbers = _without_common(*_shingle_hashes([one, other]), common)
    a, b = np.unique(shingles[text_numbers == 0]), np.unique(shingles[text_numbers == 1])
    num_shared = len(np.intersect1d(a, b, assume_unique=True))
    return num_shared / max(1, len(a) + len(b) - num_shared)


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    for text in texts:
        chunk.append(text)
        if len(chunk) == _CHUNK_TEXTS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def find_near_duplicates(texts: Sequence[str]) -> list[tuple[int, int, float]]:
    """Find texts that nearly repeat an earlier one. Returns (number, earlier number, similarity), sorted."""
    common = common_shingles(texts)
    if not len(texts):
        return []
    text_signatures = _chunked_signatures(texts, common)
    duplicates: dict[int, tuple[int, int, float]] = {}
    for band in range(_BANDS):
        order = np.argsort(text_signatures.bands[:, band], kind="stable")
        column = text_signatures.bands[order, band]
        repeats = np.flatnonzero((column[1:] == column[:-1]) & (column[1:] != 0)) + 1
        leaders = np.searchsorted(column, column[repeats])
        for number, earlier in zip(order[repeats], order[leaders], strict=True):
            if int(number) in duplicates or not text_signatures.is_candidate(number, text_signatures, earlier):
                continue
            score = jaccard_similarity(texts[number], texts[earlier], common)
            if score >= DUPLICATE_SIMILARITY:
                duplicates[int(number)] = (int(number), int(earlier), score)
    return [duplicates[number] for number in sorted(duplicates)]


def match_near_duplicates(texts: Sequence[str], others: Iterable[str], common: Hashes) -> dict[int, tuple[int, float]]:
    """Find one of `others` that nearly repeats each text. Returns number -> (other number, similarity).

    Only the bands of `texts` are held in memory: `others` may be of any length.
    """
    if not len(texts):
        return {}
    text_signatures = _chunked_signatures(texts, common)
    order = np.argsort(text_signatures.bands, axis=0, kind="stable")
    columns = np.take_along_axis(text_signatures.bands, order, axis=0)
    matches: dict[int, tuple[int, float]] = {}
    start = 0
    for chunk in _chunks(others):
        chunk_signatures = compute_signatures(chunk, common)
        chunk_bands = chunk_signatures.bands
        for band in range(_BANDS):
            index = np.searchsorted(columns[:, band], chunk_bands[:, band])
            index = np.minimum(index, len(texts) - 1)
            hits = np.flatnonzero((columns[index, band] == chunk_bands[:, band]) & (chunk_bands[:, band] != 0))
            if len(hits) > _MAX_HITS:  # rows made from one mould: one of each stands for all
                hits = hits[np.unique(index[hits], return_index=True)[1]]
            for hit in hits:
                position = int(index[hit])
                while position < len(texts) and columns[position, band] == chunk_bands[hit, band]:
                    number = int(order[position, band])
                    if number not in matches and text_signatures.is_candidate(number, chunk_signatures, int(hit)):
                        score = jaccard_similarity(texts[number], chunk[hit], common)
                        if score >= DUPLICATE_SIMILARITY:
                            matches[number] = (start + int(hit), score)
                    position += 1
        start += len(chunk)
    return matches
