"""The quickstart on the embedded model, cut short: the whole takes minutes and is `make demo`."""

import pytest

import peftkit
from tests.conftest import ROOT


@pytest.mark.slow
def test_quickstart_learns(tmp_path):
    summary = peftkit.finetune(
        ROOT / "recipes" / "quickstart.yaml",
        ["train.max_steps=12", "train.eval_steps=12", "evaluate.max_examples=10"],
        out=tmp_path / "run",
    )
    assert summary.num_trainable == 4_884_480
    assert summary.num_total == 139_399_488
    assert summary.eval_loss_after < summary.eval_loss_before / 2
    assert summary.metric_before == 0.0
    assert summary.metric_after is not None
