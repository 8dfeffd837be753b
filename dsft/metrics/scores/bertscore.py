"""BERTScore (Zhang et al. 2020, arXiv:1904.09675): words of a text that are nearest to those of another, by embeddings.

As its authors' package `bert-score` has it, neither weighted by rarity nor rescaled by a baseline. The encoder is a
directory; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dsft.errors import UserError
from dsft.metrics.metric import SHOWN, judged
from dsft.metrics.scores.score import TEXTS, Choices, Maker, Score, means

NAMES = ("bertscore_precision", "bertscore_recall", "bertscore", "bertscore_cut")


class Embedded(NamedTuple):
    """A text as an encoder sees it.

    Attributes:
        vectors: An embedding of length 1 for each token, special ones among them, shape (tokens, width).
        counted: Which tokens are of the text, bool, shape (tokens,). The others are only there to be matched.
        cut: Whether the text was longer than the encoder reads.
    """

    vectors: np.ndarray
    counted: np.ndarray
    cut: bool = False


def matched(said: Embedded, right: Embedded) -> tuple[float, float, float]:
    """Precision, recall and F1: means over a text's tokens of the cosine with the nearest one of the other text.

    Args:
        said: What was written.
        right: A reference.

    Returns:
        All 0 where one of them has no tokens, and 1 where neither has.
    """
    some = said.counted.any(), right.counted.any()
    if not all(some):
        return (float(some[0] == some[1]),) * 3
    near = said.vectors @ right.vectors.T
    precision, recall = float(near.max(1)[said.counted].mean()), float(near.max(0)[right.counted].mean())
    return precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0.0


class _Encoder:
    """A model and its tokenizer, on the CPU in fp32, so that a number depends on no other device.

    Raises:
        UserError: There is no such directory, or what is in it cannot be loaded.
    """

    def __init__(self, path: str, layer: int) -> None:
        from transformers import AutoModel, AutoTokenizer

        place = Path(path).expanduser()
        if not path or not place.is_dir():
            raise UserError(
                f"encoder={path or '(none)'}: bertscore needs a directory with an encoder and its tokenizer, as "
                "save_pretrained of transformers writes them"
            )
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
            model = AutoModel.from_pretrained(place, local_files_only=True, dtype=torch.float32)
        except (OSError, ValueError) as problem:
            raise UserError(f"encoder={path}: it cannot be loaded: {problem}") from problem
        if model.config.is_encoder_decoder:
            raise UserError(f"encoder={path}: bertscore needs an encoder, and this is one with a decoder")
        self.model, layers = model.eval(), model.config.num_hidden_layers
        if not (1 <= layer <= layers or layer == -1):
            raise UserError(f"layer={layer}: the encoder has {layers} layers; -1 is the last")
        self.layer = layers if layer == -1 else layer
        limits = [self.tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
        self.longest = min(limit for limit in limits if limit)

    @torch.no_grad()
    def embed(self, text: str) -> Embedded:
        """Embeddings of a text's tokens, as many as the encoder reads."""
        whole = len(self.tokenizer(text, verbose=False)["input_ids"])
        made = self.tokenizer(text, truncation=True, max_length=self.longest, return_special_tokens_mask=True)
        counted = np.array(made["special_tokens_mask"]) == 0
        if not counted.any():
            return Embedded(np.zeros((0, 1), np.float32), counted)
        ids = torch.tensor([made["input_ids"]])
        states = self.model(input_ids=ids, output_hidden_states=True).hidden_states[self.layer][0]
        return Embedded(torch.nn.functional.normalize(states, dim=-1).numpy(), counted, whole > len(counted))


@cache
def encoder(path: str, layer: int) -> _Encoder:
    """The encoder, loaded once."""
    return _Encoder(path, layer)


def _make(choices: Choices) -> Score:
    def count(prediction: str, references: Sequence[str], language: str) -> Sequence[float]:
        embed = encoder(choices.encoder, choices.layer).embed
        said, *right = (embed(text) for text in (prediction, *references))
        best = max((matched(said, one) for one in right), key=lambda three: three[2])
        return [1.0, *best, any(text.cut for text in (said, *right))]

    def sign(language: str) -> str:
        made = encoder(choices.encoder, choices.layer)
        return f"{Path(choices.encoder).name}_L{made.layer}_no-idf|rescaled:no"

    return Score(
        {
            "bertscore_precision": judged("mean over records", "BERTScore precision", "bertscore_precision", "{:.4f}"),
            "bertscore_recall": judged("mean over records", "BERTScore recall", "bertscore_recall", "{:.4f}"),
            "bertscore": judged("mean over records", "BERTScore F1", "bertscore", "{:.4f}", **SHOWN),
            "bertscore_cut": judged("share of records", "Texts cut for BERTScore", "bertscore_cut", better="lower"),
        },
        count,
        means(*NAMES),
        sign,
    )


bertscore = Maker(_make, TEXTS | {"encoder", "layer"})
