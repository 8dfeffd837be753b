"""Examples become a batch, in one of two layouts; all that the device would have to be asked for is found out here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dsft.model.attention import cumulative
from dsft.model.noise import token_keys
from dsft.tasks.task import Context, Task, View
from dsft.types import IGNORE_INDEX, Batch, Example

DECODER = "decoder_"
"""How the names of arrays begin that are laid out as an encoder-decoder's second text is, as `labels` then are too."""

DOCUMENT = "document_"
"""How the names of arrays begin of which each document has one, of any shape, the same for all."""

TARGET = "target_"
"""How the names of arrays begin that a batch holds only where there are targets."""


@dataclass(frozen=True)
class Collator:
    """Lays examples out as batches of a task.

    Args:
        task: Makes arrays of each example.
        context: What it may know.
        padded: Whether each document gets a row of its own, padded to the longest; else all are laid end to end.
    """

    task: Task
    context: Context
    padded: bool

    def train(self, examples: Sequence[Example], step: tuple[int, int]) -> Batch:
        """A batch to train on; `step` is its epoch, and the number of its optimizer step in it.

        No examples make a filler, one token without a target: ranks under ZeRO must take the same number of forward
        passes, and it makes up for those that a rank has no rows for.
        """
        return self._batch([(example, View(step[0])) for example in examples], step)

    def evaluate(self, examples: Sequence[Example], views: Sequence[int] | None = None) -> Batch:
        """A batch to evaluate; `views` says for each example which of its views (`Task.views`) is meant.

        Only an example's first view counts in `weight` and `examples`.
        """
        return self._batch([(e, View(number=n)) for e, n in zip(examples, views or [0] * len(examples))], (0, 0))

    def _batch(self, documents: list[tuple[Example, View]], step: tuple[int, int]) -> Batch:
        arrays = [self.task.inputs(example, view, self.context) for example, view in documents] or [_FILLER]
        lengths = [len(made["input_ids"]) for made in arrays]
        numbers = [example.number for example, _ in documents] or [0]
        counted = [example for example, view in documents if view.number == 0]
        width = max(lengths) if self.padded else None
        written = [len(made["labels"]) for made in arrays] if f"{DECODER}labels" in arrays[0] else []
        tensors: dict[str, Any] = _targets(arrays, written or lengths, max(written) if written else width)
        tensors |= self._laid_out(arrays, lengths, width)
        weight = float(sum(example.weight for example in counted))
        even = bool((tensors.get(f"{TARGET}weights", np.ones(1)) == 1).all())
        tensors["weight"] = np.float64(weight)
        tensors["lengths"] = np.array(lengths)
        tensors["noise"] = token_keys(self.context.seed, step, lengths, numbers, width and max([width, *written]))
        return Batch(
            {name: torch.as_tensor(array) for name, array in tensors.items()},
            lengths,
            weight,
            examples=len(counted),
            numbers=numbers,
            step=step,
            padded=self.padded,
            even=even,
        )

    def _laid_out(self, arrays: list[dict], lengths: list[int], width: int | None) -> dict[str, Any]:
        """Arrays of every token in the batch's layout, and what says where the documents are."""
        positions = [np.arange(length) for length in lengths]
        made = {}
        for name in arrays[0]:
            if name == "labels" or name.startswith(TARGET):
                continue
            parts = [one[name] for one in arrays]
            if name.startswith(DOCUMENT):
                made[name] = np.stack(parts)
                continue
            # filling is masked, so any token will do where there is none for it
            pad = self.context.tokenizer.pad_token_id or 0 if name in ("input_ids", f"{DECODER}labels") else 0
            made[name] = _lay(parts, max(map(len, parts)) if name.startswith(DECODER) else width, pad)
        if width is None:
            return made | {"position_ids": _lay(positions, None), "documents": cumulative(lengths)}
        return made | {"attention_mask": (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)}


_FILLER = {"input_ids": np.zeros(1, np.int64), "labels": np.full(1, IGNORE_INDEX)}


def _lay(parts: list[np.ndarray], width: int | None, pad: int = 0) -> np.ndarray:
    """Arrays of the documents' tokens, shape (1, tokens) or (documents, width)."""
    if width is None:
        return np.concatenate(parts)[None]
    laid = np.full((len(parts), width), pad, dtype=parts[0].dtype)
    for row, part in zip(laid, parts):
        row[: len(part)] = part
    return laid


def _targets(arrays: list[dict], lengths: list[int], width: int | None) -> dict[str, np.ndarray]:
    """Where the targets are among all positions of the layout, row after row, and what is said of each.

    Without any there is one at the first position, whose `target_weights` are 0; nothing where documents have targets
    and not tokens.
    """
    if "labels" not in arrays[0]:
        return {}
    begins = np.arange(len(lengths)) * width if width is not None else np.concatenate([[0], np.cumsum(lengths)[:-1]])
    at = [np.flatnonzero(one["labels"] != IGNORE_INDEX) for one in arrays]
    if not any(len(places) for places in at):
        names = {name for one in arrays for name in one if name.startswith(TARGET)}
        nothing = {name: np.zeros(1, np.float32) for name in names | {f"{TARGET}weights"}}
        return {"target_at": np.zeros(1, np.int64), "target_ids": np.zeros(1, np.int64), **nothing}
    made = {"target_at": np.concatenate([begin + places for begin, places in zip(begins, at)])}
    made["target_ids"] = np.concatenate([one["labels"][places] for one, places in zip(arrays, at)])
    for name in arrays[0]:
        if name.startswith(TARGET):
            made[name] = np.concatenate([one[name][places] for one, places in zip(arrays, at)])
    return made
