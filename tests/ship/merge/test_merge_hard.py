"""Merges that went wrong once: in a review that tried to break them, with real runs of real libraries."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import peftkit
from peftkit import ExportOptions, MergeOptions
from peftkit.errors import UserError
from peftkit.model.meta.skeleton import read_base_layout
from tests.conftest import TINY_LLAMA, save_tiny
from tests.rigs.adapters import EXPERTS, FLAVOURS, Flavour, base_plan, inputs, load, load_adapted, make, merge, stir
from tests.ship.merge.test_write import with_tokenizer

NUM_TOKENS = {"vocab_size": len(AutoTokenizer.from_pretrained(TINY_LLAMA))}
QV = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def adapter_of(folder, arguments=QV, model_type="llama", **base):
    """(base, adapter) in fp32 with a tokenizer."""
    folder.mkdir(exist_ok=True)
    made = make(Flavour(model_type, arguments, base={**NUM_TOKENS, **base}), folder)
    with_tokenizer(made[0])
    return made


def another(base, folder, seed=7, size=0.05, **arguments):
    """A further adapter of a base."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{**QV, **arguments})
    wrapped = peft.get_peft_model(load(base, "causal-lm"), config)
    stir(wrapped, size)
    wrapped.save_pretrained(folder)
    return folder


def told(error):
    return " ".join(f"{p.where}: {p.got}; {p.expected}; {p.fix}" for p in error.value.problems)


@pytest.mark.parametrize("combine", ["sum", "ties", "dare"])
def test_several_adapters_of_an_fp32_base(combine, tmp_path):
    base, one = adapter_of(tmp_path / "a")
    two = another(base, tmp_path / "two")
    options = MergeOptions(combine=combine, weights=(1.0, -0.5))
    report = peftkit.merge_adapter([one, two], out=tmp_path / "out", options=options)
    assert report.passed
    assert (report.fidelity is not None) == (combine == "sum")


@pytest.mark.parametrize("name", ["head and embeddings whole", "embeddings", "ia3"])
def test_half_of_an_adapter_of_any_kind(name, tmp_path):
    flavour = replace(FLAVOURS[name], base={**(FLAVOURS[name].base or {}), **NUM_TOKENS})
    base, adapter = make(flavour, tmp_path)
    with_tokenizer(base)
    peftkit.merge_adapter(adapter, out=tmp_path / "half", options=MergeOptions(weights=(0.5,)))
    plain = load(base, "causal-lm").state_dict()
    whole = load_adapted(base, adapter, "causal-lm").merge_and_unload().state_dict()
    half = load(tmp_path / "half", "causal-lm").state_dict()
    for key, weight in half.items():
        assert torch.allclose(weight, plain[key] + (whole[key] - plain[key]) / 2, atol=1e-6), key


def test_falcon_in_4_bit_is_dequantized(tmp_path):
    base, _ = save_tiny(tmp_path, "falcon")
    plan = replace(base_plan(base), quant_type="nf4", double_quant=True, skip_4bit=("lm_head",))
    names = load_file(base / "model.safetensors")
    assert len(read_base_layout(str(base), plan, base, names).in_4bit) == 8, "four layers in each of two blocks"


def test_a_stretched_rope_goes_with_an_adapter_away_from_its_run(recipe, tmp_path):
    import shutil

    base = {"id": str(TINY_LLAMA), "rope_scaling": {"kind": "linear", "factor": 4}}
    peftkit.finetune({**recipe, "base": base, "diagnose": {"escalate": "off"}}, out=tmp_path / "run")
    shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "away")
    for path in ("run", "away"):
        peftkit.merge_adapter(tmp_path / path, out=tmp_path / f"m-{path}")
        config = json.loads((tmp_path / f"m-{path}" / "config.json").read_text())
        assert config["rope_parameters"]["factor"] == 4.0, path
    peftkit.finetune({**recipe, "diagnose": {"escalate": "off"}}, out=tmp_path / "plain")
    with pytest.raises(UserError) as error:
        peftkit.merge_adapter([tmp_path / "run", tmp_path / "plain"], out=tmp_path / "x")
    assert "configuration overrides" in told(error)


def test_4_bit_of_which_nothing_is_known_is_the_user_s_choice(tmp_path):
    from peftkit.rundir import write_sealed

    base, adapter = adapter_of(tmp_path / "a")
    write_sealed(adapter / "peftkit.json", {"base": {"id": str(base), "quantization": {"type": "nf4", "double": True}}})
    with pytest.raises(UserError) as error:
        peftkit.merge_adapter(adapter, out=tmp_path / "x")
    assert "--base original" in told(error)
    assert peftkit.merge_adapter(adapter, out=tmp_path / "x", options=MergeOptions(base="original")).passed


def test_numbers_that_are_not_finite_go_nowhere(tmp_path):
    base, good = adapter_of(tmp_path / "a")
    bad = another(base, tmp_path / "bad")
    tensors = load_file(bad / "adapter_model.safetensors")
    tensors[sorted(tensors)[-1]][0, 0] = float("nan")
    save_file(tensors, bad / "adapter_model.safetensors", {"format": "pt"})
    for work in (
        lambda: peftkit.merge_adapter(bad, out=tmp_path / "x"),
        lambda: peftkit.merge_adapter([good, bad], out=tmp_path / "x", options=MergeOptions(combine="dare")),
        lambda: peftkit.combine_adapters([good, bad], out=tmp_path / "x"),
        lambda: peftkit.export_adapter(bad, options=ExportOptions("adapter", str(tmp_path / "x"))),
        lambda: peftkit.export_adapter(bad, options=ExportOptions("adapter", str(tmp_path / "x"), engine="vllm")),
    ):
        with pytest.raises(UserError) as error:
            work()
        assert "NaN or infinity" in told(error)
    with pytest.raises(UserError) as error:
        options = MergeOptions(combine="ties", weights=(1e39, 1.0))
        peftkit.merge_adapter([good, good], out=tmp_path / "x", options=options)
    assert "not finite" in told(error) and not (tmp_path / "x").exists()


def test_a_resized_vocabulary_is_merged_alone(tmp_path):
    base, good = adapter_of(tmp_path / "a")
    model = load(base, "causal-lm")
    model.resize_token_embeddings(NUM_TOKENS["vocab_size"] + 3)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **QV))
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(tmp_path / "more", save_embedding_layers=True)
    for paths, options in (
        ([good, tmp_path / "more"], MergeOptions()),
        ([tmp_path / "more"], MergeOptions(weights=(0.5,))),
    ):
        with pytest.raises(UserError) as error:
            peftkit.merge_adapter(paths, out=tmp_path / "x", options=options)
        assert "resized in training" in told(error)


@pytest.mark.parametrize("how", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_bart_is_untied_everywhere_or_nowhere(how, tmp_path):
    flavour = Flavour("bart", {"r": 4, "target_modules": ["q_proj"], **how}, task="seq2seq")
    base, adapter = make(flavour, tmp_path)
    merge(base, adapter, tmp_path / "out", base_plan(base, task="seq2seq"))
    adapted, merged = load_adapted(base, adapter, "seq2seq"), load(tmp_path / "out", "seq2seq")
    asked = inputs(merged, "seq2seq")
    with torch.no_grad():
        assert torch.allclose(adapted(**asked).logits, merged(**asked).logits, atol=1e-4)


def test_experts_that_were_trained_whole_are_taken_apart(tmp_path):
    flavour = Flavour("qwen3_moe", {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["experts"]})
    base, adapter = make(flavour, tmp_path)
    merge(base, adapter, tmp_path / "out", base_plan(base))
    adapted, merged = load_adapted(base, adapter, "causal-lm"), load(tmp_path / "out", "causal-lm")
    asked = inputs(merged, "causal-lm")
    with torch.no_grad():
        assert torch.allclose(adapted(**asked).logits, merged(**asked).logits, atol=1e-4)


def test_requantizing_has_a_verdict_of_its_own(recipe, tmp_path):
    recipe = {**recipe, "method": {"name": "qlora", "rank": 4}, "diagnose": {"escalate": "off"}}
    peftkit.finetune(recipe, out=tmp_path / "run")  # six steps: nothing that 4 bits could hold
    options = MergeOptions(requantize=True)
    try:
        report = peftkit.merge_adapter(tmp_path / "run", out=tmp_path / "x", options=options)
    except peftkit.PeftkitError as error:
        assert "of what the adapter changes is lost" in str(error)
    else:
        assert report.fidelity.kl <= 0.5 * report.fidelity.effect and report.choices == ()
        assert "not the evaluated model" in dict(report.rows())["verdict"]


def test_adalora_becomes_plain_lora(tmp_path):
    arguments = {**FLAVOURS["adalora"].arguments}
    base, adapter = make(replace(FLAVOURS["adalora"], arguments=arguments, base=NUM_TOKENS), tmp_path)
    with_tokenizer(base)
    peftkit.combine_adapters([adapter], out=tmp_path / "plain")
    peftkit.export_adapter(adapter, options=ExportOptions("adapter", str(tmp_path / "vllm"), engine="vllm"))
    asked = inputs(load(base, "causal-lm"), "causal-lm")
    with torch.no_grad():
        expected = load_adapted(base, adapter, "causal-lm")(**asked).logits
        for name in ("plain", "vllm"):
            got = load_adapted(base, tmp_path / name, "causal-lm")(**asked).logits
            assert torch.allclose(expected, got, atol=1e-5), name


def test_an_adapter_less_itself_is_nothing(tmp_path):
    base, one = adapter_of(tmp_path / "a")
    found = peftkit.combine_adapters([one, one], out=tmp_path / "none", weights=[1, -1])
    assert found.made.rank == 8
    plain = load(base, "causal-lm").state_dict()
    nothing = load_adapted(base, tmp_path / "none", "causal-lm").merge_and_unload().state_dict()
    assert all(torch.allclose(plain[key], nothing[key], atol=1e-6) for key in plain)


def test_the_card_of_several_adapters_says_nothing_of_one(recipe, tmp_path):
    recipe = {**recipe, "diagnose": {"escalate": "off"}}
    for name in ("first", "second"):
        peftkit.finetune({**recipe, "seed": len(name)}, out=tmp_path / name)
    options = MergeOptions(weights=(1.0, 0.5))
    peftkit.merge_adapter([tmp_path / "first", tmp_path / "second"], out=tmp_path / "out", options=options)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "second x 0.5" in card.replace("\\", "") and "combined by" in card
    assert "evaluation loss, nats" not in card and "examples trained on" not in card
    report = (tmp_path / "out" / "merge_report.json").read_text()
    assert str(tmp_path) not in report and str(tmp_path) not in card


def test_places_that_cannot_be_written_to(tmp_path, monkeypatch):
    _, one = adapter_of(tmp_path / "a")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for out, said in (
        (".", "the current folder"),
        (tmp_path / "file" / "x", "inside a file"),
        (tmp_path / ("x" * 300), "a name of 300 bytes"),
        (tmp_path / "file", "a file"),
    ):
        for work in (
            lambda out=out: peftkit.merge_adapter(one, out=out),
            lambda out=out: peftkit.combine_adapters([one], out=out),
            lambda out=out: peftkit.export_adapter(one, options=ExportOptions("adapter", str(out))),
        ):
            with pytest.raises(UserError) as error:
                work()
            assert said in told(error)
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("link", "dangling"):
        assert peftkit.merge_adapter(one, out=tmp_path / name).passed
        assert (tmp_path / name / "config.json").is_file()


def test_two_merges_to_one_place(tmp_path):
    """The slower one is told so, and the faster one is not called a killed one's leftovers meanwhile."""
    _, one = adapter_of(tmp_path / "a")
    notices = []

    def second(event):
        if event["event"] == "progress" and not notices:
            notices.append("began")
            peftkit.merge_adapter(one, out=tmp_path / "out", observer=lambda e: notices.append(e.get("text", "")))

    with pytest.raises(UserError) as error:
        peftkit.merge_adapter(one, out=tmp_path / "out", observer=second)
    assert "another program" in told(error)
    assert not any("killed" in text for text in notices)
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (MergeOptions(dtype="q8_0"), "float32, bfloat16, float16"),
        (MergeOptions(density=0.1), "ties or dare"),
        (MergeOptions(seed=1, combine="ties"), "dare"),
        (MergeOptions(base="bf16"), "dequantized or original"),
    ],
)
def test_options_of_no_effect_are_refused(options, said, tmp_path):
    _, one = adapter_of(tmp_path / "a")
    with pytest.raises(UserError) as error:
        peftkit.merge_adapter(one, out=tmp_path / "x", options=options)
    assert said in told(error)


@pytest.mark.parametrize(
    "change",
    [
        {"task_type": "X"},
        {"bias": "weird"},
        {"target_modules": "((("},
        {"rank_pattern": {"(((": 2}},
        {"layers_pattern": "x"},
        {"megatron_config": {"a": 1}},
    ],
)
def test_damaged_configurations_are_refused(change, tmp_path):
    _, one = adapter_of(tmp_path / "a")
    file = one / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError):
        peftkit.merge_adapter(one, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_weights_on_the_command_line(tmp_path):
    command = [sys.executable, "-m", "peftkit", "merge", "a*x", "--out", str(tmp_path / "x")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 2 and "the weight 'x' of a" in done.stderr


def test_a_sum_with_experts_is_the_sum(tmp_path):
    _, one = adapter_of(
        tmp_path / "a", {"r": 2, "target_modules": ["q_proj"], "target_parameters": EXPERTS}, "qwen3_moe"
    )
    report = peftkit.merge_adapter([one, one], out=tmp_path / "two", options=MergeOptions(weights=(0.5, 0.5)))
    assert report.passed
    peftkit.merge_adapter(one, out=tmp_path / "one")
    first, second = (load(tmp_path / name, "causal-lm").state_dict() for name in ("one", "two"))
    assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)
