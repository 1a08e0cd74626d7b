"""To the rung that the evidence names: modules by energy per parameter, rank by what the data tells."""

from hypothesis import given
from hypothesis import strategies as st

from peftkit.diagnose.escalation import MAX_TOKEN_ROWS, RANKS, UntrainedTokens, next_rung, rank_for
from peftkit.diagnose.signals import ModuleSignal, Signals


def module(role, residual, *, adapted=False, size=256, tangent=0.0):
    return ModuleSignal(f"layers.0.{role}", role, adapted, size, tangent, residual, residual, 0.5, narrowest=512)


def rung(*modules, rank=8, max_rank=256, num_learnt=1000, **more):
    found = Signals(tuple(modules))
    adapted = tuple(dict.fromkeys(m.role for m in modules if m.is_adapted))
    return next_rung(
        found, rank=rank, adapted_roles=adapted, max_rank=max_rank, num_loss_tokens=num_learnt, loss=2.0, **more
    )


def test_modules_are_added_by_energy_per_parameter_and_not_by_folklore():
    found = rung(
        module("q", 0.2, adapted=True, tangent=0.1), module("k", 0.005), module("o", 0.7), module("down", 0.9, size=512)
    )
    assert found.cause == "target modules"
    assert found.roles == ("q", "o", "down")  # k has a hundredth and less of what is without an adapter
    assert found.rank == 16
    assert rung(module("q", 0.2, adapted=True), module("o", 0.7), early=True).rank == 64
    assert "o 1.00" in found.said


def test_rank_where_all_layers_have_an_adapter():
    found = rung(module("q", 2.0, adapted=True, tangent=0.1), module("o", 1.0, adapted=True, tangent=0.1))
    assert (found.cause, found.roles, found.rank) == ("rank", (), 16)
    assert rung(module("q", 2.0, adapted=True), rank=64, max_rank=64) is None


def test_a_rank_below_the_usual_one_goes_there_and_never_beyond_half_of_a_layer():
    adapted = module("q", 2.0, adapted=True, tangent=0.1)
    assert rung(adapted, rank=2).rank == 16
    assert rung(adapted, rank=32, num_learnt=10**9).rank == 64
    assert rung(adapted, rank=32, num_learnt=10**9, early=True).rank == 256
    narrow = ModuleSignal("layers.0.q", "q", True, 64, 0.1, 2.0, 2.0, 0.5, narrowest=32)
    assert rung(narrow, rank=8, num_learnt=10**9, early=True).rank == 16
    assert rung(narrow, rank=16) is None


def test_tokens_that_nothing_has_trained_come_first():
    adapted, bare = module("q", 1.0, adapted=True), module("o", 9.0)
    found = rung(adapted, bare, untrained_tokens=UntrainedTokens(("<a>", "<b>"), 0.3))
    assert (found.cause, found.tokens, found.also_train) == ("embeddings or head", ("<a>", "<b>"), ())
    assert "30% of the tokens in the loss" in found.said
    many = rung(adapted, untrained_tokens=UntrainedTokens(tuple(map(str, range(MAX_TOKEN_ROWS + 1))), 0.3))
    assert (many.tokens, many.also_train) == ((), ("embeddings",))
    assert rung(adapted, bare, untrained_tokens=UntrainedTokens(("<a>",), 0.001)).cause == "target modules"


@given(st.integers(0, 10**7), st.floats(0.01, 10), st.integers(1, 10**6), st.sampled_from(RANKS))
def test_the_rank_is_a_rung_within_its_bounds(num_learnt, loss, per_rank, least):
    found = rank_for(num_learnt, loss, per_rank, min_rank=least, max_rank=256)
    assert found in RANKS
    assert least <= found <= 256
    assert found <= rank_for(2 * num_learnt, loss, per_rank, min_rank=least, max_rank=256)
