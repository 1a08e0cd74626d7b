"""From plan, model and data to a training that can be run, resumed and stopped."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PrinterCallback
from transformers.utils import logging

from peftkit.data.tokens.mask import Tokenized
from peftkit.data.tokens.prepare import Prepared
from peftkit.evaluate.losses import RowLosses, row_losses
from peftkit.methods import METHODS
from peftkit.model.adapter.attach import build_loraplus_optimizer
from peftkit.plan import Plan
from peftkit.plan.memory import evaluation_rows
from peftkit.rundir import RunDir, read_json, verify_folder
from peftkit.train.adalora import Budget
from peftkit.train.batches import longest, training_set
from peftkit.train.checkpoint.restore import AtStart, Restore, handover_folder, load_trained
from peftkit.train.guard import Guard, Vitals
from peftkit.train.objectives import sft, supervised
from peftkit.train.preflight import Preflight, preflight
from peftkit.train.recorder import Emit, Progress, Record


def objective(plan: Plan) -> ModuleType:
    """The file that trains this plan's task."""
    # TRL's fused loss reads the head past PEFT's wrapper of single token rows
    known = plan.base.task == "causal-lm" and not (plan.base.inferred or plan.method.token_rows)
    return sft if known and not plan.data.weighted else supervised  # TRL's loss knows no weights


def losses_of(
    model: Any, rows: Sequence[Tokenized], plan: Plan, *, pad_id: int, prepared: bool = True
) -> RowLosses:
    """The losses of rows; without `prepared` for a model that no trainer has prepared."""
    return row_losses(
        model,
        rows,
        pad_id=pad_id,
        batch_size=evaluation_rows(plan),
        task=plan.base.task,
        autocast=plan.train.autocast,
        summed=objective(plan).summed if prepared else None,
    )


@dataclass
class Training:
    """One assembled training. `run()` trains to the end, to a stop, or from `checkpoint` on."""

    trainer: Any
    run_dir: RunDir
    plan: Plan
    checkpoint: Path | None
    record: Record
    rows: Sequence[Tokenized]
    pad_id: int

    def preflight(self) -> Preflight:
        """Prove on the longest rows that they fit, and that everything to be trained is reached."""
        return preflight(
            self.trainer.model,
            self.plan,
            longest(self.plan, self.rows, self.plan.train.micro_batch),
            pad_id=self.pad_id,
            loss=objective(self.plan).loss,
        )

    def measure_start(self) -> None:
        """Evaluation loss before the first step."""
        if self.record.evaluate is not None:
            self.record.measure(self.trainer.model, 0)

    def run(self) -> int:
        """Train. Returns the step at which training ended, once its checkpoints are on the disk."""
        try:
            return self._run()
        finally:
            self.record.writer.close()

    def _run(self) -> int:
        if self.checkpoint is None:
            self.trainer.train()
            return int(self.trainer.state.global_step)
        step = self._catch_up(self.checkpoint)
        if self.record.stops_early or step >= (self.plan.train.num_steps or 0):
            load_trained(self.trainer.model, self.checkpoint)
            return step
        handover = handover_folder(self.checkpoint, self.run_dir.path / ".tmp-handover")
        told = logging.get_verbosity()
        logging.set_verbosity_error()  # the Trainer warns of weights that the handover lacks on purpose
        self.trainer.add_callback(AtStart(lambda: logging.set_verbosity(told)))
        try:
            self.trainer.train(resume_from_checkpoint=str(handover))
        finally:
            logging.set_verbosity(told)
            shutil.rmtree(handover, ignore_errors=True)
        return int(self.trainer.state.global_step)

    def _catch_up(self, checkpoint: Path) -> int:
        """Make the evaluation that was due at the checkpoint's step, where the stop came before it."""
        step = int(read_json(checkpoint / "trainer_state.json")["global_step"])
        last = step >= (self.plan.train.num_steps or 0)
        due = self.record.evaluate is not None and (last or step % self.plan.train.eval_steps == 0)
        if due and self.record.progress.last_step < step:
            load_trained(self.trainer.model, checkpoint)
            self.record.measure(self.trainer.model, step)
        return step

    def has_ended(self, step: int) -> bool:
        """Whether training is over at a step, by its number or by the recipe's patience."""
        return self.record.stops_early or step >= (self.plan.train.num_steps or 0)

    def take_best(self, last_step: int) -> int:
        """Put the best checkpoint's tensors into the model, unless the last step is the best."""
        best = self.record.progress.best_step
        if best is None or best == last_step:
            return last_step
        folder = self.run_dir.checkpoint(best)
        if faults := verify_folder(folder):
            text = f"the best checkpoint cannot be published, so that the last step is: {'; '.join(faults)}"
            self.record.emit("warning", text=text)
            return last_step
        load_trained(self.trainer.model, folder)
        return best


def assemble(
    model: Any,
    plan: Plan,
    tokenizer: Any,
    *,
    prepared: Prepared,
    run: RunDir,
    emit: Emit,
    checkpoint: Path | None,
    facts: Mapping[str, Any],
) -> Training:
    """Build the trainer with our callbacks; `checkpoint` is where a resumed run goes on.

    `facts` go into the manifest of each checkpoint.
    """
    train, held_out = prepared.train, prepared.eval
    progress, vitals, restore = Progress(), Vitals(), None
    if checkpoint is not None:
        restore = Restore(checkpoint)
        progress, vitals = Progress(**restore.state["progress"]), Vitals(**restore.state["vitals"])
        if progress.best_step is not None and verify_folder(run.checkpoint(progress.best_step)):
            emit(
                "warning",
                text=f"the best checkpoint, of step {progress.best_step}, is lost: the search starts anew",
            )
            progress.best_step = progress.best_loss = None

    def evaluate(wrapped: Any) -> RowLosses:
        return losses_of(wrapped, held_out, plan, pad_id=tokenizer.pad_token_id)

    drawn = training_set(plan, train, tokenizer.pad_token_id)
    guard = Guard(plan, emit, vitals, lambda numbers: [train[number].where for number in numbers])
    chosen = evaluate if held_out else None
    record = Record(plan, emit, progress, chosen, guard=guard, run=run, facts=facts)
    budget = [Budget(guard)] if METHODS[plan.method.name].schedule is not None else []
    trainer = objective(plan).trainer(
        model,
        plan,
        tokenizer,
        train=drawn,
        output_dir=run.path,
        callbacks=[*([restore] if restore else []), guard, record, *budget],
        optimizer=build_loraplus_optimizer(model, plan) if plan.method.lr_ratio is not None else None,
    )
    for callback in (record, restore):
        if callback is not None:
            callback.accelerator = trainer.accelerator
    trainer.remove_callback(PrinterCallback)  # our own events are shown instead
    return Training(trainer, run, plan, checkpoint, record, train, tokenizer.pad_token_id)
