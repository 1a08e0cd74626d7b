"""Adapters as they are found: every door that lets one out looks at its tensors the same way."""

import json
import shlex
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import peftkit
from peftkit.cli import main
from peftkit.errors import UserError
from tests.conftest import TINY_LLAMA
from tests.real.test_data import recipe_of_lengths
from tests.rigs.tiny import tiny_config


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    recipe = recipe_of_lengths(folder, range(5, 13), batch_size=4, epochs=1)
    return peftkit.finetune(recipe, out=folder / "run").result


def without_a_layer(tensors):
    return {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}


def with_default_in_keys(tensors):
    return {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}


def with_a_stranger(tensors):
    return {
        **tensors,
        "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": next(iter(tensors.values())).clone(),
    }


def with_a_prefix_of_torch_compile(tensors):
    return {name.replace("base_model.model.", "base_model.model._orig_mod."): t for name, t in tensors.items()}


DOORS = {
    "merge": lambda path, out: peftkit.merge_adapter(path, out=out),
    "adapter": lambda path, out: peftkit.export_adapter(path, options=peftkit.ExportOptions("adapter", out=out)),
    "vllm": lambda path, out: peftkit.export_adapter(
        path, options=peftkit.ExportOptions("adapter", out=out, engine="vllm")
    ),
    "gguf": lambda path, out: peftkit.export_adapter(path, options=peftkit.ExportOptions("gguf", out=out, lora=True)),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "change",
    [without_a_layer, with_default_in_keys, with_a_stranger, with_a_prefix_of_torch_compile],
    ids=lambda f: f.__name__,
)
def test_a_broken_adapter_leaves_by_no_door(door, change, adapter, tmp_path):
    broken = shutil.copytree(adapter, tmp_path / "broken")
    (broken / "MANIFEST.json").unlink()
    file = broken / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(UserError):
        DOORS[door](broken, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_copy_without_its_base_says_what_was_not_compared(adapter, tmp_path):
    away = shutil.copytree(adapter, tmp_path / "away")
    config = away / "adapter_config.json"
    (away / "MANIFEST.json").unlink()
    config.write_text(config.read_text().replace(str(TINY_LLAMA), str(tmp_path / "moved")))
    result = peftkit.export_adapter(away, options=peftkit.ExportOptions("adapter", out=str(tmp_path / "out")))
    assert "not compared" in result.said[0]
    with pytest.raises(UserError, match="merge and export take --base-model"):
        peftkit.generate(away, "hello")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_plain_copy_is_compared_with_the_base_that_is_given(adapter, tmp_path):
    away = shutil.copytree(adapter, tmp_path / "away")
    (away / "MANIFEST.json").unlink()
    config = away / "adapter_config.json"
    config.write_text(config.read_text().replace(str(TINY_LLAMA), str(tmp_path / "moved")))

    def copy(base, name):
        return peftkit.export_adapter(
            away, options=peftkit.ExportOptions("adapter", out=str(tmp_path / name), base_model=str(base))
        )

    assert not any("not compared" in note for note in copy(TINY_LLAMA, "out").said)
    with pytest.raises(UserError, match=r"^--base-model: .*give the folder that holds it"):
        copy(tmp_path / "nowhere", "none")


@pytest.mark.parametrize("fault", ["pickled", "no weights"])
def test_a_base_that_is_there_and_cannot_be_used_is_not_taken_for_a_missing_one(fault, adapter, tmp_path):
    away, base = shutil.copytree(adapter, tmp_path / "away"), shutil.copytree(TINY_LLAMA, tmp_path / "base")
    for file in base.glob("*.safetensors"):
        file.unlink()
    if fault == "pickled":
        (base / "pytorch_model.bin").write_bytes(b"\x80")
    (away / "MANIFEST.json").unlink()
    config = away / "adapter_config.json"
    config.write_text(config.read_text().replace(str(TINY_LLAMA), str(base)))
    with pytest.raises(UserError) as caught:
        peftkit.export_adapter(away, options=peftkit.ExportOptions("adapter", out=str(tmp_path / "out")))
    assert "--base-model" not in str(caught.value)
    assert ("pytorch_model.bin only" if fault == "pickled" else "without weights") in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "fix"), [("lora", "write peft_type: LORA"), ("prefix-tuning", "PREFIX_TUNING"), ("DORA", ""), (None, "")]
)
def test_a_type_that_peft_does_not_have_is_refused_at_every_door(kind, fix, adapter, tmp_path):
    odd = shutil.copytree(adapter, tmp_path / "odd")
    (odd / "MANIFEST.json").unlink()
    file = odd / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "peft_type": kind}))
    for door in DOORS.values():
        with pytest.raises(UserError, match=f"peft_type.*{fix}"):
            door(odd, str(tmp_path / "out"))


@pytest.mark.parametrize("named", [None, "", "somebody/unsloth-llama-bnb-4bit"])
def test_a_base_that_the_adapter_does_not_name_is_named_on_the_command_line(named, adapter, tmp_path):
    away = shutil.copytree(adapter, tmp_path / "away")
    (away / "MANIFEST.json").unlink()
    file = away / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": named}))
    with pytest.raises(UserError, match="--base-model"):
        peftkit.merge_adapter(away, out=str(tmp_path / "out"))
    options = peftkit.MergeOptions(base_model=str(TINY_LLAMA))
    assert peftkit.merge_adapter(away, out=str(tmp_path / "out"), options=options).passed


def test_a_trainers_folder_names_its_last_checkpoint(adapter, tmp_path):
    for step in (9, 10):
        shutil.copytree(adapter, tmp_path / f"checkpoint-{step}")
    with pytest.raises(UserError, match="checkpoint-10"):
        peftkit.merge_adapter(tmp_path, out=str(tmp_path / "out"))


@pytest.mark.parametrize("how", ["B is zero", "alpha is zero"])
def test_an_adapter_that_changes_nothing_is_said_to(how, adapter, tmp_path):
    idle = shutil.copytree(adapter, tmp_path / "idle")
    (idle / "MANIFEST.json").unlink()
    weights, config = idle / "adapter_model.safetensors", idle / "adapter_config.json"
    if how == "B is zero":
        save_file({n: t * (0 if "lora_B" in n else 1) for n, t in load_file(weights).items()}, weights)
    else:
        config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 0}))
    rows = dict(peftkit.merge_adapter(idle, out=str(tmp_path / "out")).rows())
    assert "the adapter changes nothing" in rows["verdict"]


def test_a_key_that_peft_does_not_know_is_told_where_it_is_on(adapter, tmp_path):
    foreign = shutil.copytree(adapter, tmp_path / "foreign")
    (foreign / "MANIFEST.json").unlink()
    file = foreign / "adapter_config.json"
    keys = {"use_hyperlora": True, "use_other": False, "notes": None}
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
    rows = dict(peftkit.merge_adapter(foreign, out=str(tmp_path / "merged")).rows())
    assert rows["ignored"].startswith("use_hyperlora: true: keys")
    options = peftkit.ExportOptions("adapter", out=str(tmp_path / "out"))
    assert "ignores, use_hyperlora: true" in peftkit.export_adapter(foreign, options=options).said[-1]


RENAMED = {
    "torch.compile": lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    "default": lambda name: name.replace(".weight", ".default.weight"),
    "both": lambda name: name.replace("model.model.", "model._orig_mod.model.").replace(".weight", ".default.weight"),
    "two wrappers": lambda name: f"base_model.model.{name}",
    "data parallel": lambda name: f"module.{name}",
    "a vision model's text": lambda name: name.replace("model.model.", "model.model.language_model."),
    "a missing prefix": lambda name: name.replace("model.model.", "model."),
}


@pytest.mark.parametrize("door", ["merge", "vllm", "generate"])
@pytest.mark.parametrize("how", RENAMED)
def test_names_that_a_rename_makes_fit_are_told_and_the_fix_works(how, door, adapter, tmp_path, capsys):
    broken = shutil.copytree(adapter, tmp_path / "broken")
    (broken / "MANIFEST.json").unlink()
    file = broken / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({RENAMED[how](name): tensor for name, tensor in tensors.items()}, file)
    doors = {**DOORS, "generate": lambda path, out: peftkit.generate(path, "hello", max_new_tokens=1)}
    with pytest.raises(UserError) as caught:
        doors[door](broken, str(tmp_path / "out"))
    [fix] = {problem.fix for problem in caught.value.problems}
    command = shlex.split(fix.removeprefix("its names fit after: ").replace("FIXED", str(tmp_path / "fixed")))
    assert main(command[1:]) == 0
    assert load_file(tmp_path / "fixed" / "adapter_model.safetensors").keys() == tensors.keys()
    doors[door](tmp_path / "fixed", str(tmp_path / "out"))


@pytest.mark.parametrize("rename", ["lora_X=", "=x", "nonsense", ".lora_A.=.lora_B."])
def test_a_rename_that_does_nothing_or_too_much_is_refused(rename, adapter, tmp_path):
    with pytest.raises(UserError, match="--rename"):
        peftkit.convert_weights(adapter, out=tmp_path / "out", rename=[rename])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_tables_that_were_resized_and_trained_whole_are_merged_as_peft_reads_them(tied, tmp_path):
    base = shutil.copytree(TINY_LLAMA, tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<t{i}>" for i in range(16)])

    def resized():
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        return model

    whole = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    options = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": whole, "init_lora_weights": False}
    trained = peft.get_peft_model(resized(), peft.LoraConfig(**options, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.01)
    trained.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(".original_module." in name for name in names), "the trait of these files"
    assert peftkit.merge_adapter(tmp_path / "adapter", out=str(tmp_path / "merged")).passed
    theirs = peft.PeftModel.from_pretrained(resized(), tmp_path / "adapter").eval()
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    inputs = tokenizer("say <t3> and <t15>", return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(theirs(**inputs).logits, ours(**inputs).logits, atol=1e-3)


PROJECTIONS = {"qwen3_moe": ["gate_proj", "up_proj", "down_proj"], "mixtral": ["w1", "w2", "w3"]}


def mixture(kind, folder):
    """A tiny mixture of experts with the tiny Llama's tokenizer."""
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(tiny_config(kind, vocab_size=2048)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY_LLAMA / name, folder / name)
    return folder


def logits_of(folder, adapter=None):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, adapter) if adapter else model
    return model(torch.tensor([[5, 6, 7, 8, 9]])).logits


def single_experts(kind, base, folder, *, leave_out=(), scales=None, **settings):
    """LoRA as PEFT wrote it for transformers 4, where each expert was a layer; and the sum done by hand."""
    weights, tensors = load_file(base / "model.safetensors"), {}
    for name, weight in dict(weights).items():
        if (".experts." in name or "q_proj" in name) and not any(part in name for part in leave_out):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            a, b = torch.randn(4, weight.shape[1]) * 0.1, torch.randn(weight.shape[0], 4) * 0.1
            tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
            scale = next((scale for part, scale in (scales or {}).items() if part in name), 2)
            weights[name] = weight + scale * b @ a
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none"}
    config |= {"target_modules": ["q_proj", *PROJECTIONS[kind]], "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    by_hand = folder.parent / "by_hand"
    shutil.copytree(base, by_hand)
    save_file(weights, by_hand / "model.safetensors", metadata={"format": "pt"})
    return by_hand


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_lora_of_single_experts_is_merged_and_exported_as_it_was_trained(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "cache"))
    base = mixture(kind, tmp_path / "base")
    by_hand = single_experts(kind, base, tmp_path / "adapter")
    wanted = logits_of(by_hand)
    assert not torch.allclose(wanted, logits_of(base), atol=1e-2)
    report = peftkit.merge_adapter(tmp_path / "adapter", out=tmp_path / "merged")
    assert report.passed
    assert torch.allclose(logits_of(tmp_path / "merged"), wanted, atol=1e-6)
    options = peftkit.ExportOptions("adapter", out=tmp_path / "copy")
    peftkit.export_adapter(tmp_path / "adapter", options=options)
    assert torch.allclose(logits_of(base, tmp_path / "copy"), wanted, atol=1e-6)


SCALES = {
    "rslora": ({"use_rslora": True}, {"": 4}),
    "alpha_pattern": ({"alpha_pattern": {"gate_proj": 24, "down_proj": 4}}, {"gate_proj": 6, "down_proj": 1}),
}


@pytest.mark.parametrize("name", SCALES)
def test_the_scales_of_single_experts_are_those_of_their_projections(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "cache"))
    settings, scales = SCALES[name]
    base = mixture("qwen3_moe", tmp_path / "base")
    by_hand = single_experts("qwen3_moe", base, tmp_path / "adapter", scales=scales, **settings)
    peftkit.merge_adapter(tmp_path / "adapter", out=tmp_path / "merged")
    assert torch.allclose(logits_of(tmp_path / "merged"), logits_of(by_hand), atol=1e-5)
    # another alpha is another adapter, though the weights are the same
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config |= {"lora_alpha": 0.008, "alpha_pattern": {}, "use_new": {"x": 1}}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    report = peftkit.merge_adapter(tmp_path / "adapter", out=tmp_path / "again")
    assert torch.allclose(logits_of(tmp_path / "again"), logits_of(base), atol=1e-2)
    assert report.ignored == ('use_new: {"x": 1}',), "told, though the file was rewritten"


def test_lora_of_single_experts_that_lacks_some_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "cache"))
    base = mixture("qwen3_moe", tmp_path / "base")
    single_experts("qwen3_moe", base, tmp_path / "adapter", leave_out=["layers.1.mlp.experts.2.up_proj"])
    with pytest.raises(UserError, match="each projection of every expert"):
        peftkit.merge_adapter(tmp_path / "adapter", out=tmp_path / "merged")


def test_experts_packed_one_by_one_are_told_and_repacked(adapter, tmp_path):
    base = mixture("qwen3_moe", tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    parts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_parameters=parts, init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    wanted = model(torch.tensor([[5, 6, 7, 8, 9]])).logits
    model.save_pretrained(tmp_path / "right")
    shutil.copytree(tmp_path / "right", tmp_path / "packed")
    tensors = load_file(tmp_path / "right" / "adapter_model.safetensors")
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        rows = len(tensors[name])  # rank by rank -> expert by expert
        tensors[name] = tensors[name].reshape(rows, 3, -1).transpose(1, 2).reshape(rows, -1).contiguous()
    save_file(tensors, tmp_path / "packed" / "adapter_model.safetensors", metadata={"format": "pt"})
    assert not torch.allclose(logits_of(base, tmp_path / "packed"), wanted, atol=1e-4)
    assert not peftkit.merge_adapter(tmp_path / "right", out=tmp_path / "merged_right").doubts
    (tmp_path / "packed" / "README.md").write_text("---\ntags:\n- unsloth\n---\n")
    [doubt] = peftkit.merge_adapter(tmp_path / "packed", out=tmp_path / "merged").doubts
    command = doubt.partition("peftkit convert ")[2].replace("FIXED", str(tmp_path / "fixed"))
    command = command.replace("ADAPTER", str(tmp_path / "packed"))
    assert main(["convert", *shlex.split(command)]) == 0
    assert torch.allclose(logits_of(base, tmp_path / "fixed"), wanted, atol=1e-6)
    with pytest.raises(UserError, match="an adapter of fused experts"):
        peftkit.convert_weights(adapter, out=tmp_path / "no", expert_major=True)
    for rank in (None, "x", 0, 5, 12):
        config = json.loads((tmp_path / "right" / "adapter_config.json").read_text())
        (tmp_path / "packed" / "adapter_config.json").write_text(json.dumps({**config, "r": rank}))
        with pytest.raises(UserError, match="an adapter of fused experts"):
            peftkit.convert_weights(tmp_path / "packed", out=tmp_path / "no", expert_major=True)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_of_mlx_is_converted(kind, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32)
    parts = ["layers.1.self_attn.q_proj", "layers.1.mlp.down_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=80, target_modules=parts, init_lora_weights=False, use_dora=kind == "dora")
    theirs = peft.get_peft_model(model, config)
    wanted = theirs(torch.tensor([[5, 6, 7, 8, 9]])).logits
    endings = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "m"}
    tensors = {}
    for name, tensor in peft.get_peft_model_state_dict(theirs).items():
        [ending] = [ending for ending in endings if name.endswith(ending)]
        new = name.removeprefix("base_model.model.").removesuffix(ending) + endings[ending]
        tensors[new] = tensor.T.contiguous() if tensor.ndim == 2 else tensor
    folder = tmp_path / "mlx"
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors")
    settings = {"rank": 4, "scale": 20.0, "dropout": 0.0}
    written = {"fine_tune_type": kind, "num_layers": 1, "lora_parameters": settings, "model": str(TINY_LLAMA)}
    (folder / "adapter_config.json").write_text(json.dumps(written))
    with pytest.raises(UserError) as caught:
        peftkit.merge_adapter(folder, out=tmp_path / "merged")
    [problem] = caught.value.problems
    command = problem.fix.partition(" writes")[0].replace("FIXED", str(tmp_path / "fixed"))
    assert main(shlex.split(command)[1:]) == 0
    assert torch.allclose(logits_of(TINY_LLAMA, tmp_path / "fixed"), wanted, atol=1e-5)
    options = peftkit.MergeOptions(dtype="float32")
    assert peftkit.merge_adapter(tmp_path / "fixed", out=tmp_path / "merged", options=options).passed
    assert torch.allclose(logits_of(tmp_path / "merged"), wanted, atol=1e-4)


Q = "model.layers.0.self_attn.q_proj"
MLX_FAULTS = {
    "full": {"fine_tune_type": "full"},
    "a list": {"fine_tune_type": ["lora"]},
    "no scale": {"lora_parameters": {"rank": 2}},
    "dropout in words": {"lora_parameters": {"scale": 2.0, "dropout": "x"}},
    "an early one": {"lora_parameters": {"scale": 2.0, "alpha": 16, "rank": 2}},
    "no magnitudes": {"fine_tune_type": "dora"},
    "a stranger": {"model.layers.0.mlp.experts.x": torch.zeros(2)},
    "one factor": {f"{Q}.lora_b": None},
    "two ranks": {f"{Q}.lora_b": torch.zeros(3, 4)},
    "not finite": {f"{Q}.lora_b": torch.full((2, 4), float("nan"))},
    "integers": {f"{Q}.lora_b": torch.zeros(2, 4, dtype=torch.int32)},
    "a table": {"model.embed_tokens.lora_a": torch.zeros(4, 2), "model.embed_tokens.lora_b": torch.zeros(2, 4)},
    "no module": {"lora_a": torch.zeros(4, 2)},
    "cut": {},
}


@pytest.mark.parametrize("fault", MLX_FAULTS)
def test_an_adapter_of_mlx_that_is_none_is_refused(fault, tmp_path):
    tensors = {f"{Q}.lora_a": torch.zeros(4, 2), f"{Q}.lora_b": torch.zeros(2, 4)}
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 2.0}}
    for key, value in MLX_FAULTS[fault].items():
        (config if key in {*config} else tensors)[key] = value
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / "adapters.safetensors"
    )
    if fault == "cut":
        (tmp_path / "adapters.safetensors").write_bytes(b"cut")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError):
        peftkit.convert_weights(tmp_path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_whose_tokenizer_knows_more_tokens_than_it_has_is_merged(tmp_path):
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(tiny_config("llama", vocab_size=64))
    base.save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY_LLAMA / name, tmp_path / "base" / name)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    assert peftkit.merge_adapter(tmp_path / "adapter", out=tmp_path / "merged").passed
