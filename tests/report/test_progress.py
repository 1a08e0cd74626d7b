import io

from rich.console import Console

from peftkit.report.progress import LiveDisplay, PlainDisplay
from peftkit.rundir.events import (
    DataEvent,
    EvalEvent,
    MetricEvent,
    ParametersEvent,
    PhaseEvent,
    PreflightEvent,
    StepEvent,
    TrainBeginEvent,
)

EVENTS = [
    PhaseEvent(name="base", detail="org/model"),
    DataEvent(
        num_train=10,
        num_eval=2,
        num_tokens=100,
        num_learnt=25,
        num_dropped=1,
        num_cut=0,
        default_template=True,
        chats=True,
    ),
    ParametersEvent(num_trainable=10, num_total=1000, by_role={"q": 10}, num_planned=12),
    PreflightEvent(loss=2.5, num_tensors=420, num_waiting=210, num_frozen=272, memory={}),
    TrainBeginEvent(step=0, num_steps=2),
    StepEvent(
        step=1,
        loss=1.5,
        learning_rate=1e-3,
        grad_norm=1.0,
        step_seconds=0.5,
        tokens_per_second=200.0,
        memory={"resident_bytes": 2**30},
    ),
    EvalEvent(step=1, loss=1.25, best=True),
    MetricEvent(name="exact_match", when="after", value=0.5, scores={}, num_examples=2, samples=[]),
    PhaseEvent(name="publish", detail="adapter"),
]
SAID = (
    "10 rows to train on, 2 held out",
    "100 tokens, 25 trained (25.0 %)",
    "1 rows too long were dropped",
    "no chat template",
    "trainable: 10 of 1,000",
    "the plan predicted 12",
    "preflight: all 420 trained tensors get a gradient, 272 frozen ones unchanged",
    "evaluation loss 1.2500, the best so far",
    "exact_match after: 0.50 on 2 held out",
)


def test_plain_lines(capsys):
    display = PlainDisplay()
    for event in EVENTS:
        display.show(event)
    text = capsys.readouterr().err
    assert "step 1/2: loss 1.5000, 200 tokens/s, learning rate 1.00e-03, memory 1.00 GiB" in text
    assert all(said in text for said in SAID)


def test_live_line():
    stream = io.StringIO()
    display = LiveDisplay(Console(file=stream, force_terminal=True, width=160))
    with display.live:
        for event in EVENTS:
            display.show(event)
            display.live.refresh()
    text = stream.getvalue()
    assert "base \x1b[33m0:00:00" in text, "a phase is shown with the time since it began"
    assert "writing \x1b[33m0:00:00" in text
    assert "training" in text
    assert "200 tok/s" in text
    assert "Hugging" not in text
    assert "exact_match after" in text


def test_training_that_begins_anew_has_one_bar():
    display = LiveDisplay(Console(file=io.StringIO(), force_terminal=True, width=160))
    [begin] = [event for event in EVENTS if isinstance(event, TrainBeginEvent)]
    with display.live:
        for _ in range(2):
            display.show(begin)
    assert len(display.progress.tasks) == 1
