import random

import numpy as np
import pytest
import torch

from peftkit.errors import PeftkitError
from peftkit.rundir import RunDir, publish_folder
from peftkit.train.checkpoint.restore import load_trained
from peftkit.train.checkpoint.snapshot import random_states, restore_random_states, rotate_checkpoints


def draws():
    return random.random(), float(np.random.rand()), float(np.random.randn()), torch.rand(3).tolist()


def test_random_states_come_back():
    np.random.randn()  # leaves half a pair behind, which must come back too
    kept = random_states()
    first = draws()
    assert draws() != first
    restore_random_states(*kept)
    assert draws() == first


def test_rotation_keeps_the_newest_two_and_the_best(tmp_path):
    run = RunDir(tmp_path)
    for step in (1, 2, 3, 10, 20):
        with publish_folder(run.checkpoint(step), step=step) as staging:
            (staging / "w").write_text("x")
    rotate_checkpoints(run, best_step=2)
    assert run.checkpoint_steps() == [2, 10, 20]


def test_a_checkpoint_of_other_tensors_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"other.weight": torch.zeros(1)}, tmp_path / "trained.safetensors")
    with pytest.raises(PeftkitError, match="other trained tensors"):
        load_trained(torch.nn.Linear(2, 2), tmp_path)
