"""The schedule after a restart is transformers' own, begun at the restart."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from peftkit.train.schedule import restart_rate_factor


@pytest.mark.parametrize(
    ("kind", "theirs", "arguments"),
    [
        ("cosine", "cosine", {}),
        ("cosine", "cosine_with_min_lr", {"min_lr_rate": 0.2}),
        ("linear", "linear", {}),
        ("constant", "constant_with_warmup", {}),
    ],
    ids=str,
)
def test_a_restart_follows_transformers_schedule_over_the_steps_that_are_left(kind, theirs, arguments):
    train = SimpleNamespace(schedule=kind, schedule_arguments=arguments, num_steps=100, restart_step=40)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = transformers.get_scheduler(theirs, optimizer, 3, 60, scheduler_specific_kwargs=arguments or None)
    for step in range(40, 100):
        assert restart_rate_factor(SimpleNamespace(train=train), step) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
