"""Predicted against measured memory on the actual device: random weights, the longest batch, a few steps.

Nothing is downloaded and nothing is kept: the model is made from its configuration.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.plan import Batch, Plan

if TYPE_CHECKING:
    from peftkit.data.tokens.mask import Tokenized

NUM_STEPS = 3  # the first makes the optimizer's states, the others are measured
_TRAINED = ("forward", "backward", "optimizer step")


@dataclass(frozen=True)
class Trial:
    """Bytes at the peak of a step, as predicted and as the device's allocator had them."""

    predicted_bytes: int
    measured_bytes: int
    predicted_reserved_bytes: int | None  # None on a CPU, whose allocator keeps no reserve
    measured_reserved_bytes: int | None
    step_seconds: float
    num_steps: int

    @property
    def error_percent(self) -> float:
        """Of what was allocated: positive where the plan said too much."""
        return 100 * (self.predicted_bytes - self.measured_bytes) / self.measured_bytes

    @property
    def reserved_error_percent(self) -> float | None:
        """Of what was reserved."""
        if not self.predicted_reserved_bytes or not self.measured_reserved_bytes:
            return None
        return 100 * (self.predicted_reserved_bytes / self.measured_reserved_bytes - 1)


def short(plan: Plan, batch: Batch) -> Plan:
    """The plan's step, three times, with at most two micro-batches: more add nothing to the peak."""
    num = min(2, plan.train.accumulation)
    train = replace(
        plan.train,
        num_steps=NUM_STEPS,
        num_warmup_steps=0,
        accumulation=num,
        batch_size=num * plan.train.micro_batch,
    )
    return replace(plan, train=train, data=replace(plan.data, eval=None, max_length=batch.num_tokens))


def _rows(plan: Plan, batch: Batch, vocab: int) -> list[Tokenized]:
    """Rows that make micro-batches of the shapes of `batch`; where it is padded, all but one are shorter.

    Where it is packed there are two documents to a pack.
    """
    from peftkit.data.tokens.mask import IGNORED, Tokenized

    found = []
    learnt = -(-batch.num_learnt // batch.num_rows)
    for number in range(NUM_STEPS * plan.train.accumulation * batch.num_rows):
        shorter = batch.is_padded and number % batch.num_rows > 0
        length = max(2, batch.num_tokens - shorter)
        ids = [4 + (7 * place + number) % max(1, vocab - 4) for place in range(length)]
        labels = [IGNORED] * max(0, length - learnt) + ids[max(0, length - learnt) :]
        if batch.is_packed:
            half = length // 2
            found.append(Tokenized(ids[:half], labels[:half], str(number)))
            ids, labels = ids[half:], labels[half:]
        if plan.base.task == "seq2seq":
            labels = ids[: batch.num_labels]
        elif plan.base.task == "classification":
            labels = [number % max(2, len(plan.base.labels))]
        elif plan.base.task == "token-classification":
            labels = [place % max(2, len(plan.base.labels)) for place in range(length)]
        found.append(Tokenized(ids, labels, str(number)))
    return found


def _tokenizer() -> Any:
    """The trainer wants one to pad with."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def _watch(model: Any, *, on_gpu: bool) -> Any:
    """A callback that measures every step after the first."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    from peftkit.model.meta.tensors import tensor_bytes

    class Watch(TrainerCallback):  # type: ignore[misc]
        """On a GPU the allocator's own peak; on a CPU the profiler's events of torch's allocator."""

        def __init__(self) -> None:
            self.peak_bytes = self.reserved_bytes = 0
            self.started, self.seconds = 0.0, float("inf")
            self.profile: Any = None
            self.there = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            self.started = time.perf_counter()
            if state.global_step == 0:
                return
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            elif state.global_step == 1:
                states = getattr(optimizer, "optimizer", optimizer).state.values()
                kept = [t for state in states for t in state.values() if torch.is_tensor(t)]
                self.there = tensor_bytes(model) + sum(t.untyped_storage().nbytes() for t in kept)
                self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
                self.profile.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            if self.profile is None:  # the profiler would slow what it looks at
                self.seconds = min(self.seconds, time.perf_counter() - self.started)
            if on_gpu and state.global_step > 1:
                self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated())
                self.reserved_bytes = max(self.reserved_bytes, torch.cuda.max_memory_reserved())
            if self.profile is not None:
                self.profile.__exit__(None, None, None)
                self.peak_bytes = self.there + allocator_peak(self.profile)
                self.profile = None

    return Watch()


def allocator_peak(profiled: Any) -> int:
    """The highest sum of the allocations and frees of torch's CPU allocator in a profile, in bytes."""
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        highest = max(highest, current)
    return highest


def run_trial(plan: Plan, config: Mapping[str, Any], batch: Batch, *, vocab: int) -> Trial:
    """Train `plan` on random weights and rows of the shapes of `batch`, and compare.

    `plan.memory` is what is compared with. Raises what the device raises where it does not fit after all.
    """
    from transformers import PrinterCallback, set_seed

    from peftkit.model.adapter import attach as adapter
    from peftkit.model.hardware import release
    from peftkit.model.load import read_config
    from peftkit.model.meta.blank import blank_model
    from peftkit.train.batches import training_set
    from peftkit.train.training import objective

    assert plan.memory is not None
    on_gpu = plan.device == "cuda"
    expected = max(p.allocated_bytes for p in plan.memory.peaks if p.phase in _TRAINED)
    made = adapter.plain_start(short(plan, batch))
    set_seed(plan.seed)
    device = "cuda:0" if on_gpu else plan.device
    model = adapter.attach(blank_model(made.base, read_config(config, made.base), device=device), made, None)
    release()
    watch = _watch(model, on_gpu=on_gpu)
    with tempfile.TemporaryDirectory() as folder:
        drawn = training_set(made, _rows(made, batch, vocab), pad_id=0)
        trainer = objective(made).trainer(
            model,
            made,
            _tokenizer(),
            train=drawn,
            output_dir=Path(folder),
            callbacks=[watch],
            optimizer=adapter.build_loraplus_optimizer(model, made) if made.method.lr_ratio else None,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return Trial(
        predicted_bytes=expected,
        measured_bytes=watch.peak_bytes,
        predicted_reserved_bytes=plan.memory.reserved_bytes if on_gpu else None,
        measured_reserved_bytes=watch.reserved_bytes or None,
        step_seconds=watch.seconds,
        num_steps=NUM_STEPS,
    )
