from hypothesis import given, settings
from hypothesis import strategies as st

from peftkit.data.read import mapped_dataset
from peftkit.data.tokens.mask import Tokenized
from peftkit.data.tokens.store import Counts, StoredTokens, TokenWriter, content_sha256, is_weighted

ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9)
rows = st.lists(st.builds(Tokenized, ids, ids, st.text("ab:/1", max_size=5)), max_size=8)


def store(folder, batches):
    writer = TokenWriter(folder / "rows.arrow")
    for batch in batches:
        writer.write(batch, list(range(len(batch))))
    writer.close()
    return StoredTokens([folder / "rows.arrow"])


@given(batches=st.lists(rows, max_size=3))
@settings(max_examples=40)
def test_rows_come_back_as_they_were(tmp_path_factory, batches):
    found = store(tmp_path_factory.mktemp("store"), batches)
    wanted = [row for batch in batches for row in batch]
    assert list(found) == wanted
    assert found.counts.tokens.tolist() == Counts.of(wanted).tokens.tolist()
    assert found.counts.learnt.tolist() == [row.num_learnt for row in wanted]
    assert not is_weighted(found)


def test_weights_are_kept_where_some_row_has_them(tmp_path):
    plain, weighted = Tokenized([1], [1], "a"), Tokenized([1, 2], [1, 2], "b", [0.5, 1.0])
    found = store(tmp_path, [[plain, weighted], [plain]])
    assert [row.weights for row in found] == [[1.0], [0.5, 1.0], None]
    assert is_weighted(found)
    assert is_weighted([weighted])


def test_the_trainer_reads_the_same_file(tmp_path):
    found = store(tmp_path, [[Tokenized([1, 2], [3, 4], "a")]])
    dataset = mapped_dataset(found.paths, ["input_ids", "labels"])
    assert dataset[0] == {"input_ids": [1, 2], "labels": [3, 4]}
    assert len(content_sha256(found.paths)) == 64


def test_the_fingerprint_is_of_what_is_learnt_not_of_where_it_came_from(tmp_path):
    one, two = Tokenized([1, 2], [3, 4], "a"), Tokenized([5], [6], "b")

    def print_of(*batches):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        return content_sha256(store(folder, batches).paths)

    same = print_of([one, two])
    assert print_of([one], [two]) == same, "batches are no part of it"
    assert print_of([Tokenized([1, 2], [3, 4], "elsewhere:7"), two]) == same
    others = [
        [two, one],
        [one],
        [Tokenized([1], [3, 4], "a"), Tokenized([2, 5], [6], "b")],
        [Tokenized([1, 2], [3, 5], "a"), two],
        [Tokenized([1, 2], [3, 4], "a", [1.0, 0.5]), two],
    ]
    assert len({same, *(print_of(batch) for batch in others)}) == 1 + len(others)
