import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkit.evaluate.metrics import accuracy, entity_f1, entity_spans, exact_match, macro_f1, multi_label_f1, token_f1


def test_exact_match_forgives_blanks_only():
    assert exact_match(["a ", "b", "C"], ["a", " b", "c"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("metric", [exact_match, token_f1, accuracy, macro_f1, multi_label_f1, entity_f1])
def test_nothing_to_compare_and_different_lengths_are_errors(metric):
    with pytest.raises(ValueError, match="no answers"):
        metric([], [])
    with pytest.raises(ValueError, match="1 answers for 2"):
        metric(["a"], ["a", "b"])


def test_token_f1_is_squads():
    assert token_f1(["The cat sat."], ["a cat sat down"]) == pytest.approx(0.8)
    assert token_f1([""], [""]) == 1.0
    assert token_f1(["dog"], ["cat"]) == 0.0


def test_macro_f1_weighs_classes_alike():
    answers, references = ["a"] * 9 + ["a"], ["a"] * 9 + ["b"]
    assert accuracy(answers, references) == 0.9
    assert macro_f1(answers, references) == pytest.approx((18 / 19 + 0) / 2)


def test_spans_of_bio_tags():
    assert entity_spans(["B-PER", "I-PER", "O", "B-LOC"]) == {("PER", 0, 2), ("LOC", 3, 4)}
    assert entity_spans(["I-PER", "I-LOC", "B-LOC"]) == {("PER", 0, 1), ("LOC", 1, 2), ("LOC", 2, 3)}
    assert entity_spans(["NOUN", "O", "VERB"]) == {("NOUN", 0, 1), ("VERB", 2, 3)}
    assert entity_spans([]) == set()


def test_entity_f1_wants_kind_and_borders():
    assert entity_f1([["B-PER", "I-PER"]], [["B-PER", "I-PER"]]) == 1.0
    assert entity_f1([["B-PER", "O"]], [["B-PER", "I-PER"]]) == 0.0
    assert entity_f1([["O"]], [["O"]]) == 1.0
    assert entity_f1([["B-A", "B-B"]], [["B-A", "O"]]) == pytest.approx(2 / 3)


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1))
def test_a_perfect_answer_is_one_and_scores_stay_between(labels):
    assert accuracy(labels, labels) == macro_f1(labels, labels) == 1.0
    assert 0.0 <= macro_f1(labels, ["a"] * len(labels)) <= 1.0


@given(st.lists(st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y"]), min_size=1))
def test_spans_never_overlap_and_cover_every_tag_but_o(tags):
    covered = [i for _, start, end in entity_spans(tags) for i in range(start, end)]
    assert sorted(covered) == [i for i, tag in enumerate(tags) if tag != "O"]


def test_micro_f1_counts_decisions_alike_and_macro_f1_classes():
    answers, references = [["a"], ["a", "b"], [], ["c"]], [["a"], ["a"], ["b"], []]
    # a: 2 of 2 and 2; b: 0 of 1 and 1; c: predicted once, never right
    assert multi_label_f1(answers, references) == pytest.approx((2 * 2 / (4 + 3), (1 + 0 + 0) / 3))
    assert multi_label_f1([[]], [[]]) == (1.0, 1.0)
