"""Losses row by row, which sum to the mean over what is learnt."""

import pytest
import torch

from peftkit.data.tokens.mask import IGNORE_INDEX, Tokenized
from peftkit.evaluate.losses import row_losses
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
