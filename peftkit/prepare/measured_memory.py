"""Measured memory on the actual device, against the prediction: random weights, a few longest batches.

Nothing is downloaded and nothing is kept: the model is made from its configuration.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.data.tokens.mask import IGNORE_INDEX, Tokenized
from peftkit.model.adapter import attach
from peftkit.model.hardware import allocator_peak, read_memory_use, release_memory, reset_peak_memory, synchronize
from peftkit.model.load import read_config
from peftkit.plan import Batch, Plan
from peftkit.plan.plan import RanksPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

NUM_STEPS = 3  # the first makes the optimizer's states, the others are measured
_STEP_PHASES = ("forward", "backward", "optimizer step")


@dataclass(frozen=True)
class MeasuredMemory:
    """Peak bytes of a step, as predicted and as measured by the device's allocator."""

    predicted_bytes: int
    measured_bytes: int
    predicted_reserved_bytes: int | None  # None on a CPU, whose allocator keeps no reserve
    measured_reserved_bytes: int | None
    step_seconds: float
    num_steps: int

    @property
    def error_percent(self) -> float:
        """Return the error of the predicted allocated bytes; positive where the plan was too high."""
        return 100 * (self.predicted_bytes - self.measured_bytes) / self.measured_bytes

    @property
    def reserved_error_percent(self) -> float | None:
        """Return the error of the predicted reserved bytes, in percent; None on a CPU."""
        if not self.predicted_reserved_bytes or not self.measured_reserved_bytes:
            return None
        return 100 * (self.predicted_reserved_bytes / self.measured_reserved_bytes - 1)


def shortened_plan(plan: Plan, batch: Batch) -> Plan:
    """Return the plan cut to three steps of at most two micro-batches: more add nothing to the peak."""
    accumulation = min(2, plan.train.accumulation // plan.ranks.num)  # of one process
    train = replace(
        plan.train,
        num_steps=NUM_STEPS,
        num_warmup_steps=0,
        accumulation=accumulation,
        batch_size=accumulation * plan.train.micro_batch,
    )
    data = replace(plan.data, eval=None, max_length=batch.num_tokens)
    return replace(plan, train=train, data=data, ranks=RanksPlan())  # one process, without buckets


def _peak_memory_callback(model: PreTrainedModel, *, on_gpu: bool) -> Any:
    """Return a callback that measures every step after the first."""
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    from peftkit.model.meta.tensors import count_tensor_bytes, optimizer_bytes

    class Watch(TrainerCallback):  # type: ignore[misc]
        """A callback with the peak bytes: of the allocator on a GPU, of torch's profiler on a CPU."""

        def __init__(self) -> None:
            self.peak_bytes = self.reserved_bytes = 0
            self.started, self.seconds = 0.0, float("inf")
            self.profile: Any = None
            self.there = 0

        def on_step_begin(
            self,
            args: TrainingArguments,
            state: TrainerState,
            control: TrainerControl,
            optimizer: Any = None,
            **_: object,
        ) -> None:
            self.started = time.perf_counter()
            if state.global_step == 0:
                return
            if on_gpu:
                reset_peak_memory()
            elif state.global_step == 1:
                self.there = count_tensor_bytes(model) + optimizer_bytes(optimizer)
                self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
                self.profile.__enter__()

        def on_step_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
        ) -> None:
            synchronize()
            if self.profile is None:  # the profiler would slow what it looks at
                self.seconds = min(self.seconds, time.perf_counter() - self.started)
            if on_gpu and state.global_step > 1:
                usage = read_memory_use()
                self.peak_bytes = max(self.peak_bytes, usage["peak_allocated_bytes"])
                self.reserved_bytes = max(self.reserved_bytes, usage["peak_reserved_bytes"])
            if self.profile is not None:
                self.profile.__exit__(None, None, None)
                self.peak_bytes = self.there + allocator_peak(self.profile)
                self.profile = None

    return Watch()


def measure_memory(plan: Plan, config: Mapping[str, object], batch: Batch, *, vocab: int) -> MeasuredMemory:
    """Train `plan` for a few steps on random weights and rows shaped as `batch`, and compare the memory.

    `plan.memory` is what is compared with. Raises what the device raises where it does not fit after all.
    """
    from transformers import PrinterCallback, set_seed

    from peftkit.model.meta.blank import model_from_config
    from peftkit.train.batches import build_train_dataset
    from peftkit.train.trainer import build_trainer

    assert plan.memory is not None
    on_gpu = plan.device == "cuda"
    step_peaks = [peak for peak in plan.memory.peaks if peak.phase in _STEP_PHASES]
    predicted_bytes = max(peak.allocated_bytes - peak.components.get("buckets", 0) for peak in step_peaks)
    trial_plan = attach.with_plain_init(shortened_plan(plan, batch))
    set_seed(plan.seed)
    device = "cuda:0" if on_gpu else plan.device
    model = attach.attach_adapter(
        model_from_config(trial_plan.base, read_config(config, trial_plan.base), device=device), trial_plan, None
    )
    release_memory()
    callback = _peak_memory_callback(model, on_gpu=on_gpu)
    with tempfile.TemporaryDirectory() as folder:
        # rows that fill micro-batches of the shapes of `batch`
        synthetic_rows = []
        loss_tokens = -(-batch.num_learnt // batch.num_rows)
        for number in range(NUM_STEPS * trial_plan.train.accumulation * batch.num_rows):
            is_shorter = batch.is_padded and number % batch.num_rows > 0
            length = max(2, batch.num_tokens - is_shorter)
            ids = [4 + (7 * position + number) % max(1, vocab - 4) for position in range(length)]
            labels = [IGNORE_INDEX] * max(0, length - loss_tokens) + ids[max(0, length - loss_tokens) :]
            if batch.is_packed:
                half = length // 2
                synthetic_rows.append(Tokenized(ids[:half], labels[:half], str(number)))
                ids, labels = ids[half:], labels[half:]
            if trial_plan.base.task == "seq2seq":
                labels = ids[: batch.num_labels]
            elif trial_plan.base.task == "classification":
                labels = [number % max(2, len(trial_plan.base.labels))]
            elif trial_plan.base.task == "multi-label":
                labels = [(number + position) % 2 for position in range(max(2, len(trial_plan.base.labels)))]
            elif trial_plan.base.task == "token-classification":
                labels = [position % max(2, len(trial_plan.base.labels)) for position in range(length)]
            synthetic_rows.append(Tokenized(ids, labels, str(number)))
        dataset = build_train_dataset(trial_plan, synthetic_rows, pad_id=0)
        # the Trainer pads with a tokenizer's token
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
        )
        trainer = build_trainer(
            model,
            trial_plan,
            tokenizer,
            train=dataset,
            output_dir=Path(folder),
            callbacks=[callback],
            optimizer=attach.build_loraplus_optimizer(model, trial_plan) if trial_plan.method.lr_ratio else None,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return MeasuredMemory(
        predicted_bytes=predicted_bytes,
        measured_bytes=callback.peak_bytes,
        predicted_reserved_bytes=plan.memory.reserved_bytes if on_gpu else None,
        measured_reserved_bytes=callback.reserved_bytes or None,
        step_seconds=callback.seconds,
        num_steps=NUM_STEPS,
    )
