"""Optimizers that promise to need no learning rate, beside AdamW at the usual rate of the law: no forks, no search.

    pip install prodigyopt dadaptation schedulefree
    python benchmarks/quality/rate_free.py --data FOLDER [--cells "python intents,plays sums"] [--workers 2]

All train the same adapter (rank 64) on the same batches, clipped at 1. Prodigy and D-Adaptation: rate 1 and a cosine to
zero, Prodigy with safeguard_warmup and bias correction, as its README has it for LoRA. Schedule-free: two rates, no
schedule, 5 % warm-up. Held-out loss, 240 rows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cells import CELLS, Cell, options, recipe_of, train_all

RESULTS = Path(__file__).parent.parent / "results" / "quality_rate_free.jsonl"
STEPS, BATCH = 600, 8


def prodigy(d0: float) -> Callable[[Any], Any]:
    def build(parameters: Any) -> Any:
        from prodigyopt import Prodigy

        return Prodigy(parameters, lr=1.0, safeguard_warmup=True, use_bias_correction=True, d0=d0)

    return build


def dadapt(parameters: Any) -> Any:
    from dadaptation import DAdaptAdam

    return DAdaptAdam(parameters, lr=1.0, use_bias_correction=True)


def schedule_free(rate: float) -> Callable[[Any], Any]:
    def build(parameters: Any) -> Any:
        from schedulefree import AdamWScheduleFree

        return AdamWScheduleFree(parameters, lr=rate, warmup_steps=STEPS // 20)

    return build


WAYS: dict[str, Callable[[Any], Any] | None] = {
    "AdamW, the law's rate": None,
    "Prodigy": prodigy(1e-6),
    "Prodigy, d0 1e-4": prodigy(1e-4),
    "D-Adaptation Adam": dadapt,
    "schedule-free 1.25e-3": schedule_free(1.25e-3),
    "schedule-free 2.5e-3": schedule_free(2.5e-3),
    "schedule-free 5e-3": schedule_free(5e-3),
    "schedule-free 1e-2": schedule_free(1e-2),
}


def train(folder: Path, cell: Cell, way: str, seed: int, data: Path) -> dict[str, Any]:
    """Train one cell one way. Returns its line of the results file."""
    import numpy as np
    import torch

    from peftkit.evaluate.step import backward
    from peftkit.model.adapter.attach import trainable_tensors
    from peftkit.plan import make_plan
    from peftkit.prepare.context import prepare_run, write_plan_files, write_recipe
    from peftkit.prepare.facts import light_facts, require_runnable
    from peftkit.recipe import load
    from peftkit.run import stations
    from peftkit.run.finetune import new_run
    from peftkit.train.batches import collate_groups, row_groups
    from peftkit.train.trainer import training_loss
    from peftkit.train.training import compute_row_losses

    recipe = recipe_of(cell, folder, data, steps=STEPS, batch=BATCH, seed=seed)
    recipe["method"] |= {"rank": 64, "targets": "all-linear"}
    loaded = load(recipe)
    facts, examples = light_facts(loaded)
    base = require_runnable(loaded, make_plan(loaded, facts), facts)
    with new_run(folder / "run") as run:
        write_recipe(loaded, run)
        context = prepare_run(loaded, facts, examples, base, run, lambda event: None)
        write_plan_files(context)
        plan, pad_id = context.plan, int(context.tokenizer.pad_token_id)
        segment = stations.Segment(context)
        model = stations.attach_adapter(segment, stations.load_base(segment))
        parameters = list(trainable_tensors(model).values())
        build = WAYS[way]
        optimizer = build(parameters) if build else torch.optim.AdamW(parameters, lr=plan.train.learning_rate)
        peak, warmup = optimizer.param_groups[0]["lr"], STEPS // 20
        follows_schedule = not hasattr(optimizer, "train")
        groups = row_groups(plan, context.prepared.train)
        rng = np.random.default_rng(seed)
        order = np.concatenate([rng.permutation(len(groups)) for _ in range(STEPS * BATCH // len(groups) + 1)])
        model.train()
        if not follows_schedule:
            optimizer.train()
        for step in range(STEPS):
            if follows_schedule:
                rise = (step + 1) / warmup if build is None else 1.0
                fall = 0.5 * (1 + math.cos(math.pi * step / STEPS))
                for group in optimizer.param_groups:
                    group["lr"] = peak * min(rise, fall)
            batch = [[context.prepared.train[i] for i in groups[g]] for g in order[step * BATCH : (step + 1) * BATCH]]
            backward(
                model,
                collate_groups(plan, batch, pad_id),
                training_loss(plan, fused=False),
                task=plan.base.task,
                precision=plan.train.autocast,
            )
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if not follows_schedule:
            optimizer.eval()
        losses = compute_row_losses(model, context.prepared.eval, plan, pad_id=pad_id, prepared=False)
    return {
        "cell": cell.key,
        "way": way,
        "seed": seed,
        "loss": losses.mean,
        "d": float(optimizer.param_groups[0].get("d", 0.0)),
    }


def main() -> int:
    """Train what is missing and print the table."""
    parser = options(__doc__, results=RESULTS, cells="python intents,plays intents,plays sums")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--ways", default="", help="ways that begin so, separated by commas; all if empty")
    asked = parser.parse_args()
    waiting = [
        (f"{cell.key}/{way}/{seed}", (cell, way, int(seed)))
        for seed in asked.seeds.split(",")
        for cell in CELLS
        if cell.key in asked.cells.split(",")
        for way in WAYS
        if way.startswith(tuple(asked.ways.split(",")))
    ]
    for line in sorted(train_all(train, waiting, asked), key=lambda line: (line["cell"], line["loss"])):
        print(f"{line['cell']:16} {line['way']:24} seed {line['seed']}  loss {line['loss']:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
