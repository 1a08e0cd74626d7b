"""What a refactoring must not change: losses, adapters, plans, verdicts, merged weights and GGUF files, by hash.

    python benchmarks/unchanged.py OUT.json              # this checkout
    python benchmarks/unchanged.py OUT.json --vs OLD.json

Each cell trains the tiny model of the tests for a few steps on one thread. Run it in two checkouts and
compare: reasons and messages are left out of plans and verdicts, as texts may be improved.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
WORDS = ("alpha", "beta", "gamma", "delta")
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 4},
    "dora": {"name": "lora", "rank": 4, "dora": True},
    "qlora": {"name": "qlora", "rank": 4},
    "adalora": {"name": "adalora"},
    "prefix": {"name": "prefix", "virtual_tokens": 4},
    "ia3": {"name": "ia3"},
    "full": {"name": "full"},
}
TEXT_KEYS = {"reason", "said", "text", "where", "sha256", "used_bytes", "memory_bytes", "source"}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def without_texts(value: Any) -> Any:
    """A JSON value without what is meant for a reader."""
    if isinstance(value, dict):
        return {key: without_texts(item) for key, item in value.items() if key not in TEXT_KEYS}
    return [without_texts(item) for item in value] if isinstance(value, list) else value


def cells(place: Path) -> dict[str, str]:
    """The hashes of everything that a few small trainings leave."""
    import torch

    import peftkit

    torch.set_num_threads(1)
    data = place / "chats.jsonl"
    rows = [{"prompt": f"Say {WORDS[i % 4]} number {i}", "completion": WORDS[i % 4]} for i in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for name, method in METHODS.items():
        train = {"max_steps": 6, "batch_size": 4, "micro_batch": 2, "max_length": 64, "eval_steps": 3}
        recipe = {
            "base": str(ROOT / "tests" / "assets" / "tiny-llama"),
            "method": method,
            "data": {"train": str(data), "eval": "25%"},
            "train": {**train, "learning_rate": 1e-3},
        }
        run = place / name
        peftkit.finetune(recipe, out=run)
        plan = without_texts(json.loads((run / "plan.json").read_text()))
        plan["base"]["id"] = plan["data"]["train"] = None
        # the base's path is the checkout's
        plan["decisions"] = [item for item in plan["decisions"] if item["value"] != recipe["base"]]
        found[f"{name}: plan"] = digest(json.dumps(plan, sort_keys=True).encode())
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        losses = [[e["event"], e["step"], e["loss"]] for e in events if e["event"] in {"step", "eval"}]
        found[f"{name}: losses"] = digest(json.dumps(losses).encode())
        verdicts = [without_texts(e) for e in events if e["event"] == "verdict"]
        for verdict in verdicts:
            verdict.pop("at_seconds")
        found[f"{name}: verdict"] = digest(json.dumps(verdicts, sort_keys=True).encode())
        weights = [*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")]
        found[f"{name}: weights"] = digest(b"".join(path.read_bytes() for path in sorted(weights)))
        if name in {"lora", "qlora", "ia3", "dora"}:
            options = peftkit.MergeOptions(force=True)
            peftkit.merge_adapter(run, out=place / f"{name}-merged", options=options)
            found[f"{name}: merged"] = digest((place / f"{name}-merged" / "model.safetensors").read_bytes())
        if name in {"lora", "qlora"}:
            out = place / f"{name}-gguf"
            options = peftkit.ExportOptions(to="gguf", out=str(out), pre="default", force=True)
            peftkit.export_adapter(run, options=options)
            found[f"{name}: gguf"] = digest(next(out.glob("*.gguf")).read_bytes())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--vs", type=Path)
    options = parser.parse_args()
    place = Path(tempfile.gettempdir()) / "peftkit-unchanged"  # one name: some files hold their path
    with tempfile.TemporaryDirectory() as cache:
        import os
        import shutil

        os.environ["PEFTKIT_CACHE"] = cache
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        found = cells(place)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    old = json.loads(options.vs.read_text()) if options.vs else {}
    for name, value in found.items():
        print(f"{name:<20} {value}  {'' if not old else 'equal' if old.get(name) == value else 'DIFFERS'}")
    return int(bool(old) and old != found)


if __name__ == "__main__":
    sys.exit(main())
