"""Losses row by row, which sum to the mean over what is learnt."""

from itertools import pairwise

import pytest
import torch

from peftkit.data.tokens.mask import IGNORE_INDEX, Tokenized
from peftkit.evaluate.losses import row_losses, span_losses
from peftkit.evaluate.step import token_losses
from tests.conformance.cells import rows_for
from tests.rigs.tiny import tiny_model


def losses(model, rows, **more):
    return row_losses(model, rows, pad_id=0, batch_size=3, **more)


def test_each_row_has_its_own_loss_whatever_stands_beside_it():
    model, rows = tiny_model("llama"), rows_for("causal-lm")
    together = losses(model, rows)
    for number, one in enumerate(rows):
        alone = losses(model, [one])
        assert alone.sums[0] == pytest.approx(together.sums[number], rel=1e-4)
        assert alone.counts[0] == together.counts[number]
        labels = torch.tensor([one.labels])
        with torch.no_grad():
            own = model(input_ids=torch.tensor([one.input_ids]), labels=labels).loss
        assert alone.mean == pytest.approx(float(own), rel=1e-4)
    assert together.mean == pytest.approx(sum(together.sums) / sum(together.counts))


def test_nothing_learnt_is_an_error():
    with pytest.raises(ValueError, match="no token in the loss"):
        losses(tiny_model("llama"), [Tokenized([1, 2], [IGNORE_INDEX, IGNORE_INDEX], "masked")])


@pytest.mark.parametrize("edges", [(0, 100), (0, 1, 100), (0, 3, 7, 12, 100)])
def test_losses_by_position_sum_to_those_of_the_rows(edges):
    model, rows = tiny_model("llama"), rows_for("causal-lm")
    spans = list(pairwise(edges))
    parts = span_losses(model, rows, spans, pad_id=0, batch_size=3)
    whole = losses(model, rows)
    assert [sum(part.counts[i] for part in parts) for i in range(len(rows))] == list(whole.counts)
    sums = [sum(part.sums[i] for part in parts) for i in range(len(rows))]
    assert sums == pytest.approx(list(whole.sums), rel=1e-5)


def test_a_token_counts_at_its_own_position():
    model, [row, *_] = tiny_model("llama"), rows_for("causal-lm")
    position = 4
    labels = [IGNORE_INDEX if i != position else token for i, token in enumerate(row.input_ids)]
    alone = Tokenized(row.input_ids, labels, "one token")
    parts = span_losses(model, [alone], [(0, 4), (4, 5), (5, 50)], pad_id=0, batch_size=1)
    assert [part.counts[0] for part in parts] == [0, 1, 0]
    assert parts[1].sums[0] == pytest.approx(losses(model, [alone]).sums[0], rel=1e-5)


def test_virtual_tokens_take_no_position():
    model, rows = tiny_model("llama"), rows_for("causal-lm")
    spans = [(0, 4), (4, 100)]

    def with_virtual_tokens(model, batch):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses = token_losses(logits, batch["labels"])
        return torch.cat([torch.full((len(losses), 3), 7.0), losses], 1)

    plain = span_losses(model, rows, spans, pad_id=0, batch_size=3)
    assert span_losses(model, rows, spans, pad_id=0, batch_size=3, forward_tokens=with_virtual_tokens) == plain
