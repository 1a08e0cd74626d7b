"""The data gate, proven on real data: every planted fault is found by its row, and no clean set fails."""

import json
from typing import get_args

import pytest
import yaml

from peftkit.cli import main
from peftkit.recipe.schema import CheckName
from tests.rigs.planted import FAULTS, try_clean, try_fault
from tests.rigs.realdata import SETS, load_real, make_bases

# what clean sets may be told: messages to a bank are alike, and few conversations are few rows
WARNINGS = {
    "classification": {"near-leakage"},
    "intents as chats": {"near-leakage"},
    "mixture": {"near-duplicates"},
    "sharegpt": {"enough-data"},
}


@pytest.fixture(scope="module")
def real():
    return load_real()


@pytest.fixture(scope="module")
def bases(real, tmp_path_factory):
    return make_bases(tmp_path_factory.mktemp("bases"), real)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_found(fault, real, bases, tmp_path):
    outcome = try_fault(fault, real, tmp_path, bases)
    assert not outcome.wrong, "\n".join(outcome.wrong)


@pytest.mark.parametrize("name", SETS)
def test_a_clean_set_does_not_fail(name, real, bases, tmp_path):
    report = try_clean(name, real, tmp_path, bases)
    told = {f.check: (f.status, f.said, f.rows) for f in report.findings if f.status not in {"pass", "n/a"}}
    assert not report.failed, told
    assert told.keys() <= WARNINGS.get(name, set()), told


def test_every_check_has_a_fault_that_it_finds():
    assert {fault.check for fault in FAULTS} == set(get_args(CheckName))
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


def test_padding_that_is_the_end_token_hides_no_end(real, bases, tmp_path):
    [fault] = [fault for fault in FAULTS if fault.name == "padding that is the end token"]
    num = len(real.problems) + len(real.held_problems)
    assert f"trained as the end of {num} rows" in try_fault(fault, real, tmp_path, bases).said


@pytest.fixture
def leaking(chats, recipe, tmp_path):
    """(recipe file whose held-out rows are all trained on, folder for its run)."""
    recipe["data"] = {"train": str(chats), "eval": str(chats)}
    recipe["train"] = {"max_steps": 2, "batch_size": 4, "micro_batch": 2, "max_length": 64, "eval_steps": 2}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path), tmp_path / "run"


def test_finetune_stops_at_a_check_that_fails(leaking, chats, capsys):
    path, run = leaking
    assert main(["finetune", path, "--out", str(run)]) == 2
    told = capsys.readouterr().err
    assert "data check leakage" in told
    assert f"{chats}:1" in told
    assert "data.waive: [leakage]" in told
    assert not run.exists()


def test_a_check_that_is_waived_by_name_is_written_to_the_run(leaking):
    path, run = leaking
    assert main(["finetune", path, "--out", str(run), "data.waive=[leakage]"]) == 0
    assert json.loads((run / "plan.json").read_text())["data"]["waive"] == ["leakage"]
    findings = json.loads((run / "data.json").read_text())["findings"]
    [leakage] = [finding for finding in findings if finding["check"] == "leakage"]
    assert leakage["status"] == "waived"
    assert leakage["num_rows"] == 24
    assert (run / "adapter").is_dir()


def test_rows_that_cannot_be_used_are_left_out_where_that_is_waived(leaking, chats):
    path, run = leaking
    with chats.open("a") as file:
        file.write('{"messages": [\n')
    keep = ["finetune", path, "--out", str(run), "data.eval=null", "train.eval_steps=auto"]
    assert main(keep) == 2
    assert main([*keep, "data.waive=[malformed-rows]"]) == 0
    findings = {f["check"]: f for f in json.loads((run / "data.json").read_text())["findings"]}
    assert findings["malformed-rows"]["status"] == "waived"
    assert findings["rows-dropped"]["rows"] == [[f"{chats}:25", "malformed-rows"]]


def test_a_misspelt_waiver_is_refused(leaking, capsys):
    path, run = leaking
    assert main(["finetune", path, "--out", str(run), "data.waive=[leakge]"]) == 2
    assert "did you mean leakage?" in capsys.readouterr().err


def test_check_ends_with_2_where_one_fails(leaking, capsys):
    path, _ = leaking
    assert main(["check", path]) == 2
    assert main(["check", path, "data.waive=[leakage]"]) == 0
    assert "waived" in capsys.readouterr().out
