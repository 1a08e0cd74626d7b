import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkit.archs.sizes import Sizes


def test_expressions_keys_alternatives_and_defaults():
    sizes = Sizes(
        {"hidden_size": 64, "num_attention_heads": 4, "expand": 3},
        {"inner": "expand*hidden", "twice": lambda s: 2 * s["inner"], "ranks": ("lora_rank", "hidden//16")},
        {"kernel": 4},
    )
    assert sizes["2*inner + kernel"] == 388
    assert sizes["twice"] == 384
    assert sizes["ranks"] == 4
    assert sizes["head_dim"] == 16, "not in the configuration: hidden / heads"
    assert sizes["kv"] == 64, "no grouped heads: as many as queries"


def test_inside_its_own_definition_a_name_is_the_key():
    assert Sizes({"head_dim": 8, "hidden_size": 64, "num_attention_heads": 4}, {}, {})["head_dim"] == 8


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({}, KeyError),
        ({"hidden_size": "64"}, ValueError),
        ({"hidden_size": -1}, ValueError),
        ({"hidden_size": True}, ValueError),
        ({"hidden_size": 2**32}, ValueError),
    ],
)
def test_what_is_no_size_is_told_by_name(config, error):
    with pytest.raises(error, match="hidden_size"):
        Sizes(config, {}, {})["hidden"]


@pytest.mark.parametrize("text", ["__import__('os')", "hidden**2", "hidden/2", "[1]", "hidden if 1 else 2"])
def test_only_arithmetic_is_evaluated(text):
    with pytest.raises(ValueError, match="is no expression of sizes"):
        Sizes({"hidden_size": 4}, {}, {})[text]


@given(a=st.integers(0, 999), b=st.integers(1, 999))
def test_arithmetic_is_pythons(a, b):
    sizes = Sizes({"a": a, "b": b}, {}, {})
    assert sizes["a*b + a//b - 0"] == a * b + a // b
