"""Gradient signals by hooks: sketches of every linear layer's gradient, without a frozen weight's gradient.

Per layer and stream only products with thin random matrices are kept (k columns): G Om and Psi G for G = dY^T
X, by which <G1, G2> = E <G1 Om, G2 Om> / k. Only inputs and output gradients are read, so that a 4-bit base
works as well as any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from peftkit import interrupt
from peftkit.archs import Module
from peftkit.data.tokens.mask import Tokenized
from peftkit.diagnose.signals import ModuleSignal, Signals
from peftkit.evaluate.losses import collate
from peftkit.evaluate.step import backward, forward_inputs, summed_loss
from peftkit.experiments.forks import count_loss_tokens
from peftkit.plan import Plan
from peftkit.train.checkpoint.snapshot import random_states, restore_random_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SKETCH_COLUMNS = 32  # k: wider is closer, and dearer
STREAMS = ("first", "second", "held out")


@dataclass
class _GradientSketch:
    """The gradient sketch of one layer, G of shape (d_out, d_in), per stream.

    `out` holds G [Om, (I - Qa Qa^T) Om], (d_out, columns); `into` holds Psi G, (k, d_in).
    """

    right: torch.Tensor  # (d_in, columns)
    left: torch.Tensor  # (k, d_out)
    rows_of_a: torch.Tensor | None  # orthonormal, (d_in, r)
    columns_of_b: torch.Tensor | None
    out: dict[str, torch.Tensor] = field(default_factory=dict)
    into: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, stream: str, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        dy = gradient.reshape(-1, gradient.shape[-1]).float()
        products = dy.T @ (x @ self.right), (self.left @ dy.T) @ x
        for sums, product in zip((self.out, self.into), products, strict=True):
            sums[stream] = sums[stream] + product if stream in sums else product

    def residual(self, stream: str) -> torch.Tensor:
        """Return R(G) Om, (d_out, k): the part of G outside the rows of A and the columns of B."""
        sketch = self.out[stream][:, SKETCH_COLUMNS:] if self.rows_of_a is not None else self.out[stream]
        if self.columns_of_b is not None:
            sketch = sketch - self.columns_of_b @ (self.columns_of_b.T @ sketch)
        return sketch

    def directions(self) -> torch.Tensor:
        """Return the strongest right directions of R(G), (k, d_in): candidates for new rows of A."""
        sketch = torch.stack([*self.into.values()]).sum(0)
        if self.rows_of_a is not None:
            sketch = sketch - (sketch @ self.rows_of_a) @ self.rows_of_a.T
        right: torch.Tensor = torch.linalg.svd(sketch, full_matrices=False)[2]
        return right


def _orthonormal_basis(columns: torch.Tensor) -> torch.Tensor | None:
    """Return an orthonormal basis of the columns' span; None for zeros (B before its first step)."""
    if not bool(columns.any()):
        return None
    left, singular_values, _ = torch.linalg.svd(columns.detach().float(), full_matrices=False)
    basis: torch.Tensor = left[:, singular_values > 1e-6 * singular_values[0]]
    return basis


@dataclass
class GradientProbe:
    """A probe that runs streams of rows through the model and sketches all layers' gradients."""

    model: Any
    plan: Plan
    modules: Sequence[Module]
    pad_id: int
    sketches: dict[str, _GradientSketch] = field(default_factory=dict)
    stream: str = STREAMS[0]
    num_tokens: int = 0

    def look(self, streams: Mapping[str, Sequence[Tokenized]]) -> Signals:
        """Compute the signals of disjoint sets of rows, one for each of STREAMS."""
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        own_hook = self.plan.train.gradient_checkpointing == "none"
        if own_hook:
            base.enable_input_require_grads()  # without, the first layers get no gradient and stay silent
        generator, handles = torch.Generator().manual_seed(0), []
        places = {m.name: (base.get_submodule(m.name), m.d_in, m.d_out) for m in self.modules}
        head = base.get_output_embeddings()
        if head is not None and getattr(head, "weight", None) is not None and head.weight.ndim == 2:
            places["head"] = (head, head.weight.shape[1], head.weight.shape[0])
        for name, (module, d_in, d_out) in places.items():
            right = torch.randn(d_in, SKETCH_COLUMNS, generator=generator).to(self.model.device)
            left = torch.randn(SKETCH_COLUMNS, d_out, generator=generator).to(self.model.device)
            # AdaLoRA's factors are bare parameters, which have no `weight`
            if not (hasattr(module, "lora_A") and hasattr(dict(module.lora_A.items()).get("default"), "weight")):
                self.sketches[name] = _GradientSketch(right, left, None, None)
            else:
                rows = _orthonormal_basis(module.lora_A["default"].weight.T)
                columns = _orthonormal_basis(module.lora_B["default"].weight)
                assert rows is not None
                row_basis = rows.to(self.model.device)
                projected = right - row_basis @ (row_basis.T @ right)
                self.sketches[name] = _GradientSketch(torch.cat([right, projected], dim=1), left, row_basis, columns)
            handles.append(module.register_forward_hook(self._forward_hook(name)))
        was_training, rng_states = self.model.training, random_states()
        # dropout would only add noise; but layers are recomputed in training mode only
        self.model.train(not own_hook)
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
        try:
            for self.stream, stream_rows in streams.items():
                self._run_backward(stream_rows)
        finally:
            for handle in handles:
                handle.remove()
            if own_hook:
                base.disable_input_require_grads()
            self.model.zero_grad(set_to_none=True)
            self.model.train(was_training)
            restore_random_states(*rng_states)
        return self._to_signals(sum(map(len, streams.values())))

    def _forward_hook(self, name: str) -> Callable[..., None]:
        def seen(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if not (torch.is_grad_enabled() and output.requires_grad):
                return
            x, stream = inputs[0].detach(), self.stream
            output.register_hook(lambda dy: self.sketches[name].add(stream, x, dy.detach()))

        return seen

    def _run_backward(self, rows: Sequence[Tokenized]) -> None:
        """Accumulate gradients of the rows' mean loss, in micro-batches."""
        task, size = self.plan.base.task, max(1, self.plan.train.micro_batch)
        pieces = [collate(rows[i : i + size], self.pad_id, task=task) for i in range(0, len(rows), size)]
        total = sum(count_loss_tokens(piece["labels"], task) for piece in pieces)

        def share_of_loss(model: PreTrainedModel, batch: Mapping[str, torch.Tensor], task: str) -> torch.Tensor:
            logits = model(**forward_inputs(model, batch, task)).logits
            smoothing = self.plan.train.label_smoothing
            return summed_loss(logits, batch["labels"], task, smoothing=smoothing) / max(1, total)

        for piece in pieces:
            interrupt.stop_if_requested("interrupted during the diagnosis")
            backward(self.model, piece, share_of_loss, task=task, precision=self.plan.train.autocast)
        self.num_tokens += sum(row.length for row in rows)

    def _to_signals(self, num_rows: int) -> Signals:
        module_signals = []
        for module in self.modules:
            sketch = self.sketches[module.name]
            if set(sketch.out) != set(STREAMS):
                continue  # an expert that no row reached
            first, second = (sketch.out[name][:, :SKETCH_COLUMNS] for name in STREAMS[:2])
            total_energy = _energy(first, second)
            residuals = [sketch.residual(name) for name in STREAMS]
            residual = _energy(*residuals[:2])
            is_adapted = sketch.rows_of_a is not None
            module_signals.append(
                ModuleSignal(
                    module.name,
                    module.role,
                    is_adapted,
                    module.d_in + module.d_out,
                    tangent=total_energy - residual if is_adapted else 0.0,
                    residual=residual,
                    held_out_residual=_energy((residuals[0] + residuals[1]) / 2, residuals[2]),
                    agreement=float(torch.cosine_similarity(first.flatten(), second.flatten(), dim=0)),
                    size=_norm_product(sketch),
                    narrowest=min(module.d_in, module.d_out),
                )
            )
        head = self.sketches.get("head")
        has_head = head is not None and set(head.out) == set(STREAMS)
        return Signals(
            tuple(module_signals), head_size=_norm_product(head) if head and has_head else 0.0, num_rows=num_rows
        )


def _energy(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first * second).sum()) / first.shape[1]


def _norm_product(sketch: _GradientSketch) -> float:
    first, second = (sketch.out[name][:, :SKETCH_COLUMNS] for name in STREAMS[:2])
    return float(first.norm() * second.norm()) / SKETCH_COLUMNS
