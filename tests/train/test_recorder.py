from hypothesis import given
from hypothesis import strategies as st

from peftkit.train.recorder import EvalProgress

losses = st.lists(st.floats(0.01, 10), min_size=1, max_size=20)


@given(losses)
def test_progress_finds_the_smallest_loss(values):
    progress = EvalProgress()
    for step, loss in enumerate(values, start=1):
        progress.note(loss, step, 0.0)
    assert progress.best_loss == min(values)
    assert progress.best_step == values.index(min(values)) + 1
    assert progress.num_without_gain == len(values) - progress.best_step
    assert progress.last_step == len(values)


def test_small_gains_are_the_best_but_do_not_restore_patience():
    progress = EvalProgress()
    assert progress.note(1.0, 1, 0.1)
    assert progress.note(0.95, 2, 0.1)
    assert (progress.best_step, progress.num_without_gain) == (2, 1)
    assert progress.note(0.85, 3, 0.1)
    assert progress.num_without_gain == 0


def test_nan_is_never_the_best():
    progress = EvalProgress()
    assert not progress.note(float("nan"), 1, 0.0)
    assert progress.note(3.0, 2, 0.0)
    assert not progress.note(float("nan"), 3, 0.0)
    assert progress.best_step == 2


def test_a_checkpoint_that_could_not_be_written_gives_the_best_back():
    progress = EvalProgress()
    progress.note(2.0, 10, 0.0)
    progress.note(1.5, 20, 0.0)
    progress.lost(15)
    assert progress.best_step == 20
    progress.lost(20)
    assert (progress.best_step, progress.best_loss) == (10, 2.0)
    assert not progress.note(1.0, 30, 0.0, has_checkpoint=False)
    assert (progress.best_step, progress.last_step) == (10, 30)
