import pytest

from peftkit.data.formats import BadRow, detect_format, select_reader
from peftkit.data.read import Row


@pytest.mark.parametrize("label", [None, "", " ", "\n\t", [None], {}, 1.5])
def test_a_class_is_text_that_shows_or_a_whole_number(label):
    row = Row({"text": "a", "label": label}, "w")
    with pytest.raises(BadRow):
        select_reader(row, "classification")[1](row)


@pytest.mark.parametrize("label", ["a", " a ", 0, 7])
def test_classes_are_kept_as_they_are(label):
    row = Row({"text": "a", "label": label}, "w")
    assert select_reader(row, "classification")[1](row).label == str(label)


@pytest.mark.parametrize(
    ("value", "classes"),
    [
        (["b", "a"], ("b", "a")),
        ([], ()),
        ('["a", "b"]', ("a", "b")),
        ([3, 5.0], ("3", "5")),
        ([0, 1, 1], ("1", "2")),
        ([0.0, 0.0, 0.0, 1.0], ("3",)),
        ([False, True, False], ("1",)),
        ([0, 1], ("0", "1")),
    ],
    ids=str,
)
def test_several_classes_are_names_ids_or_a_flag_for_each(value, classes):
    row = Row({"text": "t", "labels": value}, "f:1")
    assert select_reader(row, "multi-label")[1](row).tags == classes


@pytest.mark.parametrize(
    ("value", "message"),
    [(["a", "a"], "each class once"), ([1, 1], "each class once"), ("a", "list of classes"), ([None], "a class in")],
)
def test_what_is_no_list_of_classes_is_refused(value, message):
    row = Row({"text": "t", "labels": value}, "f:1")
    with pytest.raises(BadRow) as caught:
        select_reader(row, "multi-label")[1](row)
    assert message in caught.value.expected


@pytest.mark.parametrize(
    ("value", "name"),
    [(["a", "b"], "multi-label"), ([], "multi-label"), (["a"], "classification"), ("a", "classification")],
)
def test_a_list_of_other_than_one_class_is_multi_label(value, name):
    assert detect_format([Row({"text": "t", "labels": value}, "f:1")]) == name
