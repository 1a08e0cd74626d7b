"""What the plan makes of `diagnose:`, and what it refuses."""

import pytest

from peftkit.errors import UserError
from peftkit.plan import Plan
from peftkit.plan.plan import Growth, read_plan
from peftkit.recipe import check_recipe, load
from peftkit.rundir import RunDir, write_sealed
from tests.rigs.plans import cpu_plan


def decided(plan, key):
    return next(one for one in plan.decisions if one.key == key)


def test_recommend_is_the_default_and_pauses_nowhere():
    plan = cpu_plan()
    assert (plan.diagnose.escalate, plan.diagnose.look_steps) == ("recommend", ())
    assert plan.diagnose.compute_share == 0.15


def test_auto_looks_early_and_later_where_there_are_steps_enough():
    plan = cpu_plan(diagnose={"escalate": "auto"}, train={"max_steps": 500})
    assert plan.train.num_warmup_steps == 25
    assert plan.diagnose.look_steps == (26, 75, 200)
    short = cpu_plan(diagnose={"escalate": "auto"}, train={"max_steps": 199})
    assert short.diagnose.look_steps == (11,)
    unpaid = cpu_plan(diagnose={"escalate": "auto", "bounds": {"compute": 0}}, train={"max_steps": 500})
    assert unpaid.diagnose.look_steps == ()
    assert "compute is 0" in decided(unpaid, "diagnose.looks").reason
    assert cpu_plan(diagnose={"escalate": "auto"}, train={"max_steps": 40}).diagnose.look_steps == ()


@pytest.mark.parametrize(
    ("method", "train", "why"),
    [
        ("prefix", {}, "prefix has no rank"),
        ("ia3", {}, "LoRA, is recommended"),
        ({"name": "lora", "init": "pissa"}, {}, "defined by its initial weights"),
        ({"name": "lora", "lr_ratio": 16.0}, {}, "its own learning rate"),
        ("lora", {"optimizer": "adafactor"}, "cannot be grown"),
    ],
)
def test_what_cannot_grow_is_recommended_to_with_a_reason(method, train, why):
    plan = cpu_plan(method, diagnose={"escalate": "auto"}, train={"max_steps": 200, **train})
    found = decided(plan, "diagnose.escalate")
    assert (found.value, plan.diagnose.escalate) == ("recommend", "recommend")
    assert why in found.reason


def test_nothing_is_judged_without_held_out_rows():
    source = {"base": "org/model", "method": "lora", "data": {"train": "x.jsonl", "eval": None}}
    assert check_recipe(load(source)) == []
    plan = cpu_plan(data={"train": "x.jsonl", "eval": None})
    assert plan.diagnose.escalate == "off"
    assert "data.eval: 5%" in decided(plan, "diagnose.escalate").reason
    wanted = {"escalate": "auto", "target": {"value": 1.0}, "reference": "full"}
    problems = check_recipe(load({**source, "diagnose": wanted}))
    assert [p.where.split()[-1] for p in problems] == ["diagnose.escalate", "diagnose.target", "diagnose.reference"]


def test_keys_beside_off_are_told():
    source = {"base": "org/model", "method": "lora", "data": {"train": "x.jsonl"}}
    problems = check_recipe(load({**source, "diagnose": {"escalate": "off", "target": {"value": 1.0}}}))
    assert [p.got for p in problems] == ["target with escalate: off"]
    bounded = {"bounds": {"max_escalations": 3}}
    assert len(check_recipe(load({**source, "diagnose": bounded}))) == 1
    assert check_recipe(load({**source, "diagnose": {**bounded, "escalate": "auto"}})) == []


@pytest.mark.parametrize(
    ("target", "is_fine"),
    [({"value": 1.2}, True), ({"value": -1.0}, False), ({"metric": "accuracy", "value": 90.0}, False)],
)
def test_a_target_that_no_run_can_reach_or_miss_is_told(target, is_fine):
    source = {"base": "org/model", "method": "lora", "data": {"train": "x.jsonl"}, "diagnose": {"target": target}}
    assert (check_recipe(load(source)) == []) == is_fine


def test_targets_and_bounds_that_mean_nothing_are_refused():
    for wanted, said in (
        ({"target": {"metric": "accuracy", "value": 0.9}}, "accuracy, which is not measured"),
        ({"bounds": {"max_memory": "large"}}, "'large'"),
    ):
        with pytest.raises(UserError, match=said):
            cpu_plan(diagnose=wanted)
    for method in ("qlora", "ia3", "full"):
        with pytest.raises(UserError, match=f"full with {method}"):
            cpu_plan(method, diagnose={"reference": "full"})
    plan = cpu_plan(diagnose={"bounds": {"max_memory": "4GiB", "compute": "5%"}})
    assert (plan.diagnose.max_memory_bytes, plan.diagnose.compute_share) == (4 * 2**30, 0.05)


def test_a_plan_with_growths_comes_back_from_json():
    from dataclasses import replace

    plan = replace(cpu_plan(), growths=(Growth(20, "rank", ("method.rank=32",), kept=False),))
    assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_with_an_unknown_field_is_refused_by_its_name(tmp_path):
    run = RunDir.create(tmp_path / "run")
    plan = cpu_plan().to_json()
    write_sealed(run.path / "plan.json", plan)
    assert read_plan(run) == cpu_plan()
    write_sealed(run.path / "plan.json", {**plan, "train": {**plan["train"], "warmth": 1}})
    with pytest.raises(UserError, match=r"plan\.json: got a plan that cannot be read \(train\.warmth"):
        read_plan(run)
