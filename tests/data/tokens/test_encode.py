import pytest
from transformers import AutoTokenizer

from peftkit.data.formats import Example, labels_of, to_examples
from peftkit.data.read import Row
from peftkit.data.tokens.encode import ENCODERS
from peftkit.data.tokens.mask import IGNORE_INDEX
from peftkit.errors import UserError
from tests.conftest import TINY_LLAMA


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_LLAMA)


def test_a_target_ends_in_the_end_token(tokenizer):
    [row] = ENCODERS["seq2seq"]([Example("w", prompt="say alpha", completion="alpha")], tokenizer, {})
    assert row.labels[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(row.labels[:-1]).strip() == "alpha"
    assert row.length == max(len(row.input_ids), len(row.labels))


def test_a_class_is_the_label(tokenizer):
    [row] = ENCODERS["classification"]([Example("w", prompt="say", label="b")], tokenizer, {"a": 0, "b": 1})
    assert row.labels == [1]
    assert row.num_learnt == 1


def test_a_tag_stands_at_the_first_token_of_its_word(tokenizer):
    example = Example("w", words=("say", "alpha"), tags=("O", "B"))
    [row] = ENCODERS["token-classification"]([example], tokenizer, {"O": 0, "B": 1})
    assert [label for label in row.labels if label != IGNORE_INDEX] == [0, 1]
    assert len(row.labels) == len(row.input_ids)


def test_labels_are_sorted_as_numbers_or_text():
    def of(values):
        rows = [Row({"text": "a", "label": value}, f"f:{i}") for i, value in enumerate(values)]
        return labels_of(to_examples(rows, "classification"))

    assert of([10, 9, 1]) == ("1", "9", "10")
    assert of(["b", "a"]) == ("a", "b")


@pytest.mark.parametrize(
    ("fields", "name", "said"),
    [
        ({"text": "a", "label": None}, "classification", "label is None"),
        ({"text": "a", "label": 1.5}, "classification", "label is 1.5"),
        ({"text": "", "label": 1}, "classification", "an empty text"),
        ({"tokens": ["a"], "tags": ["O", "O"]}, "token-classification", "1 tokens with 2 tags"),
        ({"tokens": "a", "tags": "O"}, "token-classification", "a list of words"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, "token-classification", "empty or not text"),
    ],
)
def test_rows_that_do_not_fit_are_told_with_file_and_line(fields, name, said):
    with pytest.raises(UserError, match=r"rows\.jsonl:3") as caught:
        to_examples([Row(fields, "rows.jsonl:3")], name)
    assert said in str(caught.value)


def test_weights_are_of_every_label_and_none_is_learnt_of_weight_nothing(tokenizer):
    asked, said = {"role": "user", "content": "say"}, {"role": "assistant", "content": "alpha", "weight": 0.5}
    [row] = ENCODERS["seq2seq"]([Example("w", messages=(asked, said), weight=4.0)], tokenizer, {})
    assert row.weights == [2.0] * len(row.labels)
    examples = [Example("w", prompt="a", completion="b", weight=w) for w in (0.0, 3.0)]
    none, triple = ENCODERS["seq2seq"](examples, tokenizer, {})
    assert (none.num_learnt, triple.weights) == (0, [3.0] * len(triple.labels))
    [row] = ENCODERS["classification"]([Example("w", prompt="say", label="b", weight=0.0)], tokenizer, {"b": 0})
    assert row.num_learnt == 0
