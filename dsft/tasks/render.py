"""A conversation becomes token ids and a mask of the tokens that are learnt.

Everything is decided on characters of the one rendered text, which is then tokenised once. So the ids are those that
the model sees at inference, and no piece is ever tokenised out of its context.
"""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np
from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from dsft.config.schema import TrainOn
from dsft.data.sources import BadRecord
from dsft.errors import UserError
from dsft.tasks.conversation import Conversation
from dsft.types import Example

Span = tuple[int, int]  # characters, end exclusive

CONTEXT = 40
"""Characters shown on either side of the place where two renderings part."""


def render(conversation: Conversation, tokenizer: PreTrainedTokenizerFast, train_on: TrainOn) -> Example:
    """Token ids of a conversation, untruncated, and which of them are supervised.

    A chat is rendered by the tokenizer's chat template. `assistant` supervises what the assistant writes in each of
    its turns, the turn's end token included and the white space after that excluded; `last_assistant` only in the
    last; `all` everything. A plain text is learnt as a whole, followed by the tokenizer's end-of-sequence token.

    Raises:
        BadRecord: The template refuses the conversation.
        UserError: There is no chat template, it is broken as such, or it has no `{% generation %}` marks and does not
            write a conversation's beginning in the same way once the conversation goes on.
    """
    if not tokenizer.is_fast:
        raise UserError("the tokenizer is a slow one, without offsets of its tokens; a model with a fast one is needed")
    if conversation.text is not None:
        return _plain(conversation.text, tokenizer)
    if not tokenizer.chat_template:
        raise UserError(
            f"{conversation.origin}: the record is a chat, but the tokenizer has no chat template; give one with "
            "model.chat_template=FILE, take an instruction-tuned model, or give records with a `text` field"
        )
    try:
        text, spans = _supervised_text(conversation, tokenizer, train_on)
    except BadRecord:
        _refuse_broken(_template(conversation, tokenizer), tokenizer)
        raise
    answer = str(conversation.messages[-1].get("content") or "").strip()
    if answer and answer not in text:
        _refuse_broken(_template(conversation, tokenizer), tokenizer)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return _example(encoding["input_ids"], _overlap(encoding["offset_mapping"], spans))


def turn_end(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Id of the token with which the chat template ends what an assistant writes.

    It is the first added token after the answer. None where the template writes none, or where there is no template:
    then the turn ends in words, or with the text, and no token says so.
    """
    if not tokenizer.chat_template:
        return None
    answer = "over the hill"
    messages = [{"role": "user", "content": "where is the moon"}, {"role": "assistant", "content": answer}]
    try:
        text, _ = _rendered(Conversation(messages=messages), tokenizer, len(messages))
    except BadRecord:
        return None  # a template that wants more of a conversation; its records will tell
    _, found, tail = text.rpartition(answer)
    # some models add such a token without calling it special; those of white space are no ends
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    places = {token: tail.find(token) for token in {*_specials(tokenizer), *added}}
    ahead = [(place, -len(token), token) for token, place in places.items() if found and place >= 0]
    return tokenizer.convert_tokens_to_ids(min(ahead)[2]) if ahead else None


def _plain(text: str, tokenizer: PreTrainedTokenizerFast) -> Example:
    ids = list(tokenizer(text)["input_ids"])
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return _example(ids, np.ones(len(ids), dtype=bool))


def weighed(columns: dict[str, np.ndarray]) -> Example:
    """The example of `ids` and `supervised`, with its weight: as many tokens as are supervised.

    The first is none of them, as nothing comes before it to predict it from.
    """
    columns["supervised"][:1] = False
    return Example(columns, tokens=len(columns["ids"]), weight=float(columns["supervised"].sum()))


def _example(ids: list[int], supervised: np.ndarray) -> Example:
    return weighed({"ids": np.asarray(ids, dtype=np.int32), "supervised": supervised})


def _supervised_text(
    conversation: Conversation, tokenizer: PreTrainedTokenizerFast, train_on: TrainOn
) -> tuple[str, list[Span]]:
    text, marks = _rendered(conversation, tokenizer, len(conversation.messages))
    if train_on is TrainOn.all:
        return text, [(0, len(text))]
    turns = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    last = turns[-1]
    if train_on is TrainOn.last_assistant:
        turns = [last]
    if not _has_marks(_template(conversation, tokenizer)):
        spans = [_turn_span(conversation, tokenizer, text, turn) for turn in turns]
        return text, [_close(text, span, _specials(tokenizer), "") for span in spans]
    end = _end_token(*_rendered(conversation, tokenizer, last + 1), tokenizer)
    if train_on is TrainOn.last_assistant:
        marks = marks[len(_rendered(conversation, tokenizer, last)[1]) :]
    return text, [_close(text, span, _specials(tokenizer), end) for span in marks]


def _template(conversation: Conversation, tokenizer: PreTrainedTokenizerFast) -> str:
    """The chat template for a conversation; of several by name, `tool_use` where there are tools, else `default`."""
    try:
        return tokenizer.get_chat_template(None, conversation.tools)
    except ValueError as error:
        raise UserError(
            f"the tokenizer has several chat templates ({', '.join(sorted(tokenizer.chat_template))}), and none is "
            "called default. Choose one with model.chat_template=FILE."
        ) from error


def _has_marks(template: str) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def _rendered(
    conversation: Conversation, tokenizer: PreTrainedTokenizerFast, turns: int, prompt: bool = False
) -> tuple[str, list[Span]]:
    """The first `turns` turns as text, and the spans of `{% generation %}` blocks, where the template has any."""
    template = _template(conversation, tokenizer)
    marks = _has_marks(template)
    try:
        texts, spans = render_jinja_template(
            [conversation.messages[:turns]],
            tools=conversation.tools,
            chat_template=template,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=prompt,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # a template is a program
        raise BadRecord(conversation.origin, f"the chat template refuses the conversation: {error}") from error
    return texts[0], spans[0] if marks else []


def _refuse_broken(template: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Blame the template before the record, where it can do nothing with any conversation.

    Raises:
        UserError: It is no valid template, fails on the plainest conversations, or leaves out what is said.
    """
    if fault := _fault(template, tuple(sorted(tokenizer.special_tokens_map.items()))):
        raise UserError(
            f"the chat template (model.chat_template=FILE, or else that of model.path) {fault}. Correct it, or give "
            "another with model.chat_template=FILE."
        )


@lru_cache(maxsize=4)
def _fault(template: str, specials: tuple[tuple[str, str], ...]) -> str | None:
    """What is wrong with a template, as the plainest conversations show; None if it can do with one of them."""
    question, answer = (
        {"role": "user", "content": "where is the moon"},
        {"role": "assistant", "content": "over the hill"},
    )
    faults = []
    for beginning in ([question], [{"role": "system", "content": "be brief"}, question]):
        try:
            texts, _ = render_jinja_template([[*beginning, answer]], chat_template=template, **dict(specials))
        except TemplateSyntaxError as error:
            return f"is no valid Jinja template: line {error.lineno}: {error.message}"
        except Exception as error:
            faults.append(f"fails on every conversation: {error}")
            continue
        if answer["content"] in texts[0]:
            return None
        faults.append("leaves out what the assistant says" if texts[0].strip() else "renders nothing")
    return faults[0]


def _turn_span(conversation: Conversation, tokenizer: PreTrainedTokenizerFast, text: str, turn: int) -> Span:
    """Where in `text` the assistant writes: after the prompt for its turn, up to where the conversation so far ends."""
    before, _ = _rendered(conversation, tokenizer, turn, prompt=True)
    so_far, _ = _rendered(conversation, tokenizer, turn + 1)
    for part, piece in ((f"before turn {turn + 1}", before), (f"up to turn {turn + 1}", so_far)):
        if not text.startswith(piece):
            raise UserError(_where_they_part(conversation, part, piece, text, turn))
    return len(before), len(so_far)


def _where_they_part(conversation: Conversation, part: str, piece: str, text: str, turn: int) -> str:
    parting = (i for i, (left, right) in enumerate(zip(piece, text, strict=False)) if left != right)
    at = next(parting, min(len(piece), len(text)))
    around = slice(max(0, at - CONTEXT), at + CONTEXT)
    last = max(i for i, message in enumerate(conversation.messages) if message["role"] == "assistant")
    remedy = "data.train_on=last_assistant, or " if turn != last else ""
    return (
        f"{conversation.origin}: the chat template writes the conversation {part} differently when it goes on, so "
        f"the assistant's tokens cannot be found. They part at character {at}:\n"
        f"  {part + ':':<20}{piece[around]!r}\n"
        f"  {'whole conversation:':<20}{text[around]!r}\n"
        f"Choose {remedy}a template with {{% generation %}} marks by model.chat_template=FILE."
    )


def _end_token(text: str, marks: list[Span], tokenizer: PreTrainedTokenizerFast) -> str:
    """The special token that follows the last mark of a conversation that ends there; "" if none does."""
    tail = text[marks[-1][1] :] if marks else ""
    return max((special for special in _specials(tokenizer) if tail.startswith(special)), key=len, default="")


def _close(text: str, span: Span, specials: tuple[str, ...], end: str) -> Span:
    """The span from its first character to the end token of the turn, and no further."""
    body = text[slice(*span)].rstrip()
    if body.endswith(specials):
        return span[0], span[0] + len(body)
    return (span[0], span[1] + len(end)) if text.startswith(end, span[1]) else span


def _specials(tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    return _specials_of_size(tokenizer, len(tokenizer))


@lru_cache(maxsize=4)
def _specials_of_size(tokenizer: PreTrainedTokenizerFast, size: int) -> tuple[str, ...]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(sorted({*tokenizer.all_special_tokens, *added} - {""}))


def _overlap(offsets: list[Span], spans: list[Span]) -> np.ndarray:
    """Which tokens hold a character of one of the spans; bool, shape (tokens,).

    Byte-level tokenizers give each token of a split character the whole character, and may leave leading spaces out
    of a token's offsets: a token of spaces alone is then empty, and begins where the one before it ends.
    """
    starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    reached = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]])
    starts = np.where(starts == ends, np.minimum(starts, reached), starts)
    supervised = np.zeros(len(ends), dtype=bool)
    for start, end in spans:
        supervised |= (starts < end) & (ends > start)
    return supervised
