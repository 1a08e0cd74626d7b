"""A disk with too little room is told before training, with the number; and a real one that is full."""

import os
import subprocess

import pytest

import peftkit
from peftkit.errors import UserError
from peftkit.plan import read_plan
from peftkit.prepare.context import checkpoint_bytes, run_bytes
from peftkit.rundir import RunDir, require_free_space, verify_folder


def test_a_checkpoint_takes_what_was_said(recipe, tmp_path):
    for method in ({"name": "lora", "rank": 4}, {"name": "full"}, {"name": "ia3"}):
        out = tmp_path / method["name"]
        peftkit.finetune({**recipe, "method": method}, out=out)
        run, plan = RunDir(out), read_plan(RunDir(out))
        step = run.checkpoint(run.checkpoint_steps()[-1])
        sizes = [(step / f"{name}.safetensors").stat().st_size for name in ("trained", "optimizer")]
        assert checkpoint_bytes(plan) == pytest.approx(sum(sizes), rel=0.02, abs=40_000)  # and headers
        assert sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) < run_bytes(plan)


def test_too_little_room_is_refused_with_the_number(tmp_path):
    with pytest.raises(UserError, match=r"free for a checkpoint, expected .* free; make room"):
        require_free_space(tmp_path / "to" / "come", 2**60, what="a checkpoint", fix="make room")
    require_free_space(tmp_path / "to" / "come", 1, what="a checkpoint", fix="make room")


@pytest.mark.parametrize("kibibytes", [200, pytest.param(20_000, marks=pytest.mark.slow)])
def test_a_small_disk(recipe, tmp_path, kibibytes):
    """A tmpfs of some kilobytes: too small from the start, or full on the way."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a file system may not be mounted here")
    try:
        with pytest.raises(UserError, match="make room") as caught:
            filler = place / "filler"
            recipe["train"].update(max_steps=400, checkpoint_steps=5, eval_steps=50)

            def fill(event):
                if event["event"] == "checkpoint" and not filler.exists():
                    free = os.statvfs(place)
                    filler.write_bytes(b"x" * (free.f_bavail * free.f_bsize - 2**16))

            peftkit.finetune(recipe, out=place / "run", observer=fill)
        if kibibytes > 1000:
            run = RunDir(place / "run")
            assert run.checkpoint_steps(), str(caught.value)
            assert all(verify_folder(run.checkpoint(step)) == [] for step in run.checkpoint_steps())
            warned = [event for event in run.events() if event["event"] == "warning"]
            assert any("no checkpoint of step" in event["text"] for event in warned)
            filler.unlink()
            assert peftkit.resume_run(run.path).num_steps == 400
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
