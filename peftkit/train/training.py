"""Assembly of a training from plan, model and data: it can be run, resumed and stopped."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, set_seed
from transformers.utils import logging

from peftkit import ranks
from peftkit.data.tokens.mask import Tokenized
from peftkit.data.tokens.prepare import TokenizedData
from peftkit.evaluate.losses import RowLosses, row_losses, span_losses
from peftkit.evaluate.step import fused_row_sums, fused_token_losses
from peftkit.methods import METHODS
from peftkit.model.adapter.attach import build_loraplus_optimizer
from peftkit.plan import Plan
from peftkit.plan.memory import evaluation_rows
from peftkit.plan.packing import FORMER_SAMPLINGS
from peftkit.plan.task import trainer_spec
from peftkit.rundir import RunDir, read_json, verify_folder
from peftkit.rundir.events import Observer, WarningEvent
from peftkit.train.adalora import AdaLoraCallback
from peftkit.train.batches import build_train_dataset, longest_groups
from peftkit.train.checkpoint.restore import (
    CheckpointRestorer,
    TrainBeginCallback,
    load_trained,
    rank_seed,
    write_resume_folder,
)
from peftkit.train.guard import LossHistory, StepGuard
from peftkit.train.preflight import Preflight, run_preflight
from peftkit.train.recorder import EvalProgress, Recorder
from peftkit.train.trainer import build_trainer, training_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def compute_row_losses(
    model: PreTrainedModel,
    rows: Sequence[Tokenized],
    plan: Plan,
    *,
    pad_id: int,
    prepared: bool = True,
    shared: bool = False,
) -> RowLosses:
    """Compute the losses of rows; pass `prepared=False` for a model that no trainer has prepared.

    `shared` among all ranks, which have to come here together.
    """
    return row_losses(
        model,
        rows,
        pad_id=pad_id,
        batch_size=evaluation_rows(plan),
        task=plan.base.task,
        autocast=plan.train.autocast,
        shared=shared,
        forward_sums=fused_row_sums if prepared and trainer_spec(plan).loss == "fused" else None,
    )


def compute_span_losses(
    model: PreTrainedModel,
    rows: Sequence[Tokenized],
    plan: Plan,
    spans: Sequence[tuple[int, int]],
    *,
    pad_id: int,
    prepared: bool,
) -> list[RowLosses]:
    """Compute the losses of rows by spans of positions, as `compute_row_losses` does as a whole."""
    return span_losses(
        model,
        rows,
        spans,
        pad_id=pad_id,
        batch_size=evaluation_rows(plan),
        autocast=plan.train.autocast,
        forward_tokens=fused_token_losses if prepared and trainer_spec(plan).loss == "fused" else None,
    )


@dataclass
class Training:
    """An assembled training. `run()` trains to the end, to a stop, or from `checkpoint` on."""

    trainer: Any
    run_dir: RunDir
    plan: Plan
    checkpoint: Path | None
    recorder: Recorder
    rows: Sequence[Tokenized]
    pad_id: int

    def preflight(self) -> Preflight:
        """Prove on the longest rows that they fit, and that every trained tensor gets a gradient."""
        return run_preflight(
            self.trainer.model,
            self.plan,
            longest_groups(self.plan, self.rows, self.plan.train.micro_batch),
            pad_id=self.pad_id,
            loss=training_loss(self.plan),
        )

    def evaluate_start(self) -> None:
        """Record the evaluation loss before the first step."""
        if self.recorder.evaluate is not None:
            self.recorder.measure(self.trainer.model, 0)

    def run(self) -> int:
        """Train, and return the step at which training ended, once its checkpoints are on disk."""
        try:
            if self.checkpoint is None:
                if rank := ranks.current().rank:
                    self.trainer.add_callback(
                        TrainBeginCallback(lambda: set_seed(rank_seed(self.plan.seed, rank)))  # dropout of its own
                    )
                self.trainer.train()
                return int(self.trainer.state.global_step)
            # run the evaluation due at the checkpoint's step, if it was not run yet
            step = int(read_json(self.checkpoint / "trainer_state.json")["global_step"])
            is_last = step >= (self.plan.train.num_steps or 0)
            is_due = self.recorder.evaluate is not None and (is_last or step % self.plan.train.eval_steps == 0)
            if is_due and self.recorder.progress.last_step < step:
                load_trained(self.trainer.model, self.checkpoint)
                self.recorder.measure(self.trainer.model, step)
            if self.recorder.stops_early or step >= (self.plan.train.num_steps or 0):
                load_trained(self.trainer.model, self.checkpoint)
                return step
            resume_folder = write_resume_folder(self.checkpoint, Path(tempfile.mkdtemp(prefix="peftkit-handover-")))
            verbosity = logging.get_verbosity()
            logging.set_verbosity_error()  # the Trainer warns of weights that the handover lacks on purpose
            self.trainer.add_callback(TrainBeginCallback(lambda: logging.set_verbosity(verbosity)))
            try:
                self.trainer.train(resume_from_checkpoint=str(resume_folder))
            finally:
                logging.set_verbosity(verbosity)
                shutil.rmtree(resume_folder, ignore_errors=True)
            return int(self.trainer.state.global_step)
        finally:
            self.recorder.writer.close()

    def has_ended(self, step: int) -> bool:
        """Return True if training is over at a step, by its number or by the recipe's patience."""
        return self.recorder.stops_early or step >= (self.plan.train.num_steps or 0)

    def load_best(self, last_step: int) -> int:
        """Load the best checkpoint's tensors unless the last step is the best. Returns the step."""
        best = self.recorder.progress.best_step
        if best is None or best == last_step:
            return last_step
        folder = self.run_dir.checkpoint(best)
        if faults := verify_folder(folder):
            text = f"the best checkpoint is damaged, the last step is published instead: {'; '.join(faults)}"
            self.recorder.emit(WarningEvent(text=text))
            return last_step
        load_trained(self.trainer.model, folder)
        return best


def assemble(
    model: PreTrainedModel,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prepared: TokenizedData,
    run: RunDir,
    emit: Observer,
    checkpoint: Path | None,
    facts: Mapping[str, object],
) -> Training:
    """Build the trainer with our callbacks; a resumed run continues from `checkpoint`.

    `facts` go into the manifest of each checkpoint.
    """
    train, held_out = prepared.train, prepared.eval
    progress, history, restorer = EvalProgress(), LossHistory(), None
    if checkpoint is not None:
        restorer = CheckpointRestorer(checkpoint)
        progress, history = (EvalProgress(**restorer.state["progress"]), LossHistory(**restorer.state["vitals"]))
        if progress.best_step is not None and verify_folder(run.checkpoint(progress.best_step)):
            emit(WarningEvent(text=f"the best checkpoint, of step {progress.best_step}, is lost: the search restarts"))
            progress.best_step = progress.best_loss = None
        if plan.train.sampling in FORMER_SAMPLINGS:
            text = "the run was begun by an earlier peftkit: from here on its rows come in another order than then"
            emit(WarningEvent(text=text))

    def evaluate(wrapped_model: object) -> RowLosses:
        return compute_row_losses(wrapped_model, held_out, plan, pad_id=tokenizer.pad_token_id, shared=True)

    dataset = build_train_dataset(plan, train, tokenizer.pad_token_id)
    guard = StepGuard(plan, emit, history, lambda numbers: [train[number].where for number in numbers])
    evaluator = evaluate if held_out else None
    recorder = Recorder(plan, emit, progress, evaluator, guard=guard, run=run, facts=facts)
    adalora_callbacks = [AdaLoraCallback(guard)] if METHODS[plan.method.name].schedule is not None else []
    trainer = build_trainer(
        model,
        plan,
        tokenizer,
        train=dataset,
        output_dir=run.path,
        callbacks=[*([restorer] if restorer else []), guard, recorder, *adalora_callbacks],
        optimizer=build_loraplus_optimizer(model, plan) if plan.method.lr_ratio is not None else None,
    )
    for callback in (recorder, restorer):
        if callback is not None:
            callback.accelerator = trainer.accelerator
    trainer.remove_callback(PrinterCallback)  # our own events are shown instead
    return Training(trainer, run, plan, checkpoint, recorder, train, tokenizer.pad_token_id)
