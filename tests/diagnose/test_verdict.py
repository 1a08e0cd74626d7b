"""A verdict shows every number, and comes back from JSON as it was."""

import json
import math

from peftkit.diagnose.statistics import Interval
from peftkit.diagnose.verdict import Action, Cost, Verdict


def verdict(**more):
    action = Action(
        "grow the adapter", ("method.rank=16", "method.alpha=32"), Interval(0.2, 0.1, 0.3, 40), Cost(1000, 4096, 1.02)
    )
    loss = Interval(2.0, 1.9, 2.1, 40)
    return Verdict(300, "lagging", "rank", "the larger one is better", action, loss, 40, 0.12, **more)


def test_it_comes_back_from_json_as_it_was():
    made = verdict(numbers={"arms": {"continue": {"loss": 2.0}}}, kept=True)
    assert Verdict.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_bounds_of_one_document_are_json_too():
    loss = Interval(2.0, -math.inf, math.inf, 1)
    made = Verdict(3, "plateaued", "undecided", "too few rows", Action("nothing"), loss, 1)
    text = json.dumps(made.to_json(), allow_nan=False)
    assert Verdict.from_json(json.loads(text)) == made


def test_it_says_what_is_known_and_how_well():
    said = dict(verdict().rows())
    assert said["cause"] == "rank"
    assert "of only 40 held-out documents" in said["loss"]
    assert "1,000 trainable parameters" in said["cost"]
    assert "+0.2000 [+0.1000, +0.3000]" in said["expected gain"]
    assert "12" in said["diagnosis cost"]
    assert "<table" in verdict()._repr_html_()
