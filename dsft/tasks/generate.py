"""Texts that a model writes, several prompts at once: greedy, by beams, or drawn, the same whatever shares a batch.

Prompts of like length go together. What is drawn for an answer depends on a seed, its record's number and its own
number, so no batch, order or number of ranks changes it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dsft.errors import UserError
from dsft.tasks import isolation

ROWS, TOKENS = 16, 32_768
"""Of a batch at most, tokens that are yet to be written among them."""

END, STRING, LENGTH = "end", "stop", "length"
"""Why a text ends: by a token that ends turns, by one of `Decoding.stop`, or at its greatest length."""


FAILURES = (RuntimeError, ValueError, IndexError)
"""What a model comes up with where it cannot take a prompt, or has no memory for a batch."""


@dataclass(frozen=True)
class Decoding:
    """How texts are written.

    Attributes:
        max_new_tokens: Tokens of a text at most.
        beams: Beginnings that are followed at once; 1 is greedy.
        temperature: What logits are divided by before a token is drawn; 0 takes the likeliest.
        top_p: Draw from the likeliest tokens that have this probability together; 1 for all.
        top_k: Draw from this many; 0 for all.
        min_p: Draw from those at least this share as likely as the likeliest; 0 for all.
        repetition_penalty: What logits of tokens that came before are divided by where positive, and multiplied by
            where negative (arXiv:1909.05858); 1 for none.
        answers: Texts for each prompt.
        stop: Strings that end a text, and are taken off it.
        seed: What is drawn depends on it.

    Raises:
        UserError: A value is none, or does nothing beside another.
    """

    max_new_tokens: int = 256
    beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    answers: int = 1
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [
            (self.max_new_tokens < 1, f"max_new_tokens={self.max_new_tokens} is a whole number, at least 1"),
            (self.beams < 1, f"beams={self.beams} is a whole number, at least 1"),
            (not 0 <= self.temperature < float("inf"), f"temperature={self.temperature:g} is 0 or more"),
            (not 0 < self.top_p <= 1, f"top_p={self.top_p:g} is above 0, and at most 1"),
            (self.top_k < 0, f"top_k={self.top_k} is a whole number, 0 or more"),
            (not 0 <= self.min_p <= 1, f"min_p={self.min_p:g} is from 0 to 1"),
            (
                not 0 < self.repetition_penalty < float("inf"),
                f"repetition_penalty={self.repetition_penalty:g} is above 0",
            ),
            (self.answers < 1, f"answers={self.answers} is a whole number, at least 1"),
            (not all(self.stop), "stop: a string that ends texts has a character"),
            (self.temperature > 0 and self.beams > 1, f"beams={self.beams} beside temperature: leave one of them out"),
        ]
        drawn = {"top_p": self.top_p != 1, "top_k": self.top_k, "min_p": self.min_p, "answers": self.answers > 1}
        wrong += [
            (bool(given) and not self.temperature, f"{name} does nothing with temperature=0, which draws nothing")
            for name, given in drawn.items()
        ]
        if problem := next((message for is_so, message in wrong if is_so), None):
            raise UserError(problem)


@dataclass(frozen=True)
class Prompt:
    """What a record gives a model to go on from.

    Attributes:
        ids: Its tokens.
        told: What is said of the record beside the answer, in JSON types.
    """

    ids: list[int]
    told: dict[str, Any]


@dataclass(frozen=True)
class Written:
    """A text that a model wrote.

    Attributes:
        text: It, without special tokens.
        stopped: END, STRING or LENGTH.
        tokens: How many it has, that which ended it among them.
    """

    text: str
    stopped: str
    tokens: int


class Draw(LogitsProcessor):
    """Leaves of each row's logits the token that is drawn for it.

    Args:
        decoding: How.
        keys: Of each row (record, answer).
    """

    def __init__(self, decoding: Decoding, keys: list[tuple[int, int]]) -> None:

        self._chances = [random.Random(f"{decoding.seed} {record} {answer}") for record, answer in keys]
        warpers = [
            (decoding.temperature != 1, TemperatureLogitsWarper, decoding.temperature),
            (decoding.top_k > 0, TopKLogitsWarper, decoding.top_k),
            (decoding.top_p < 1, TopPLogitsWarper, decoding.top_p),
            (decoding.min_p > 0, MinPLogitsWarper, decoding.min_p),
        ]
        self._warpers = LogitsProcessorList([make(value) for wanted, make, value in warpers if wanted])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """One number for each row says where, in the sum of probabilities, its token lies."""
        sums = self._warpers(input_ids, scores).double().softmax(-1).cumsum(-1)
        places = torch.tensor([chance.random() for chance in self._chances], dtype=torch.float64, device=sums.device)
        # what has no probability adds nothing to the sum, so that the first sum above the place is of one that has
        chosen = (sums > (places[:, None] * sums[:, -1:])).to(torch.int8).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)


class Penalty(LogitsProcessor):
    """transformers' repetition penalty, which a prompt's padding has no part in.

    Args:
        penalty: `Decoding.repetition_penalty`.
        padding: How many tokens of each row are.
    """

    def __init__(self, penalty: float, padding: list[int]) -> None:
        self._penalty, self._padding = RepetitionPenaltyLogitsProcessor(penalty), padding

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Row by row, as rows have different numbers of tokens; beams of a prompt follow each other."""
        beams = len(input_ids) // len(self._padding)
        rows = [
            self._penalty(input_ids[row : row + 1, self._padding[row // beams] :], scores[row : row + 1])
            for row in range(len(input_ids))
        ]
        return torch.cat(rows)


class Writer:
    """Writes texts.

    Args:
        model: The transformers model, on `device`, in evaluation mode, with empty generation settings.
        device: Where it computes.
        tokenizer: Its tokenizer.
        stop_tokens: Token ids that end a text.
        decoding: How.
        begin: What an encoder-decoder's decoder has read before it writes; None of a model of one side.
        rows: Prompts of a batch at most.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device,
        tokenizer: PreTrainedTokenizerFast,
        stop_tokens: list[int],
        decoding: Decoding,
        begin: list[int] | None = None,
        rows: int | None = None,
    ) -> None:
        self._model, self._device, self._tokenizer = model, device, tokenizer
        self._stops, self._decoding, self._begin = stop_tokens, decoding, begin
        pads = (tokenizer.pad_token_id, *stop_tokens, 0)
        self._pad = next(int(token) for token in pads if token is not None)
        self._rows = rows or ROWS
        self._ragged: bool | None = None
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._positions = None if begin is not None else positions

    def write(self, prompts: Mapping[int, list[int]]) -> Iterator[tuple[int, list[Written] | str]]:
        """Texts for all prompts, as they come.

        Args:
            prompts: Token ids by the number of their record.

        Yields:
            A record's number, and its texts; or why there is none.
        """
        limits = {number: self._limit(ids) for number, ids in prompts.items()}
        for number, limit in limits.items():
            if limit < 1:
                yield number, "the prompt alone fills the model"
        open_ones = [number for number, limit in limits.items() if limit > 0]
        open_ones.sort(key=lambda number: (limits[number], len(prompts[number]), number))
        while open_ones:
            taken = self._batch(open_ones, prompts, limits)
            open_ones = open_ones[len(taken) :]
            yield from self._tried(taken, prompts, limits[taken[0]])

    def _limit(self, ids: list[int]) -> int:
        room = self._decoding.max_new_tokens if self._positions is None else self._positions - len(ids)
        return min(self._decoding.max_new_tokens, room)

    def _batch(self, numbers: list[int], prompts: Mapping[int, list[int]], limits: Mapping[int, int]) -> list[int]:
        """The next of `numbers` that go together: of one limit, within the budget, of one length where need be."""
        first, copies = numbers[0], self._decoding.answers * self._decoding.beams
        taken: list[int] = []
        for number in numbers[: max(1, self._rows // copies)]:
            length = len(prompts[number])
            fits = (len(taken) + 1) * copies * (length + limits[first]) <= TOKENS or not taken
            alike = limits[number] == limits[first]
            if length != len(prompts[first]) and alike and fits:
                alike = self._keeps_padding(prompts[first], prompts[number])
            if not (fits and alike):
                break
            taken.append(number)
        return taken

    def _keeps_padding(self, short: list[int], long: list[int]) -> bool:
        """Whether a prompt is answered in the same way with padding beside it; found out once, by two that can be."""
        if self._ragged is None:
            settings = self._settings(1, output_logits=True, return_dict_in_generate=True)
            try:
                both, alone = (
                    self._model.generate(**self._inputs(given), generation_config=settings).logits[0]
                    for given in ([short, long], [short])
                )
            except FAILURES:
                return False  # the record whose fault it is says so by itself
            self._ragged = isolation.same(both[:1].float(), alone[:1].float())
        return self._ragged

    def _inputs(self, given: list[list[int]]) -> dict[str, Any]:
        """What `generate` is given: prompts with their padding in front, or behind where an encoder reads them."""
        longest = max(map(len, given))
        padding = [[self._pad] * (longest - len(ids)) for ids in given]
        hidden = [[0] * len(pad) for pad in padding]
        front = self._begin is None
        ids = [pad + own if front else own + pad for pad, own in zip(padding, given)]
        mask = [pad + [1] * len(own) if front else [1] * len(own) + pad for pad, own in zip(hidden, given)]
        made = {"input_ids": ids, "attention_mask": mask}
        if self._begin is not None:
            made["decoder_input_ids"] = [self._begin] * len(given)
        return {name: torch.tensor(values, device=self._device) for name, values in made.items()}

    def _settings(self, tokens: int, **more: Any) -> GenerationConfig:
        if self._begin is not None:
            more["decoder_start_token_id"] = self._begin[0]  # else it is put in front once more
        return GenerationConfig(
            max_new_tokens=tokens, do_sample=False, pad_token_id=self._pad, eos_token_id=self._stops or None, **more
        )

    def _tried(
        self, numbers: list[int], prompts: Mapping[int, list[int]], limit: int
    ) -> Iterator[tuple[int, list[Written] | str]]:
        """The texts of a batch; where it fails, those of its halves, down to the record whose fault it is."""
        try:
            texts = self._written(numbers, prompts, limit)
        except FAILURES as problem:
            if len(numbers) > 1:
                half = len(numbers) // 2
                yield from self._tried(numbers[:half], prompts, limit)
                yield from self._tried(numbers[half:], prompts, limit)
                return
            yield numbers[0], f"{type(problem).__name__}: {problem}"
            return
        yield from zip(numbers, texts, strict=True)

    def _written(self, numbers: list[int], prompts: Mapping[int, list[int]], limit: int) -> list[list[Written]]:
        decoding = self._decoding
        keys = [(number, answer) for number in numbers for answer in range(decoding.answers)]
        inputs = self._inputs([prompts[number] for number, _ in keys])
        begun = inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1]
        processors = LogitsProcessorList()
        if decoding.repetition_penalty != 1:
            padding = [0 if self._begin is not None else begun - len(prompts[number]) for number, _ in keys]
            processors.append(Penalty(decoding.repetition_penalty, padding))
        if decoding.temperature:
            processors.append(Draw(decoding, keys))
        more: dict[str, Any] = {"num_beams": decoding.beams}
        if decoding.stop:
            more["stop_strings"] = list(decoding.stop)
        found = self._model.generate(
            **inputs,
            generation_config=self._settings(limit, **more),
            logits_processor=processors,
            tokenizer=self._tokenizer,
        )
        texts = [self._text(row) for row in found[:, begun:].tolist()]
        return [texts[at : at + decoding.answers] for at in range(0, len(texts), decoding.answers)]

    def _text(self, ids: list[int]) -> Written:
        end = next((place + 1 for place, token in enumerate(ids) if token in self._stops), None)
        ids = ids[:end]
        while end is None and ids and ids[-1] == self._pad:  # behind one of the strings that end a text
            ids.pop()
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        cuts = [text.index(string) for string in self._decoding.stop if string in text]
        if cuts:
            return Written(text[: min(cuts)], STRING, len(ids))
        return Written(text, LENGTH if end is None else END, len(ids))
