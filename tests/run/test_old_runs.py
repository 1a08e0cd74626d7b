"""Run directories made before the code was moved into its rooms are read, resumed, diagnosed and merged.

The archive was written by the revision before (0.1.0 at 78465a6), in the folder that is made here again: a
run's files hold its paths under hashes.
"""

import fcntl
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import peftkit
from peftkit.plan import read_plan
from peftkit.rundir import RunDir
from peftkit.rundir.events import StepEvent, UnknownEvent, WarningEvent, of_type
from tests.conftest import TINY_LLAMA

PLACE = Path("/tmp/peftkit-old-runs")
ARCHIVE = Path(__file__).parents[1] / "assets" / "old_runs.tar.xz"


@pytest.fixture
def old_runs():
    with PLACE.with_suffix(".lock").open("w") as lock:  # other sessions on this machine use the same folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(PLACE, ignore_errors=True)
        PLACE.mkdir()
        shutil.copytree(TINY_LLAMA, PLACE / "tiny-llama")
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(PLACE, filter="data")
        yield PLACE
        shutil.rmtree(PLACE, ignore_errors=True)


def test_old_runs_of_each_kind(old_runs, tmp_path):
    """One test, as the folder has one name: workers would stand in each other's way."""
    for name in ("lora", "qlora", "prefix", "stopped", "grown"):
        run = RunDir.open(old_runs / name)
        assert not peftkit.verify_run(run.path).faults
        events = run.events()
        assert not [event for event in events if isinstance(event, UnknownEvent)]
        lines = [json.loads(line) for line in run.events_file.read_text().splitlines()]
        assert [event.to_json() for event in events] == lines, "nothing is lost"
        sealed = json.loads((run.path / "plan.json").read_text())
        plan = json.loads(json.dumps(read_plan(run).to_json()))
        younger = plan["base"].pop("end_token"), plan["train"].pop("schedule_arguments")
        younger += plan["base"].pop("new_tokens"), plan["method"].pop("start_from"), plan["train"].pop("neftune")
        younger += plan["train"].pop("label_smoothing"), plan["train"].pop("rate_search")
        assert (plan["train"].pop("num_rows"), plan.pop("ranks")) == (None, {"num": 1, "strategy": "none"})
        for growth in plan["growths"]:
            of_growth = growth.pop("undone_step"), growth.pop("rows"), growth.pop("row_losses"), growth.pop("overhead")
            assert of_growth == (0, [], [], 0.0)
        assert younger == (None, {}, {}, None, None, 0.0, None)
        assert plan == {key: value for key, value in sealed.items() if key != "sha256"}
        if name != "stopped":
            summary = peftkit.summarize_run(run.path)
            assert (summary.num_steps, summary.method) == (60, "lora") if name == "grown" else (6, name)
            [*_, verdict] = [line for line in lines if line["event"] == "verdict"]
            assert peftkit.diagnose_run(run.path).cause == summary.verdict.cause == verdict["cause"]

    stopped = RunDir.open(old_runs / "stopped")
    [first, *_] = [event.step for event in of_type(stopped.events(), StepEvent)][::-1]
    resumed = peftkit.resume_run(stopped.path, allow_changed=["versions"])
    steps = [event.step for event in of_type(stopped.events(), StepEvent)]
    assert 0 < first < 6
    assert steps[-(6 - first) :] == list(range(first + 1, 7)), "it goes on from the old checkpoint"
    tensors = load_file(resumed.result / "adapter_model.safetensors")
    whole = load_file(old_runs / "lora" / "adapter" / "adapter_model.safetensors")
    assert resumed.num_steps == 6
    assert {name: tensor.shape for name, tensor in tensors.items()} == {name: whole[name].shape for name in whole}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert [event for event in of_type(stopped.events(), WarningEvent) if "rows come in another order" in event.text]

    for name in ("lora", "qlora", "grown"):
        report = peftkit.merge_adapter(
            old_runs / name, out=tmp_path / name, options=peftkit.MergeOptions(dtype="float32")
        )
        assert report.passed
    if torch.__version__.endswith("+cpu"):  # the build that made them: numbers of another are not compared
        anew = peftkit.diagnose_run(old_runs / "lora", anew=True)
        assert anew.loss.mean == pytest.approx(peftkit.summarize_run(old_runs / "lora").verdict.loss.mean, rel=1e-4)
    assert peftkit.generate(old_runs / "prefix", ["Say alpha number 1"], max_new_tokens=2)
