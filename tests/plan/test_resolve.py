import json
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkit.archs import KNOWN, shape_from_config
from peftkit.data.rows.ingest import read_examples
from peftkit.errors import UserError
from peftkit.methods import METHODS
from peftkit.plan import DataFacts, DeviceFacts, Facts, ModelFacts, Plan, make_plan
from peftkit.prepare.facts import data_facts, memory_problems, model_facts
from peftkit.recipe import load
from peftkit.recipe.shipped import list_shipped
from tests.rigs.plans import cpu_plan

LLAMA = ModelFacts("m", "hub", shape_from_config(KNOWN["meta-llama/Llama-3.1-8B"]))
GPU = DeviceFacts("cuda", "NVIDIA H100", 85_000_000_000, True, True)
CPU = DeviceFacts("cpu", "a CPU", 24 * 2**30, True, True)


def plan(method="lora", *, device=GPU, rows=1000, model=LLAMA, **sections):
    source = {"base": "org/m", "method": method, "data": {"train": "x.jsonl"}, **sections}
    data = DataFacts(rows, 10, "chat") if rows else None
    return make_plan(load(source), Facts(device, model, data))


def refuse(*args, **kwargs):
    with pytest.raises(UserError) as caught:
        plan(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize("shipped", list_shipped(), ids=lambda s: s.name)
def test_every_shipped_recipe_resolves_without_weights_or_network(shipped):
    from peftkit.model.base.locate import locate_base

    loaded = load(shipped.path)
    base = locate_base(loaded.recipe.base.id, revision=None, where="base", need_weights=False)
    examples = read_examples(loaded)
    model = model_facts(loaded, base, examples)
    made = make_plan(loaded, Facts(GPU, model, data_facts(examples, model.shape.task)))
    assert made.method.num_trainable > 0
    assert memory_problems(loaded, made, Facts(GPU, model, data_facts(examples, model.shape.task))) == []
    assert "auto" not in [decision.value for decision in made.decisions]
    assert shipped.title


def test_no_auto_is_left_and_every_decided_value_has_a_reason():
    made = plan("qlora")
    for decision in made.decisions:
        assert decision.value != "auto"
        if decision.source == "decided":
            assert decision.reason


def test_steps_follow_from_rows_batch_and_epochs():
    assert plan(rows=1000, train={"epochs": 2.0, "batch_size": 10}).train.num_steps == 200
    assert plan(rows=1001, train={"epochs": 1.0, "batch_size": 10}).train.num_steps == 101
    assert plan(rows=5).train.batch_size == 5
    assert plan(rows=None).train.num_steps is None
    assert plan(rows=10, train={"max_steps": 7}).train.num_steps == 7


@given(rows=st.integers(1, 10_000), micro=st.integers(1, 64), epochs=st.floats(0.1, 10))
def test_batches_always_divide(rows, micro, epochs):
    made = plan(rows=rows, train={"micro_batch": micro, "epochs": epochs}).train
    assert made.batch_size == made.micro_batch * made.accumulation
    assert made.num_steps >= 1
    assert 0 <= made.num_warmup_steps <= made.num_steps


def test_a_single_step_has_no_warm_up():
    made = plan(rows=16, train={"epochs": 1.0}).train
    assert (made.num_steps, made.num_warmup_steps) == (1, 0)


def test_a_metric_on_raw_text_is_refused():
    loaded = load({"base": "o/m", "method": "lora", "data": {"train": "x.txt"}, "evaluate": {"metric": "exact_match"}})
    with pytest.raises(UserError, match="raw text has no answer"):
        make_plan(loaded, Facts(GPU, LLAMA, DataFacts(10, 2, "text")))


def test_precision_by_device():
    assert plan(device=GPU).base.dtype == "bfloat16"
    assert plan(device=GPU).train.autocast == "bf16"
    old = replace(GPU, supports_bf16=False)
    assert plan(device=old).train.autocast == "fp16"
    assert plan(device=CPU).base.dtype == "float32"
    assert plan(device=CPU).train.autocast is None
    assert plan("full", device=GPU).base.dtype == "float32"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"device": replace(GPU, supports_bf16=False), "train": {"precision": "bf16"}}, "no bf16 units"),
        ({"device": CPU, "train": {"precision": "fp16"}}, "fp16 training needs a GPU"),
        ({"method": "qlora", "device": replace(CPU, has_bitsandbytes=False)}, "pip install 'peftkit[qlora]'"),
        ({"device": CPU, "train": {"optimizer": "paged_adamw_8bit"}}, "needs a CUDA GPU"),
        (
            {"device": replace(GPU, has_bitsandbytes=False), "train": {"optimizer": "adamw_bnb_8bit"}},
            "without bitsandbytes",
        ),
        ({"train": {"max_length": 200_000}}, "at most 131072"),
        ({"method": {"name": "lora", "targets": ["gate", "qq_proj"]}}, "qq_proj"),
    ],
)
def test_conflicts_with_the_device_or_model_are_told(arguments, said):
    arguments = dict(arguments)
    assert said in refuse(arguments.pop("method", "lora"), **arguments)


def test_ia3_scales_inputs_of_what_is_targeted_only():
    made = plan({"name": "ia3", "targets": ["k", "down"], "feedforward": ["down_proj"]})
    assert made.method.peft.arguments["feedforward_modules"] == ["down_proj"]
    assert "not among the targets" in refuse({"name": "ia3", "feedforward": ["bogus"]})
    assert "not among the targets" in refuse({"name": "ia3", "targets": ["k"], "feedforward": ["down_proj"]})


def test_a_layer_that_is_not_there_is_told_before_loading():
    assert "matches no module" in refuse({"name": "lora", "targets": ["layers.99.self_attn.q_proj"]})
    assert plan({"name": "lora", "targets": ["layers.3.self_attn.q_proj"]}).method.num_trainable > 0


def test_a_method_that_cannot_work_is_refused_with_the_nearest_that_does():
    mamba = ModelFacts("m", "hub", shape_from_config(KNOWN["state-spaces/mamba-130m-hf"]))
    said = refuse("prefix", model=mamba)
    assert "no attention, so there are no keys and values" in said
    assert "the nearest that works: prompt" in said
    gpt2 = ModelFacts("m", "hub", shape_from_config(KNOWN["openai-community/gpt2"]))
    assert "the nearest that works: lora" in refuse("oft", model=gpt2, train={"max_length": 64})


def test_changes_that_a_family_needs_are_decisions_with_a_reason():
    def reasons(name, method="lora"):
        model = ModelFacts("m", "hub", shape_from_config(KNOWN[name]))
        made = plan(method, model=model, train={"max_length": 64})
        return {d.key: d for d in made.decisions}

    mamba = reasons("state-spaces/mamba-130m-hf")
    assert mamba["method.targets"].value == ["in_proj"]
    assert "never called" in mamba["method.left_out"].reason
    mixtral = reasons("mistralai/Mixtral-8x7B-v0.1", "qlora")
    assert "experts" in mixtral["method.targets"].reason
    assert mixtral["base.in_4bit"].value == "99.4 %"
    rwkv = reasons("RWKV/rwkv-4-169m-pile")
    assert rwkv["evaluate.generation_batch"].value == 1
    assert "rescale_every" in rwkv["base.config.rescale_every"].reason
    assert reasons("state-spaces/mamba-130m-hf", "prompt")["evaluate.use_cache"].value is False


def test_a_4bit_base_that_is_little_in_4bit_says_so():
    model = ModelFacts("m", "hub", shape_from_config(KNOWN["Qwen/Qwen3-0.6B"]))
    low = ModelFacts("m", "hub", shape_from_config({**KNOWN["google/gemma-3-1b-pt"], "num_hidden_layers": 2}))
    [decision] = [d for d in plan("qlora", model=low).decisions if d.key == "base.in_4bit"]
    assert "little: most of this model is embeddings" in decision.reason
    [decision] = [d for d in plan("qlora", model=model).decisions if d.key == "base.in_4bit"]
    assert "little" not in decision.reason


def test_experts_cannot_have_dropout_dora_or_4bit():
    model = ModelFacts("m", "hub", shape_from_config(KNOWN["mistralai/Mixtral-8x7B-v0.1"]))
    for options, said in (
        ({"dropout": 0.05}, "set dropout: 0"),
        ({"dora": True}, "set dora: false"),
        ({"init": "pissa"}, "expected default"),
        ({"name": "qlora"}, "fused weights in 4-bit cannot carry LoRA"),
    ):
        method = {"name": "lora", "targets": ["attention", "experts"], **options}
        assert said in refuse(method, model=model)


def test_parameters_can_be_named():
    model = ModelFacts("m", "hub", shape_from_config(KNOWN["mistralai/Mixtral-8x7B-v0.1"]))
    method = {"name": "lora", "targets": "attention", "target_parameters": ["experts.down_proj"]}
    assert plan(method, model=model).method.target_parameters == ("down_proj",)
    assert "matches no parameter" in refuse({**method, "target_parameters": ["nothing"]}, model=model)


def test_longer_rows_than_the_trained_positions_need_rope_scaling():
    long = {"max_length": 200_000}
    assert "rope_scaling: {kind: yarn, factor: 2}" in refuse(train=long)
    source = {"base": {"id": "o/m", "rope_scaling": {"kind": "yarn", "factor": 2.0}}, "method": "lora"}
    loaded = load({**source, "data": {"train": "x.jsonl"}, "train": long})
    made = make_plan(loaded, Facts(GPU, LLAMA, None))
    assert made.base.overrides["rope_scaling"] == {"kind": "yarn", "factor": 2.0, "trained": 131072}
    gpt2 = ModelFacts("m", "hub", shape_from_config(KNOWN["openai-community/gpt2"]))
    with pytest.raises(UserError, match="its positions are: learned"):
        make_plan(loaded, Facts(GPU, gpt2, None))


def test_a_base_that_claims_more_positions_than_it_was_trained_to():
    def made(**scaling):
        base = {"id": "o/m", "rope_scaling": {"kind": "yarn", **scaling}}
        recipe = {"base": base, "method": "lora", "data": {"train": "x.jsonl"}, "train": {"max_length": 16_384}}
        return make_plan(load(recipe), Facts(GPU, LLAMA, None))

    assert made(factor=4.0, trained=4096).base.overrides["rope_scaling"]["trained"] == 4096
    with pytest.raises(UserError, match=r"raise base\.rope_scaling\.factor to 4"):
        made(factor=2.0, trained=4096)
    with pytest.raises(UserError, match="kind yarn or linear"):
        made(kind="dynamic", factor=4.0, trained=4096)
    with pytest.raises(UserError, match="at most 131072"):
        made(factor=4.0, trained=200_000)


def test_a_base_that_stretches_its_positions_already_is_not_stretched_again():
    config = {**KNOWN["meta-llama/Llama-3.1-8B"], "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    model = ModelFacts("m", "hub", shape_from_config(config))
    base = {"id": "o/m", "rope_scaling": {"kind": "linear", "factor": 2.0}}
    loaded = load({"base": base, "method": "lora", "data": {"train": "x.jsonl"}})
    with pytest.raises(UserError, match=r"already \(llama3\)"):
        make_plan(loaded, Facts(GPU, model, None))
    with pytest.raises(UserError, match="greater than 1"):
        load({"base": {**base, "rope_scaling": {"factor": 1.0}}, "method": "lora", "data": {"train": "x"}})


def test_the_default_length_is_what_the_model_has_positions_for():
    bert = ModelFacts("m", "hub", shape_from_config(KNOWN["google-bert/bert-base-uncased"]))
    made = make_plan(
        load({"base": "o/m", "method": "prompt", "data": {"train": "x.csv"}}),
        Facts(GPU, bert, DataFacts(10, 2, "classification", ("a", "b"))),
    )
    assert made.data.max_length == 512 - 20
    assert plan().data.max_length == 2048
    gpt2 = ModelFacts("m", "hub", shape_from_config(KNOWN["openai-community/gpt2"]))
    said = refuse({"name": "prompt", "virtual_tokens": 10}, model=gpt2, train={"max_length": 1020})
    assert "at most 1014" in said
    assert "after 10 virtual tokens" in said


def test_one_class_is_no_task_and_a_classifier_writes_nothing():
    bert = ModelFacts("m", "hub", shape_from_config(KNOWN["google-bert/bert-base-uncased"]))
    source = {"base": "o/m", "method": "lora", "data": {"train": "x.csv"}}
    with pytest.raises(UserError, match="rows of the one class a"):
        make_plan(load(source), Facts(GPU, bert, DataFacts(10, 2, "classification", ("a",))))
    with pytest.raises(UserError, match="a classifier generates no text"):
        make_plan(
            load({**source, "evaluate": {"max_new_tokens": 9}}),
            Facts(GPU, bert, DataFacts(10, 2, "classification", ("a", "b"))),
        )


@pytest.mark.parametrize(
    ("name", "task", "data_format", "said"),
    [
        ("google-t5/t5-base", "causal-lm", "chat", "a task that it has a head for: seq2seq"),
        ("google-bert/bert-base-uncased", "auto", "chat", "trained for classification"),
        ("google-t5/t5-base", "auto", "classification", "a task that it has a head for: seq2seq"),
        ("google-t5/t5-base", "auto", "text", "reads one text and writes another"),
        ("google-bert/bert-base-uncased", "seq2seq", "classification", "the data decides"),
    ],
)
def test_task_data_and_family_must_agree(name, task, data_format, said):
    from peftkit.archs import family_of
    from peftkit.plan.task import decide_task

    found = decide_task(task, data_format, family_of(KNOWN[name]["model_type"]), "recipe.yaml:3 task")
    assert said in str(found)


def test_masks_metrics_and_cuts_are_for_tasks_that_have_them():
    t5 = ModelFacts("m", "hub", shape_from_config(KNOWN["google-t5/t5-base"]))
    data = {"train": "x.jsonl", "mask": "all", "truncation": "keep_end"}
    said = refuse(model=t5, data=data, evaluate={"metric": "accuracy"})
    assert "no mask" in said
    assert "an encoder needs the start" in said
    assert "one of exact_match, token_f1" in said


def test_sources_and_reasons(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("base: org/m\nmethod:\n  name: lora\n  rank: 8\ndata: {train: x.jsonl}\n")
    made = make_plan(load(path, ["seed=3"]), Facts(GPU, LLAMA, None))
    by_key = {decision.key: decision for decision in made.decisions}
    assert by_key["method.rank"].source == f"{path}:4"
    assert by_key["seed"].source == "command line"
    assert by_key["method.alpha"].source == "decided"
    assert by_key["method.alpha"].reason == "2 x rank"
    assert by_key["train.max_grad_norm"].source == "default"


@pytest.mark.parametrize("method", sorted(METHODS))
def test_plan_survives_json(method):
    made = plan(method)
    text = json.dumps(made.to_json())
    again = Plan.from_json(json.loads(text))
    assert json.loads(json.dumps(again.to_json())) == json.loads(text)
    assert again.train == made.train
    assert again.method.peft == made.method.peft
    assert again.method.num_trainable == made.method.num_trainable


def test_a_plan_with_token_rows_survives_json():
    made = plan({"name": "lora", "also_train": [{"tokens": ["<a>", "<b>"]}]})
    assert Plan.from_json(json.loads(json.dumps(made.to_json()))).method.token_rows == ("<a>", "<b>")


@pytest.mark.parametrize(
    ("method", "train", "said"),
    [
        ({"name": "oft", "block_size": 2**31 - 2}, {"max_length": 64}, "which does not divide"),
        ("lora", {"batch_size": 2**31 - 1, "micro_batch": 2**30}, "try micro_batch: 1"),
        ("lora", {"batch_size": 2**31}, "a number less than"),
    ],
)
def test_huge_numbers_are_refused_at_once(method, train, said):
    begin = time.monotonic()
    with pytest.raises(UserError, match=said):
        cpu_plan(method, train=train)
    assert time.monotonic() - begin < 3


def test_a_huge_batch_is_planned_at_once():
    begin = time.monotonic()
    assert cpu_plan("lora", train={"batch_size": 877577771, "max_length": 64}).train.batch_size == 877577771
    assert time.monotonic() - begin < 3
