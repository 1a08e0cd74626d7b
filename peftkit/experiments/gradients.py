"""Signals by hooks: what the gradients of all linear layers want, without a gradient of any frozen weight.

Per layer and stream only products with thin random matrices are kept (k columns): G Om and Psi G for
G = dY^T X, by which <G1, G2> = E <G1 Om, G2 Om> / k. Only inputs and output gradients are read, so that a
4-bit base is as good as any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from peftkit import interrupt
from peftkit.archs import Module
from peftkit.data.tokens.mask import Tokenized
from peftkit.diagnose.signals import ModuleSignal, Signals
from peftkit.evaluate.losses import collate, inputs_of, summed_loss
from peftkit.experiments.forks import num_learnt
from peftkit.plan import Plan
from peftkit.train.checkpoint.snapshot import random_states, restore_random_states

WIDTH = 32  # k: wider is closer, and dearer
STREAMS = ("first", "second", "held out")


@dataclass
class _Sketch:
    """Of one layer. `out` holds G [Om, (I - Qa Qa^T) Om] per stream, `into` holds Psi G."""

    right: torch.Tensor  # (d_in, columns)
    left: torch.Tensor  # (k, d_out)
    rows_of_a: torch.Tensor | None  # orthonormal, (d_in, r)
    columns_of_b: torch.Tensor | None
    out: dict[str, torch.Tensor] = field(default_factory=dict)
    into: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, stream: str, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        dy = gradient.reshape(-1, gradient.shape[-1]).float()
        made = dy.T @ (x @ self.right), (self.left @ dy.T) @ x
        for kept, piece in zip((self.out, self.into), made, strict=True):
            kept[stream] = kept[stream] + piece if stream in kept else piece

    def residual(self, stream: str) -> torch.Tensor:
        """R(G) Om: beyond both the rows of A and the columns of B."""
        found = self.out[stream][:, WIDTH:] if self.rows_of_a is not None else self.out[stream]
        if self.columns_of_b is not None:
            found = found - self.columns_of_b @ (self.columns_of_b.T @ found)
        return found

    def directions(self) -> torch.Tensor:
        """The strongest right directions of R(G), (k, d_in): new rows of A."""
        found = torch.stack([*self.into.values()]).sum(0)
        if self.rows_of_a is not None:
            found = found - (found @ self.rows_of_a) @ self.rows_of_a.T
        right: torch.Tensor = torch.linalg.svd(found, full_matrices=False)[2]
        return right


def _orthonormal(columns: torch.Tensor) -> torch.Tensor | None:
    """An orthonormal basis of the columns' span; None for zeros (B before its first step)."""
    if not bool(columns.any()):
        return None
    left, sizes, _ = torch.linalg.svd(columns.detach().float(), full_matrices=False)
    basis: torch.Tensor = left[:, sizes > 1e-6 * sizes[0]]
    return basis


def _sketch_of(module: Any, generator: torch.Generator, d_in: int, d_out: int, device: Any) -> _Sketch:
    right = torch.randn(d_in, WIDTH, generator=generator).to(device)
    left = torch.randn(WIDTH, d_out, generator=generator).to(device)
    if not _is_adapted(module):
        return _Sketch(right, left, None, None)
    rows = _orthonormal(module.lora_A["default"].weight.T)
    columns = _orthonormal(module.lora_B["default"].weight)
    assert rows is not None
    inside = rows.to(device)
    projected = right - inside @ (inside.T @ right)
    return _Sketch(torch.cat([right, projected], dim=1), left, inside, columns)


def _is_adapted(module: Any) -> bool:
    # AdaLoRA holds bare parameters there, whose rank is not the rows' number
    return hasattr(module, "lora_A") and hasattr(dict(module.lora_A.items()).get("default"), "weight")


@dataclass
class Looker:
    """Runs streams of rows through the model and keeps sketches of all layers' gradients."""

    model: Any
    plan: Plan
    modules: Sequence[Module]
    pad_id: int
    sketches: dict[str, _Sketch] = field(default_factory=dict)
    stream: str = STREAMS[0]
    num_tokens: int = 0

    def look(self, streams: Mapping[str, Sequence[Tokenized]]) -> Signals:
        """The signals of disjoint sets of rows, one for each of STREAMS."""
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        own_hook = self.plan.train.gradient_checkpointing == "none"
        if own_hook:
            base.enable_input_require_grads()  # without, the first layers get no gradient and stay silent
        handles, was_training, saved = self._hook(base), self.model.training, random_states()
        # dropout would only add noise; but layers are recomputed in training mode only
        self.model.train(not own_hook)
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
        try:
            for self.stream, rows in streams.items():
                self._pass(rows)
        finally:
            for handle in handles:
                handle.remove()
            if own_hook:
                base.disable_input_require_grads()
            self.model.zero_grad(set_to_none=True)
            self.model.train(was_training)
            restore_random_states(*saved)
        return self._signals(sum(map(len, streams.values())))

    def _hook(self, base: Any) -> list[Any]:
        generator, handles = torch.Generator().manual_seed(0), []
        places = {m.name: (base.get_submodule(m.name), m.d_in, m.d_out) for m in self.modules}
        head = base.get_output_embeddings()
        if head is not None and getattr(head, "weight", None) is not None and head.weight.ndim == 2:
            places["head"] = (head, head.weight.shape[1], head.weight.shape[0])
        for name, (module, d_in, d_out) in places.items():
            self.sketches[name] = _sketch_of(module, generator, d_in, d_out, self.model.device)
            handles.append(module.register_forward_hook(self._watch(name)))
        return handles

    def _watch(self, name: str) -> Callable[..., None]:
        def seen(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if not (torch.is_grad_enabled() and output.requires_grad):
                return
            x, stream = inputs[0].detach(), self.stream
            output.register_hook(lambda dy: self.sketches[name].add(stream, x, dy.detach()))

        return seen

    def _pass(self, rows: Sequence[Tokenized]) -> None:
        """Gradients of the mean loss of the rows, in pieces of a micro-batch."""
        task, size = self.plan.base.task, max(1, self.plan.train.micro_batch)
        pieces = [collate(rows[i : i + size], self.pad_id, task=task) for i in range(0, len(rows), size)]
        total = sum(num_learnt(piece["labels"], task) for piece in pieces)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.plan.train.autocast or "")
        for piece in pieces:
            interrupt.stop_if_requested("interrupted while looking for a cause")
            batch = {key: value.to(self.model.device) for key, value in piece.items()}
            with torch.autocast(self.model.device.type, dtype=dtype, enabled=dtype is not None):
                logits = self.model(**inputs_of(self.model, batch, task)).logits
                loss = summed_loss(logits, batch["labels"], task) / max(1, total)
            loss.backward()
        self.num_tokens += sum(row.length for row in rows)

    def _signals(self, num_rows: int) -> Signals:
        found = []
        for module in self.modules:
            sketch = self.sketches[module.name]
            if set(sketch.out) != set(STREAMS):
                continue  # an expert that no row reached
            whole = _energy(*(sketch.out[name][:, :WIDTH] for name in STREAMS[:2]))
            residuals = [sketch.residual(name) for name in STREAMS]
            residual = _energy(*residuals[:2])
            is_adapted = sketch.rows_of_a is not None
            found.append(
                ModuleSignal(
                    module.name,
                    module.role,
                    is_adapted,
                    module.d_in + module.d_out,
                    tangent=whole - residual if is_adapted else 0.0,
                    residual=residual,
                    across=_energy((residuals[0] + residuals[1]) / 2, residuals[2]),
                    agreement=_cosine(*(sketch.out[name][:, :WIDTH] for name in STREAMS[:2])),
                    size=_size(sketch),
                    narrowest=min(module.d_in, module.d_out),
                )
            )
        head = self.sketches.get("head")
        heard = head is not None and set(head.out) == set(STREAMS)
        return Signals(
            tuple(found),
            head_size=_size(head) if head and heard else 0.0,
            num_rows=num_rows,
        )


def _energy(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first * second).sum()) / first.shape[1]


def _size(sketch: _Sketch) -> float:
    first, second = (sketch.out[name][:, :WIDTH] for name in STREAMS[:2])
    return float(first.norm() * second.norm()) / WIDTH


def _cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    size = float(first.norm() * second.norm())
    return float((first * second).sum()) / size if size else 0.0
