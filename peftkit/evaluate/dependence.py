"""Do answers depend on their questions? Each is compared with itself under another row's question."""

from __future__ import annotations

from collections.abc import Sequence

from peftkit.data.tokens.mask import IGNORED, Tokenized

MOST_LONGER = 2.0  # a question that makes a row more than so many times as long is not given to it


def swapped(rows: Sequence[Tokenized]) -> tuple[list[int], list[Tokenized]]:
    """(numbers of rows, the same answers under the question of another row), for rows with one of each.

    The other row is the next one with another answer: the losses of the same answer tokens can be compared.
    Empty where rows have no question, or all the same answer.
    """
    parts = [_parts(row) for row in rows]
    whole = [i for i, part in enumerate(parts) if part is not None]
    numbers, made = [], []
    for place, i in enumerate(whole):
        question, answer = parts[i] or ([], [])
        others = (whole[(place + ahead) % len(whole)] for ahead in range(1, len(whole)))
        other = next((j for j in others if _differs(parts[j], question, answer)), None)
        if other is None:
            continue
        asked = (parts[other] or ([], []))[0]
        numbers.append(i)
        made.append(Tokenized([*asked, *answer], [IGNORED] * len(asked) + answer, rows[i].where))
    return numbers, made


def _parts(row: Tokenized) -> tuple[list[int], list[int]] | None:
    """(question, answer) where all that is learnt stands together, after something else.

    What follows it is left out: most chat templates end in a newline that nobody learns.
    """
    learnt = [i for i, label in enumerate(row.labels) if label != IGNORED]
    if not learnt or learnt[0] == 0 or len(row.labels) != len(row.input_ids):
        return None
    first, end = learnt[0], learnt[-1] + 1
    return None if end - first != len(learnt) else (row.input_ids[:first], row.input_ids[first:end])


def _differs(other: tuple[list[int], list[int]] | None, question: list[int], answer: list[int]) -> bool:
    if other is None or other[0] == question or other[1] == answer:
        return False
    return len(other[0]) <= MOST_LONGER * (len(question) + len(answer))
