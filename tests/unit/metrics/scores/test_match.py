"""Short answers and numbers, by hand; `test_answers` has the rules of SQuAD and CMRC."""

from fractions import Fraction

import pytest

from dsft.metrics.scores import SCORES
from dsft.metrics.scores.match import last_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7", 7), ("5-3", 3), ("5 - 3", 3), ("so -3", -3), ("-5", -5), ("5−3 is −2", -2), ("=-2", -2),
        ("x is $-5", -5), ("-$5.50", Fraction(-11, 2)), ("￥１２", 12), ("f(2)-3", 3),
        ("#### 1,234", 1234), ("#### $-7\nThat was 3 steps.", -7), ("#### Step\n42", 42),
        ("1 #### 2\n#### 3 apples", 3),
        (r"so \boxed{42} and 7", 42), (r"\boxed{1} then \boxed{2}", 2), (r"\boxed{\frac{3}{4}}.", Fraction(3, 4)),
        (r"\boxed{\text{about } {12}} 5", 12), (r"$\boxed{-\dfrac{1}{2}}$", Fraction(-1, 2)), (r"\boxed{9", 9),
        ("3/4", Fraction(3, 4)), ("3 / 4", Fraction(3, 4)), ("50%", Fraction(1, 2)), (r"50\%", Fraction(1, 2)),
        ("１２．５", Fraction(25, 2)), ("５０％", Fraction(1, 2)), ("１，２３４元", 1234), ("得３，４００米", 3400),
        ("答案是12个。", 12), ("先算3，400个", 400), (".5", Fraction(1, 2)), ("1,2", 2), ("1,2345", 2345),
        ("25 m²", 25), ("none", None), ("", None), ("1/0", None), ("1/0.0", None), ("7.", 7), ("**7**", 7),
        ("1,000,000.25", Fraction("1000000.25")), ("9" * 5000, None), ("-", None), ("%", None), ("十二", None),
    ],
)  # fmt: skip
def test_the_last_number(text, number):
    found = last_number(text)
    assert (found and found.value) == number


@pytest.mark.parametrize(
    ("said", "references", "right"),
    [
        ("it is 7.0", ["six 6", "7"], 1),
        ("eight", ["8"], 0),
        ("0.75", ["3/4"], 1),
        ("0.333", ["1/3"], 0),
        ("50%", ["50%"], 1),
        ("50%", ["0.5"], 1),
        ("50", ["50%"], 1),
        ("5%", ["0.5"], 0),
        ("1200", ["1,200"], 1),
        ("我算出是１，２００。", ["#### 1200"], 1),
        ("", ["3"], 0),
        ("1" * 5000, ["1"], 0),
    ],
)
def test_numbers_match(said, references, right):
    found = SCORES["number"].of_record(said, references)
    assert found == {"number": right, "number_read": bool(said) and any(c.isdigit() for c in said) and len(said) < 1000}


def test_a_reference_without_a_number_is_refused():
    with pytest.raises(ValueError, match="number: there is no number in the reference 'twelve'"):
        SCORES["number"].statistics("12", ["twelve"])


def test_answers_go_by_the_rules_of_their_language():
    assert SCORES["answer"].of_record("The Moon!", ["sun", "moon"]) == {"exact": 1, "token_f1": 1}
    assert SCORES["answer"].of_record("月亮上", ["月亮"]) == {"exact": 0, "token_f1": pytest.approx(0.8)}
    assert SCORES["answer"].of_record("", [""]) == {"exact": 1, "token_f1": 1}
    assert (SCORES["answer"].signature("zh"), SCORES["answer"].signature("en")) == ("rules:CMRC 2018", "rules:SQuAD")
