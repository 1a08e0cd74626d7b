"""What an adapter does to each parameter, and what is refused before a weight is read."""

import json

import pytest

from peftkit.errors import UserError
from peftkit.model.adapter.edits import read_edits, refuse_unmergeable
from peftkit.model.meta.skeleton import meta_model
from peftkit.ship.files.tensors import read_all_entries
from tests.rigs.adapters import FLAVOURS, base_plan, make


def edits(name, folder):
    flavour = FLAVOURS[name]
    base, adapter = make(flavour, folder)
    tensors = read_all_entries([adapter / "adapter_model.safetensors"])
    shapes = {key: entry.shape for key, entry in tensors.items()}
    return read_edits(meta_model(str(base), base_plan(base, task=flavour.task)), adapter, shapes), shapes


@pytest.mark.parametrize("name", FLAVOURS)
def test_every_tensor_of_an_adapter_is_used(name, tmp_path):
    found, shapes = edits(name, tmp_path)
    used = {key for own in found.values() for edit in own for key in edit.tensors.values()}
    assert used == set(shapes)


def test_scales_are_those_of_peft(tmp_path):
    found, shapes = edits("rslora with patterns", tmp_path)
    scales = {key: (own[0].scale, shapes[own[0].tensors["A"]][0]) for key, own in found.items()}
    layer = "model.layers.1"
    assert scales[f"{layer}.self_attn.q_proj.weight"] == (8 / 8**0.5, 8)
    assert scales[f"{layer}.self_attn.v_proj.weight"] == (3 / 4**0.5, 4)
    assert scales[f"{layer}.mlp.up_proj.weight"] == (8 / 2**0.5, 2)
    assert scales["model.layers.0.mlp.up_proj.weight"] == (8 / 4**0.5, 4)


def test_experts_are_told_apart_by_their_parameter_not_by_the_order_of_wrapping(tmp_path):
    found, shapes = edits("experts of qwen3", tmp_path)
    for key, own in found.items():
        if ".experts." in key:
            a, b = (shapes[own[0].tensors[side]] for side in "AB")
            assert own[0].kind == "experts"
            wide = key.endswith("gate_up_proj")
            assert (a[1] < b[0]) == wide, "gate and up go out wider than they come in"


def test_copies_of_tables_are_marked(tmp_path):
    found, _ = edits("embeddings", tmp_path)
    first, second = found["model.embed_tokens.weight"]
    assert (first.kind, first.is_table_copy, second.kind) == ("whole", True, "embedding")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "nothing to merge"),
        ({"peft_type": "PROMPT_TUNING"}, "nothing to merge"),
        ({"peft_type": "OFT"}, "merge_and_unload"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"}, "changed the base"),
        ({"peft_type": "LORA", "init_lora_weights": "OLoRA"}, "changed the base"),
        ({"peft_type": "LORA", "alora_invocation_tokens": [1]}, "does not merge this kind"),
        ({}, "None"),
    ],
)
def test_what_is_no_addition_to_weights_is_refused(config, said, tmp_path):
    with pytest.raises(UserError) as error:
        refuse_unmergeable(tmp_path, config)
    assert said in " ".join(f"{p.got} {p.fix}" for p in error.value.problems)


def test_all_problems_at_once(tmp_path):
    config = {"peft_type": "LORA", "init_lora_weights": "pissa", "layer_replication": [[0, 1]], "use_bdlora": True}
    with pytest.raises(UserError) as error:
        refuse_unmergeable(tmp_path, config)
    assert len(error.value.problems) == 3


def test_a_configuration_of_another_base_is_refused(tmp_path):
    base, adapter = make(FLAVOURS["lora"], tmp_path)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": ["c_attn"]}))
    with pytest.raises(UserError, match="does not fit this base"):
        read_edits(meta_model(str(base), base_plan(base)), adapter, {})
