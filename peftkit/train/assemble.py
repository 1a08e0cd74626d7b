"""From plan, model and data to a training that can be run, resumed and stopped."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftkit.data import to_dataset
from peftkit.data.mask import Tokenized
from peftkit.model.adapter import build_loraplus_optimizer
from peftkit.plan import Plan
from peftkit.rundir import RunDir, read_json
from peftkit.train.checkpoint import Restore, handover_folder, load_trained
from peftkit.train.objectives import sft
from peftkit.train.record import Emit, Progress, Record


def rows_of(tokenized: Sequence[Tokenized]) -> list[dict[str, list[int]]]:
    """Tokenized examples as the trainer's columns."""
    return [{"input_ids": row.input_ids, "labels": row.labels} for row in tokenized]


@dataclass
class Training:
    """One assembled training. `run()` trains to the end, to a stop, or from `checkpoint` on."""

    trainer: Any
    run_dir: RunDir
    checkpoint: Path | None
    progress: Progress

    def evaluate(self) -> float:
        """Evaluation loss of the model as it is now, in nats per learnt token."""
        return float(self.trainer.evaluate()["eval_loss"])

    def run(self) -> int:
        """Train. Returns the step at which training ended."""
        handover = self.run_dir.path / ".handover"
        resume = None
        if self.checkpoint is not None:
            resume = str(handover_folder(self.checkpoint, self.trainer.model, handover))
        try:
            self.trainer.train(resume_from_checkpoint=resume)
        finally:
            shutil.rmtree(handover, ignore_errors=True)
        return int(self.trainer.state.global_step)

    def take_best(self) -> int | None:
        """Put the best checkpoint's tensors into the model, unless the last step is the best."""
        best = self.progress.best_step
        if best is None or best == self.trainer.state.global_step:
            return best
        load_trained(self.trainer.model, self.run_dir.checkpoint(best))
        return best


def assemble(
    model: Any,
    plan: Plan,
    tokenizer: Any,
    *,
    train: Sequence[Tokenized],
    held_out: Sequence[Tokenized],
    run: RunDir,
    emit: Emit,
    checkpoint: Path | None,
) -> Training:
    """Build the trainer with our callbacks; `checkpoint` is where a resumed run goes on."""
    progress = Progress()
    callbacks: list[Any] = []
    if checkpoint is not None:
        progress = Progress(**read_json(checkpoint / "state.json")["progress"])
        callbacks.append(Restore(checkpoint))
    callbacks.append(Record(run, plan, emit, progress))
    optimizer = None
    if plan.method.lr_ratio is not None:
        optimizer = build_loraplus_optimizer(model, plan)
    trainer = sft.trainer(
        model,
        plan,
        tokenizer,
        train=to_dataset(rows_of(train)),
        held_out=to_dataset(rows_of(held_out)) if held_out else None,
        output_dir=run.path,
        callbacks=callbacks,
        optimizer=optimizer,
    )
    return Training(trainer, run, checkpoint, progress)
