"""The language of a text, by its script and its commonest small words: enough to see a stray one."""

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
for _name, _listed in _WORDS.items():
    for _word in _listed.split():
        _LOOKUP.setdefault(_word, []).append(_name)
_WORD = re.compile(r"[^\W\d_]+")
_LOOKED_AT = 600  # characters
_FEWEST_HITS = 4  # different words


def language_of(text: str) -> str:
    """The likeliest language, or "" where a text has too little to tell."""
    text = text[:_LOOKED_AT]
    if not text.isascii():
        letters = sum(char.isalpha() for char in text)
        for name, first, last in _SCRIPTS:
            if sum(first <= char <= last for char in text) * 3 > letters:
                return name
    scores: dict[str, float] = {}
    hits = {word for word in _WORD.findall(text.lower()) if word in _LOOKUP}
    for word in hits:
        for name in _LOOKUP[word]:
            scores[name] = scores.get(name, 0.0) + 1 / len(_LOOKUP[word])
    if len(hits) < _FEWEST_HITS:
        return ""
    (best, top), *rest = sorted(scores.items(), key=lambda item: -item[1])
    return best if not rest or top >= 1.5 * rest[0][1] else ""
