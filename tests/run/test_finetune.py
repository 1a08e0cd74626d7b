"""End to end on the tiny pretrained model: real libraries, real training."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import peftkit
from peftkit.errors import UserError
from peftkit.rundir import RunDir, verify_folder
from tests.conftest import TINY_LLAMA, chat, write_jsonl

METHODS = {
    "full": {"name": "full"},
    "lora": {"name": "lora", "rank": 4, "dropout": 0.1},
    "lora+": {"name": "lora", "rank": 4, "lr_ratio": 4.0},
    "dora": {"name": "lora", "rank": 4, "dora": True},
    "pissa": {"name": "lora", "rank": 4, "init": "pissa"},
    "eva": {"name": "lora", "rank": 2, "init": "eva"},
    "qlora": {"name": "qlora", "rank": 4},
    "prefix": {"name": "prefix", "virtual_tokens": 4},
    "ia3": {"name": "ia3"},
    "prompt": {"name": "prompt", "virtual_tokens": 4},
    "vera": {"name": "vera", "rank": 16},
    "oft": {"name": "oft", "block_size": 4},
    "adalora": {"name": "adalora", "initial_rank": 4, "rank": 2},
    "ln": {"name": "ln"},
}


@pytest.mark.parametrize("case", METHODS)
def test_every_method_trains_and_its_result_loads_in_plain_libraries(case, recipe, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    recipe = {**recipe, "method": METHODS[case], "evaluate": {"metric": "exact_match", "max_new_tokens": 4}}
    recipe["train"] = {**recipe["train"], "max_steps": 12, "eval_steps": 6}
    if case in {"prefix", "ia3", "prompt", "vera", "adalora", "ln", "oft"}:
        recipe["train"]["learning_rate"] = 3e-2
    summary = peftkit.finetune(recipe, out=tmp_path / "run")
    assert summary.eval_loss_after < summary.eval_loss_before
    assert summary.num_steps == 12
    run = RunDir(tmp_path / "run")
    [planned] = [e for e in run.events() if e["event"] == "parameters"]
    assert planned["num_planned"] == planned["num_trainable"] == summary.num_trainable
    assert sum(planned["by_role"].values()) == summary.num_trainable
    assert verify_folder(summary.result) == []
    [memory] = [e for e in run.events() if e["event"] == "memory"]
    assert memory["measured_bytes"] == pytest.approx(memory["predicted_bytes"], rel=0.015)
    assert memory["process_bytes"] > 0
    if case == "full":
        model = AutoModelForCausalLM.from_pretrained(summary.result, dtype=torch.float32)
    else:
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32), summary.result
        )
    assert torch.isfinite(model(input_ids=torch.tensor([[5, 6, 7]])).logits).all()


@pytest.mark.parametrize("level", [True, "selective"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_preflight_recomputes_as_training_does(level, method, recipe, tmp_path):
    recipe["method"] = {"name": method}
    recipe["train"] = {**recipe["train"], "max_steps": 2, "gradient_checkpointing": level}
    peftkit.finetune(recipe, out=tmp_path / "run")
    [memory] = [e for e in RunDir(tmp_path / "run").events() if e["event"] == "memory"]
    assert memory["measured_bytes"] == pytest.approx(memory["predicted_bytes"], rel=0.02)


def test_run_directory_holds_what_the_design_promises(recipe, tmp_path):
    recipe["evaluate"] = {"metric": "exact_match", "max_new_tokens": 4}
    summary = peftkit.finetune(recipe, out=tmp_path / "run")
    run = RunDir(tmp_path / "run")
    names = {path.name for path in run.path.iterdir()}
    assert names - {"next-recipe.yaml"} == {
        "recipe.yaml",
        "resolved.yaml",
        "plan.json",
        "data.json",
        "environment.json",
        "run.lock",
        "events.jsonl",
        "checkpoints",
        "adapter",
    }
    kinds = [event["event"] for event in run.events()]
    assert kinds.count("step") == 6
    assert kinds.count("metric") == 2
    assert kinds[-1] == "done"
    assert [e["step"] for e in run.events() if e["event"] == "eval"] == [0, 3, 6]
    assert summary.metric_before is not None
    assert summary.peak_bytes["peak_resident_bytes"] > 100_000_000
    assert not [p for p in run.path.rglob("*") if p.suffix in {".bin", ".pt", ".pth", ".pkl"}]
    assert json.loads((run.path / "plan.json").read_text())["method"]["name"] == "lora"
    again = peftkit.finetune(run.path / "resolved.yaml", out=tmp_path / "again")
    assert same_weights(summary.result, again.result), "the resolved recipe reproduces the run"


def same_weights(one, other):
    return (one / "adapter_model.safetensors").read_bytes() == (other / "adapter_model.safetensors").read_bytes()


def test_same_seed_same_bytes_other_seed_other_bytes(recipe, tmp_path):
    runs = [peftkit.finetune({**recipe, "seed": seed}, out=tmp_path / f"{i}") for i, seed in enumerate((1, 1, 2))]
    assert same_weights(runs[0].result, runs[1].result)
    assert not same_weights(runs[0].result, runs[2].result)


def test_accumulation_does_not_change_the_gradient(recipe, tmp_path):
    """All 18 rows in three passes or in 18: the same loss and nearly the same weights, whatever the order."""
    ends = []
    for micro in (6, 1):
        recipe["train"].update(batch_size=18, micro_batch=micro)
        ends.append(load_file(peftkit.finetune(recipe, out=tmp_path / str(micro)).result / "adapter_model.safetensors"))
    for name, tensor in ends[0].items():
        assert torch.allclose(tensor, ends[1][name], atol=2e-4), name


def test_best_checkpoint_is_published_and_early_stopping_stops(recipe, tmp_path):
    recipe["train"].update(max_steps=40, eval_steps=2, learning_rate=0.3, early_stopping={"patience": 2})
    summary = peftkit.finetune(recipe, out=tmp_path / "run")
    events = RunDir(tmp_path / "run").events()
    assert [e for e in events if e["event"] == "early_stop"]
    assert summary.num_steps < 40
    evals = {e["step"]: e["loss"] for e in events if e["event"] == "eval" and e["step"]}
    done = events[-1]
    assert done["published_step"] == min(evals, key=evals.get)
    best = load_file(RunDir(tmp_path / "run").checkpoint(done["published_step"]) / "trained.safetensors")
    published = load_file(summary.result / "adapter_model.safetensors")
    assert all(torch.equal(published[name.replace(".default", "")], tensor) for name, tensor in best.items())


def test_prompt_completion_instruction_and_text_train(recipe, tmp_path):
    rows = {
        "prompt-completion": [{"prompt": f"{i} plus 1 is ", "completion": str(i + 1)} for i in range(8)],
        "instruction": [{"instruction": f"add 1 to {i}", "output": str(i + 1)} for i in range(8)],
        "text": [{"text": f"import os\nx = {i}"} for i in range(8)],
    }
    for name, data in rows.items():
        recipe["data"] = {"train": str(write_jsonl(tmp_path / f"{name}.jsonl", data)), "eval": None}
        recipe["train"].update(max_steps=2, eval_steps="auto")
        summary = peftkit.finetune(recipe, out=tmp_path / name)
        assert summary.loss_last > 0
        assert json.loads((summary.path / "plan.json").read_text())["data"]["format"] == name


def test_one_row_trains_without_evaluation(recipe, tmp_path):
    recipe["data"]["train"] = str(write_jsonl(tmp_path / "one.jsonl", [chat("a", "b")]))
    summary = peftkit.finetune(recipe, out=tmp_path / "run")
    assert summary.eval_loss_after is None
    assert summary.num_steps == 6


def test_a_gguf_file_is_a_base(recipe, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    from tests.rigs.tiny_gguf import write_gguf

    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "cache"))
    model = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32)
    recipe["base"] = str(write_gguf(tmp_path / "tiny.gguf", model, "llama", TINY_LLAMA / "tokenizer.json"))
    assert peftkit.make_plan(recipe).method.num_trainable > 0
    assert not (tmp_path / "cache" / "bases").exists()  # planned from the header alone
    summary = peftkit.finetune(recipe, out=tmp_path / "run")
    assert summary.eval_loss_after < summary.eval_loss_before
    assert len(peftkit.generate(summary.path, ["Say alpha number 0"], max_new_tokens=3)) == 1


def test_a_gguf_header_that_tells_too_little_is_converted_to_plan(recipe, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    from peftkit.prepare import facts
    from tests.rigs.tiny_gguf import write_gguf

    monkeypatch.setenv("PEFTKIT_CACHE", str(tmp_path / "cache"))
    model = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32)
    recipe["base"] = str(write_gguf(tmp_path / "tiny.gguf", model, "llama", TINY_LLAMA / "tokenizer.json"))
    whole = peftkit.make_plan(recipe).method.num_trainable
    full = facts.read_header_config

    def lacking(path, where):
        return {key: value for key, value in full(path, where).items() if key != "hidden_size"}

    monkeypatch.setattr(facts, "read_header_config", lacking)
    assert peftkit.make_plan(recipe).method.num_trainable == whole
    assert (tmp_path / "cache").exists()


def test_diverged_training_publishes_nothing(recipe, tmp_path):
    recipe["train"].update(learning_rate=1e30, max_grad_norm=1e30)
    recipe["data"]["eval"] = None
    recipe["train"]["eval_steps"] = "auto"
    with pytest.raises(UserError, match="after 3 rollbacks"):
        peftkit.finetune(recipe, out=tmp_path / "run")
    losses = [e["loss"] for e in RunDir(tmp_path / "run").events() if e["event"] == "step"]
    assert not all(math.isfinite(loss) for loss in losses), "a NaN is told as NaN"
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_split_of_a_file_is_refused(recipe, tmp_path):
    recipe["data"]["eval"] = "test"
    with pytest.raises(UserError, match="only hub datasets have splits"):
        peftkit.finetune(recipe, out=tmp_path / "run")


def test_generate_answers_from_a_run(recipe, tmp_path):
    summary = peftkit.finetune(recipe, out=tmp_path / "run")
    answers = peftkit.generate(summary.path, ["Say alpha number 0", "Say beta number 1"], max_new_tokens=5)
    assert len(answers) == 2
    assert all(isinstance(answer, str) for answer in answers)


def test_the_system_prompt_of_the_recipe_is_asked_with(recipe, tmp_path, monkeypatch):
    from peftkit.results import generate as generation

    recipe["data"]["chat"] = {"system": "Answer with one word."}
    summary = peftkit.finetune(recipe, out=tmp_path / "run")
    asked = []
    real = generation.generate_answers

    def watched(model, tokenizer, prompts, **rest):
        asked.extend(prompts)
        return real(model, tokenizer, prompts, **rest)

    monkeypatch.setattr(generation, "generate_answers", watched)
    peftkit.generate(summary.path, ["Say alpha number 0"], max_new_tokens=2)
    assert "Answer with one word." in asked[0]
    again = peftkit.evaluate_run(summary.path, data=recipe["data"]["train"])
    assert again.num_rows == 24


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base": "/nowhere"}, "does not exist"),
        ({"data": {"train": "/nowhere.jsonl"}}, "does not exist"),
        ({"train": {"max_length": 4}}, "all 18 rows are longer"),
        ({"method": {"name": "lora", "targets": ["q_prj"]}}, "nearest: q_proj"),
    ],
)
def test_what_cannot_start_leaves_no_run_behind(recipe, tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        peftkit.finetune({**recipe, **change}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_summary_shows_itself_in_a_notebook(recipe, tmp_path):
    summary = peftkit.finetune(recipe, out=tmp_path / "run")
    assert "trainable parameters" in summary._repr_html_()
    assert peftkit.summarize_run(summary.path) == summary


def test_single_token_rows_of_a_tied_table_train(recipe, tmp_path):
    recipe["method"] = {"name": "lora", "rank": 4, "also_train": [{"tokens": ["<|user|>", "<|assistant|>"]}]}
    recipe["train"].update(micro_batch=1)
    summary = peftkit.finetune(recipe, out=tmp_path / "run")
    assert summary.trainable_by_role["tokens"] > 0
