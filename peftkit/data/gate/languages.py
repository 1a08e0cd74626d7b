"""Language detection by script and by frequent short words: enough to find rows in a stray language."""

from __future__ import annotations

import re

_SCRIPTS = (
    ("Cyrillic script", "\u0400", "\u052f"),
    ("Greek", "\u0370", "\u03ff"),
    ("Hebrew", "\u0590", "\u05ff"),
    ("Arabic script", "\u0600", "\u06ff"),
    ("Devanagari script", "\u0900", "\u097f"),
    ("Thai", "\u0e00", "\u0e7f"),
    ("Japanese", "\u3040", "\u30ff"),
    ("Korean", "\uac00", "\ud7af"),
    ("Chinese", "\u4e00", "\u9fff"),
)
# words that hardly stand in texts of the other languages
_WORDS = {
    "English": "the and is are was were with this that have has from what which they you your how many of",
    "German": "der das und ist nicht ein eine mit von auf für sind wie ich sich auch dem zu wird",
    "French": "le les et est une dans pour que qui sur pas avec des du je vous nous sont au",
    "Spanish": "el los y es una por con para que se las como está pero más su son mi",
    "Italian": "il gli è una per con che di non sono come della nel alla questo più mi anche",
    "Portuguese": "os é uma para com que não se como da em mais são meu você um ao pelo",
    "Dutch": "de het en een van niet met voor zijn dat wat ik hoe aan ook maar deze wordt",
    "Polish": "w nie na się jest że jak ale czy od przez dla tego jego być są można",
    "Swedish": "och är ett att det som inte med för på av jag har till hur när kan",
    "Turkish": "ve bir bu için ile çok var mı değil olarak nasıl kadar daha gibi olan",
}
_LOOKUP: dict[str, list[str]] = {}
for _name, _text in _WORDS.items():
    for _word in _text.split():
        _LOOKUP.setdefault(_word, []).append(_name)
_WORD = re.compile(r"[^\W\d_]+")
_MAX_CHARS = 600  # characters
_MIN_HITS = 4  # different words


def language_of(text: str) -> str:
    """Return the likeliest language of a text, or "" if it is too short to tell.

    A script wins if more than a third of the letters are in its range. Otherwise each of the text's distinct
    frequent words adds 1 / (languages that share it) to each of them; the best language wins with at least
    _MIN_HITS words and 1.5 times the score of the next.

    Example: language_of("what is the name of this city") == "English"
    """
    text = text[:_MAX_CHARS]
    if not text.isascii():
        letters = sum(char.isalpha() for char in text)
        for name, low, high in _SCRIPTS:
            if sum(low <= char <= high for char in text) * 3 > letters:
                return name
    scores: dict[str, float] = {}
    hits = {word for word in _WORD.findall(text.lower()) if word in _LOOKUP}
    for word in hits:
        for name in _LOOKUP[word]:
            scores[name] = scores.get(name, 0.0) + 1 / len(_LOOKUP[word])
    if len(hits) < _MIN_HITS:
        return ""
    (best, best_score), *rest = sorted(scores.items(), key=lambda item: -item[1])
    return best if not rest or best_score >= 1.5 * rest[0][1] else ""
