import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkit.data.rows.disk import JsonLinesReader, JsonLinesWriter

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=("Cs",))),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=("Cs",))), inner),
)


@given(rows=st.lists(values, max_size=12))
def test_what_is_written_is_read_by_number(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("spill") / "rows.jsonl"
    writer = JsonLinesWriter(path)
    for row in rows:
        writer.append(row)
    writer.close()
    found = JsonLinesReader(path, lambda value: value)
    assert list(found) == rows
    assert found[1:3] == rows[1:3]
    if rows:
        assert found[-1] == rows[-1]
    with pytest.raises(IndexError):
        found[len(rows)]
