"""Encoder-decoders and classifiers, end to end on tiny models with real tokenizers."""

import json

import pytest
import torch

import peftkit
from peftkit.errors import UserError
from peftkit.rundir import RunDir
from tests.conftest import TINY_LLAMA, write_jsonl
from tests.rigs.tiny import tiny_model

WORDS = ("alpha", "beta", "gamma", "delta")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Tiny bases of other shapes, with the tiny Llama's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
    size = {"vocab_size": len(tokenizer)}
    found = {}
    for model_type, task in (("t5", "seq2seq"), ("bart", "seq2seq"), ("bert", "classification")):
        folder = tmp_path_factory.mktemp(model_type)
        torch.manual_seed(0)
        ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        tiny_model(model_type, task, **size, **ids).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found[model_type] = folder
    return found


def recipe_for(base, data, method, **train):
    settings = {"max_steps": 30, "batch_size": 8, "micro_batch": 8, "max_length": 64, "eval_steps": 15}
    return {"base": str(base), "method": method, "data": data, "train": {**settings, "learning_rate": 1e-2, **train}}


def classified(tmp_path, num=48):
    rows = [{"text": f"please say {WORDS[i % 4]} for {i}", "label": WORDS[i % 4]} for i in range(num)]
    return {"train": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "eval": "25%"}


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "ia3", "prefix"])
def test_a_classifier_learns_its_labels_from_the_data(method, bases, tmp_path):
    recipe = recipe_for(bases["bert"], classified(tmp_path), method, max_steps=40)
    if method in {"full", "qlora", "lora"}:
        recipe["train"].update(learning_rate=5e-3, max_steps=60)
    summary = peftkit.finetune(recipe, out=tmp_path / "run")
    assert summary.metric == "accuracy"
    assert summary.eval_loss_after < summary.eval_loss_before
    if method in {"full", "lora", "qlora"}:
        assert summary.metric_after > 0.9
    [counted] = [e for e in RunDir(summary.path).events() if e["event"] == "parameters"]
    assert counted["num_planned"] == counted["num_trainable"]
    [after] = [e for e in RunDir(summary.path).events() if e["event"] == "metric" and e["when"] == "after"]
    assert set(after["scores"]) == {"accuracy", "macro_f1"}
    config = json.loads((summary.path / "plan.json").read_text())["base"]
    assert config["labels"] == sorted(WORDS)
    [answer] = peftkit.generate(summary.path, ["please say gamma for 7"])
    assert answer in WORDS


def test_a_decoder_can_classify_too(tmp_path):
    recipe = recipe_for(TINY_LLAMA, classified(tmp_path), "lora", learning_rate=3e-3)
    summary = peftkit.finetune(recipe, out=tmp_path / "run")
    assert summary.metric_after > 0.9
    assert json.loads((summary.path / "plan.json").read_text())["base"]["task"] == "classification"


def test_an_adapted_classifier_loads_in_plain_peft(bases, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    summary = peftkit.finetune(recipe_for(bases["bert"], classified(tmp_path), "lora"), out=tmp_path / "run")
    base = AutoModelForSequenceClassification.from_pretrained(
        bases["bert"], id2label=dict(enumerate(sorted(WORDS))), ignore_mismatched_sizes=True
    )
    model = PeftModel.from_pretrained(base, summary.result).eval()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(summary.result)
    texts = [f"please say {word} for 5" for word in WORDS]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    found = model(**inputs).logits.argmax(-1).tolist()
    assert [sorted(WORDS)[i] for i in found] == peftkit.generate(summary.path, texts)


def test_tags_are_learnt_at_the_first_token_of_a_word(bases, tmp_path):
    rows = [
        {"tokens": ["say", WORDS[i % 4], f"now{i}"], "tags": ["O", "B-WORD" if i % 4 < 2 else "B-NAME", "O"]}
        for i in range(48)
    ]
    data = {"train": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "eval": "25%"}
    summary = peftkit.finetune(
        recipe_for(bases["bert"], data, "lora", learning_rate=3e-3, max_steps=90), out=tmp_path / "run"
    )
    assert summary.metric == "entity_f1"
    assert summary.metric_after > summary.metric_before
    [answer] = peftkit.generate(summary.path, ["say alpha now"])
    assert [pair.split("/")[0] for pair in answer.split()] == ["say", "alpha", "now"]


@pytest.mark.parametrize("model_type", ["t5", "bart"])
@pytest.mark.parametrize("method", ["lora", *(pytest.param(m, marks=pytest.mark.slow) for m in ("prompt", "full"))])
def test_an_encoder_decoder_learns_to_write_targets(model_type, method, bases, tmp_path):
    rows = [{"prompt": f"say {WORDS[i % 4]} {i}", "completion": WORDS[i % 4]} for i in range(48)]
    data = {"train": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "eval": "25%"}
    recipe = recipe_for(bases[model_type], data, method)
    recipe["evaluate"] = {"metric": "exact_match", "max_new_tokens": 6}
    if method == "full":
        recipe["train"].update(max_steps=100, learning_rate=1e-3)
    summary = peftkit.finetune(recipe, out=tmp_path / "run")
    assert summary.eval_loss_after < summary.eval_loss_before
    if method == "full":
        assert summary.metric_after > 0.8
    assert json.loads((summary.path / "plan.json").read_text())["base"]["task"] == "seq2seq"
    assert len(peftkit.generate(summary.path, ["say beta 3"], max_new_tokens=5)) == 1


def test_data_without_labels_is_refused_for_an_encoder(bases, chats, tmp_path):
    recipe = recipe_for(bases["bert"], {"train": str(chats)}, "lora")
    with pytest.raises(UserError, match="trained for classification"):
        peftkit.finetune(recipe, out=tmp_path / "run")


def test_a_run_can_be_measured_again(bases, tmp_path):
    summary = peftkit.finetune(recipe_for(bases["bert"], classified(tmp_path), "lora"), out=tmp_path / "run")
    found = peftkit.evaluate_run(summary.path)
    assert found.loss == pytest.approx(summary.eval_loss_after, abs=1e-4)
    assert found.scores["accuracy"] == summary.metric_after


def test_loss_by_position_is_told(recipe, tmp_path):
    summary = peftkit.finetune(recipe, out=tmp_path / "run")
    found = peftkit.evaluate_run(summary.path, data=recipe["data"]["train"], contexts=[32, 64])
    assert [context.length for context in found.contexts] == [32, 64]
    assert all(context.num_windows >= 1 for context in found.contexts)
    assert found.context_rows()[0][:3] == ("context", "windows", "loss")
    elsewhere = peftkit.evaluate_run(summary.result, data=recipe["data"]["train"], contexts=[32])
    assert elsewhere.contexts[0].loss == pytest.approx(found.contexts[0].loss)
    with pytest.raises(UserError, match="pass longer data"):
        peftkit.evaluate_run(summary.path, data=recipe["data"]["train"], contexts=[10**6])


@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_stopped_and_resumed_equals_uninterrupted(model_type, bases, tmp_path):
    from peftkit.errors import Interrupted
    from tests.run.test_resume import stopping_at, weights

    if model_type == "bert":
        data = classified(tmp_path)
    else:
        rows = [{"prompt": f"say {WORDS[i % 4]} {i}", "completion": WORDS[i % 4]} for i in range(48)]
        data = {"train": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "eval": "25%"}
    method = {"name": "lora", "rank": 4, "dropout": 0.2}
    recipe = recipe_for(bases[model_type], data, method, max_steps=12, eval_steps=4, micro_batch=4)
    whole = peftkit.finetune(recipe, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        peftkit.finetune(recipe, out=tmp_path / "cut", observer=stopping_at(7))
    assert weights(peftkit.resume_run(tmp_path / "cut")) == weights(whole)


def test_micro_batches_do_not_change_what_a_tagger_learns(bases, tmp_path):
    """The mean over all tags of a step, whose rows have one to twelve, however it is cut."""
    from safetensors.torch import load_file

    rows = [
        {"tokens": [f"say{i}", WORDS[i % 4]] * (1 + i % 6), "tags": ["O", f"B-{i % 2}"] * (1 + i % 6)}
        for i in range(32)
    ]
    data = {"train": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "eval": None}
    ends = []
    for micro in (32, 2):
        recipe = recipe_for(bases["bert"], data, "lora", max_steps=2, micro_batch=micro, learning_rate=1e-3)
        recipe["train"] |= {"eval_steps": "auto", "batch_size": 32}
        summary = peftkit.finetune(recipe, out=tmp_path / str(micro))
        [first, *_] = [e for e in RunDir(summary.path).events() if e["event"] == "step"]
        ends.append((first, load_file(summary.result / "adapter_model.safetensors")))
    (whole, weights), (cut, same_weights) = ends
    assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    assert cut["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)
    assert all(torch.allclose(tensor, same_weights[name], atol=2e-4) for name, tensor in weights.items())


def test_micro_batches_do_not_change_what_an_encoder_decoder_learns(bases, tmp_path):
    """The mean over all target tokens of a step, which takes all rows, however it is cut."""
    from safetensors.torch import load_file

    words = ["alpha", "beta beta", "gamma gamma gamma", "delta delta delta delta"]
    rows = [{"prompt": f"say {WORDS[i % 4]} {i}", "completion": words[i % 4]} for i in range(32)]
    data = {"train": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "eval": None}
    ends = []
    for micro in (8, 2):
        recipe = recipe_for(bases["t5"], data, "lora", max_steps=4, micro_batch=micro, learning_rate=1e-3)
        recipe["train"] |= {"eval_steps": "auto", "batch_size": 32}
        summary = peftkit.finetune(recipe, out=tmp_path / str(micro))
        ends.append(load_file(summary.result / "adapter_model.safetensors"))
    for name, tensor in ends[0].items():
        assert torch.allclose(tensor, ends[1][name], atol=2e-4), name


def test_a_head_for_other_classes_starts_afresh_and_says_so(bases, tmp_path):
    told = []
    peftkit.finetune(
        recipe_for(bases["bert"], classified(tmp_path), "lora", max_steps=2), out=tmp_path / "run", observer=told.append
    )
    [warning] = [e["text"] for e in told if e["event"] == "warning" and "a head of" in e["text"]]
    assert "a head of 3 outputs" in warning
    assert "the data has 4: the head is newly initialised" in warning


def test_a_word_that_the_tokenizer_drops_does_not_shift_the_tags():
    from peftkit.results.generate import tagged_text

    class Words:
        def __call__(self, words, is_split_into_words):
            return self

        def word_ids(self, row):
            return [None, 0, 2, 2, None]

    assert tagged_text(Words(), ["say", "\u200b", "now"], ["O", "B"]) == "say/O \u200b/? now/B"


def test_classes_that_only_held_out_rows_have_are_told(bases, tmp_path):
    data = classified(tmp_path)
    data["eval"] = str(write_jsonl(tmp_path / "held.jsonl", [{"text": "say zeta", "label": "zeta"}]))
    told = []
    peftkit.finetune(recipe_for(bases["bert"], data, "lora", max_steps=2), out=tmp_path / "run", observer=told.append)
    assert any(
        "held-out rows of classes that are not in the training data: zeta" in e["text"]
        for e in told
        if e["event"] == "warning"
    )


def test_measuring_on_other_data_is_refused(bases, tmp_path):
    summary = peftkit.finetune(
        recipe_for(bases["bert"], classified(tmp_path), "lora", max_steps=2), out=tmp_path / "run"
    )
    odd = write_jsonl(tmp_path / "odd.jsonl", [{"text": "a", "label": "zeta"}])
    with pytest.raises(UserError, match="classes that were not trained: zeta"):
        peftkit.evaluate_run(summary.path, data=odd)
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match="text data for a result of classification"):
        peftkit.evaluate_run(summary.path, data=text)
    with pytest.raises(UserError, match="at most 128, the learned positions of the model"):
        peftkit.generate(summary.path, ["say alpha " * 200])
    with pytest.raises(UserError, match="classes are not drawn"):
        peftkit.generate(summary.path, "a", temperature=1.0)
    import shutil

    shutil.copytree(summary.result, tmp_path / "elsewhere")
    with pytest.raises(UserError, match="knows the names of the classes"):
        peftkit.generate(tmp_path / "elsewhere", ["say"])
    (tmp_path / "elsewhere" / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        peftkit.evaluate_run(tmp_path / "elsewhere")


def test_an_adapter_away_from_its_run_answers_as_in_it(recipe, tmp_path):
    import shutil

    summary = peftkit.finetune(recipe, out=tmp_path / "run")
    shutil.copytree(summary.result, tmp_path / "elsewhere")
    prompts = ["Say alpha number 0", "Say beta number 1"]
    here = peftkit.generate(summary.path, prompts, max_new_tokens=5)
    assert peftkit.generate(tmp_path / "elsewhere", prompts, max_new_tokens=5) == here


def test_chats_of_many_turns_train_an_encoder_decoder(bases, tmp_path):
    turns = [("user", "say alpha"), ("assistant", "alpha"), ("user", "again"), ("assistant", "alpha")]
    rows = [{"messages": [{"role": r, "content": f"{c} {i}"} for r, c in turns]} for i in range(12)]
    data = {"train": str(write_jsonl(tmp_path / "chats.jsonl", rows)), "eval": None}
    recipe = recipe_for(bases["t5"], data, "lora", max_steps=2)
    recipe["train"]["eval_steps"] = "auto"
    assert peftkit.finetune(recipe, out=tmp_path / "run").result is not None


def with_several_classes(tmp_path, num=64):
    """Rows with every subset of the words as classes, the empty one too."""
    rows = []
    for i in range(num):
        words = [word for bit, word in enumerate(WORDS) if (i % 16) >> bit & 1]
        rows.append({"text": f"please say {' and '.join(words) or 'nothing'} for {i}", "labels": words})
    return {"train": str(write_jsonl(tmp_path / "rows.jsonl", [*rows[3:], *rows[:3]])), "eval": "25%"}


@pytest.mark.parametrize("base", ["bert", "llama"])
def test_texts_of_several_classes_are_learnt_merged_and_read_by_transformers(base, bases, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = bases.get(base, TINY_LLAMA)
    method = {"name": "lora", "rank": 16}
    recipe = recipe_for(folder, with_several_classes(tmp_path), method, learning_rate=5e-3, max_steps=150)
    summary = peftkit.finetune(recipe, out=tmp_path / "run")
    assert summary.metric == "micro_f1"
    assert summary.metric_after > 0.9
    texts = [f"please say {words} for 7" for words in ("nothing", "beta", "gamma and delta")]
    answers = peftkit.generate(summary.path, texts)

    peftkit.merge_adapter(summary.path, out=tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert model.config.problem_type == "multi_label_classification"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    for text, answer in zip(texts, answers, strict=True):
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        chosen = (model(**inputs).logits[0] > 0).nonzero()[:, 0].tolist()
        assert answer == (", ".join(model.config.id2label[i] for i in chosen) or "(none)")


def test_rows_are_as_long_as_their_tokens_however_many_classes_there_are(bases, tmp_path):
    rows = [{"text": f"say {WORDS[i % 4]}", "labels": [f"class {i} {n}" for n in range(4)]} for i in range(24)]
    data = {"train": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "eval": "25%"}
    checked = peftkit.check_data(recipe_for(bases["bert"], data, "lora"))  # 96 classes, 64 tokens a row at most
    assert checked.totals.num_train == checked.totals.num_learnt == 18 and checked.totals.longest < 64


def test_smoothing_is_refused_where_each_class_is_a_question_of_its_own(bases, tmp_path):
    recipe = recipe_for(bases["bert"], with_several_classes(tmp_path), "lora", label_smoothing=0.1)
    with pytest.raises(UserError, match="each class is yes or no"):
        peftkit.make_plan(recipe)
