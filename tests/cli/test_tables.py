"""Tables show what they are given: rich would take square brackets for markup, and drop them."""

from peftkit.cli.commands.diagnose import print_verdict
from peftkit.diagnose.statistics import Interval
from peftkit.diagnose.verdict import Action, Verdict


def test_changes_of_a_verdict_are_shown_whole(capsys):
    action = Action("grow the adapter", ("method.targets=[q, v, o]", "method.rank=16"))
    loss = Interval(2.0, 1.9, 2.1, 80)
    print_verdict(Verdict(300, "lagging", "target modules", "layers [o] lack one", action, loss, 80))
    shown = capsys.readouterr().out
    assert "method.targets=[q, v, o] method.rank=16" in shown
    assert "layers [o] lack one" in shown
