"""Rows with their questions swapped, to measure whether the loss of an answer depends on its question."""

from __future__ import annotations

from collections.abc import Sequence

from peftkit.data.tokens.mask import IGNORE_INDEX, Tokenized

MAX_LENGTH_RATIO = 2.0  # a question that makes a row more than so many times as long is not given to it


def swap_questions(rows: Sequence[Tokenized]) -> tuple[list[int], list[Tokenized]]:
    """Return (row indices, rows) with each answer under another row's question, for rows with one of each.

    The question is that of the next row whose question and answer both differ, so that the losses of the same
    answer tokens can be compared. Empty where rows have no question, or all have the same answer.
    """
    pairs = [_split_question_answer(row) for row in rows]
    usable = [i for i, pair in enumerate(pairs) if pair is not None]
    numbers, swapped_rows = [], []
    for position, i in enumerate(usable):
        question, answer = pairs[i] or ([], [])
        others = (usable[(position + offset) % len(usable)] for offset in range(1, len(usable)))
        max_length = MAX_LENGTH_RATIO * (len(question) + len(answer))
        other = next(
            (
                j
                for j in others
                if (pair := pairs[j]) is not None
                and pair[0] != question
                and pair[1] != answer
                and len(pair[0]) <= max_length
            ),
            None,
        )
        if other is None:
            continue
        other_question = (pairs[other] or ([], []))[0]
        numbers.append(i)
        swapped_rows.append(
            Tokenized([*other_question, *answer], [IGNORE_INDEX] * len(other_question) + answer, rows[i].where)
        )
    return numbers, swapped_rows


def _split_question_answer(row: Tokenized) -> tuple[list[int], list[int]] | None:
    """Return (question, answer) token ids where the tokens in the loss are one span after others, else None.

    What follows the answer is dropped: most chat templates end in a newline that is not in the loss.
    """
    loss_positions = [i for i, label in enumerate(row.labels) if label != IGNORE_INDEX]
    if not loss_positions or loss_positions[0] == 0 or len(row.labels) != len(row.input_ids):
        return None
    first, end = loss_positions[0], loss_positions[-1] + 1
    return None if end - first != len(loss_positions) else (row.input_ids[:first], row.input_ids[first:end])
