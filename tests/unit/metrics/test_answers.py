"""Answers are judged as the scripts of SQuAD and CMRC judge them; every number here is worked out by hand."""

import numpy as np
import pytest

from dsft.metrics.answers import is_chinese, no_answer_threshold, score

ENGLISH = [
    ("Paris", ["Paris"], 1, 1),
    ("the Paris", ["Paris"], 1, 1),
    ("PARIS.", ["paris"], 1, 1),
    ("an apple a day", ["apple day"], 1, 1),
    ("theory", ["ory"], 0, 0),
    ("in Paris", ["Paris"], 0, 2 / 3),
    ("Paris, France", ["France"], 0, 2 / 3),
    ("the red fox", ["red fox and owl"], 0, 2 * 2 / (2 + 4)),
    ("fox fox", ["fox"], 0, 2 / 3),
    ("fox fox", ["fox owl fox"], 0, 4 / 5),
    ("U.S.", ["US"], 1, 1),
    ("well-known", ["wellknown"], 1, 1),
    ("$5", ["5"], 1, 1),
    ("10,000", ["10000"], 1, 1),
    ("moon", ["sun"], 0, 0),
    ("moon", ["sun", "the moon"], 1, 1),
    ("bright moon", ["sun", "moon"], 0, 2 / 3),
    ("", ["moon"], 0, 0),
    ("", [], 1, 1),
    ("moon", [], 0, 0),
    ("the", ["moon"], 0, 0),
    ("moon", ["the"], 0, 0),  # what is nothing by the rules is no answer: the question has none
    ("the", ["a"], 1, 1),
    ("a", [], 1, 1),
    ("“moon”", ["moon"], 0, 0),  # SQuAD leaves out the punctuation of ASCII alone
    ("moon\u00a0 hill", ["moon hill"], 1, 1),
]
CHINESE = [
    ("在山上", ["在山上"], 1, 1),
    ("在山上。", ["在山上"], 1, 1),
    ("《月亮》", ["月亮"], 1, 1),
    ("山上", ["在山上"], 0, 4 / 5),
    ("在山上的月亮", ["月亮"], 0, 2 * 2 / 8),
    ("月山亮", ["月亮"], 0, 2 * 1 / 5),  # the longest run counts, and not all characters
    ("亮月", ["月亮"], 0, 2 * 1 / 4),
    ("花", ["月"], 0, 0),
    ("花", ["月", "花"], 1, 1),
    ("", ["月亮"], 0, 0),
    ("", [], 1, 1),
    ("月亮", [], 0, 0),
    ("1998年", ["1998"], 0, 2 * 1 / 3),  # a number is one word
    ("3.14 米", ["3.14米"], 0, 1),
    ("Windows 系统", ["windows系统"], 0, 1),
    ("NBA-篮球", ["nba篮球"], 1, 1),
    ("，。", ["月亮"], 0, 0),
    ("（北京）", ["北京"], 1, 1),
]


@pytest.mark.parametrize(("given", "right", "exact", "f1"), ENGLISH)
def test_by_the_rules_of_squad(given, right, exact, f1):
    assert score(given, right, chinese=False) == pytest.approx((exact, f1))


@pytest.mark.parametrize(("given", "right", "exact", "f1"), CHINESE)
def test_by_the_rules_of_cmrc(given, right, exact, f1):
    assert score(given, right, chinese=True) == pytest.approx((exact, f1))


@pytest.mark.parametrize(
    ("text", "chinese"),
    [
        ("月亮在山上。", True),
        ("The moon", False),
        ("NBA球星姚明", True),
        ("Yao Ming (姚明)", False),
        ("12 。", False),
        ("", False),
    ],
)
def test_which_rules_hold_is_told_by_the_text(text, chinese):
    assert is_chinese(text) == chinese


def test_the_best_threshold_wins_most():
    """Against every threshold that makes a difference."""
    random = np.random.default_rng(0)
    for size in range(1, 30):
        margins = random.integers(-4, 5, size).astype(float)
        gains = random.choice([-1.0, -0.5, 0.5, 1.0], size)

        def won(threshold, margins=margins, gains=gains):
            return gains[margins > threshold].sum()

        best = max(won(threshold) for threshold in [margins.min() - 1, *margins])
        assert won(no_answer_threshold(margins, gains)) == pytest.approx(best)
