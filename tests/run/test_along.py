"""Which processes a recipe asks for, and a run that goes on with others."""

import pytest

from peftkit import ranks
from peftkit.errors import UserError
from peftkit.recipe import load
from peftkit.run.along import num_to_launch, on_any_ranks, require_alike


@pytest.mark.parametrize(("count", "num"), [("auto", 0), (1, 0), (2, 2)])
def test_processes_are_started_where_more_than_one_is_asked_for(count, num, recipe, monkeypatch):
    loaded = load({**recipe, "devices": {"count": count}})
    assert num_to_launch(loaded) == num
    assert on_any_ranks(loaded).recipe.devices.count == "auto"
    assert loaded.recipe.devices.count == count
    monkeypatch.setattr(ranks, "launched", lambda: ranks.Ranks(1, 2, 1))
    assert num_to_launch(loaded) == 0, "they were started already"


class Context:
    def __init__(self, device, **versions):
        self.facts = type("Facts", (), {"device": type("Device", (), {"name": device})})
        base = {"config_sha256": "c", "weights_sha256": {"w": "1"}}
        self.prints = {"recipe": "a", "data": "b", "tokenizer": "c", "base": base, "versions": versions}

    def fingerprints(self):
        return self.prints


def test_ranks_that_differ_are_all_named_at_once(monkeypatch):
    lead, other, third = Context("a CPU", torch="2"), Context("another", torch="3"), Context("a CPU", torch="2")
    everyone = [{"fingerprints": one.fingerprints(), "device": one.facts.device.name} for one in (lead, other, third)]
    monkeypatch.setattr(ranks, "current", lambda: ranks.Ranks(0, 3))
    monkeypatch.setattr(ranks, "gathered", lambda own: everyone)
    with pytest.raises(UserError) as caught:
        require_alike(lead)
    assert [problem.where for problem in caught.value.problems] == ["rank 1", "rank 1"]
    assert "torch 2 then, 3 now" in str(caught.value) and "a CPU on rank 0, another there" in str(caught.value)
    everyone[1] = everyone[0]
    require_alike(lead)
