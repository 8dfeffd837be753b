"""A tokenizer held against its chat template and the model's config, before anything is tokenised.

Which of a template's own texts are markers is a rule: `<|...|>`, `<｜...｜>`, `<start_of_turn>`, `<end_of_turn>`, `<s>`
and `</s>`. `[INST]`, `<think>`, `<tool_call>` and the like are plain text by design in many models, and are
not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from dsft.errors import UserError
from dsft.tasks.template import ANSWER, QUESTION, ChatTemplate, chat_template

MARKER = re.compile(r"<\|[^<>|\s]{1,60}\|>|<｜[^<>｜]{1,60}｜>|<(?:start|end)_of_turn>|</?s>")

SYSTEM = {"role": "system", "content": "be brief"}
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "looks", "parameters": {"type": "object", "properties": {}}},
}
REMEDY = (
    "Add them with data.new_tokens=FILE, or choose a template of tokens that there are with model.chat_template=FILE"
)


def check(tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig, chats: bool) -> list[str]:
    """What may be wrong with a tokenizer, to be shown and kept.

    Args:
        tokenizer: With new tokens.
        config: The language model's.
        chats: Whether the task renders chats.

    Raises:
        UserError: The end of the assistant's turn is no token, so that none is learnt to stop at; or the template
            writes the token that begins a sequence twice.
    """
    warnings = list(_ids(tokenizer, config))
    if not (chats and tokenizer.chat_template):
        return warnings
    try:
        template = chat_template(tokenizer)
    except UserError:
        return warnings  # several templates and none for chats: their records will tell
    texts = list(_texts(template))
    cut = sorted({marker for text in texts for marker in MARKER.findall(text) if not _whole(marker, tokenizer)})
    names = ", ".join(cut)
    for text in texts:
        _, found, tail = text.rpartition(ANSWER["content"])
        end = MARKER.match(tail.lstrip()) if found else None
        if end and end[0] in cut:
            raise UserError(
                f"the chat template ends the assistant's turn with {end[0]}, which is no token of the tokenizer: it "
                f"would be cut into pieces, and the model would learn no token to stop at (so with {names}). {REMEDY}."
            )
        _refuse_two_beginnings(text, tokenizer)
    if cut:
        warnings.append(
            f"the chat template writes {names}, which the tokenizer cuts into pieces. {REMEDY}, unless the model was "
            "trained so."
        )
    return warnings


def _texts(template: ChatTemplate) -> Iterator[str]:
    """Plain conversations as the template writes them, as far as it takes them."""
    for before in ([], [SYSTEM]):
        for after, prompt in (([ANSWER], False), ([], True)):
            for tools in (None, [TOOL]):
                try:
                    yield template.write([*before, QUESTION, *after], tools, prompt)[0]
                except ValueError:
                    continue


def _whole(marker: str, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a text is one token."""
    return len(tokenizer(marker, add_special_tokens=False)["input_ids"]) == 1


def _refuse_two_beginnings(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    begin = tokenizer.bos_token_id
    if begin is not None and tokenizer(text, add_special_tokens=False)["input_ids"][:2] == [begin] * 2:
        raise UserError(
            f"the chat template writes {tokenizer.bos_token}, which begins a sequence, twice: the model has never seen "
            "that. Correct the template, or give another with model.chat_template=FILE."
        )


def _ids(tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig) -> Iterator[str]:
    """Where the model's config and the tokenizer disagree."""
    for name in ("bos", "eos", "pad"):
        ours, theirs = getattr(tokenizer, f"{name}_token_id"), getattr(config, f"{name}_token_id", None)
        known = theirs if isinstance(theirs, list) else [theirs]
        if ours is not None and theirs is not None and ours not in known:
            yield (
                f"the model's config has {name}_token_id={theirs}, and the tokenizer's {name} token is "
                f"{getattr(tokenizer, f'{name}_token')!r}, {ours}: the tokenizer's is used here. See that the two "
                "belong together."
            )
