import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from peftkit.data.rows.similar import (
    DUPLICATE_SIMILARITY,
    common_shingles,
    compute_signatures,
    find_near_duplicates,
    jaccard_similarity,
    match_near_duplicates,
)

WORDS = [
    line.strip()
    for line in ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school"]
]
NONE = np.empty(0, np.uint64)


def text(seed, length=40):
    chosen = random.Random(seed)
    return " ".join(chosen.choice(WORDS) + str(chosen.randrange(99)) for _ in range(length))


def jaccard(one, other):
    """The same by definition: sets of runs of eight bytes of the plain text."""

    def runs(value):
        plain = "".join(char if char.isalnum() else " " for char in value.lower())
        raw = b"\0" * 7 + " ".join(plain.split(" ")).encode()
        while b"  " in raw:
            raw = raw.replace(b"  ", b" ")
        return {raw[i : i + 8] for i in range(len(raw) - 7)}

    a, b = runs(one), runs(other)
    return len(a & b) / len(a | b)


@given(st.text("abc ,.!ABC", min_size=1, max_size=60), st.text("abc ,.!ABC", min_size=1, max_size=60))
def test_similarity_is_jaccard_over_runs(one, other):
    assert jaccard_similarity(one, other, NONE) == jaccard(one, other)


def test_case_punctuation_and_blanks_do_not_count():
    assert jaccard_similarity("Hello,  World again!", "hello world again ", NONE) == 1.0


def test_each_planted_near_duplicate_is_found_and_nothing_else():
    texts = [text(seed) for seed in range(300)]
    planted = {300: 7, 301: 120, 302: 250}
    texts += [texts[source].replace(" ", " , ", 3) + " more" for source in planted.values()]
    found = find_near_duplicates(texts)
    assert {(i, j) for i, j, _ in found} == set(planted.items())
    assert all(same >= DUPLICATE_SIMILARITY for *_, same in found)


def test_held_out_texts_are_found_among_any_number_of_others():
    others = [text(seed) for seed in range(2000)]
    held = [text(9000), others[1234] + " once", text(9001)]
    found = match_near_duplicates(held, iter(others), common_shingles(others))
    assert {number: other for number, (other, _) in found.items()} == {1: 1234}


def test_what_every_row_says_does_not_make_rows_alike():
    asked = "Name the intent of this message to a bank, with one of the names that you were given: "
    texts = [asked + text(seed, 8) for seed in range(50)]
    assert find_near_duplicates(texts) == []
    assert jaccard_similarity(texts[0], texts[1], NONE) > 0.3


def test_short_texts_are_not_compared():
    assert not compute_signatures(["yes", "no"], NONE).bands.any()
    assert find_near_duplicates(["yes"] * 5) == []
    assert find_near_duplicates([]) == []
