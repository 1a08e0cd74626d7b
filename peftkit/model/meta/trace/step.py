"""One training step and one evaluation of a plan on the meta device: what is alive at the highest point.

The real code runs: transformers' model, PEFT's adapter, bitsandbytes' layers, the trainer's loss. No weights,
no device, no network.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from peftkit.model.adapter import attach as adapter
from peftkit.model.meta.blank import blank_model
from peftkit.model.meta.tensors import weight_tensors
from peftkit.model.meta.trace.caching import reserved_bytes
from peftkit.model.meta.trace.kernels import SCRATCH, Head, Kernels, Target
from peftkit.model.meta.trace.ledger import BACKWARD, BELOW, EVALUATION, FORWARD, OPTIMIZER, Ledger, Snapshot
from peftkit.plan import Plan
from peftkit.plan.memory import Static, evaluation_batch, static_memory
from peftkit.plan.plan import Batch

Loss = Callable[[Any, Mapping[str, Any]], Any]
_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, None: None}


@dataclass(frozen=True)
class Traced:
    """Peaks by phase, what CUDA's allocator would reserve for them, and what never leaves the device.

    `moments` tells the backward pass in two: at its top, and from the first gradient on.
    """

    moments: Mapping[str, Snapshot]
    static_bytes: int
    kept_bytes: int
    reserved_bytes: int
    num_trainable: int

    @property
    def peaks(self) -> dict[str, Snapshot]:
        """By phase, the backward pass as one."""
        found = dict(self.moments)
        below = found.pop(BELOW, None)
        if below is not None and below.allocated_bytes > found[BACKWARD].allocated_bytes:
            found[BACKWARD] = replace(below, phase=BACKWARD)
        return found


def build(plan: Plan, config: Any, *, recomputing: Callable[[], Any] = nullcontext) -> Any:
    """The plan's model on the meta device: base, 4-bit layers, adapter, checkpointing, in training mode.

    `recomputing` makes the context in which checkpointed layers run again.
    """
    model = adapter.attach(blank_model(plan.base, config, device="meta"), adapter.plain_start(plan), None)
    model.train()
    if plan.train.gradient_checkpointing != "none":
        arguments = adapter.checkpointing(plan)
        arguments["activation_checkpointing_kwargs"]["context_fn"] = lambda: (nullcontext(), recomputing())
        model.activation_checkpointing_enable(**arguments)
        if plan.method.peft is not None:
            model.enable_input_require_grads()
    return model


def batch_of(batch: Batch, task: str) -> dict[str, torch.Tensor]:
    """Tensors of a batch's shapes."""
    size = (batch.num_rows, batch.num_tokens)
    labels = {
        "classification": (batch.num_rows,),
        "seq2seq": (batch.num_rows, batch.num_labels),
    }.get(task, size)
    told_by = "position_ids" if batch.is_packed else "attention_mask"
    made = {"input_ids": size, told_by: size, "labels": labels}
    return {name: torch.zeros(shape, dtype=torch.long, device="meta") for name, shape in made.items()}


def _set_up(ledger: Ledger, model: Any, plan: Plan, static: Static) -> None:
    """What is there before the step: weights, adapter, optimizer states, gradients of earlier passes."""

    def arrived(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        ledger.see(parameter.grad, "gradients")
        ledger.phase = BELOW if ledger.phase == BACKWARD else ledger.phase

    for tensor, is_trained in weight_tensors(model):
        ledger.see(tensor, "adapter" if is_trained and plan.method.peft is not None else "base weights")
    for buffer in model.buffers():
        ledger.see(buffer, "buffers")
    for num_bytes in static.optimizer_blocks:
        ledger.allocate(num_bytes, "optimizer")
    for _ in range(static.num_counters):
        ledger.allocate(4, "workspaces")
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if plan.train.accumulation > 1:
            parameter.grad = torch.empty_like(parameter)
            ledger.see(parameter.grad, "gradients")
        parameter.register_post_accumulate_grad_hook(arrived)


def _fused_loss(model: Any, batch: Mapping[str, Any]) -> Any:
    """A value whose graph is that of the fused loss: the head gives log-probabilities in place of logits."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return model(**inputs, use_cache=False).logits.sum()


def _head(model: Any, batch: Batch, target: Target) -> Head:
    """The language model's head as the trainer's fused loss sees it."""
    config = model.config.get_text_config()
    return Head(
        weight=model.get_output_embeddings().weight,
        softcap=getattr(config, "final_logit_softcapping", None) is not None,
        num_learnt=batch.num_learnt,
        triton=target == "cuda",
    )


def trace(plan: Plan, config: Any, batch: Batch, *, loss: Loss | None) -> Traced:
    """Run a step and an evaluation pass of `plan` on `batch`.

    `config` is the base's configuration, `loss` the loss that is trained (None: TRL's fused one). Raises
    whatever the model's code raises on the meta device.
    """
    target: Target = "cuda" if plan.device == "cuda" else "cpu"
    autocast = _TYPES[plan.train.autocast]
    model = build(plan, config, recomputing=lambda: Kernels(target, autocast, head=None))
    trained = [p for p in model.parameters() if p.requires_grad]
    static = static_memory(plan, [tuple(p.shape) for p in trained], [p.element_size() for p in trained])
    ledger = Ledger(
        round_to=512 if target == "cuda" else 1,
        vocab=int(model.config.get_text_config().vocab_size),
        scratch=SCRATCH[target],
        truth=lambda tensor: not (batch.is_padded or batch.is_packed) if tensor.dtype == torch.bool else 0,
    )
    head = _head(model, batch, target) if loss is None else None
    if static.workspace_bytes:
        ledger.allocate(static.workspace_bytes, "workspaces")
    _set_up(ledger, model, plan, static)
    inputs = batch_of(batch, plan.base.task)
    for tensor in inputs.values():
        ledger.see(tensor, "batch")
    static_bytes = ledger.live_bytes() - ledger.live_bytes(of={"gradients"})
    with ledger:
        ledger.phase = FORWARD
        with Kernels(target, autocast, head=head):
            value = _fused_loss(model, inputs) if loss is None else loss(model, inputs)
        kept_bytes = ledger.live_bytes(of={""})
        ledger.phase = BACKWARD
        value.backward()
        ledger.phase = OPTIMIZER
        ledger.free(ledger.allocate(static.step_bytes, "temporaries"))
        del value
        model.zero_grad(set_to_none=True)
        if batch.eval_rows:
            ledger.phase = EVALUATION
            model.eval()
            held_out = evaluation_batch(batch)
            inputs = batch_of(held_out, plan.base.task)
            head = _head(model, held_out, target) if loss is None else None
            with torch.no_grad(), Kernels(target, autocast, head=head):
                _fused_loss(model, inputs) if loss is None else loss(model, inputs)
    peaks = ledger.peaks((FORWARD, BACKWARD, BELOW, OPTIMIZER, EVALUATION))
    reserved = reserved_bytes([b.num_bytes for b in ledger.blocks], ledger.events) if target == "cuda" else 0
    del model, inputs
    gc.collect()
    return Traced(peaks, static_bytes, kept_bytes, reserved, sum(p.numel() for p in trained))
