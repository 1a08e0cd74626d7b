"""Several adapters as one: the sum exactly, or the nearest of a smaller rank, with what is lost told."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peftkit
from peftkit.errors import UserError
from peftkit.ship.merge.concat import _truncated_svd
from tests.conftest import TINY_LLAMA
from tests.rigs.adapters import FLAVOURS, Flavour, inputs, load, load_adapted, make, stir
from tests.ship.merge.test_write import with_tokenizer


@pytest.fixture
def two(tmp_path):
    """Two adapters of one base with other ranks, scales and modules."""
    import peft
    from transformers import AutoTokenizer

    vocabulary = {"vocab_size": len(AutoTokenizer.from_pretrained(TINY_LLAMA))}
    arguments = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
    base, one = make(Flavour("llama", arguments, base=vocabulary), tmp_path)
    with_tokenizer(base)
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(
        load(base, "causal-lm"),
        peft.LoraConfig(
            task_type="CAUSAL_LM", r=2, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "up_proj"]
        ),
    )
    stir(wrapped)
    wrapped.save_pretrained(tmp_path / "two")
    return base, one, tmp_path / "two"


def weights_of(base, adapter):
    state = load_adapted(base, adapter, "causal-lm").merge_and_unload().state_dict()
    return {name: tensor.double() for name, tensor in state.items()}


def test_the_sum_is_exact(two, tmp_path):
    base, one, other = two
    found = peftkit.combine_adapters([one, other], out=tmp_path / "sum", weights=[1.0, -0.5])
    assert found.made.rank == 6 and found.made.discarded == 0 and "exactly" in found.rows()[1][1]
    plain = {name: tensor.double() for name, tensor in load(base, "causal-lm").state_dict().items()}
    first, second, both = (weights_of(base, folder) for folder in (one, other, tmp_path / "sum"))
    for name, weight in plain.items():
        expected = first[name] - 0.5 * (second[name] - weight)
        assert torch.allclose(both[name], expected, atol=1e-6), name
    dense = peftkit.merge_adapter(
        [one, other], out=tmp_path / "dense", options=peftkit.MergeOptions(weights=(1.0, -0.5))
    )
    assert dense.passed
    asked = inputs(load(base, "causal-lm"), "causal-lm")
    with torch.no_grad():
        a = load(tmp_path / "dense", "causal-lm")(**asked).logits
        b = load_adapted(base, tmp_path / "sum", "causal-lm")(**asked).logits
    assert torch.allclose(a, b, atol=1e-5), "dense and as an adapter are the same"


def test_one_adapter_of_weight_one_comes_back(two, tmp_path):
    base, one, other = two
    for number, adapter in enumerate((one, other)):
        peftkit.combine_adapters([adapter], out=tmp_path / f"{number}")
        before, after = weights_of(base, adapter), weights_of(base, tmp_path / f"{number}")
        assert all(torch.allclose(before[name], after[name], atol=1e-7) for name in before)


def test_a_smaller_rank_tells_what_it_leaves_out(two, tmp_path):
    base, one, other = two
    found = peftkit.combine_adapters([one, other], out=tmp_path / "small", rank=3)
    assert found.made.rank == 3 and 0 < found.made.discarded < found.made.most_discarded < 1
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert config["r"] == 3 and config["rank_pattern"] == {}
    exact = peftkit.combine_adapters([one, other], out=tmp_path / "exact")
    assert exact.made.full_rank == 6
    plain = load(base, "causal-lm").state_dict()
    whole, small = weights_of(base, tmp_path / "exact"), weights_of(base, tmp_path / "small")
    left = sum(float((whole[n] - small[n]).square().sum()) for n in plain)
    total = sum(float((whole[n] - plain[n].double()).square().sum()) for n in plain)
    assert abs(left / total - found.made.discarded) < 1e-4


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_truncation_is_the_nearest_matrix_of_its_rank(d_out, d_in, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(6, d_in, generator=generator), torch.randn(d_out, 6, generator=generator)
    product = b.double() @ a.double()
    rank = min(rank, d_in, d_out)
    made = _truncated_svd((a, b), rank)
    assert made[0].shape == (rank, d_in) and made[1].shape == (d_out, rank)
    left = torch.linalg.svdvals(product)[rank:].square().sum().sqrt()
    got = (product - made[1].double() @ made[0].double()).norm()
    assert abs(float(got - left)) < 1e-4 * (1 + float(product.norm()))


@pytest.mark.parametrize("name", ["dora", "head and embeddings whole", "experts of qwen3", "ia3", "lora with bias"])
def test_more_than_lora_of_weights_is_refused(name, tmp_path):
    base, adapter = make(FLAVOURS[name], tmp_path)
    with_tokenizer(base)
    with pytest.raises(UserError, match="LoRA of weights only"):
        peftkit.combine_adapters([adapter, adapter], out=tmp_path / "x")
    assert not (tmp_path / "x").exists()
