import pytest

from peftkit.data.formats import BadRow, select_reader
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
