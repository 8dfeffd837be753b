"""A tokenizer's chat template, as a function from messages to text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from dsft.errors import UserError

Span = tuple[int, int]
"""Characters of a text, end exclusive."""

QUESTION = {"role": "user", "content": "where is the moon"}
ANSWER = {"role": "assistant", "content": "over the hill"}


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with the special tokens that it may write.

    Attributes:
        source: Jinja.
        specials: Names and texts of the tokenizer's special tokens.
    """

    source: str
    specials: tuple[tuple[str, Any], ...]

    @property
    def marks(self) -> bool:
        """Whether `{% generation %}` marks say what the assistant writes."""
        return _has_marks(self.source)

    def write(
        self,
        messages: Sequence[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        prompt: bool = False,
        options: tuple[tuple[str, Any], ...] = (),
    ) -> tuple[str, list[Span]]:
        """The messages as text, and the spans of `{% generation %}` blocks, where the template has any.

        Args:
            messages: Turns.
            tools: Tool definitions.
            prompt: Whether the beginning of the assistant's next turn is written too.
            options: Further variables of the template, such as `enable_thinking`.

        Raises:
            ValueError: The template refuses them.
        """
        try:
            texts, spans = render_jinja_template(
                [list(messages)],
                tools=tools,
                chat_template=self.source,
                return_assistant_tokens_mask=self.marks,
                add_generation_prompt=prompt,
                **dict(self.specials),
                **dict(options),
            )
        except Exception as error:  # a template is a program
            raise ValueError(f"the chat template refuses the conversation: {error}") from error
        return texts[0], spans[0] if self.marks else []

    def refuse_broken(self) -> None:
        """Blame the template before the record, where it can do nothing with any conversation.

        Raises:
            UserError: It is no valid template, fails on the plainest conversations, or leaves out what is said.
        """
        if fault := _fault(self):
            raise UserError(
                f"the chat template (model.chat_template=FILE, or else that of model.path) {fault}. Correct it, or "
                "give another with model.chat_template=FILE."
            )


def chat_template(tokenizer: PreTrainedTokenizerFast, tools: list[dict[str, Any]] | None = None) -> ChatTemplate:
    """The template for a conversation; of several by name, `tool_use` where there are tools, else `default`.

    Raises:
        UserError: There are several, and none is for this.
    """
    try:
        source = tokenizer.get_chat_template(None, tools)
    except ValueError as error:
        raise UserError(
            f"the tokenizer has several chat templates ({', '.join(sorted(tokenizer.chat_template))}), and none is "
            "called default. Choose one with model.chat_template=FILE."
        ) from error
    return ChatTemplate(source, _named_specials(tokenizer, len(tokenizer)))


def specials(tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    """Texts of all special tokens."""
    return _specials_of_size(tokenizer, len(tokenizer))


def special_at(text: str, at: int, specials: Iterable[str]) -> str:
    """The longest special token that a text has at a place; "" if there is none."""
    return max((special for special in specials if text.startswith(special, at)), key=len, default="")


def turn_end(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Id of the token with which the chat template ends what an assistant writes.

    It is the first added token after the answer. None where the template writes none, or where there is no template:
    then the turn ends in words, or with the text, and no token says so.
    """
    text = turn_end_text(tokenizer)
    return tokenizer.convert_tokens_to_ids(text) if text else None


def turn_end_text(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The text of that token."""
    if not tokenizer.chat_template:
        return None
    return _turn_end(tokenizer, chat_template(tokenizer), len(tokenizer))


@lru_cache(maxsize=64)
def _has_marks(source: str) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None


@lru_cache(maxsize=4)
def _turn_end(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, size: int) -> str | None:
    try:
        text, _ = template.write([QUESTION, ANSWER])
    except ValueError:
        return None  # a template that wants more of a conversation; its records will tell
    _, found, tail = text.rpartition(ANSWER["content"])
    # some models add such a token without calling it special; those of white space are no ends
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    places = {token: tail.find(token) for token in {*specials(tokenizer), *added}}
    ahead = [(place, -len(token), token) for token, place in places.items() if found and place >= 0]
    return min(ahead)[2] if ahead else None


@lru_cache(maxsize=4)
def _specials_of_size(tokenizer: PreTrainedTokenizerFast, size: int) -> tuple[str, ...]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(sorted({*tokenizer.all_special_tokens, *added} - {""}))


@lru_cache(maxsize=4)
def _named_specials(tokenizer: PreTrainedTokenizerFast, size: int) -> tuple[tuple[str, Any], ...]:
    named = tokenizer.special_tokens_map.items()
    return tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in named)


@lru_cache(maxsize=4)
def _fault(template: ChatTemplate) -> str | None:
    """What is wrong with a template, as the plainest conversations show; None if it can do with one of them."""
    faults = []
    for beginning in ([QUESTION], [{"role": "system", "content": "be brief"}, QUESTION]):
        try:
            text, _ = template.write([*beginning, ANSWER])
        except ValueError as error:
            if isinstance(syntax := error.__cause__, TemplateSyntaxError):
                return f"is no valid Jinja template: line {syntax.lineno}: {syntax.message}"
            faults.append(f"fails on every conversation: {error.__cause__}")
            continue
        if ANSWER["content"] in text:
            return None
        faults.append("leaves out what the assistant says" if text.strip() else "renders nothing")
    return faults[0]
