"""Scores of generated texts: each a file, or a value in one, and an entry here."""

from dsft.metrics.scores import diversity, match, rouge, sacre, sentence_bleu
from dsft.metrics.scores.score import Score

SCORES: dict[str, Score] = {
    "bleu": sacre.bleu,
    "chrf": sacre.chrf,
    "chrf_words": sacre.chrf_words,
    "ter": sacre.ter,
    "rouge": rouge.rouge,
    "rouge_stemmed": rouge.rouge_stemmed,
    **sentence_bleu.scores,
    "answer": match.answer,
    "number": match.number,
    "diversity": diversity.diversity,
}
"""All of them by name."""

__all__ = ["SCORES", "Score"]
