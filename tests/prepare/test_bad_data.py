"""Data as it comes: each ends in a clear problem or in a run, never in a traceback or a silent loss."""

import json
import socket

import pytest

import peftkit
from peftkit.errors import UserError
from tests.conftest import chat, write_jsonl


def given(recipe, path, **data):
    recipe["data"] = {"train": str(path), "eval": None, **data}
    recipe["train"]["eval_steps"] = "auto"
    return recipe


def refused(recipe):
    with pytest.raises(UserError) as caught:
        peftkit.check_data(recipe)
    return str(caught.value)


def found(report, check):
    return next(finding for finding in report.findings if finding.check == check)


def test_a_line_that_is_far_too_long_is_one_fault_and_the_rest_is_read(recipe, tmp_path):
    path = tmp_path / "d.jsonl"
    good = json.dumps(chat("Say alpha", "alpha"))
    with path.open("w", encoding="utf-8") as file:
        file.write(good + "\n" + '{"messages": "')
        for _ in range(70):
            file.write("x" * 2**20)
        file.write('"}\n' + good + "\n")
    finding = found(peftkit.check_data(given(recipe, path)), "malformed-rows")
    assert (finding.status, finding.rows[0][0]) == ("fail", f"{path}:2")


def test_a_folder_with_a_stray_binary_names_it(recipe, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    write_jsonl(folder / "d.jsonl", [chat("Say alpha", "alpha")])
    (folder / "weights.bin").write_bytes(b"\0\1\2")
    assert "weights.bin" in refused(given(recipe, folder))


def test_nested_parquet_is_read_as_turns(recipe, tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [chat(f"Say alpha {i}", "alpha") for i in range(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    report = peftkit.check_data(given(recipe, tmp_path / "d.parquet"))
    assert (report.totals.num_train, report.failed) == (5, ())


def test_a_column_that_is_sometimes_a_list_is_told_by_row(recipe, tmp_path):
    rows = [{"prompt": "Say alpha", "completion": "alpha"}, {"prompt": "Say beta", "completion": ["beta"]}]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    finding = found(peftkit.check_data(given(recipe, path)), "missing-fields")
    assert finding.rows == ((f"{path}:2", "completion is list, expected text in completion"),)


def test_an_empty_split_is_told(recipe, tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [chat("Say alpha", "alpha")])
    (tmp_path / "empty.jsonl").write_text("")
    assert "empty.jsonl: got no rows" in refused(given(recipe, path, eval=str(tmp_path / "empty.jsonl")))


def test_a_row_of_one_token_teaches_nothing(recipe, tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": "say alpha"}, {"text": "<|end|>"}])
    finding = found(peftkit.check_data(given(recipe, path)), "masked-rows")
    assert finding.rows == ((f"{path}:2", "a row of one token: there is nothing to predict"),)


def test_settings_of_chats_for_rows_without_turns_are_refused(recipe, tmp_path):
    rows = [{"prompt": f"Say {i}", "completion": str(i)} for i in range(4)]
    told = refused(given(recipe, write_jsonl(tmp_path / "d.jsonl", rows), chat={"system": "Be brief."}))
    assert "data.chat.system: got a setting of chats, expected nothing, as no row is a chat" in told


def test_one_row_trains_with_nothing_held_out(recipe, tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [chat("Say alpha", "alpha")])
    recipe = given(recipe, path, eval="25%")
    recipe["train"] |= {"max_steps": 2, "batch_size": "auto", "micro_batch": "auto"}
    report = peftkit.check_data(recipe)
    assert found(report, "held-out").status == "warn"
    assert found(report, "enough-data").status == "warn"
    assert not report.failed
    assert peftkit.finetune(recipe, out=tmp_path / "run").num_steps == 2


def test_a_hub_dataset_while_offline_is_told_at_once(recipe):
    assert "HF_HUB_OFFLINE" in refused(given(recipe, "some-one/some-data"))


def test_a_url_that_hangs_is_given_up(recipe, monkeypatch):
    from peftkit.data.read import remote

    monkeypatch.setattr(remote, "STALL_TIMEOUT_SECONDS", 0.5)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        said = refused(given(recipe, f"http://user:password@127.0.0.1:{port}/rows.jsonl?token=secret"))
    assert "sent nothing for" in said
    assert "password" not in said and "secret" not in said


def test_weights_of_rows_and_turns_weigh_in_the_loss(recipe, tmp_path):
    """A row of weight 3 counts as three rows; a turn of weight 0 is not learnt."""
    from peftkit.rundir import RunDir

    rows = [chat("Say alpha", "alpha alpha"), chat("Say beta", "beta beta")]
    recipe["train"] |= {"max_steps": 1, "batch_size": "auto", "micro_batch": "auto"}

    def first_loss(name, rows):
        run = given(recipe, write_jsonl(tmp_path / f"{name}.jsonl", rows))
        peftkit.finetune(run, out=tmp_path / name)
        events = {e["event"]: e for e in RunDir(tmp_path / name).events()}
        return events["step"]["loss"], events["data"]["num_learnt"]

    (first, num_first), (second, num_second) = (first_loss(f"only{i}", [r]) for i, r in enumerate(rows))
    weighed, num = first_loss("weighed", [{**rows[0], "weight": 3}, rows[1]])
    assert num == num_first + num_second
    assert weighed == pytest.approx((3 * first * num_first + second * num_second) / num, rel=1e-4)
    longer = {"messages": [*rows[0]["messages"], *rows[1]["messages"]]}
    longer["messages"][1] = {**longer["messages"][1], "weight": 0}
    report = peftkit.check_data(given(recipe, write_jsonl(tmp_path / "turn.jsonl", [longer])))
    learnt = "".join(p.text for p in report.samples[0].pieces if p.kind.startswith("learnt"))
    assert learnt.replace("<|end|>", "") == "beta beta"
