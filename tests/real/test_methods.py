"""Methods on the small or odd data that people bring."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

import peftkit
from peftkit.errors import UserError
from peftkit.evaluate.step import summed_loss
from tests.conftest import TINY_LLAMA
from tests.real.test_data import recipe_of_lengths


def test_eva_on_fewer_rows_than_rank_ends_and_says_nothing_of_its_own(tmp_path, capfd):
    recipe = recipe_of_lengths(tmp_path, [9, 10], batch_size=2, epochs=1)
    recipe["method"] = {"name": "lora", "rank": 12, "init": "eva"}
    assert peftkit.finetune(recipe, out=tmp_path / "run").num_steps == 1
    assert "skipping SVD" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("rank", "lengths", "said"),
    [(16, [2, 2], "eva at rank 16 with at most"), (80, [40] * 8, "eva at rank 80 for a layer with 128 inputs")],
)
def test_eva_that_cannot_start_is_a_conflict_of_the_plan(rank, lengths, said, tmp_path):
    recipe = recipe_of_lengths(tmp_path, lengths, batch_size=2, epochs=1)
    recipe["method"] = {"name": "lora", "rank": rank, "init": "eva"}
    with pytest.raises(UserError, match=said):
        peftkit.finetune(recipe, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        (["train.learning_rate=0.5"], {"warning.learning_rate"}),
        (["train.learning_rate=1e-9"], {"warning.learning_rate"}),
        (["method.rank=4096"], {"warning.rank"}),
        (["train.learning_rate=0.002", "method.rank=64"], set()),
        ([], set()),
    ],
    ids=str,
)
def test_values_that_nobody_would_choose_are_warned_of(overrides, warned, tmp_path):
    recipe = recipe_of_lengths(tmp_path, [9, 10], batch_size=2, epochs=1)
    decisions = peftkit.make_plan(recipe, overrides).decisions
    assert {decision.key for decision in decisions if decision.key.startswith("warning.")} == warned


def test_a_length_far_beyond_the_model_s_is_no_case_for_yarn(tmp_path):
    recipe = recipe_of_lengths(tmp_path, [9, 10], batch_size=2, epochs=1)
    with pytest.raises(UserError) as caught:
        peftkit.make_plan(recipe, ["train.max_length=100000"])
    assert "yarn" not in str(caught.value)
    with pytest.raises(UserError, match="kind: yarn, factor: 2"):
        peftkit.make_plan(recipe, ["train.max_length=1000"])


SCHEDULES = {
    "warm-up in steps": ({"kind": "cosine", "warmup_steps": 4}, "cosine", 4, {}),
    "a floor": ({"kind": "cosine", "min_rate": 0.1, "warmup_steps": 2}, "cosine_with_min_lr", 2, {"min_lr_rate": 0.1}),
    "restarts": ({"kind": "restarts", "cycles": 3, "warmup_steps": 2}, "cosine_with_restarts", 2, {"num_cycles": 3}),
    "wsd": (
        {"kind": "wsd", "decay": 0.25, "min_rate": 0.2, "warmup_steps": 2},
        "warmup_stable_decay",
        2,
        {"num_decay_steps": 5, "min_lr_ratio": 0.2},
    ),
    "constant": ({"kind": "constant", "warmup": 0.1}, "constant_with_warmup", 2, {}),
    "no warm-up": ({"kind": "linear", "warmup_steps": 0}, "linear", 0, {}),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rates_of_a_run_are_those_of_transformers_schedule(name, tmp_path):
    settings, theirs, num_warmup, arguments = SCHEDULES[name]
    recipe = recipe_of_lengths(tmp_path, range(5, 9), batch_size=4)
    recipe["train"] |= {"max_steps": 20, "learning_rate": 1e-3, "schedule": settings}
    recipe["train"].pop("epochs", None)
    rates = []

    def note(event):
        if event["event"] == "step":
            rates.append(event["learning_rate"])

    peftkit.finetune(recipe, out=tmp_path / "run", observer=note)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = transformers.get_scheduler(
        theirs,
        optimizer,
        num_warmup_steps=num_warmup,
        num_training_steps=20,
        scheduler_specific_kwargs=arguments or None,
    )
    expected = []
    for _ in range(20):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "linear", "cycles": 3}, "cycles with linear"),
        ({"kind": "cosine", "decay": 0.2}, "decay with cosine"),
        ({"kind": "constant", "min_rate": 0.1}, "min_rate with constant"),
        ({"warmup": 0.1, "warmup_steps": 3}, "warmup and warmup_steps"),
        ({"warmup_steps": 20}, "20 of 20 steps"),
        ({"kind": "wsd", "warmup_steps": 16, "decay": 0.5}, r"16 steps of warm-up and 10 of decay[\s\S]*at most 0.2"),
        ({"kind": "restarts", "cycles": 30}, r"30 in 19 steps[\s\S]*at most 9"),
    ],
    ids=str,
)
def test_settings_that_a_schedule_does_not_have_are_refused(settings, said, tmp_path):
    recipe = recipe_of_lengths(tmp_path, range(5, 9), batch_size=4)
    recipe["train"] |= {"max_steps": 20, "schedule": settings}
    with pytest.raises(UserError, match=said):
        peftkit.make_plan(recipe)


def test_neftune_is_noise_on_the_embeddings_of_training_alone(tmp_path):
    recipe = recipe_of_lengths(tmp_path, range(5, 13), batch_size=8)
    recipe["data"]["eval"] = recipe["data"]["train"]
    recipe["data"]["waive"] = ["near-leakage", "leakage", "near-duplicates"]
    losses = {}
    for alpha in (None, 1e-6, 5.0, 50.0):
        recipe["train"] = {"max_steps": 1, "batch_size": 8, "neftune": alpha, "learning_rate": 1e-12}
        run = peftkit.finetune(recipe, out=tmp_path / f"run{alpha}")
        losses[alpha] = (run.loss_last, run.eval_loss_before, run.eval_loss_after)
    quiet = losses[None]
    assert losses[1e-6] == pytest.approx(quiet, rel=1e-5)
    for alpha in (5.0, 50.0):
        assert losses[alpha][1:] == pytest.approx(quiet[1:], rel=1e-6), "not in evaluations"
    assert abs(losses[50.0][0] - quiet[0]) > abs(losses[5.0][0] - quiet[0]) > 1e-3
    recipe["method"] = {"name": "prefix", "virtual_tokens": 2}
    with pytest.raises(UserError, match="5 with prefix"):
        peftkit.make_plan(recipe, {"train.neftune": 5})


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_label_smoothing_is_the_papers_and_of_training_alone(precision, tmp_path):
    recipe = recipe_of_lengths(tmp_path, range(5, 13), batch_size=8)
    recipe["data"]["eval"] = recipe["data"]["train"]
    recipe["data"]["waive"] = ["near-leakage", "leakage", "near-duplicates"]
    losses, runs = {}, {}
    for smoothing in (0.0, 0.1, 0.5):
        recipe["train"] = {"max_steps": 1, "batch_size": 8, "learning_rate": 1e-12, "precision": precision}
        run = peftkit.finetune(recipe, {"train.label_smoothing": smoothing}, out=tmp_path / f"run{smoothing}")
        losses[smoothing] = run.loss_last
        runs[smoothing] = run
    # (1 - e) loss + e mean over the vocabulary of -log p: linear in e
    assert losses[0.1] > losses[0.0]
    assert losses[0.5] - losses[0.0] == pytest.approx(5 * (losses[0.1] - losses[0.0]), rel=1e-3)
    assert runs[0.5].eval_loss_before == pytest.approx(runs[0.0].eval_loss_before, rel=1e-6), "not in evaluations"
    for run in (runs[0.1], runs[0.5]):
        memory = [json.loads(line) for line in (run.result.parent / "events.jsonl").read_text().splitlines()]
        [told] = [event for event in memory if event["event"] == "memory"]
        assert told["measured_bytes"] == pytest.approx(told["predicted_bytes"], rel=0.02)
    with pytest.raises(UserError, match="does not pack"):
        peftkit.make_plan(recipe, {"train.label_smoothing": 0.1, "train.packing": True})


def test_a_smoothed_loss_does_not_hide_what_is_known_by_heart(tmp_path):
    """The smoothed training loss has a floor above the held-out loss: overfitting would never be named."""
    recipe = recipe_of_lengths(tmp_path, range(5, 25), batch_size=8)
    recipe["data"]["eval"] = recipe["data"]["train"]
    recipe["data"]["waive"] = ["near-leakage", "leakage", "near-duplicates"]
    recipe["train"] = {"max_steps": 12, "batch_size": 8, "learning_rate": 1e-2, "label_smoothing": 0.5}
    run = peftkit.finetune(recipe, out=tmp_path / "run")
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    judged = next(event for event in events if event["event"] == "verdict")["numbers"]["train_loss"]
    [*_, at_the_look] = [event["loss"] for event in events if event["event"] == "eval"]
    assert judged == pytest.approx(at_the_look, rel=1e-4), "the same rows, the plain loss"
    assert run.loss_last > judged + 1


def test_a_smoothed_loss_is_that_of_transformers():
    from transformers.trainer_pt_utils import LabelSmoother

    logits, labels = torch.randn(2, 6, 11), torch.randint(0, 11, (2, 6))
    labels[0, :3] = -100
    ours = summed_loss(logits, labels, "causal-lm", smoothing=0.2) / (labels[:, 1:] != -100).sum()
    theirs = LabelSmoother(epsilon=0.2)({"logits": logits}, labels, shift_labels=True)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_layers_ranks_and_parts_are_those_that_the_recipe_names(tmp_path):
    recipe = recipe_of_lengths(tmp_path, range(5, 13), batch_size=4)
    recipe["method"] = {
        "name": "lora",
        "rank": 4,
        "layers": "last 2",
        "exclude": ["k", {"match": r".*\.3\.mlp\..*"}],
        "rank_pattern": {"down": 8},
        "alpha_pattern": {"q": 3.0},
        "also_train": ["3.mlp.down_proj"],
    }
    recipe["train"] = {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-2}
    run = peftkit.finetune(recipe, out=tmp_path / "run")
    tensors = load_file(Path(run.result) / "adapter_model.safetensors")
    ranks = {
        name.split(".layers.")[1].split(".lora_A")[0]: t.shape[0] for name, t in tensors.items() if "lora_A" in name
    }
    attention = {f"{layer}.self_attn.{name}_proj": 4 for layer in (2, 3) for name in "qvo"}
    assert ranks == {**attention, "2.mlp.gate_proj": 4, "2.mlp.up_proj": 4, "2.mlp.down_proj": 8}
    assert sum(t.numel() for t in tensors.values()) == run.num_trainable
    base = transformers.AutoModelForCausalLM.from_pretrained(TINY_LLAMA)
    modules = dict(PeftModel.from_pretrained(base, run.result).named_modules())
    scales = {name: module.scaling["default"] for name, module in modules.items() if hasattr(module, "lora_A")}
    assert {scale for name, scale in scales.items() if "q_proj" in name} == {3.0 / 4}
    assert {scale for name, scale in scales.items() if "q_proj" not in name} == {2.0}, "alpha is 2 x the module's rank"
    assert peftkit.merge_adapter(run.path, out=str(tmp_path / "merged")).passed
