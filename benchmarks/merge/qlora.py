"""Which base is a QLoRA adapter merged into? SmolLM2 after two real fine-tunes: every choice, measured.

    python benchmarks/merge/qlora.py [--out FOLDER]      # some 15 minutes on 2 cores

A strong adapter is the quickstart's (60 steps); a light one sees 20 steps at a fifth of its rate. Each choice
is compared with what was trained and evaluated: the 4-bit base with the adapter. `other` is the loss on text
that has nothing to do with the task.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import write_result

import peftkit
from peftkit import MergeOptions
from peftkit.data.tokens.mask import Tokenized
from peftkit.model.load import load_model
from peftkit.results.find import Adapter, find_adapter
from peftkit.results.load import load_adapter_result
from peftkit.ship.merge.compare import ComparisonRows
from peftkit.ship.merge.decide import plan_merge_inputs
from peftkit.ship.merge.fidelity import PROMPTS, ModelOutputs, compute_outputs, measure_fidelity

ROOT = Path(__file__).parent.parent.parent
RECIPE = ROOT / "recipes" / "quickstart.yaml"
COMMON = ("diagnose.escalate=off", "evaluate.metric=null")
RUNS = {"strong": COMMON, "light": (*COMMON, "train.max_steps=20", "train.learning_rate=1e-4", "train.eval_steps=20")}


def asked(model: Any, rows: ComparisonRows, other: list[Tokenized], pad_id: int) -> tuple[ModelOutputs, ModelOutputs]:
    """What a model says on the task's rows, and on other text."""
    found = tuple(
        compute_outputs(model, texts, loss_rows=texts, pad_id=pad_id, task="causal-lm")
        for texts in (rows.loss_rows, other)
    )
    del model
    gc.collect()
    return found  # type: ignore[return-value]


def line(
    name: str, trained: tuple[ModelOutputs, ModelOutputs], got: tuple[ModelOutputs, ModelOutputs]
) -> dict[str, Any]:
    """One row of the table."""
    fidelity, elsewhere = (measure_fidelity(a, b) for a, b in zip(trained, got, strict=True))
    row = {
        "choice": name,
        "kl": fidelity.kl,
        "top1_agreement": fidelity.top1_agreement,
        "loss": fidelity.loss,
        "other_loss": elsewhere.loss,
    }
    print(json.dumps(row), flush=True)
    return row


def table(run: Path) -> list[dict[str, Any]]:
    """All choices for one run."""
    adapter = find_adapter(run)
    rows = ComparisonRows.of(plan_merge_inputs([run], MergeOptions()), run, print)
    held = load_adapter_result(adapter, device="cpu")
    tokenizer, pad_id = held.tokenizer, held.tokenizer.pad_token_id
    other = [Tokenized(ids, ids, "text") for ids in (list(tokenizer(text)["input_ids"]) for text in PROMPTS)]
    trained = asked(held.model, rows, other, pad_id)
    found = [line("as trained: NF4 with the adapter", trained, trained)]
    with held.model.disable_adapter():
        found.append(line("NF4 without the adapter", trained, asked(held.model, rows, other, pad_id)))
    del held
    plain = replace(adapter.base, quant_type=None)
    bare = load_model(adapter.source, plain, device="cpu")
    found.append(line("original without the adapter", trained, asked(bare, rows, other, pad_id)))
    del bare
    gc.collect()
    for name, options in (
        ("dequantized + adapter (default)", MergeOptions()),
        ("original + adapter in bf16 (--base original)", MergeOptions(base="original", force=True)),
        ("original + adapter in fp32 (--dtype float32)", MergeOptions(base="original", dtype="float32")),
        ("NF4(original + adapter) (--requantize nf4)", MergeOptions(requantize=True, force=True)),
    ):
        with tempfile.TemporaryDirectory() as place:
            peftkit.merge_adapter(run, out=Path(place) / "m", options=options)
            held = replace(plain, overrides={}, dtype="bfloat16" if options.requantize else plain.dtype)
            model = load_model(str(Path(place) / "m"), held, device="cpu")
            found.append(line(name, trained, asked(model, rows, other, pad_id)))
    found.append(line("PEFT: merge_and_unload in 4-bit", trained, theirs(adapter, rows, other, pad_id)))
    return found


def theirs(
    adapter: Adapter, rows: ComparisonRows, other: list[Tokenized], pad_id: int
) -> tuple[ModelOutputs, ModelOutputs]:
    """PEFT's own merge into the 4-bit layers: the sum is rounded to 4 bits again."""
    held = load_adapter_result(adapter, device="cpu")
    return asked(held.model.merge_and_unload(), rows, other, pad_id)


def main() -> None:
    """Train, merge every way, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", help="folder for the runs, kept; a temporary one unless given")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(arguments.out or place)
        result = {}
        for name, overrides in RUNS.items():
            if not (folder / name).is_dir():
                peftkit.finetune(RECIPE, overrides, out=folder / name)
            print(name, flush=True)
            result[name] = table(folder / name)
        write_result("merge_qlora", result)


if __name__ == "__main__":
    main()
