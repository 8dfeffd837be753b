"""New tokens of a tokenizer: read from a file, added, and taken apart into the pieces that the old vocabulary has."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from dsft.errors import UserError
from dsft.runtime.content import disguise

MARKER = re.compile(r"<[|｜].+[|｜]>")
"""A control marker such as `<|im_end|>`: a special token, which decoding can leave out. All others are text."""

BLOCK = 1 << 24
"""Ids that are looked at at once."""

LISTED = 8
"""Tokens that a message names; all are counted."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's new tokens: those that the model was not trained with.

    Attributes:
        first: Id of the first of them; all later ids are new too.
        pieces: For each id from `first` on, the ids (all below `first`) of the token's text under the old vocabulary;
            empty where the tokenizer skips an id.
        texts: For each of these ids, the token's text; None where the tokenizer skips an id.
        added: Those of the texts that were added to the tokenizer, in the order of their ids.
        known: Texts that were asked for and are one token of the old vocabulary already.
        repeated: Texts that were asked for more than once.
    """

    first: int
    pieces: tuple[tuple[int, ...], ...] = ()
    texts: tuple[str | None, ...] = ()
    added: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Rows that an embedding must have: the largest id and one."""
        return self.first + len(self.pieces)

    @property
    def identity(self) -> str:
        """What was added, briefly, for ranks to agree on; differs where any token or their order does."""
        digest = hashlib.sha256("\n".join(self.added).encode("utf-8")).hexdigest()[:8]
        return f"{len(self.added)} tokens ({digest})" if self.added else "none"

    def state_dict(self) -> dict[str, Any]:
        """All that the rows of new tokens are made from, as JSON values."""
        return {"first": self.first, "pieces": [[*pieces] for pieces in self.pieces]}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Vocabulary:
        """The vocabulary that `state_dict` described, without texts: enough to give a model its rows again."""
        return cls(state["first"], tuple(tuple(pieces) for pieces in state["pieces"]))

    def audit(self, ids: np.ndarray) -> dict[str, list[str]]:
        """What became of the tokens that were asked for, and which new ones are in none of `ids`, for `audit.json`.

        Args:
            ids: All token ids of the training data, in memory or mapped.
        """
        seen = np.zeros(self.size, dtype=bool)
        for start in range(0, len(ids) if self.pieces else 0, BLOCK):
            seen[ids[start : start + BLOCK]] = True
        unseen = [text for place, text in enumerate(self.texts, self.first) if text is not None and not seen[place]]
        return {"added": [*self.added], "known": [*self.known], "repeated": [*self.repeated], "unseen": unseen}

    def notes(self, audit: dict[str, list[str]], trained: bool) -> Iterator[str]:
        """The audit in words, a line each.

        Args:
            audit: What `audit` returned.
            trained: Whether the rows of new tokens are trained.
        """
        said = {
            "added": "added to the tokenizer",
            "known": "left out, being tokens already",
            "repeated": "given more than once",
            "unseen": f"of {len(self.pieces)} new tokens occur nowhere in the data",
        }
        yield from (
            f"new tokens: {len(audit[key])} {words}: {_list(audit[key])}" for key, words in said.items() if audit[key]
        )
        if self.pieces and not trained:
            yield (
                f"new tokens: all {len(self.pieces)} keep the mean of their pieces, since tuning.new_tokens=false does "
                "not train their rows"
            )


def read(file: str) -> list[str]:
    """The tokens of a UTF-8 text file, one a line, in order, repeated ones included.

    A byte-order mark and blank lines are left out.

    Raises:
        UserError: The file cannot be read, holds no token, or a line is none: spaces at its ends, control characters.
    """
    where = f"data.new_tokens={file}"
    try:
        path = Path(file).expanduser()
        if problem := disguise(path, text=True):
            raise UserError(f"{where}: this is {problem}.")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.") from error
    except OSError as error:
        raise UserError(
            f"{where}: cannot be read: {error.strerror}. Give a text file with a token per line."
        ) from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    for number, line in lines:
        if line != line.strip():
            raise UserError(
                f"{where}: line {number}: {line!r} begins or ends with a space, which would be part of the token. "
                "Remove it."
            )
        if any(unicodedata.category(character) == "Cc" for character in line):
            raise UserError(
                f"{where}: line {number}: {line!r} holds a tab or another control character. Give one token per line "
                "and nothing else."
            )
    if not lines:
        raise UserError(f"{where}: it holds no token. Give one per line, or leave data.new_tokens out.")
    return [line for _, line in lines]


def extend(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str], rows: int) -> Vocabulary:
    """Add tokens to a tokenizer, and tell what is new in it for a model with `rows` embeddings.

    An added token is matched in text as it is written, before the tokenizer normalises anything, inside words too.
    Tokens that the tokenizer brought itself, but that have no row in the model, are new as well.

    Args:
        tokenizer: Changed in place.
        tokens: Texts to add; repeated ones, and those that are a token already, are left out and reported.
        rows: Rows of the model's embedding; may be more than the tokenizer's ids.

    Raises:
        UserError: A token cannot be added, or taken apart; it is named.
    """
    before = 1 + max(tokenizer.get_vocab().values())
    first = min(before, rows)
    if not tokens and before <= rows:
        return Vocabulary(first)
    if not tokenizer.is_fast:
        raise UserError(
            f"data.new_tokens: no tokens can be added to a {type(tokenizer).__name__}, which has no fast version. "
            "Leave data.new_tokens out, or use another model."
        )
    there = {text: _is_known(text, tokenizer.backend_tokenizer) for text in dict.fromkeys(tokens)}
    known, added = ([text for text, is_known in there.items() if is_known is wanted] for wanted in (True, False))
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=bool(MARKER.fullmatch(t))) for t in added])
    _check_whole(tokenizer, added)
    new = {place: text for text, place in tokenizer.get_vocab().items() if place >= first}
    texts = tuple(new.get(place) for place in range(first, 1 + max(new, default=first - 1)))
    return Vocabulary(
        first,
        pieces=_pieces(texts, tokenizer, first),
        texts=texts,
        added=tuple(added),
        known=tuple(known),
        repeated=tuple(text for text, times in Counter(tokens).items() if times > 1),
    )


def _pieces(texts: Sequence[str | None], tokenizer: PreTrainedTokenizerFast, first: int) -> tuple[tuple[int, ...], ...]:
    """Ids of each text under the vocabulary of ids below `first`; none where there is no text.

    An added token is text like any other. An entry of the tokenizer's model (as BPE) is written in that model's own
    letters, which may stand for bytes: so it is taken apart by the model alone.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < first]
    _cut(state["model"], first)
    # truncation and padding are left over from whoever called the tokenizer last
    old = Tokenizer.from_str(json.dumps(state | {"truncation": None, "padding": None}))
    outside = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    model = Tokenizer.from_str(json.dumps(state | outside | {"added_tokens": []}))
    is_added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    found = []
    for text in texts:
        pieces = (old if text in is_added else model).encode(text or "", add_special_tokens=False).ids
        if text is not None and not pieces:
            raise UserError(f"{text!r} is a new token, but nothing at all under the old vocabulary. Take it out.")
        found.append(tuple(pieces))
    return tuple(found)


def _cut(model: dict[str, Any], first: int) -> None:
    """Leave the ids below `first` in a tokenizer's model (BPE, Unigram, WordPiece or WordLevel)."""
    if isinstance(model["vocab"], list):
        model["vocab"] = model["vocab"][:first]
        return
    model["vocab"] = {text: place for text, place in model["vocab"].items() if place < first}
    if "merges" in model:
        pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if {*pair, "".join(pair)} <= model["vocab"].keys()]


def _is_known(text: str, backend: Tokenizer) -> bool:
    """Whether the text is one token already.

    Raises:
        UserError: The vocabulary holds an entry of this name that stands for another text, as byte-level ones do.
    """
    named = backend.token_to_id(text)
    ids = backend.encode(text, add_special_tokens=False).ids
    for place in {named, *(ids if len(ids) == 1 else [])}:
        if place is not None and backend.decode([place], skip_special_tokens=False) == text:
            return True
    if named is not None:
        raise UserError(
            f"data.new_tokens: {text!r} cannot be added: the vocabulary uses this name for another piece of text. "
            "Leave it out."
        )
    return False


def _check_whole(tokenizer: PreTrainedTokenizerFast, added: Sequence[str]) -> None:
    """Make sure that each added text becomes its own token and no other."""
    for text in added:
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        if ids != [tokenizer.convert_tokens_to_ids(text)]:
            raise UserError(
                f"data.new_tokens: {text!r} was added, but the tokenizer still reads it as "
                f"{tokenizer.convert_ids_to_tokens(ids)}. Leave it out."
            )


def _list(texts: Sequence[str]) -> str:
    shown = ", ".join(map(repr, texts[:LISTED]))
    return shown + (f" and {len(texts) - LISTED} more" if len(texts) > LISTED else "")
