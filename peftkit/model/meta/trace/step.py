"""Memory trace of one training step and one evaluation of a plan on the meta device.

The real code runs: transformers' model, PEFT's adapter, bitsandbytes' layers, the trainer's loss. No weights,
no device, no network.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from peftkit.model.adapter import attach
from peftkit.model.meta.blank import model_from_config
from peftkit.model.meta.tensors import weight_tensors
from peftkit.model.meta.trace.caching import simulate_reserved_bytes
from peftkit.model.meta.trace.kernels import SCRATCH, KernelTarget, LMHead, TargetKernels
from peftkit.model.meta.trace.ledger import BACKWARD, BACKWARD_BELOW, EVALUATION, FORWARD, OPTIMIZER, Ledger, PhasePeak
from peftkit.plan import Plan
from peftkit.plan.memory import evaluation_batch, optimizer_memory
from peftkit.plan.plan import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TracedLoss = Callable[[Any, Mapping[str, Any]], Any]
_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, None: None}


@dataclass(frozen=True)
class StepTrace:
    """Peaks by phase, the bytes that CUDA's allocator would reserve, and those that never leave the device.

    `split_peaks` has the backward pass in two phases: its top, and from the first gradient on.
    """

    split_peaks: Mapping[str, PhasePeak]
    static_bytes: int
    saved_activation_bytes: int
    reserved_bytes: int
    num_trainable: int

    @property
    def peaks(self) -> dict[str, PhasePeak]:
        """The peaks by phase, with the backward pass as one."""
        found = dict(self.split_peaks)
        below = found.pop(BACKWARD_BELOW, None)
        if below is not None and below.allocated_bytes > found[BACKWARD].allocated_bytes:
            found[BACKWARD] = replace(below, phase=BACKWARD)
        return found


def build_training_model(
    plan: Plan, config: object, *, recomputing: Callable[[], Any] = nullcontext
) -> PreTrainedModel:
    """Build the plan's model on the meta device in training mode: base, 4-bit layers, adapter, checkpointing.

    `recomputing` returns the context in which checkpointed layers run again.
    """
    model = attach.attach_adapter(
        model_from_config(plan.base, config, device="meta"), attach.with_plain_init(plan), None
    )
    model.train()
    if plan.train.gradient_checkpointing != "none":
        arguments = attach.checkpointing_arguments(plan)
        arguments["activation_checkpointing_kwargs"]["context_fn"] = lambda: (nullcontext(), recomputing())
        model.activation_checkpointing_enable(**arguments)
        if plan.method.peft is not None:
            model.enable_input_require_grads()
    return model


def meta_batch(batch: Batch, task: str, num_classes: int) -> dict[str, torch.Tensor]:
    """Return the tensors of a batch's shapes, on the meta device."""
    size = (batch.num_rows, batch.num_tokens)
    shapes_by_task = {
        "classification": (batch.num_rows,),
        "multi-label": (batch.num_rows, max(2, num_classes)),
        "seq2seq": (batch.num_rows, batch.num_labels),
    }
    labels = shapes_by_task.get(task, size)
    boundary_key = "position_ids" if batch.is_packed else "attention_mask"
    shapes = {"input_ids": size, boundary_key: size, "labels": labels}
    return {name: torch.zeros(shape, dtype=torch.long, device="meta") for name, shape in shapes.items()}


def _fused_loss(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Compute a value with the fused loss's graph: the head returns log-probabilities, not logits."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return model(**inputs, use_cache=False).logits.sum()


def _lm_head(model: PreTrainedModel, batch: Batch, target: KernelTarget) -> LMHead:
    """Return the LM head as the trainer's fused loss sees it."""
    config = model.config.get_text_config()
    return LMHead(
        weight=model.get_output_embeddings().weight,
        softcap=getattr(config, "final_logit_softcapping", None) is not None,
        num_learnt=batch.num_learnt,
        triton=target == "cuda",
    )


def trace_step(plan: Plan, config: object, batch: Batch, *, loss: TracedLoss | None) -> StepTrace:
    """Trace a training step and an evaluation pass of `plan` on `batch`.

    `config` is the base's configuration, `loss` the training loss (None: TRL's fused one). Raises whatever
    the model's code raises on the meta device.
    """
    target: KernelTarget = "cuda" if plan.device == "cuda" else "cpu"
    autocast = _AUTOCAST_DTYPES[plan.train.autocast]
    model = build_training_model(plan, config, recomputing=lambda: TargetKernels(target, autocast, head=None))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    static = optimizer_memory(
        plan, [tuple(parameter.shape) for parameter in trainable], [parameter.element_size() for parameter in trainable]
    )
    ledger = Ledger(
        round_to=512 if target == "cuda" else 1,
        vocab=int(model.config.get_text_config().vocab_size),
        scratch=SCRATCH[target],
        scalar_value=lambda tensor: not (batch.is_padded or batch.is_packed) if tensor.dtype == torch.bool else 0,
    )
    head = _lm_head(model, batch, target) if loss is None else None
    if static.workspace_bytes:
        ledger.allocate(static.workspace_bytes, "workspaces")

    # before the step: weights, adapter, optimizer states, gradients of earlier passes
    def arrived(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        ledger.see(parameter.grad, "gradients")
        ledger.phase = BACKWARD_BELOW if ledger.phase == BACKWARD else ledger.phase

    for weight, is_trained in weight_tensors(model):
        ledger.see(weight, "adapter" if is_trained and plan.method.peft is not None else "base weights")
    for buffer in model.buffers():
        ledger.see(buffer, "buffers")
    for num_bytes in static.optimizer_blocks:
        ledger.allocate(num_bytes, "optimizer")
    for _ in range(static.num_counters):
        ledger.allocate(4, "workspaces")
    if plan.ranks.num > 1:  # in which DDP adds up gradients
        ledger.allocate(sum(p.numel() * p.element_size() for p in trainable), "buckets")
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if plan.train.accumulation > plan.ranks.num:
            parameter.grad = torch.empty_like(parameter)
            ledger.see(parameter.grad, "gradients")
        parameter.register_post_accumulate_grad_hook(arrived)
    inputs = meta_batch(batch, plan.base.task, len(plan.base.labels))
    for tensor in inputs.values():
        ledger.see(tensor, "batch")
    static_bytes = ledger.live_bytes() - ledger.live_bytes(kinds={"gradients"})
    with ledger:
        ledger.phase = FORWARD
        with TargetKernels(target, autocast, head=head):
            loss_value = _fused_loss(model, inputs) if loss is None else loss(model, inputs)
        kept_bytes = ledger.live_bytes(kinds={""})
        ledger.phase = BACKWARD
        loss_value.backward()
        ledger.phase = OPTIMIZER
        ledger.free(ledger.allocate(static.step_bytes, "temporaries"))
        del loss_value
        model.zero_grad(set_to_none=True)
        if batch.eval_rows:
            ledger.phase = EVALUATION
            model.eval()
            held_out = evaluation_batch(batch)
            inputs = meta_batch(held_out, plan.base.task, len(plan.base.labels))
            head = _lm_head(model, held_out, target) if loss is None else None
            with torch.no_grad(), TargetKernels(target, autocast, head=head):
                _fused_loss(model, inputs) if loss is None else loss(model, inputs)
    peaks = ledger.peaks((FORWARD, BACKWARD, BACKWARD_BELOW, OPTIMIZER, EVALUATION))
    reserved = (
        simulate_reserved_bytes([block.num_bytes for block in ledger.blocks], ledger.events) if target == "cuda" else 0
    )
    del model, inputs
    gc.collect()
    return StepTrace(peaks, static_bytes, kept_bytes, reserved, sum(parameter.numel() for parameter in trainable))
