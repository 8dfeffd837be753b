"""Languages of texts, what words are in each, and what makes texts alike that are written in different ways."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import regex
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

from dsft.errors import UserError
from dsft.types import HAN

AUTO, ENGLISH, CHINESE, OTHER = "auto", "en", "zh", "other"

UNSPACED = frozenset({"ja", "ko", "th", "lo", "km", "my", "bo"})
"""Languages beside Chinese whose words are not parted by spaces, or not always; they go by characters."""

LANGUAGE = re.compile(r"auto|other|[a-z]{2,3}")

SCRIPTS = {
    "ja": re.compile("[\u3040-\u30ff\uff66-\uff9f]"),
    CHINESE: re.compile(HAN),
    "th": re.compile("[\u0e00-\u0e7f]"),
    "lo": re.compile("[\u0e80-\u0eff]"),
    "km": re.compile("[\u1780-\u17ff]"),
    "my": re.compile("[\u1000-\u109f]"),
    "bo": re.compile("[\u0f00-\u0fff]"),
}
"""Letters by which a language without spaces is known; those of Japanese are its syllables."""

_WORD = regex.compile(rf"{HAN}|(?!{HAN})[\p{{L}}\p{{N}}](?:(?!{HAN})[\p{{L}}\p{{N}}\p{{M}}])*")
_CHARACTER = regex.compile(r"[\p{L}\p{N}]\p{M}*")
_LETTER = re.compile(r"[^\W\d_]")


def told(language: str, references: Sequence[str]) -> str:
    """The language of a record: what was said; or, where that is `auto`, what its references show.

    `zh` where they have more Chinese characters than other letters; one of `SCRIPTS` likewise, where Japanese is what
    has a syllable for every ten Chinese characters; else `en` where all letters are ASCII, else `other`.

    Raises:
        ValueError: It is no language.
    """
    if not LANGUAGE.fullmatch(language):
        raise ValueError(f"the language {language!r} is auto, other, or a code of two or three letters, such as zh")
    if language != AUTO:
        return language
    letters = "".join(_LETTER.findall("".join(references)))
    if letters.isascii():
        return ENGLISH
    counts = {own: len(script.findall(letters)) for own, script in SCRIPTS.items()}
    if counts["ja"] * 10 >= counts[CHINESE]:
        counts["ja"] += counts.pop(CHINESE) if counts["ja"] else 0
    most = max(counts, key=counts.__getitem__)
    return most if 2 * counts[most] > len(letters) else OTHER


def words(text: str, language: str) -> list[str]:
    """The words of a text, in small letters, full-width letters and digits as their narrow forms (NFKC), without
    punctuation.

    A Chinese character is a word wherever it stands; of languages that are written without spaces every letter and
    digit is one; else runs of letters and digits are. Marks, such as vowel signs, belong to the letter before.
    """
    pattern = _CHARACTER if language in UNSPACED else _WORD
    return pattern.findall(unicodedata.normalize("NFKC", text).lower())


def tokens(text: str, name: str) -> list[str]:
    """The tokens of a text, punctuation among them, by one of `TOKENIZERS`."""
    return TOKENIZERS[name](text.rstrip())


def by_language(language: str) -> str:
    """The tokenizer that sacrebleu has for a language's BLEU, of those that need nothing else installed."""
    return "zh" if language == CHINESE else "char" if language in UNSPACED else "13a"


def _forgetful(tokenizer: Callable[[str], str]) -> Callable[[str], list[str]]:
    """A tokenizer of sacrebleu that does not keep the last 65,536 texts; each of ours is asked for once or twice."""

    def made(text: str) -> list[str]:
        found = tokenizer(text).split()
        for kind in (type(tokenizer), TokenizerRegexp):
            vars(kind)["__call__"].cache_clear()
        return found

    return made


def _segmented(text: str) -> list[str]:
    return [word for word in _segmenter()(text) if not word.isspace()]


@cache
def _segmenter() -> Any:
    try:
        import rjieba
    except ImportError:
        raise UserError(
            "the tokenizer `words` needs the package rjieba, which finds Chinese words: pip install 'dsft[zh]'; or "
            "take zh or char."
        ) from None
    return rjieba.cut


@cache
def _converter() -> Any:
    try:
        from opencc import OpenCC
    except ImportError:
        raise UserError(
            "normalize=[simplified] needs the package opencc, which knows traditional characters: pip install "
            "'dsft[zh]'; or leave it out, and traditional and simplified characters are different ones."
        ) from None
    return OpenCC("t2s")


TOKENIZERS: dict[str, Callable[[str], list[str]]] = {
    "13a": _forgetful(Tokenizer13a()),
    "zh": _forgetful(TokenizerZh()),
    "char": lambda text: [character for character in text if not character.isspace()],
    "words": _segmented,
}
"""13a, zh and char as of sacrebleu, and the words that rjieba finds."""

NORMALIZATIONS: dict[str, Callable[[str], str]] = {
    "width": lambda text: unicodedata.normalize("NFKC", text),
    "simplified": lambda text: _converter().convert(text),
    "case": str.lower,
}
"""Full-width and half-width forms as one (Unicode's NFKC), traditional characters as simplified ones (OpenCC's `t2s`),
capital letters as small ones."""


def normalized(text: str, names: Sequence[str]) -> str:
    """The text after these of `NORMALIZATIONS`, in the order of those."""
    for name, change in NORMALIZATIONS.items():
        if name in names:
            text = change(text)
    return text


def ready(tokenizer: str, normalize: Sequence[str]) -> None:
    """Find out whether what was chosen is there.

    Raises:
        UserError: It is not, or its package is not installed.
    """
    for what, name, known in (
        ("tokenizer", tokenizer, [AUTO, *TOKENIZERS]),
        *(("normalize", one, [*NORMALIZATIONS]) for one in normalize),
    ):
        if name not in known:
            raise UserError(f"{what}: there is no {name!r}; there are {', '.join(known)}")
    if tokenizer == "words":
        _segmenter()
    normalized("", normalize)
