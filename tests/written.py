"""What models write, drawn by chance: predictions with references that share much with them."""

from __future__ import annotations

import random

WORDS = "the cat sat on a mat in the big red house , and it was very happy today . running quickly nationally".split()
HAN = "春天来了大地复苏万物生长我们去山上看花今天很高兴，。"

Written = tuple[str, list[str], str]
"""Prediction, references, language."""


def pairs(count: int, chinese: bool = False, most: int = 3, longest: int = 18, lines: bool = False) -> list[Written]:
    """Predictions with one to `most` references; some are empty, some short, some in `lines`."""
    draw, made = random.Random(0), []
    alphabet, between = (HAN, "") if chinese else (WORDS, " ")
    if lines:
        alphabet = [*alphabet, *["\n"] * 3]
    for _ in range(count):
        own = [draw.choice(alphabet) for _ in range(draw.randint(0 if draw.random() < 0.1 else 1, longest))]
        references = []
        for _ in range(draw.randint(1, most)):
            other = [word if draw.random() < 0.7 else draw.choice(alphabet) for word in own] or [draw.choice(alphabet)]
            references.append(between.join(other[: draw.randint(1, len(other))] + other[: draw.randint(0, 2)]))
        made.append((between.join(own), references, "zh" if chinese else "en"))
    return made
