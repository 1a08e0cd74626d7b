import pytest

from peftkit.data.formats import Example
from peftkit.data.gate.languages import language_of
from peftkit.data.rows.scan_text import is_mojibake, redacted_secret, scan_text
from peftkit.data.rows.tally import MAX_NAMED_ROWS, Tally


def seen(text, **fields):
    tally = Tally()
    scan_text(Example("f:1", completion=text, **fields), tally)
    return set(tally.to_json())


@pytest.mark.parametrize("text", ["café", "£1 costs", "naïve – “quoted”", "日本語", "Привет", "50 °C", "señor Ñ"])
def test_real_text_is_no_mojibake(text):
    assert not is_mojibake(text)
    assert seen(text) == set()


@pytest.mark.parametrize("text", ["café", "“quoted”", "Привет", "naïve"])
def test_utf8_read_as_a_code_page_is_mojibake(text):
    raw = text.encode("utf-8")
    wrong = "".join(bytes([byte]).decode("cp1252", errors="ignore") or chr(byte) for byte in raw)
    assert is_mojibake(wrong)
    assert seen(wrong) >= {"mojibake"}


def test_replacement_and_control_characters():
    assert seen("a\ufffdb") == {"mojibake"}
    assert seen("a\x07b") == {"control-characters"}
    assert seen("a\tb\nc\r\n") == set()


@pytest.mark.parametrize(
    "parts",
    [
        ("-----BEGIN RSA ", "PRIVATE KEY-----"),
        ("AKIA", "ABCDEFGHIJKLMNOP"),
        ("sk-", "proj-", "a1B2c3D4" * 4),
        ("ghp_", "a1B2c3D4" * 5),
        ("hf_", "abcdefgh" * 5),
        ("xoxb-", "1234567890-abcdef"),
        ("eyJ", "hbGciOiJIUzI1.", "eyJ", "zdWIiOiIxMjM0.", "SflKxwRJSMeK"),
    ],
)
def test_secrets_are_found_and_never_shown_whole(parts):
    secret = "".join(parts)
    tally = Tally()
    scan_text(Example("f:1", completion=f"my key is {secret}."), tally)
    [(where, what)] = tally.of("secrets").rows
    assert where == "f:1"
    assert secret not in what
    assert len(redacted_secret(secret)) < len(secret) + 20


def test_words_that_only_look_like_secrets_are_none():
    assert seen("the task-oriented skill, sk-learn, AKIA alone, hf_hub and eyJ") == set()
    assert seen("write to ann@example.org") == {"emails"}
    assert seen("@home a@b") == set()


def chat(*roles):
    return Example("f:1", messages=tuple({"role": role, "content": "x"} for role in roles))


@pytest.mark.parametrize(
    ("roles", "odd"),
    [
        (("user", "assistant"), False),
        (("system", "user", "assistant", "tool", "assistant", "user", "assistant"), False),
        (("user", "user", "assistant"), True),
        (("user", "assistant", "assistant"), True),
        (("user", "system", "assistant"), True),
        (("user", "tool", "assistant"), True),
    ],
)
def test_turns_out_of_order(roles, odd):
    tally = Tally()
    scan_text(chat(*roles), tally)
    assert bool(tally.of("roles").count) is odd


def test_a_tally_counts_all_and_names_the_first():
    tally = Tally()
    for number in range(MAX_NAMED_ROWS + 5):
        tally.add("emails", f"f:{number}", "x")
    again = Tally.from_json(tally.to_json())
    assert (again.of("emails").count, len(again.of("emails").rows)) == (MAX_NAMED_ROWS + 5, MAX_NAMED_ROWS)
    both = again.joined(tally)
    assert (both.of("emails").count, len(both.of("emails").rows)) == (2 * (MAX_NAMED_ROWS + 5), MAX_NAMED_ROWS)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is the name of this card, and how do you use it?", "English"),
        ("Wie kann ich mich mit der Karte auf der Seite anmelden, und was ist das?", "German"),
        ("Comment est-ce que je peux trouver les mots qui sont dans une liste ?", "French"),
        ("¿Cómo es posible que los pagos no estén en la cuenta, y por qué se pierden?", "Spanish"),
        ("Как дела", "Cyrillic script"),
        ("これは何ですか", "Japanese"),
        ("今天天气很好", "Chinese"),
        ("ok", ""),
        ("12 + 7 = 19", ""),
    ],
)
def test_languages(text, language):
    assert language_of(text) == language
