"""The page of the data check: whole in itself, fit for a phone, and without a machine's folders."""

import pytest

from peftkit.cli import main
from peftkit.report.data_page import without_folders


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/data/rows.jsonl:3", "rows.jsonl:3"),
        ("the input of /tmp/x/rows.jsonl:3", "the input of rows.jsonl:3"),
        ("rows.jsonl:3", "rows.jsonl:3"),
        ("data/rows.jsonl:3", "data/rows.jsonl:3"),
        ("https://example.org/a/rows.jsonl:3", "https://example.org/a/rows.jsonl:3"),
        ("and/or 3/4", "and/or 3/4"),
    ],
)
def test_folders_of_the_machine_are_left_out(text, shown):
    assert without_folders(text) == shown


def test_the_page_names_no_folder_and_fits_a_phone(recipe, tmp_path):
    import yaml

    path, page = tmp_path / "recipe.yaml", tmp_path / "page.html"
    path.write_text(yaml.safe_dump(recipe))
    main(["check", str(path), "--html", str(page)])
    text = page.read_text()
    assert "chats.jsonl:" in text
    assert str(tmp_path) not in text
    assert "name='viewport'" in text
    assert "http" not in text, "nothing is fetched"
