import json
from pathlib import Path

import pytest

from peftkit.errors import UserError
from peftkit.rundir import MANIFEST, RunDir, publish_folder, verify_folder, write_text
from peftkit.rundir.events import ResumeEvent


def published(tmp_path: Path) -> Path:
    folder = tmp_path / "step-000001"
    with publish_folder(folder, step=1) as staging:
        (staging / "a.bin").write_bytes(b"weights")
        (staging / "sub").mkdir()
        (staging / "sub" / "b.json").write_text("{}")
    return folder


def test_published_folder_verifies(tmp_path):
    folder = published(tmp_path)
    assert verify_folder(folder) == []
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["step"] == 1
    assert set(manifest["files"]) == {"a.bin", "sub/b.json"}


def test_exception_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), publish_folder(tmp_path / "x") as staging:
        (staging / "half").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "a.bin").write_bytes(b"weightz"), "changed after it was written"),
        (lambda f: (f / "a.bin").write_bytes(b"w"), "has 1 bytes, not 7"),
        (lambda f: (f / "a.bin").unlink(), "is missing"),
        (lambda f: (f / MANIFEST).unlink(), "is incomplete"),
        (lambda f: (f / MANIFEST).write_text("{"), "unreadable"),
    ],
)
def test_damage_is_found(tmp_path, damage, said):
    folder = published(tmp_path)
    damage(folder)
    assert said in verify_folder(folder)[0]


def test_sizes_alone_miss_flipped_bytes_but_find_cuts(tmp_path):
    folder = published(tmp_path)
    (folder / "a.bin").write_bytes(b"weightz")
    assert verify_folder(folder, hashes=False) == []
    (folder / "a.bin").write_bytes(b"")
    assert verify_folder(folder, hashes=False)


def test_write_text_keeps_the_old_file_when_it_fails(tmp_path):
    target = tmp_path / "plan.json"
    write_text(target, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(target, "\ud800")
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_create_refuses_a_run_a_full_folder_and_a_file(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "resolved.yaml").write_text("{}")
    with pytest.raises(UserError, match=r"already holds a run.*peftkit resume"):
        RunDir.create(tmp_path / "run")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="not empty"):
        RunDir.create(tmp_path / "notes")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file"):
        RunDir.create(tmp_path / "file")


def test_open_wants_a_run(tmp_path):
    with pytest.raises(UserError, match=r"without resolved\.yaml"):
        RunDir.open(tmp_path)
    with pytest.raises(UserError, match="nothing there"):
        RunDir.open(tmp_path / "absent")


def test_event_cut_by_a_kill_is_left_out_and_dropped(tmp_path):
    run = RunDir(tmp_path)
    run.emit(ResumeEvent(step=1))
    with run.events_file.open("a") as file:
        file.write('{"event": "st')
    assert run.events() == [{"event": "resume", "step": 1}]
    assert run.repair_events() == []
    run.emit(ResumeEvent(step=2))
    assert [e["step"] for e in run.events()] == [1, 2]


def test_newest_checkpoint_passes_over_damaged_ones(tmp_path):
    run = RunDir(tmp_path)
    for step in (10, 20, 30):
        with publish_folder(run.checkpoint(step), step=step) as staging:
            (staging / "w").write_text(str(step))
    (run.checkpoint(30) / "w").write_text("99")
    run.checkpoint(40).mkdir()
    newest, skipped = run.newest_checkpoint()
    assert newest == run.checkpoint(20)
    assert len(skipped) == 2
    assert "step-000040 is incomplete" in skipped[0]


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_what_no_folder_can_be_called_is_told(name):
    for function in (RunDir.open, RunDir.create):
        with pytest.raises(UserError, match="no folder can have"):
            function(Path(name))


def test_a_broken_line_is_told_and_set_aside(tmp_path):
    run = RunDir(tmp_path)
    for step in (1, 2, 3):
        run.emit(ResumeEvent(step=step))
    lines = run.events_file.read_bytes().split(b"\n")
    lines[1] = lines[1][:5] + b"\xff" + lines[1][6:]
    run.events_file.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=r"events\.jsonl:2: got a line that is no event"):
        run.events()
    assert run.repair_events() == [2]
    assert [event["step"] for event in run.events()] == [1, 3]
    [aside] = tmp_path.glob("damaged-events-*/events.jsonl")
    assert aside.read_bytes() == b"\n".join(lines)


def test_what_others_made_is_not_taken_for_ours(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".tmp-mine").write_text("keep me")
    with pytest.raises(UserError, match="not empty"):
        RunDir.create(tmp_path / "run")
    RunDir(tmp_path / "run").remove_leftovers()
    assert (tmp_path / "run" / ".tmp-mine").read_text() == "keep me"
    (tmp_path / "empty").mkdir()
    run = RunDir.create(tmp_path / "empty")
    run.discard(keep_folder=True)
    assert list((tmp_path / "empty").iterdir()) == []
    RunDir.create(tmp_path / "made").discard(keep_folder=False)
    assert not (tmp_path / "made").exists()
