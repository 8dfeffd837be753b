"""Masked language modelling: encoders adapted to raw text (Devlin et al. 2019, arXiv:1810.04805)."""

from __future__ import annotations

import re
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from dsft.config.schema import OnOverflow, TaskConfig
from dsft.errors import UserError
from dsft.metrics import Metric
from dsft.model.kind import MASKED
from dsft.tasks import texts
from dsft.tasks.conversation import Conversation, plain_text
from dsft.tasks.fit import fit
from dsft.tasks.forward import Forward
from dsft.tasks.nll import perplexity, token_metrics
from dsft.tasks.task import Context, Outcome, Sampling, Task, View
from dsft.types import HAN, IGNORE_INDEX, Batch, Dropped, Example

MASKED_SHARE, RANDOM_SHARE = 0.8, 0.1
"""Of the tokens that are predicted: the share that the mask token stands for, and that another token stands for. The
rest stay as they are."""

CHINESE = re.compile(f"{HAN}+")
WORD = re.compile(r"[^\W_]+|[^\w\s]|_")
"""A run of letters and digits, or any other character that is no space."""


GUESSES = 5
"""Tokens that are told of each place that is filled."""

NO_TEXT = "no tokens but special ones"


def encode(record: Conversation, context: Context) -> list[Example | Dropped] | Dropped:
    """A text's tokens between the tokenizer's special ones, and which of them can be predicted.

    Raises:
        UserError: The tokenizer has no mask token, or `data.max_length` holds nothing but special tokens.
    """
    tokenizer, data, written = context.tokenizer, context.data, record.text or ""
    if tokenizer.mask_token_id is None:
        raise UserError("task=masked_lm needs a tokenizer with a mask token, and that of model.path has none.")
    if not record.weight:
        return Dropped(texts.NO_WEIGHT)
    encoding = tokenizer(
        written, return_offsets_mapping=True, return_special_tokens_mask=True, truncation=False, verbose=False
    )
    ids, inside = np.array(encoding["input_ids"], np.int32), ~np.array(encoding["special_tokens_mask"], bool)
    if not inside.any():
        return Dropped(NO_TEXT)
    text = slice(int(inside.argmax()), len(ids) - int(inside[::-1].argmax()))
    columns = {"ids": ids[text], "maskable": ~np.isin(ids[text], tokenizer.all_special_ids)}
    if context.task.whole_words:
        columns["words"] = _words(written, encoding["offset_mapping"][text])
    before, after = ids[: text.start], ids[text.stop :]
    make = partial(_framed, before=before, after=after, share=context.task.mask_share, weight=record.weight)
    overflow = OnOverflow.split if data.on_overflow is OnOverflow.auto else data.on_overflow
    parts = fit(columns, make, data.max_length, overflow, record.origin, frame=len(before) + len(after))
    if isinstance(parts, Dropped) or len(parts) > 1 or (isinstance(parts[0], Example) and parts[0].weight):
        return parts
    return Dropped(NO_TEXT)


def _framed(
    columns: dict[str, np.ndarray], before: np.ndarray, after: np.ndarray, share: float, weight: float
) -> Example:
    """A part of a text with the special tokens around it; its weight is that of the record for each token predicted."""
    outside = {"ids": (before, after), "maskable": (before < 0, after < 0), "words": (before * 0 - 1, after * 0 - 1)}
    whole = {
        name: np.concatenate([outside[name][0], column, outside[name][1]]).astype(column.dtype)
        for name, column in columns.items()
    }
    return Example(whole, tokens=len(whole["ids"]), weight=weight * _count(whole["maskable"], share))


def _count(maskable: np.ndarray, share: float) -> int:
    """How many tokens are predicted, of which of them can be."""
    return max(1, round(share * int(maskable.sum()))) if maskable.any() else 0


def _words(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """The number of each token's word, int32, shape (tokens,): Chinese as rjieba segments it, else letters and digits.

    Raises:
        UserError: There is Chinese text, and rjieba is not installed.
    """
    starts = np.full(len(text) + 1, -1, dtype=np.int32)
    for match in WORD.finditer(text):
        starts[match.start() : match.end()] = match.start()
    for match in CHINESE.finditer(text):
        at = match.start()
        for word in _segment(match[0]):
            starts[at : at + len(word)] = at
            at += len(word)
    # a token may begin with the space before its word
    first = [next((c for c in range(b, e) if starts[c] >= 0), b) for b, e in offsets]
    return starts[first]


def _segment(text: str) -> list[str]:
    try:
        import rjieba
    except ImportError:
        raise UserError(
            "task.whole_words=true with Chinese text needs the package rjieba, which finds the words: pip install "
            "'dsft[zh]'; or leave task.whole_words out."
        ) from None
    return rjieba.cut(text)


def inputs(example: Example, view: View, context: Context) -> dict[str, np.ndarray]:
    """Ids of which some are hidden, and as their labels what stood there.

    What is hidden is drawn from seed, epoch and example. The first view of an evaluation hides as training does; each
    further one hides a single token, for pseudo-perplexity.
    """
    ids = example.ids.astype(np.int64)
    labels = np.full_like(ids, IGNORE_INDEX)
    weights, pseudo = np.ones(len(ids), np.float32), np.zeros(len(ids), np.float32)
    places = np.flatnonzero(example.columns["maskable"])
    if view.number:
        chosen = places[view.number - 1 : view.number]
        weights[chosen], pseudo[chosen] = 0, 1
        labels[chosen], ids[chosen] = ids[chosen], context.tokenizer.mask_token_id
    else:
        random = np.random.default_rng([context.seed, view.epoch + 1, example.number])
        count = _count(example.columns["maskable"], context.task.mask_share)
        chosen = _chosen(random, places, count, example.columns.get("words"))
        # whole words may be some tokens more or fewer than the example weighs
        weights[chosen] = example.weight / len(chosen)
        labels[chosen] = ids[chosen]
        ids[chosen] = _hidden(random, ids[chosen], context.tokenizer)
    return {"input_ids": ids, "labels": labels, "target_weights": weights, "target_pseudo": pseudo}


def _chosen(random: np.random.Generator, places: np.ndarray, count: int, words: np.ndarray | None) -> np.ndarray:
    """Which of `places` are predicted: `count` of them, or whole words, of which only a first one goes beyond it."""
    if words is None:
        return np.sort(random.permutation(places)[:count])
    _, word_of, sizes = np.unique(words[places], return_inverse=True, return_counts=True)
    taken, total = np.zeros(len(sizes), bool), 0
    for word in random.permutation(len(sizes)):
        if total == 0 or total + sizes[word] <= count:
            taken[word], total = True, total + sizes[word]
    return places[taken[word_of]]


def _hidden(random: np.random.Generator, ids: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """What stands in place of these tokens."""
    draw, others = random.random(len(ids)), random.choice(_ordinary(tokenizer, len(tokenizer)), len(ids))
    return np.select(
        [draw < MASKED_SHARE, draw < MASKED_SHARE + RANDOM_SHARE], [tokenizer.mask_token_id, others], default=ids
    )


@lru_cache(maxsize=4)
def _ordinary(tokenizer: PreTrainedTokenizerFast, size: int) -> np.ndarray:
    """Ids of all tokens that are not special."""
    return np.setdiff1d(np.arange(size), tokenizer.all_special_ids)


def loss(forward: Forward, batch: Batch, settings: TaskConfig) -> Outcome:
    """Summed negative log-likelihood of the hidden tokens, in nats, and the same of those that were hidden alone."""
    nll = forward.nll(batch)
    pseudo = batch.tensors.get("target_pseudo", batch.tensors["target_weights"] * 0).double()
    pseudo_sums = {"pseudo_loss": (nll.each * pseudo).sum(), "pseudo_tokens": pseudo.sum()}
    return Outcome(nll.total, {"correct": nll.correct, **pseudo_sums})


def views(example: Example, number: int, context: Context) -> int:
    """One, and one for each token of the examples over which pseudo-perplexity is formed."""
    limit = context.eval.pseudo_perplexity
    counted = limit is None or number < limit
    return 1 + int(example.columns["maskable"].sum()) * counted


def sample(sampling: Sampling, example: Example, context: Context) -> dict[str, str]:
    """A text with hidden tokens, as it stood, and with the model's first guesses in their places."""
    made, tokenizer = inputs(example, View(), context), context.tokenizer
    at = np.flatnonzero(made["labels"] != IGNORE_INDEX)
    hidden, filled = example.ids.astype(np.int64), example.ids.astype(np.int64)
    hidden[at] = tokenizer.mask_token_id
    ids = torch.from_numpy(hidden)[None].to(sampling.device)
    guesses = sampling.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, at].argmax(-1)
    filled[at] = guesses.cpu().numpy()
    shown = example.columns["maskable"]
    text = slice(int(shown.argmax()), len(shown) - int(shown[::-1].argmax()))
    return {
        "prompt": tokenizer.decode(hidden[text]),
        "reference": tokenizer.decode(example.ids[text]),
        "answer": tokenizer.decode(filled[text]),
    }


def write(sampling: Sampling, record: Conversation, context: Context) -> dict[str, Any]:
    """A text with the model's first guesses where it has mask tokens, and the likeliest tokens at each of them.

    Raises:
        ValueError: It has no mask token, or is too long.
    """
    tokenizer = context.tokenizer
    ids = torch.tensor([tokenizer(record.text, verbose=False)["input_ids"]], device=sampling.device)
    (at,) = torch.nonzero(ids[0] == tokenizer.mask_token_id, as_tuple=True)
    if not len(at):
        raise ValueError(f"its text has no {tokenizer.mask_token} to be filled")
    if ids.shape[1] > context.data.max_length:
        raise ValueError(f"{ids.shape[1]} tokens, and data.max_length is {context.data.max_length}")
    logits = sampling.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, at]
    logits[:, tokenizer.all_special_ids] = -torch.inf
    best = logits.float().softmax(-1).topk(GUESSES)
    ids[0, at] = best.indices[:, 0]
    guesses = [
        [{"token": tokenizer.decode([token]), "probability": chance} for token, chance in zip(*each)]
        for each in zip(best.indices.tolist(), best.values.tolist())
    ]
    return {"prediction": tokenizer.decode(ids[0].tolist(), skip_special_tokens=True), "guesses": guesses}


_METRICS = token_metrics("hidden")

METRICS = {
    "loss": _METRICS["loss"],
    "perplexity": _METRICS["perplexity"],
    "pseudo_perplexity": Metric(
        "exp of nats per token",
        "Pseudo-perplexity",
        "{:,.4g}",
        ("pseudo_loss", "pseudo_tokens"),
        perplexity,
        better="lower",
        needs="eval.pseudo_perplexity",
        meaning="each token hidden alone (arXiv:1910.14659); left out with `eval.pseudo_perplexity=0`",
    ),
    "token_accuracy": _METRICS["token_accuracy"],
}

TASK = Task(
    shapes={("text",): plain_text},
    encode=encode,
    inputs=inputs,
    loss=loss,
    kind=MASKED,
    metrics=METRICS,
    target="masked_tokens",
    settings=frozenset(
        {"model.logits_chunk", "task.mask_share", "task.whole_words", "eval.pseudo_perplexity", "train.samples"}
    ),
    encoded=frozenset({"mask_share", "whole_words"}),
    views=views,
    sample=sample,
    write=write,
    asks_by=frozenset({"data.max_length"}),
)
