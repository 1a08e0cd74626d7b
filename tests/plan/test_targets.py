import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkit.archs import FAMILIES, KNOWN, shape_from_config, shortest_names
from peftkit.methods import METHODS
from peftkit.plan.targets import (
    make_selection,
    matches_target,
    resolve_items,
    resolve_layers,
    resolve_targets,
    resolve_whole,
    unmatched_targets,
)
from tests.rigs.tiny import TINY

LLAMA = shape_from_config(KNOWN["meta-llama/Llama-3.2-1B"])
GPT2 = shape_from_config(KNOWN["openai-community/gpt2"])
MIXTRAL = shape_from_config(KNOWN["mistralai/Mixtral-8x7B-v0.1"])
NEXT = shape_from_config(KNOWN["Qwen/Qwen3-Next-80B-A3B-Instruct"])
BERT = shape_from_config(KNOWN["google-bert/bert-base-uncased"])
JAMBA = shape_from_config(KNOWN["ai21labs/Jamba-v0.1"])


def names(wanted, shape, method="lora"):
    modules, problems = resolve_targets(wanted, shape, METHODS[method], "recipe.yaml:5 method.targets")
    assert not problems
    chosen = make_selection(modules, shape, as_parameters=method == "lora")
    return chosen.names, chosen.parameters


def refused(wanted, shape, method="lora"):
    _, problems = resolve_targets(wanted, shape, METHODS[method], "recipe.yaml:5 method.targets")
    assert problems[0].where == "recipe.yaml:5 method.targets"
    return str(problems[0])


def test_groups_and_roles():
    assert names("attention", LLAMA)[0] == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert names(["q", "down"], LLAMA)[0] == ("q_proj", "down_proj")
    assert len(names("all-linear", LLAMA)[0]) == 7
    assert names(["qkv"], GPT2)[0] == ("c_attn",)
    assert names(["q", "q_proj", "q"], LLAMA)[0] == ("q_proj",)
    assert names("attention", GPT2)[0] == ("c_attn", "attn.c_proj")


def test_a_regular_expression_is_of_whole_names():
    assert names(r"match:.*\.(q|v)_proj", LLAMA)[0] == ("q_proj", "v_proj")
    assert len(names([r"match:model\.layers\.[01]\..*"], LLAMA)[0]) == 14
    assert "match:.*q_proj.*" in refused("match:q_proj", LLAMA)
    assert "regular expression" in refused("match:(", LLAMA)


@pytest.mark.parametrize(
    ("layers", "kept"),
    [
        ("last 2", [14, 15]),
        ("first 1", [0]),
        (3, [3]),
        ("0-1, 4", [0, 1, 4]),
        ([0, "last 1"], [0, 15]),
        ("2 - 3", [2, 3]),
    ],
    ids=str,
)
def test_layers_are_counted_from_either_end(layers, kept):
    found, problems = resolve_layers(layers, (module.name for module in LLAMA.modules), "layers")
    assert not problems
    assert found == {("model.layers", number) for number in kept}


@pytest.mark.parametrize("layers", ["last 17", "0-16", 16, "x", "", "3-2", [0, "last 99"], "last 0", "-1"], ids=str)
def test_layers_that_the_model_does_not_have_are_refused(layers):
    _, [problem] = resolve_layers(layers, (module.name for module in LLAMA.modules), "layers")
    assert "model.layers 0-15" in problem.fix


def test_layers_of_an_encoder_may_be_more_than_its_decoder_has():
    stacks = [f"encoder.{i}.q" for i in range(12)] + [f"decoder.{i}.q" for i in range(6)]
    found, problems = resolve_layers("0-11", stacks, "layers")
    assert len(found) == 18 and not problems


def test_values_by_item_are_those_of_the_last_that_names_a_module():
    modules, _ = resolve_targets("all-linear", LLAMA, METHODS["lora"], "")
    values, problems = resolve_items({"all-linear": 1, "down": 2, "0.mlp.down_proj": 3}, modules, LLAMA, "pattern")
    assert not problems
    assert (values["model.layers.0.mlp.down_proj"], values["model.layers.1.mlp.down_proj"]) == (3, 2)
    assert values["model.layers.0.mlp.up_proj"] == 1
    attention, _ = resolve_targets("attention", LLAMA, METHODS["lora"], "")
    _, [problem] = resolve_items({"down": 2}, attention, LLAMA, "pattern")
    assert "not adapted" in problem.got and problem.fix == "these are q, k, v, o"


def test_parts_to_train_whole_are_named_as_targets_are():
    parts, problems = resolve_whole(["down", "norm"], LLAMA, "also_train")
    assert not problems
    assert {part.role for part in parts} == {"down", "norms"} and len(parts) == 17
    _, [problem] = resolve_whole(["embedings"], LLAMA, "also_train")
    assert problem.fix == "did you mean embeddings?"
    _, [problem] = resolve_whole(["experts"], MIXTRAL, "also_train")
    assert "no layer of its own" in problem.got


def test_what_is_excluded_is_not_taken_for_outside_of_the_layers():
    in_last = {("model.layers", 15)}
    excluded = {module.name for module in LLAMA.modules if module.role == "q"}
    modules, problems = resolve_targets(["q", "v"], LLAMA, METHODS["lora"], "", layers=in_last, exclude=excluded)
    assert not problems
    assert [module.name for module in modules] == ["model.layers.15.self_attn.v_proj"]
    _, [problem] = resolve_targets(["q"], LLAMA, METHODS["lora"], "", layers={("model.layers", 99)})
    assert "outside of method.layers" in problem.got


def test_experts_are_parameters_and_never_a_default():
    assert names("all-linear", MIXTRAL) == (("q_proj", "k_proj", "v_proj", "o_proj"), ())
    assert names("experts", MIXTRAL) == ((), ("gate_up_proj", "down_proj"))
    assert "only LoRA reaches" in refused("experts", MIXTRAL, "ia3")
    assert "which matches no module" in refused("router", MIXTRAL)


def test_layers_that_peft_would_take_for_experts_are_reached_by_their_weights():
    targets, parameters = names("all-linear", NEXT)
    assert "in_proj_qkvz" in targets
    assert parameters == ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    assert names("down", NEXT, "ia3")[0] == ("shared_expert.down_proj",)


def test_an_ending_that_other_layers_share_is_written_out_by_layer():
    targets, _ = names("down", BERT)
    assert targets[:2] == ("0.output.dense", "1.output.dense")
    assert names("all-linear", BERT)[0][:3] == ("query", "key", "value")


def test_blocked_layers_are_refused_with_their_reason():
    assert "never called" in refused("dt_proj", JAMBA)
    assert "bypass an adapter" in refused(["out_proj"], JAMBA)
    assert "in_proj" in names("all-linear", JAMBA)[0]


@pytest.mark.parametrize(
    ("shape", "wanted", "said"),
    [
        (LLAMA, ["q_prj"], "q_proj"),
        (LLAMA, ["c_attn"], "which matches no module"),
        (GPT2, ["gate"], "roles of GPT-2: qkv, o, up, down"),
        (LLAMA, "w1", "roles of Llama"),
        (LLAMA, "lm_head", "also_train: [head]"),
        (GPT2, "wte", "keeps the tie"),
    ],
)
def test_a_target_that_cannot_be_is_an_error_with_the_way_out(shape, wanted, said):
    assert said in refused(wanted, shape)


def test_explicit_names_and_paths():
    assert names(["self_attn.q_proj"], LLAMA)[0] == ("q_proj",)
    assert names(["model.layers.1.self_attn.q_proj"], LLAMA)[0] == ("1.self_attn.q_proj",)
    assert matches_target("model.layers.1.mlp.up_proj", "up_proj")
    assert not matches_target("model.layers.1.mlp.gate_up_proj", "up_proj")
    assert unmatched_targets(["a.b.c"], ["b.c"], "w") == []


SHAPES = [
    shape_from_config({**TINY[t], "model_type": t})
    for family in FAMILIES
    for t in family.model_types
    if t not in {"zamba2"}
]


@given(data=st.data())
def test_shortest_names_match_exactly_what_is_chosen(data):
    shape = data.draw(st.sampled_from(SHAPES))
    everything = [module.name for module in shape.modules]
    chosen = data.draw(st.sets(st.sampled_from(everything), min_size=1))
    ordered = [name for name in everything if name in chosen]
    found = shortest_names(ordered, everything)
    assert [n for n in everything if any(matches_target(n, ending) for ending in found)] == ordered
