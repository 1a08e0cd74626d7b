"""Answers under other rows' questions."""

from hypothesis import given
from hypothesis import strategies as st

from peftkit.data.tokens.mask import IGNORE_INDEX, Tokenized
from peftkit.evaluate.dependence import swap_questions


def row(question, answer, after=()):
    ids = [*question, *answer, *after]
    labels = [IGNORE_INDEX] * len(question) + list(answer) + [IGNORE_INDEX] * len(after)
    return Tokenized(ids, labels, f"row {ids}")


def test_each_answer_stands_under_the_question_of_another_answer():
    rows = [row([1, 2], [9]), row([3], [8, 8]), row([4], [9])]
    numbers, made = swap_questions(rows)
    assert numbers == [0, 1, 2]
    assert [(m.input_ids, m.labels) for m in made] == [
        ([3, 9], [IGNORE_INDEX, 9]),
        ([4, 8, 8], [IGNORE_INDEX, 8, 8]),
        ([3, 9], [IGNORE_INDEX, 9]),
    ]


def test_rows_without_a_question_or_with_more_than_one_answer_are_left_out():
    text = Tokenized([1, 2, 3], [1, 2, 3], "text")
    turns = Tokenized([1, 2, 3, 4], [IGNORE_INDEX, 2, IGNORE_INDEX, 4], "two turns")
    assert swap_questions([text, turns]) == ([], [])
    assert swap_questions([row([1], [5]), row([2], [5])]) == ([], []), "all answers alike: nothing to swap"
    assert swap_questions([]) == ([], [])


@given(st.lists(st.tuples(st.lists(st.integers(3, 9), min_size=1, max_size=6), st.integers(10, 12)), max_size=12))
def test_the_answers_stay_as_they_are(made):
    rows = [row(question, [answer]) for question, answer in made]
    numbers, others = swap_questions(rows)
    assert len(numbers) == len(others)
    for number, other in zip(numbers, others, strict=True):
        learnt = [label for label in other.labels if label != IGNORE_INDEX]
        assert learnt == [label for label in rows[number].labels if label != IGNORE_INDEX]
        assert other.input_ids != rows[number].input_ids
        assert other.length <= 3 * rows[number].length


def test_what_a_template_writes_after_the_answer_is_left_out():
    numbers, made = swap_questions([row([1, 2], [9], after=[7]), row([3], [8], after=[7])])
    assert numbers == [0, 1]
    assert [m.input_ids for m in made] == [[3, 9], [1, 2, 8]]
