"""One micro-batch: its loss is what the model's own is, and gradients add up with their weights."""

import pytest
import torch

from peftkit.evaluate.losses import collate
from peftkit.evaluate.step import backward, loss_from_logits, summed_loss
from tests.conformance.cells import rows_for
from tests.rigs.tiny import tiny_model


def batch_and_model():
    model = tiny_model("llama", "causal-lm").train()
    return collate(rows_for("causal-lm"), 0), model


def test_the_loss_is_the_models_own():
    batch, model = batch_and_model()
    own = model(**{key: value for key, value in batch.items() if key != "weights"}).loss
    assert float(loss_from_logits(model, batch, "causal-lm")) == pytest.approx(float(own), rel=1e-5)


def test_weights_scale_the_gradients_and_they_accumulate():
    batch, model = batch_and_model()
    value = backward(model, batch, loss_from_logits, task="causal-lm", precision=None)
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    parts = [backward(model, batch, loss_from_logits, task="causal-lm", precision=None, weight=w) for w in (0.25, 0.75)]
    assert sum(parts) == pytest.approx(value)
    for name, parameter in model.named_parameters():
        if name in whole:
            assert torch.allclose(parameter.grad, whole[name], rtol=1e-4, atol=1e-6), name


def test_weights_of_rows_scale_their_losses():
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    single = [float(summed_loss(logits[i : i + 1], labels[i : i + 1], "causal-lm")) for i in (0, 1)]
    weights = torch.tensor([[2.0] * 5, [0.5] * 5])
    assert float(summed_loss(logits, labels, "causal-lm", weights)) == pytest.approx(2 * single[0] + single[1] / 2)


def test_the_loss_of_several_classes_is_transformers_own(tmp_path):
    model = tiny_model("bert", "classification", num_labels=3, problem_type="multi_label_classification").eval()
    ids, labels = torch.randint(5, 50, (4, 7)), torch.tensor([[0, 1, 1], [0, 0, 0], [1, 1, 1], [1, 0, 0]])
    output = model(input_ids=ids, labels=labels.float())
    assert float(summed_loss(output.logits, labels, "multi-label")) == pytest.approx(12 * float(output.loss), rel=1e-6)
    # a row of weight 0 has no label in the loss; another weight multiplies its own
    rows = [float(summed_loss(output.logits[i : i + 1], labels[i : i + 1], "multi-label")) for i in range(4)]
    weights, masked = torch.tensor([[1.0] * 3, [3.0] * 3, [1.0] * 3, [1.0] * 3]), labels.clone()
    masked[0] = -100
    weighted = float(summed_loss(output.logits, masked, "multi-label", weights))
    assert weighted == pytest.approx(3 * rows[1] + rows[2] + rows[3], rel=1e-6)
