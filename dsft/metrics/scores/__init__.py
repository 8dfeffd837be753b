"""Scores of generated texts: each a file, or a value in one, and an entry here."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields

from dsft.errors import UserError
from dsft.metrics.scores import bertscore, diversity, match, rouge, sacre, sentence_bleu, structured
from dsft.metrics.scores.language import ready
from dsft.metrics.scores.score import Choices, Maker, Score, intervals, total

MAKERS: dict[str, Maker] = {
    "bleu": sacre.bleu,
    "chrf": sacre.chrf,
    "chrf_words": sacre.chrf_words,
    "ter": sacre.ter,
    "rouge": rouge.rouge,
    "rouge_stemmed": rouge.rouge_stemmed,
    **sentence_bleu.makers,
    "answer": match.answer,
    "number": match.number,
    "json": structured.json_match,
    "calls": structured.tool_calls,
    "length": diversity.length,
    "diversity": diversity.diversity,
    "bertscore": bertscore.bertscore,
}
"""What makes them, by name."""

SCORES: dict[str, Score] = {name: make(Choices()) for name, make in MAKERS.items()}
"""All of them as they are unless something is chosen."""


def chosen(names: Iterable[str], choices: Choices | None = None) -> dict[str, Score]:
    """The scores of these names as they were chosen.

    Raises:
        UserError: There is no such score; something was chosen that none of them reads, or that is not there.
    """
    names, choices = list(names), choices or Choices()
    for name in names:
        if name not in MAKERS:
            near = difflib.get_close_matches(name, MAKERS, n=1, cutoff=0.0)
            raise UserError(f"scores: there is no {name!r}. Did you mean {near[0]}? There are {', '.join(MAKERS)}")
    read = {one for name in names for one in MAKERS[name].reads}
    for one in fields(choices):
        if getattr(choices, one.name) != one.default and one.name not in read:
            readers = [name for name, maker in MAKERS.items() if one.name in maker.reads]
            raise UserError(f"{one.name} is read by {', '.join(readers)}, and none of them is asked for")
    ready(choices.tokenizer, choices.normalize)
    made = {name: MAKERS[name](choices) for name in names}
    for score in made.values():
        score.signature("en")  # finds out whether all that it counts with is there
    return made


__all__ = ["MAKERS", "SCORES", "Choices", "Maker", "Score", "chosen", "intervals", "total"]
