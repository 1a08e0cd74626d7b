"""Preparing 50,000 chats for training: peftkit against TRL's own preparation, on the same file and cores.

Both start from the file and end with packs of 2,048 tokens in which only answers are learnt, with the
tokenizer of SmolLM2-135M; peftkit's time includes what its checks look at on the way. TRL prepares with as
many processes as there are cores, and with one; the faster counts. Memory is what a process grows by beyond
its imports (anonymous pages, sampled), at one and at ten times the rows. Start: what data costs a second run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SOURCE = ROOT / "tests" / "assets" / "data" / "gsm8k.train.jsonl"
MAX_LENGTH = 2048


def write_rows(path: Path, num: int) -> None:
    """Chats made of real questions and answers, each question with many answers: no row comes twice."""
    rows = [json.loads(line) for line in SOURCE.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for number in range(num):
            at, turn = number % len(rows), number // len(rows)
            question, other = rows[at]["question"], rows[(7 * at + turn) % len(rows)]
            asked = {"role": "user", "content": f"{question} (Exercise {number})"}
            answer = {"role": "assistant", "content": other["answer"]}
            file.write(json.dumps({"prompt": [asked], "completion": [answer]}) + "\n")


class Watch:
    """Seconds and growth of anonymous memory of a block, of this process and its children."""

    def __enter__(self) -> Watch:
        self.before = self.peak = self._bytes()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()
        self.started = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self.started
        self.done.set()
        self.thread.join()

    @staticmethod
    def _bytes() -> int:
        import psutil

        found = 0
        own = psutil.Process()
        for process in (own, *own.children(recursive=True)):
            try:
                info = process.memory_info()
                found += info.rss - info.shared
            except psutil.Error:
                continue
        return found

    def _sample(self) -> None:
        while not self.done.wait(0.3):  # looking through all processes takes milliseconds of ours
            self.peak = max(self.peak, self._bytes())

    def result(self) -> dict[str, float]:
        """What was measured."""
        return {"seconds": self.seconds, "grown_mib": (self.peak - self.before) / 2**20}


def tokenizer_folder() -> str:
    from peftkit.model.base.locate import locate_base
    from peftkit.model.load import resolve_source

    return str(resolve_source(locate_base("embedded:smollm2-135m-instruct", revision=None, where="base"), "base"))


def ours(file: Path, folder: str, *, once: bool = False) -> dict[str, Any]:
    """Read, tokenize and pack; then the checks; then all of it again from the cache."""
    import trl.chat_template_utils  # noqa: F401  imports are not preparation
    from transformers import AutoTokenizer

    import peftkit
    from peftkit.data.rows.ingest import ingest
    from peftkit.data.tokens.pack import pack_rows, packing_efficiency
    from peftkit.data.tokens.prepare import tokenize_examples
    from peftkit.data.tokens.store import Counts
    from peftkit.plan.plan import DataPlan
    from peftkit.recipe import load

    tokenizer = AutoTokenizer.from_pretrained(folder)
    recipe = {
        "base": folder,
        "method": "lora",
        "data": {"train": str(file), "eval": None},
        "train": {"max_length": MAX_LENGTH, "packing": True},
    }
    loaded = load(recipe)
    plan = DataPlan((), None, "prompt-completion", {}, "completion", "drop", MAX_LENGTH)
    made: dict[str, Any] = {}

    def prepared() -> None:
        found = tokenize_examples(ingest(loaded.recipe.data, seed=0, where=loaded.where), tokenizer, plan)
        lengths = Counts.of(found.train).tokens.tolist()
        packs = pack_rows(lengths, MAX_LENGTH)
        made["packs"], made["full"] = len(packs), packing_efficiency(lengths, packs, MAX_LENGTH)

    with Watch() as first:
        prepared()
    if once:
        return {"prepare": first.result()}
    shutil.rmtree(os.environ["PEFTKIT_CACHE"])
    with without_checks(), Watch() as bare:
        prepared()
    with Watch() as second:
        prepared()
    peftkit.check_data(recipe)  # what tokens depend on differs a little: this prepares for the next line
    with Watch() as checked:
        peftkit.check_data(recipe)
    return {
        "bare": bare.result(),
        "prepare": first.result(),
        "check_again": checked.result(),
        "second": second.result(),
        **made,
    }


@contextmanager
def without_checks() -> Iterator[None]:
    """Reading and tokenizing with nothing looked at, to see what looking costs."""
    from peftkit.data.rows import ingest
    from peftkit.data.tokens.scan_tokens import TokenScanner as Looks

    kept = {name: getattr(Looks, name) for name in ("text", "row", "round_trip")}
    look = ingest.look
    ingest.look = lambda example, tally: None
    for name in kept:
        setattr(Looks, name, lambda self, *rest: None)
    try:
        yield
    finally:
        ingest.look = look
        for name, method in kept.items():
            setattr(Looks, name, method)


def theirs(file: Path, folder: str, num_proc: int | None) -> dict[str, Any]:
    """The same by TRL's SFTTrainer."""
    import datasets
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    config.update({"num_hidden_layers": 1, "hidden_size": 18, "intermediate_size": 8})
    model = AutoModelForCausalLM.from_config(config)
    with tempfile.TemporaryDirectory() as name:
        arguments = SFTConfig(
            output_dir=name,
            use_cpu=True,
            bf16=False,
            max_length=MAX_LENGTH,
            packing=True,
            dataset_num_proc=num_proc,
            report_to="none",
        )
        with Watch() as watch:
            data = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=name)
            trainer = SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
        return {"prepare": watch.result(), "packs": len(trainer.train_dataset)}


def run(what: str, file: Path, folder: str, cache: Path) -> dict[str, Any]:
    """One measurement in a process of its own."""
    env = {**os.environ, "PEFTKIT_CACHE": str(cache), "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, __file__, "--one", what, str(file), folder]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


ONE: dict[str, Callable[[Path, str], dict[str, Any]]] = {
    "once": lambda file, folder: ours(file, folder, once=True),
    "peftkit": ours,
    "trl": lambda file, folder: theirs(file, folder, None),
    "trl parallel": lambda file, folder: theirs(file, folder, os.cpu_count()),
}


def median_of(found: list[dict[str, Any]], *keys: str) -> float:
    """The median of a value that lies at `keys`."""
    from benchmarks.common import median

    values = []
    for one in found:
        value: Any = one
        for key in keys:
            value = value[key]
        values.append(float(value))
    return median(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=3, metavar=("WHAT", "FILE", "FOLDER"))
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.one:
        what, file, folder = options.one
        print(json.dumps(ONE[what](Path(file), folder)))
        return
    from benchmarks.common import write_result

    folder = tokenizer_folder()
    found: dict[str, list[dict[str, Any]]] = {what: [] for what in ("peftkit", "trl", "trl parallel")}
    with tempfile.TemporaryDirectory() as name:
        small, large = Path(name) / "rows.jsonl", Path(name) / "more.jsonl"
        write_rows(small, options.rows)
        write_rows(large, 10 * options.rows)
        for number in range(options.rounds):
            for what, results in found.items():
                results.append(run(what, small, folder, Path(name) / f"cache-{number}"))
        grown = run("once", large, folder, Path(name) / "cache-large")
    best = min(median_of(found[what], "prepare", "seconds") for what in ("trl", "trl parallel"))
    seconds = median_of(found["peftkit"], "prepare", "seconds")
    second = median_of(found["peftkit"], "second", "seconds")
    bare = median_of(found["peftkit"], "bare", "seconds")
    checks = median_of(found["peftkit"], "check_again", "seconds") - second + seconds - bare
    memory = median_of(found["peftkit"], "prepare", "grown_mib")
    ten_times = grown["prepare"]["grown_mib"]
    trl_memory = median_of(found["trl"], "prepare", "grown_mib")
    one = found["peftkit"][0]
    lines = {
        "prepare": f"peftkit {seconds:.2f} s, TRL {best:.2f} s: {best / seconds:.2f} x (target 1.5)",
        "second run": f"{second:.2f} s (target 2)",
        "checks": f"{checks:.2f} s, {checks / bare:.1%} on top of preparing without them (target 20 %)",
        "memory": f"{memory:.0f} MiB at {options.rows:,} rows, {ten_times:.0f} MiB at ten times as many",
        "memory of TRL": f"{trl_memory:.0f} MiB at {options.rows:,} rows",
        "packs": f"peftkit {one['packs']:,} ({one['full']:.1%} full), TRL {found['trl'][0]['packs']:,}",
    }
    for key, line in lines.items():
        print(f"{key:<14} {line}")
    result = {"rows": options.rows, "measured": found, "ten_times": grown, "told": lines}
    print(write_result("data", result).relative_to(ROOT))


if __name__ == "__main__":
    main()
