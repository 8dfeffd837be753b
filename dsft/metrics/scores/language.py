"""Languages of texts, and what words are in each."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from dsft.metrics.answers import is_chinese
from dsft.types import HAN

AUTO, ENGLISH, CHINESE, OTHER = "auto", "en", "zh", "other"

UNSPACED = frozenset({"ja", "ko", "th", "lo", "km", "my", "bo"})
"""Languages beside Chinese whose words are not parted by spaces, or not always; they go by characters."""

LANGUAGE = re.compile(r"auto|other|[a-z]{2,3}")

_WORD = re.compile(rf"{HAN}|(?:(?!{HAN})[^\W_])+")
_CHARACTER = re.compile(r"[^\W_]")
_LETTER = re.compile(r"[^\W\d_]")


def told(language: str, references: Sequence[str]) -> str:
    """The language of a record: what was said; or, where that is `auto`, what its references show.

    `zh` where they have more Chinese characters than other letters, else `en` where all letters are ASCII, else
    `other`.
    """
    if language != AUTO:
        return language
    text = "".join(references)
    if is_chinese(text):
        return CHINESE
    return ENGLISH if all(letter.isascii() for letter in _LETTER.findall(text)) else OTHER


def words(text: str, language: str) -> list[str]:
    """The words of a text, in small letters, full-width letters and digits as their narrow forms (NFKC), without
    punctuation.

    A Chinese character is a word wherever it stands; of languages that are written without spaces every letter and
    digit is one; else runs of letters and digits are.
    """
    pattern = _CHARACTER if language in UNSPACED else _WORD
    return pattern.findall(unicodedata.normalize("NFKC", text).lower())
