"""The daily part of a product leaves no pair of values out."""

import itertools

from pairwise import cover


def test_every_pair_meets_in_few_cases():
    dimensions = (1, 2), (1, 3), ("zero0", "zero1", "zero2", "zero3"), ("none", "bfd"), "abcde"
    chosen = cover(*dimensions)
    assert len(chosen) < 30 < len(list(itertools.product(*dimensions)))
    assert chosen == cover(*dimensions)
    for (a, first), (b, second) in itertools.combinations(enumerate(dimensions), 2):
        assert {(case[a], case[b]) for case in chosen} == set(itertools.product(first, second))
