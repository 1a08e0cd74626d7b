"""The trainer of any objective: the class that it names, guarded, on tokenized data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit.data.tokens.mask import IGNORE_INDEX
from peftkit.evaluate.step import LossFunction, forward_inputs, fused_loss, loss_from_logits, summed_loss
from peftkit.model.adapter.attach import cast_trainable_to_fp32
from peftkit.model.mends.one_device import use_one_device
from peftkit.plan import Plan
from peftkit.plan.task import trainer_spec
from peftkit.train.arguments import trainer_arguments
from peftkit.train.batches import FilledDataset, TrainDataset
from peftkit.train.guard import loss_listener
from peftkit.train.schedule import build_restart_scheduler

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer


def training_loss(plan: Plan, *, fused: bool = True) -> LossFunction:
    """Return the loss of a micro-batch as the plan's trainer computes it; without `fused`, from the logits."""
    if fused and trainer_spec(plan).loss == "fused":
        return fused_loss
    return partial(loss_from_logits, smoothing=plan.train.label_smoothing)


def build_trainer(
    model: PreTrainedModel,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    *,
    train: TrainDataset,
    output_dir: Path,
    callbacks: Sequence[Any],
    optimizer: Optimizer | None,
) -> Trainer:
    """Build the plan's trainer over the train dataset. A guard among the callbacks gets each loss.

    Unless it is fused, the loss is computed here from the logits: the Trainer divides a model's own loss by
    the accumulation or not, depending on whether the model's signature takes loss arguments, which says
    nothing of what it does.
    """
    spec, task, listener = trainer_spec(plan), plan.base.task, loss_listener(callbacks)
    trainer_class, arguments_class = _named_class(spec.trainer), _named_class(spec.arguments_class)
    is_fused = spec.loss == "fused"

    def mean_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None, weights: Any = None) -> torch.Tensor:
        total = summed_loss(outputs.logits, labels, task, weights, plan.train.label_smoothing)
        return total / (labels.ne(IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch)

    def collate_inputs(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = train.collator(items)
        extras: dict[str, Any] = {key: batch[key] for key in ("labels", "weights", "rows") if key in batch}
        return {**forward_inputs(model, batch, task), **extras}

    class GuardedTrainer(trainer_class):  # type: ignore[misc, valid-type]
        """A trainer that reports each micro-batch to the guard, and weighs tokens where rows have weights."""

        def compute_loss(self, model: PreTrainedModel, inputs: Any, *rest: Any, **named: Any) -> Any:
            rows = inputs.pop("rows")
            num_tokens = int(inputs.pop("num_tokens", 0))  # of packs, which have no attention mask: TRL miscounts them
            if not is_fused:
                self.compute_loss_func = partial(mean_loss, weights=inputs.pop("weights", None))
            loss = super().compute_loss(model, inputs, *rest, **named)
            listener(rows, loss, num_tokens)
            return loss

        def get_train_dataloader(self) -> Any:
            """Return a data loader of the whole training, in the plan's order: to the Trainer it is one epoch."""
            from torch.utils.data import DataLoader

            loader = DataLoader(
                FilledDataset(train.dataset) if train.order.num_fillers else train.dataset,
                batch_size=plan.train.micro_batch,
                sampler=train.order,
                collate_fn=self.data_collator,
                pin_memory=self.args.dataloader_pin_memory,
            )
            return self.accelerator.prepare(loader)

        def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
            """Return the Trainer's scheduler, or the restarted one where the plan restarts its schedule."""
            if plan.train.restart_step:
                self.lr_scheduler = build_restart_scheduler(plan, optimizer or self.optimizer)
                return self.lr_scheduler
            return super().create_scheduler(num_training_steps, optimizer)

    arguments = arguments_class(**trainer_arguments(plan, output_dir=output_dir), **spec.arguments)
    use_one_device(arguments)
    trainer = GuardedTrainer(
        model=model,
        args=arguments,
        data_collator=train.collator if is_fused else collate_inputs,
        train_dataset=train.dataset,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        optimizers=(optimizer, None),
        **({} if is_fused else {"compute_loss_func": mean_loss}),
    )
    if is_fused and plan.method.peft is not None:
        # TRL casts adapters over 4-bit bases to bf16, which loses small updates and breaks exact resume
        cast_trainable_to_fp32(model)
    return trainer


def _named_class(name: str) -> Any:
    """Return a class by its dotted name: the door by which transformers and TRL enter."""
    module, _, class_name = name.rpartition(".")
    return getattr(import_module(module), class_name)
