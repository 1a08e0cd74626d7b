"""Merged weights against PEFT: the same function always, the same bits wherever PEFT rounds once."""

import pytest
import torch

from tests.conftest import TINY_LLAMA
from tests.rigs.adapters import FLAVOURS, base_plan, inputs, load, load_adapted, make, merge, stir
from tests.rigs.tiny import tiny_model

# PEFT rounds the experts' change before it adds it, and adds what embeddings get in 16 bits
ROUNDS_TWICE = {"experts of qwen3", "experts of mixtral", "embeddings"}


@pytest.mark.parametrize("name", FLAVOURS)
def test_the_merged_model_computes_what_the_adapter_does(name, tmp_path):
    flavour = FLAVOURS[name]
    base, adapter = make(flavour, tmp_path)
    plan = merge(base, adapter, tmp_path / "out", base_plan(base, task=flavour.task))
    assert plan.untied == flavour.unties
    adapted, merged = load_adapted(base, adapter, flavour.task), load(tmp_path / "out", flavour.task)
    asked = inputs(merged, flavour.task)
    with torch.no_grad():
        expected, got = adapted(**asked).logits, merged(**asked).logits
        with adapted.disable_adapter():
            alone = adapted(**asked).logits
    assert float((expected - alone).abs().max()) > 1e-3, "the adapter has no effect: nothing is shown"
    assert float((expected - got).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FLAVOURS)
def test_weights_are_peft_s_own_bit_for_bit(name, dtype, tmp_path):
    flavour = FLAVOURS[name]
    if dtype == "bfloat16" and name in ROUNDS_TWICE:
        pytest.skip("PEFT rounds twice here: see the test against fp64")
    if flavour.peft_is_wrong:
        pytest.skip("PEFT's own merge is another function: see the test of that")
    base, adapter = make(flavour, tmp_path, dtype)
    merge(base, adapter, tmp_path / "out", base_plan(base, dtype, flavour.task))
    theirs = load_adapted(base, adapter, flavour.task, dtype).merge_and_unload()
    theirs.save_pretrained(tmp_path / "theirs")
    one, two = (load(tmp_path / each, flavour.task, dtype).state_dict() for each in ("out", "theirs"))
    assert one.keys() == two.keys()
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


@pytest.mark.parametrize("name", sorted(ROUNDS_TWICE))
def test_where_peft_rounds_twice_ours_is_the_exact_sum_rounded_once(name, tmp_path):
    flavour = FLAVOURS[name]
    base, adapter = make(flavour, tmp_path, "bfloat16")
    merge(base, adapter, tmp_path / "out", base_plan(base, "bfloat16", flavour.task))
    exact = load_adapted(base, adapter, flavour.task, "float64").double().merge_and_unload().state_dict()
    ours = load(tmp_path / "out", flavour.task, "bfloat16").state_dict()
    theirs = load_adapted(base, adapter, flavour.task, "bfloat16").merge_and_unload().state_dict()
    errors = [sum(int((state[key] != exact[key].bfloat16()).sum()) for key in exact) for state in (ours, theirs)]
    assert errors[0] <= 2 < errors[1], "an fp32 product that stands between two numbers may fall either way"


@pytest.mark.parametrize("name", [name for name, flavour in FLAVOURS.items() if flavour.peft_is_wrong])
def test_peft_s_merge_of_tied_tables_is_still_wrong(name, tmp_path):
    """When this fails, PEFT has mended it, and docs/merge.md need not warn any more."""
    flavour = FLAVOURS[name]
    base, adapter = make(flavour, tmp_path)
    adapted = load_adapted(base, adapter, flavour.task)
    asked = inputs(adapted, flavour.task)
    with torch.no_grad():
        expected = adapted(**asked).logits
        adapted.merge_and_unload().save_pretrained(tmp_path / "theirs")
        got = load(tmp_path / "theirs", flavour.task)(**asked).logits
    assert float((expected - got).abs().max()) > 0.1


def test_another_type_for_all_weights(tmp_path):
    base, adapter = make(FLAVOURS["lora"], tmp_path)
    plan = merge(base, adapter, tmp_path / "out", base_plan(base), dtype=torch.bfloat16)
    assert {output.dtype for output in plan.outputs} == {torch.bfloat16}
    merged = load(tmp_path / "out", "causal-lm", "bfloat16")
    assert merged.config.dtype == torch.bfloat16
    exact = load_adapted(base, adapter, "causal-lm").merge_and_unload().state_dict()
    assert all(torch.equal(exact[key].bfloat16(), value) for key, value in merged.state_dict().items())


def test_shards_and_index_are_as_the_base_has_them(tmp_path):
    base, adapter = make(FLAVOURS["embeddings, tied"], tmp_path)
    model = load(base, "causal-lm")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    shards = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 2
    merge(tmp_path / "sharded", adapter, tmp_path / "out", base_plan(base))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == shards
    asked = inputs(model, "causal-lm")
    with torch.no_grad():
        expected = load_adapted(base, adapter, "causal-lm")(**asked).logits
        got = load(tmp_path / "out", "causal-lm")(**asked).logits
    assert torch.allclose(expected, got, atol=1e-5)


def test_a_base_of_the_hub_s_old_names(tmp_path):
    """GPT-2's files on the hub have no prefix."""
    from safetensors.torch import load_file, save_file

    base, adapter = make(FLAVOURS["lora of gpt2"], tmp_path)
    tensors = load_file(base / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()},
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    merge(base, adapter, tmp_path / "out", base_plan(base))
    adapted = load_adapted(base, adapter, "causal-lm")
    asked = inputs(adapted, "causal-lm")
    with torch.no_grad():
        expected, got = adapted(**asked).logits, load(tmp_path / "out", "causal-lm")(**asked).logits
    assert torch.allclose(expected, got, atol=1e-5)


def test_a_resized_vocabulary_travels_with_the_adapter(tmp_path):
    import peft
    from transformers import AutoTokenizer

    from peftkit.model.adapter.load import load_adapter
    from peftkit.ship.merge.merge import MergeOptions
    from peftkit.ship.merge.merge import merge as merge_run

    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = model.config.vocab_size + 5
    model.resize_token_embeddings(rows)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    stir(wrapped)
    wrapped.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    asked = {"input_ids": torch.tensor([[1, rows - 1, rows - 3, 5]])}
    with torch.no_grad():
        expected = wrapped.eval()(**asked).logits
        loaded = load_adapter(load(tmp_path / "base", "causal-lm"), tmp_path / "adapter").eval()(**asked)
    assert torch.equal(expected, loaded.logits)
    report = merge_run([tmp_path / "adapter"], tmp_path / "out", MergeOptions())
    assert report.passed
    merged = load(tmp_path / "out", "causal-lm")
    assert merged.config.vocab_size == rows
    with torch.no_grad():
        assert torch.allclose(expected, merged(**asked).logits, atol=1e-5)


def with_tokenizer(folder):
    """Give a folder the tiny tokenizer."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(TINY_LLAMA).save_pretrained(folder)
