import pytest

from peftkit.archs import family_of
from peftkit.plan.targets import matches, resolve_targets, unmatched

LLAMA, GPT2 = family_of("llama"), family_of("gpt2")


def test_groups_and_roles():
    assert resolve_targets("attention", LLAMA, "w") == (("q_proj", "k_proj", "v_proj", "o_proj"), [])
    assert resolve_targets(["q", "down"], LLAMA, "w") == (("q_proj", "down_proj"), [])
    assert len(resolve_targets("all-linear", LLAMA, "w")[0]) == 7
    assert resolve_targets(["qkv"], GPT2, "w") == (("c_attn",), [])
    assert resolve_targets(["q", "q_proj", "q"], LLAMA, "w") == (("q_proj",), [])


@pytest.mark.parametrize(
    ("family", "wanted", "said"),
    [
        (LLAMA, ["q_prj"], "q_proj"),
        (LLAMA, ["c_attn"], "which matches no module"),
        (GPT2, ["gate"], "roles of GPT-2: qkv, o, up, down"),
        (LLAMA, "w1", "roles of Llama"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error_with_the_nearest_names(family, wanted, said):
    _, [problem] = resolve_targets(wanted, family, "recipe.yaml:5 method.targets")
    assert said in str(problem)
    assert problem.where == "recipe.yaml:5 method.targets"


def test_explicit_names_and_paths():
    assert resolve_targets(["self_attn.q_proj", "embed_tokens"], LLAMA, "w")[1] == []
    assert resolve_targets(["model.layers.1.self_attn.q_proj"], LLAMA, "w")[1] == []
    assert matches("model.layers.1.mlp.up_proj", "up_proj")
    assert not matches("model.layers.1.mlp.gate_up_proj", "up_proj")
    assert unmatched(["a.b.c"], ["b.c"], "w") == []
