import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftkit.units import divisors, join_names, parse_share, shorten, show_bytes, show_count, show_percent, show_seconds


@given(st.integers(0, 100))
def test_share_reads_what_people_write(percent):
    assert parse_share(f"{percent}%") == pytest.approx(percent / 100)
    assert parse_share(f" {percent} % ") == pytest.approx(percent / 100)


@pytest.mark.parametrize("text", ["5", "%", "-1%", "101%", "five%", ""])
def test_share_refuses_the_rest(text):
    with pytest.raises(ValueError, match="percentage"):
        parse_share(text)


def test_numbers_as_people_read_them():
    assert show_bytes(512) == "512 B"
    assert show_bytes(3 * 2**30) == "3.00 GiB"
    assert show_count(1234567) == "1,234,567"
    assert show_percent(0.0353) == "3.53 %"
    assert show_percent(0.00007) == "0.007 %"
    assert show_seconds(75) == "1 min 15 s"
    assert show_seconds(7200) == "2 h 00 min"


def test_what_steers_a_terminal_is_only_shown():
    from peftkit.units import printable

    assert printable("a\x1b[2Jb\u202ec\n\td") == "a<1B>[2Jb<202E>c\n\td"
    assert printable("café 日本") == "café 日本"


@given(st.integers(1, 5000))
def test_divisors_are_all_there_are(number):
    assert divisors(number) == [size for size in range(number, 0, -1) if number % size == 0]


def test_divisors_of_large_numbers_take_no_time():
    assert divisors(2**31 - 1) == [2**31 - 1, 1]


def test_foreign_texts_are_shown_in_part():
    assert shorten("a" * 60) == "a" * 60
    assert shorten("a" * 61) == "a" * 57 + "..."
    assert join_names(["a", "b"]) == "a, b"
    assert join_names(["a", "b", "c" * 99, "d"], max_names=3) == f"a, b, {'c' * 57}..., 1 more"
