import pytest

import peftkit
from peftkit.cli import main
from peftkit.errors import UserError
from peftkit.recipe.document import dump_text


def test_a_run_made_again_is_the_same_to_the_last_byte(recipe, tmp_path):
    peftkit.finetune(recipe, out=tmp_path / "run")
    found = peftkit.reproduce_run(tmp_path / "run")
    assert found.is_equal and found.changed == {} and found.num_steps == 6
    assert found.after.path == tmp_path / "run-again"
    assert ("result", "equal byte for byte") in found.rows()


def test_what_changed_and_where_it_parts_is_told(recipe, chats, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(dump_text(recipe))
    assert main(["finetune", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]) == 0
    chats.write_text(chats.read_text().replace("number 3", "number 33"))
    assert main(["reproduce", str(tmp_path / "run"), "--out", str(tmp_path / "other")]) == 1
    told = capsys.readouterr().out
    assert "differ from step 1 on" in told or "differ from step 2 on" in told
    assert "differs: adapter_model.safetensors" in told
    assert "data changed since" in told


def test_only_a_finished_and_whole_run_is_made_again(recipe, tmp_path):
    peftkit.finetune(recipe, out=tmp_path / "run")
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="0 bytes"):
        peftkit.reproduce_run(tmp_path / "run")
    (tmp_path / "run" / "adapter").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="without a result"):
        peftkit.reproduce_run(tmp_path / "run")
