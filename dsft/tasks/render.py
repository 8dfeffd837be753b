"""A conversation becomes token ids and the weight with which each of them is learnt.

Everything is decided on characters of a rendered text, which is then tokenised once. So the ids are those that the
model sees at inference, and no piece is ever tokenised out of its context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from transformers import PreTrainedTokenizerFast

from dsft.config.schema import DataConfig, OnRewrittenHistory, Reasoning, TrainOn
from dsft.data.sources import BadRecord
from dsft.errors import UserError
from dsft.tasks import reasoning
from dsft.tasks.conversation import Conversation
from dsft.tasks.manner import Manner, manner
from dsft.tasks.template import Span, chat_template, special_at, specials, turn_end_text
from dsft.tasks.turns import Mode, Passage, Writer, grouped, rewriting

Weighted = tuple[Span, float]

SPLIT = "split, as the chat template rewrites history (data.on_rewritten_history=split)"
ONLY_LAST = "with turns that are not learnt, as the chat template rewrites history (data.on_rewritten_history=last)"
UNHEARD = "with a weight on a turn that is not learnt (data.train_on=weights learns it)"
STRIPPED = "without their reasoning (data.reasoning=strip)"
RENAMED = "with tool call ids rewritten as the chat template wants them"


@dataclass
class Rendering:
    """Tokens of one text.

    Attributes:
        columns: `ids`, int32, and `weights`, float32, 0 where a token is not learnt; shape (tokens,).
        cuts: Tokens at which a turn of somebody begins behind one of the assistant, rising; int64.
    """

    columns: dict[str, np.ndarray]
    cuts: np.ndarray


@dataclass(frozen=True)
class Text:
    """A rendered text.

    Attributes:
        text: All of it.
        spans: What is learnt, and how much it counts; a later one holds where two meet.
        cuts: Characters where a turn of the assistant is over.
    """

    text: str
    spans: list[Weighted]
    cuts: list[int]


def render(conversation: Conversation, tokenizer: PreTrainedTokenizerFast, data: DataConfig) -> list[Rendering]:
    """Tokens of a conversation, untruncated, and what each of them counts; several where history is rewritten.

    A chat is rendered by the tokenizer's chat template. `assistant` supervises what the assistant writes in each of
    its turns, the turn's end token included and the white space after that excluded; `last_assistant` only in the
    last; `weights` in each turn of anybody that carries a weight too; `all` everything. A plain text is learnt as a
    whole, followed by the tokenizer's end-of-sequence token.

    Raises:
        BadRecord: The template refuses the conversation, does not write one of its fields, or rewrites history though
            that is not wanted.
        UserError: There is no chat template, or it is broken as such.
    """
    if not tokenizer.is_fast:
        raise UserError("the tokenizer is a slow one, without offsets of its tokens; a model with a fast one is needed")
    if conversation.text is not None:
        return [_plain(conversation, tokenizer)]
    if not tokenizer.chat_template:
        raise UserError(
            f"{conversation.origin}: the record is a chat, but the tokenizer has no chat template; give one with "
            "model.chat_template=FILE, take an instruction-tuned model, or give records with a `text` field"
        )
    try:
        return [_tokens(text, tokenizer, conversation.weight) for text in _texts(conversation, tokenizer, data)]
    except ValueError as problem:
        chat_template(tokenizer, conversation.tools).refuse_broken()
        raise BadRecord(conversation.origin, str(problem)) from problem


def _plain(conversation: Conversation, tokenizer: PreTrainedTokenizerFast) -> Rendering:
    ids = list(tokenizer(conversation.text, verbose=False)["input_ids"])
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        raise BadRecord(
            conversation.origin,
            f"field `text` begins with {tokenizer.bos_token}, which the tokenizer writes too: remove it from the text",
        )
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    weights = np.full(len(ids), conversation.weight, np.float32)
    return Rendering({"ids": np.asarray(ids, np.int32), "weights": weights}, np.empty(0, np.int64))


def _tokens(text: Text, tokenizer: PreTrainedTokenizerFast, weight: float) -> Rendering:
    encoding = tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts, ends = _bounds(encoding["offset_mapping"])
    weights = np.zeros(len(ends), np.float32)
    for (begin, end), counts in text.spans:
        weights[(starts < end) & (ends > begin)] = weight * counts
    cuts = np.unique(np.searchsorted(starts, text.cuts))
    return Rendering({"ids": np.asarray(encoding["input_ids"], np.int32), "weights": weights}, cuts)


def _bounds(offsets: list[Span]) -> tuple[np.ndarray, np.ndarray]:
    """Where each token begins and ends.

    Byte-level tokenizers give each token of a split character the whole character, and may leave leading spaces out
    of a token's offsets: a token of spaces alone is then empty, and begins where the one before it ends.
    """
    starts, ends = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets)).reshape(-1, 2).T
    reached = np.concatenate([[0], np.maximum.accumulate(ends)[:-1]])
    return np.where(starts == ends, np.minimum(starts, reached), starts), ends


def _texts(conversation: Conversation, tokenizer: PreTrainedTokenizerFast, data: DataConfig) -> list[Text]:
    """What is rendered of a chat, and what is learnt of it."""
    if data.reasoning is Reasoning.strip:
        conversation = _stripped(conversation)
    template = chat_template(tokenizer, conversation.tools)
    end = turn_end_text(tokenizer)
    counts = _counts(conversation, data.train_on)
    learnt = [turn for turn, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    turns = [turn for turn in learnt if counts[turn]]
    writer = Writer(template, conversation.messages, conversation.tools, specials(tokenizer), end)
    how = manner(conversation, writer, turns)
    writer = replace(writer, messages=how.form.messages(conversation.messages))
    passages = [writer.passage(turn, how.modes.get(turn, Mode()), _thought(conversation, turn)) for turn in turns]
    _refuse_missing(how)
    if how.form.ids != "given":
        conversation.notes.add(RENAMED)
    if data.train_on is TrainOn.all:
        return [_everything(conversation, writer, counts)]
    groups = _chosen(grouped(passages), data.on_rewritten_history, conversation)
    made = [_group(group, conversation, counts, data.reasoning) for group in groups] or [Text("", [], [])]
    whole = groups and groups[-1][-1].turn == len(conversation.messages) - 1
    text = groups[-1][-1].text if whole else writer.whole()
    if not groups or text.startswith(groups[-1][-1].text[: groups[-1][-1].end]):
        made[-1] = replace(made[-1], text=text)
    if data.train_on is TrainOn.weights:
        others = [turn for turn, count in enumerate(counts) if count and turn not in learnt]
        made[-1].spans.extend((_content(writer, made[-1].text, turn), counts[turn]) for turn in others)
    return made


def _counts(conversation: Conversation, train_on: TrainOn) -> list[float]:
    """What a token of each message counts, before the record's own weight."""
    messages = conversation.messages
    last = max(turn for turn, message in enumerate(messages) if message["role"] == "assistant")
    counts = []
    for turn, message in enumerate(messages):
        carried = conversation.weight_of(turn)
        learnt = train_on is TrainOn.all or (message["role"] == "assistant" and turn >= conversation.context)
        if train_on is TrainOn.last_assistant:
            learnt = turn == last
        if train_on is TrainOn.weights:
            learnt = learnt or carried is not None
        if carried and not learnt:
            conversation.notes.add(UNHEARD)
        counts.append((1.0 if carried is None else carried) if learnt else 0.0)
    return counts


def _thought(conversation: Conversation, turn: int) -> str | None:
    """A turn's reasoning, wherever it stands."""
    message = conversation.messages[turn]
    return message.get("reasoning_content") or reasoning.apart(message["content"] or "").reasoning.strip() or None


def _stripped(conversation: Conversation) -> Conversation:
    """The conversation without reasoning."""
    messages = []
    for given in conversation.messages:
        message = dict(given)
        if message["role"] == "assistant":
            thought = message.pop("reasoning_content", None)
            parts = reasoning.apart(message["content"] or "")
            if parts.closed:
                message["content"] = parts.answer
            if thought or parts.closed:
                conversation.notes.add(STRIPPED)
            if not message.get("tool_calls") and not (message["content"] or "").strip():
                raise ValueError("a turn of the assistant is nothing but reasoning (data.reasoning=strip)")
        messages.append(message)
    return replace(conversation, messages=messages)


def _refuse_missing(how: Manner) -> None:
    if how.problem:
        raise ValueError(how.problem)
    if how.missing:
        names = ", ".join(f"`{name}`" for name in how.missing)
        last = how.missing[0].rpartition(".")[2].partition("[")[0]
        field = "tools" if how.missing[0].startswith("tools.") else last
        field = "tool_calls" if ".tool_calls" in how.missing[0] else field
        raise ValueError(
            f"the chat template does not write {names} where it belongs, so that the model would not learn it. Choose "
            f"a template that knows it with model.chat_template=FILE, or leave it out with data.ignore_fields=[{field}]"
        )


def _chosen(
    groups: list[list[Passage]], on_rewritten: OnRewrittenHistory, conversation: Conversation
) -> list[list[Passage]]:
    """The groups of passages that examples are made of."""
    if len(groups) < 2:
        return groups
    if on_rewritten is OnRewrittenHistory.error:
        raise ValueError(
            f"{rewriting(groups[0][-1], groups[-1][-1])}\nChoose data.on_rewritten_history=split or last, or "
            "data.train_on=last_assistant."
        )
    conversation.notes.add(SPLIT if on_rewritten is OnRewrittenHistory.split else ONLY_LAST)
    return groups if on_rewritten is OnRewrittenHistory.split else groups[-1:]


def _group(group: list[Passage], conversation: Conversation, counts: list[float], policy: Reasoning) -> Text:
    """The text in which all passages of a group stand, and their spans."""
    spans: list[Weighted] = []
    for passage in group:
        thought = _thought(conversation, passage.turn) if policy is Reasoning.mask else None
        for span in passage.spans:
            spans += [(part, counts[passage.turn]) for part in _without(passage.text, span, thought)]
    return Text(group[-1].text, spans, [passage.end for passage in group])


def _without(text: str, span: Span, thought: str | None) -> Iterator[Span]:
    """The parts of a span around its reasoning."""
    found = reasoning.place(text[slice(*span)], thought) if thought else None
    if found is None:
        if thought:
            raise ValueError("a turn's reasoning does not stand in it as it was given (data.reasoning=mask)")
        yield span
        return
    yield from ((b, e) for b, e in ((span[0], span[0] + found[0]), (span[0] + found[1], span[1])) if b < e)


def _everything(conversation: Conversation, writer: Writer, counts: list[float]) -> Text:
    """The whole text, every character of which counts 1, but for what messages that carry a weight say."""
    text = writer.whole()
    spans: list[Weighted] = [((0, len(text)), 1.0)]
    for turn, count in enumerate(counts):
        if count != 1:
            spans.append((_content(writer, text, turn), count))
    return Text(text, spans, [])


def _content(writer: Writer, text: str, turn: int) -> Span:
    """Where a message's content stands in the whole text, with the turn's end token where one follows.

    Raises:
        ValueError: It does not stand there as it was given.
    """
    content, marker = (writer.messages[turn]["content"] or "").strip(), "zqmarkerqz"
    marked = [*writer.messages]
    marked[turn] = marked[turn] | {"content": marker}
    other, _ = writer.template.write(marked, writer.tools)
    at = other.find(marker)
    if not content or at < 0 or not (text.startswith(other[:at]) and text.startswith(content, at)):
        raise ValueError(f"turn {turn + 1} carries a weight, and the chat template does not write it as it was given")
    end = at + len(content)
    return at, end + len(special_at(text, end, writer.specials))
