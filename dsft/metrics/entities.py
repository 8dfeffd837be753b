"""Entities in sequences of tags, and how many of them are found; seqeval is the judge.

Tags are a prefix and a type, `B-PER`: BIO (B, I, O) and BIOES (E ends, S is single; BILOU's L and U, BMES's M are the
same). What is no legal sequence is read by one rule, that of CoNLL's own script: an entity begins at a B or S; after O,
E or S; and where the type changes; it ends before the next beginning or O, and behind E or S.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

Entity = tuple[str, int, int]
"""Type, and words (begin, end exclusive)."""

OUTSIDE = "O"
_SAME = {"L": "E", "U": "S", "M": "I"}
_PREFIXES = "BIESLUM"


def split(tag: str) -> tuple[str, str]:
    """Prefix (B, I, E, S or O) and type of a tag; a prefix alone has the type `_`."""
    if tag == OUTSIDE:
        return OUTSIDE, ""
    prefix, _, kind = tag.partition("-")
    return _SAME.get(prefix, prefix), kind or "_"


def is_scheme(tags: Iterable[str]) -> bool:
    """Whether these are tags of entities, and not plain labels of words."""
    given = {tag for tag in tags if tag != OUTSIDE}
    return bool(given) and all(tag[0] in _PREFIXES and tag[1:2] in ("-", "") for tag in given)


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of a sentence, in order."""
    found: list[Entity] = []
    begun, kind, before = 0, "", OUTSIDE
    for place, tag in enumerate([*tags, OUTSIDE]):
        prefix, own = split(tag)
        inside = kind and prefix in "IE" and own == kind and before not in "ES"
        if kind and not inside:
            found.append((kind, begun, place))
            kind = ""
        if prefix != OUTSIDE and not inside:
            begun, kind = place, own
        before = prefix
    return found


def repaired(tags: Sequence[str]) -> list[str]:
    """The legal sequence that holds the same entities: in BIOES where a tag is of that, else in BIO."""
    closed = any(split(tag)[0] in "ES" for tag in tags)
    made = [OUTSIDE] * len(tags)
    for kind, begin, end in entities(tags):
        name = "" if kind == "_" else f"-{kind}"
        made[begin:end] = [f"B{name}"] + [f"I{name}"] * (end - begin - 1)
        if closed:
            made[end - 1] = f"E{name}" if end - begin > 1 else f"S{name}"
    return made


class Found:
    """Entities of many sentences that are right, found and there, by type; each counts what its sentence does."""

    def __init__(self) -> None:
        self.right: Counter[str] = Counter()
        self.found: Counter[str] = Counter()
        self.there: Counter[str] = Counter()

    def add(self, predicted: Sequence[str], true: Sequence[str], count: float = 1.0) -> None:
        """Count a sentence's tags, as many of each."""
        ours, theirs = set(entities(predicted)), set(entities(true))
        for counter, which in ((self.right, ours & theirs), (self.found, ours), (self.there, theirs)):
            for kind, _, _ in which:
                counter[kind] += count  # type: ignore[assignment]

    def numbers(self) -> dict[str, float]:
        """`precision`, `recall` and `f1` over all entities, `f1_macro` over types; an entity is right with its type and
        both of its ends. Nothing where there are none at all."""
        types = self.there.keys() | self.found.keys()
        if not types:
            return {}
        whole = _three(*(sum(counter.values()) for counter in (self.right, self.found, self.there)))
        return whole | {"f1_macro": sum(row["f1"] for row in self.by_type().values()) / len(types)}

    def by_type(self) -> dict[str, dict[str, float]]:
        """For each type `precision`, `recall`, `f1` and `support`."""
        return {
            kind: _three(self.right[kind], self.found[kind], self.there[kind]) | {"support": float(self.there[kind])}
            for kind in sorted(self.there.keys() | self.found.keys())
        }


def by_tag(table: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """For each plain tag `precision`, `recall`, `f1` and `support` in words, of those that a word has or is given.

    Args:
        table: Words that have the tag of the row and were given that of the column, shape (tags, tags).
        names: Of the tags.
    """
    right, found, there = (part.tolist() for part in (np.diag(table), table.sum(0), table.sum(1)))
    return {
        name: _three(right[n], found[n], there[n]) | {"support": there[n]}
        for n, name in enumerate(names)
        if found[n] or there[n]
    }


def _three(right: float, found: float, there: float) -> dict[str, float]:
    return {
        "precision": right / found if found else 0.0,
        "recall": right / there if there else 0.0,
        "f1": 2 * right / (found + there) if found + there else 0.0,
    }
