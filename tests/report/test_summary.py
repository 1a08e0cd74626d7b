from peftkit.report import read_summary
from peftkit.rundir import RunDir, write_sealed
from peftkit.rundir.events import DoneEvent, EvalEvent, StepEvent
from tests.rigs.plans import cpu_plan


def made(tmp_path, *events):
    run = RunDir(tmp_path)
    write_sealed(tmp_path / "plan.json", cpu_plan().to_json())
    write_sealed(tmp_path / "environment.json", {"device": {"name": "a CPU"}})
    for event in events:
        run.emit(event)
    return read_summary(run)


def step(number, loss):
    return StepEvent(
        at_seconds=number,
        step=number,
        loss=loss,
        learning_rate=1e-3,
        grad_norm=1.0,
        step_seconds=1.0,
        tokens_per_second=100.0,
        memory={"peak_resident_bytes": 10},
    )


def test_unfinished_run_says_how_to_go_on(tmp_path):
    summary = made(tmp_path, step(1, 2.0), step(2, 1.0))
    assert summary.result is None
    assert summary.next_commands == (f"peftkit resume {tmp_path}",)
    assert (summary.loss_first, summary.loss_last) == (2.0, 1.0)
    assert dict(summary.rows())["result"] == "none yet"


def test_steps_trained_twice_count_once(tmp_path):
    summary = made(tmp_path, step(1, 2.0), step(2, 9.0), step(2, 1.5), step(3, 1.0))
    assert summary.num_steps == 3
    assert summary.train_seconds == 3.0


def test_loss_after_is_that_of_what_was_published(tmp_path):
    losses = ((0, 5.0), (2, 1.0), (4, 3.0))
    evals = [EvalEvent(at_seconds=step, step=step, loss=loss, best=True) for step, loss in losses]
    done = DoneEvent(at_seconds=9.0, step=4, published_step=2, result="adapter", memory={})
    summary = made(tmp_path, *evals, step(4, 1.0), done)
    assert (summary.eval_loss_before, summary.eval_loss_after) == (5.0, 1.0)
    assert summary.total_seconds == 9.0


def test_nothing_but_a_plan(tmp_path):
    assert made(tmp_path).num_steps == 0
