import json

import pytest

from peftkit.archs import KNOWN, shape_from_config
from peftkit.methods import METHODS
from peftkit.plan.inspection import make_inspection


def inspect(name):
    return make_inspection(name, shape_from_config(KNOWN[name]))


@pytest.mark.parametrize("name", KNOWN)
def test_every_known_model_is_told_whole(name):
    found = inspect(name)
    assert sum(found.by_role.values()) == found.num_parameters
    assert [answer.name for answer in found.methods] == list(METHODS)
    for answer in found.methods:
        assert answer.works or answer.note
        assert answer.num_trainable is None or 0 < answer.num_trainable <= found.num_parameters
    json.dumps(found.to_json())
    assert found.id in found.id + found._repr_html_()
    assert all(len(text) < 400 for _, text in found.rows())


def test_numbers_of_llama_8b():
    found = inspect("meta-llama/Llama-3.1-8B")
    assert found.cache_bytes_per_token == {"bf16": 131072.0, "int8": 65536.0, "int4": 32768.0}
    assert dict(found.rows())["cache at 131,072"].startswith("bf16 16.00 GiB")
    assert found.weight_bytes["bf16"] == 2 * 8_030_261_248
    assert 5.5e9 < found.weight_bytes["nf4"] < 6.0e9
    assert found.optimal_tokens == 20 * 8_030_261_248
    lora = next(answer for answer in found.methods if answer.name == "lora")
    assert lora.num_trainable == 4 * 41_943_040, "rank 64"


def test_a_large_cache_is_told_with_ways_out():
    [note] = [text for text in inspect("meta-llama/Llama-3.1-8B").mind if "keys and values" in text]
    assert "at 131,072 tokens its keys and values take 16.00 GiB in bf16, 107.0 % of its weights" in note
    assert "8.00 GiB in 8 bits, 4.00 GiB in 4" in note
    assert "GQA" not in note, "its keys are grouped already"
    shared = KNOWN["meta-llama/Llama-3.1-8B"]
    every_head = make_inspection("o/m", shape_from_config({**shared, "num_key_value_heads": 32}))
    [note] = [text for text in every_head.mind if "keys and values" in text]
    assert "take 64.00 GiB in bf16" in note
    assert "GQA), a quarter as many, would keep 16.00 GiB" in note
    short = make_inspection("o/m", shape_from_config({**shared, "max_position_embeddings": 8192}))
    assert not any("keys and values" in text for text in short.mind), "1 GiB beside 15"
    assert not any("keys and values" in text for text in inspect("state-spaces/mamba-130m-hf").mind)


def test_active_parameters_of_a_mixture():
    assert inspect("mistralai/Mixtral-8x7B-v0.1").num_active == 12_879_925_248
    assert 3.2e9 < inspect("Qwen/Qwen3-30B-A3B").num_active < 3.5e9


def test_a_state_is_told_instead_of_a_cache_and_missing_kernels_by_name():
    found = inspect("state-spaces/mamba-130m-hf")
    assert found.attention == "none"
    assert not any(found.cache_bytes_per_token.values())
    assert found.state_bytes_per_sequence > 0
    assert "linear in the length" in found.compute
    assert "mamba_ssm, causal_conv1d" in found.mind[-1]
    prefix = next(answer for answer in found.methods if answer.name == "prefix")
    assert not prefix.works
    assert prefix.note.endswith("nearest: prompt")
