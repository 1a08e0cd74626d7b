"""One process trains on one device, however many transformers sees."""

import pytest
from transformers import TrainingArguments

from peftkit.model.mends.one_device import use_one_device


@pytest.mark.parametrize(("num_seen", "num_used"), [(0, 0), (1, 1), (8, 1)])
def test_a_process_uses_one_device(num_seen, num_used, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4)
    arguments._n_gpu = num_seen  # as transformers sets it, without a switch
    use_one_device(arguments)
    assert arguments.n_gpu == num_used
    assert arguments.train_batch_size == 4, "transformers multiplies it by the GPUs of a DataParallel"
