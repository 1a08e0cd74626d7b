from hypothesis import given
from hypothesis import strategies as st

from peftkit.train.record import Progress

losses = st.lists(st.floats(0.01, 10), min_size=1, max_size=20)


@given(losses)
def test_progress_finds_the_smallest_loss(values):
    progress = Progress()
    for step, loss in enumerate(values, start=1):
        progress.note(loss, step, 0.0)
    assert progress.best_loss == min(values)
    assert progress.best_step == values.index(min(values)) + 1
    assert progress.num_without_gain == len(values) - progress.best_step
    assert progress.last_step == len(values)


def test_small_gains_are_the_best_but_do_not_restore_patience():
    progress = Progress()
    assert progress.note(1.0, 1, 0.1)
    assert progress.note(0.95, 2, 0.1)
    assert (progress.best_step, progress.num_without_gain) == (2, 1)
    assert progress.note(0.85, 3, 0.1)
    assert progress.num_without_gain == 0


def test_nan_is_never_the_best():
    progress = Progress()
    assert not progress.note(float("nan"), 1, 0.0)
    assert progress.note(3.0, 2, 0.0)
    assert not progress.note(float("nan"), 3, 0.0)
    assert progress.best_step == 2
