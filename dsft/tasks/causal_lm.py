"""Causal language modelling: chats and plain texts, of which the supervised tokens are learnt."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from dsft.config.schema import DataConfig, OnOverflow, TaskConfig
from dsft.model.kind import CAUSAL
from dsft.tasks.conversation import ASKED, SHAPES, Conversation
from dsft.tasks.fit import fit
from dsft.tasks.forward import Forward
from dsft.tasks.generate import Prompt
from dsft.tasks.nll import token_metrics
from dsft.tasks.render import Rendering, render
from dsft.tasks.task import Context, Outcome, Sampling, Task, View
from dsft.tasks.template import chat_template
from dsft.types import IGNORE_INDEX, Batch, Dropped, Example

UNSUPERVISED = "no supervised tokens"
CUT_OFF = "no supervised tokens left after truncation to data.max_length"
MASKED = (
    "every label is masked; no token of {records} records would be learnt ({why}). Likely causes: prompts longer than "
    "data.max_length, so that truncation cuts the answers off; a chat template whose {{% generation %}} marks enclose "
    "nothing; data.train_on not fitting the records; weights that are all 0"
)


def encode(conversation: Conversation, context: Context) -> list[Example | Dropped] | Dropped:
    """Token ids and what each of them counts, in examples of at most `data.max_length` tokens."""
    made: list[Example | Dropped] = []
    unfit = Dropped(UNSUPERVISED, MASKED)
    for rendering in render(conversation, context.tokenizer, context.data):
        if not rendering.columns["weights"][1:].any():
            continue
        parts = _fitted(rendering, conversation, context.data)
        if isinstance(parts, Dropped):
            unfit = parts
        elif len(parts) == 1 and isinstance(parts[0], Example) and not parts[0].weight:
            unfit = Dropped(CUT_OFF, MASKED)
        else:
            made += parts
    return made or unfit


def _fitted(rendering: Rendering, conversation: Conversation, data: DataConfig) -> list[Example | Dropped] | Dropped:
    overflow = data.on_overflow
    if overflow is OnOverflow.auto:
        overflow = OnOverflow.truncate if conversation.text is None else OnOverflow.split
    return fit(
        rendering.columns,
        weighed,
        data.max_length,
        overflow,
        conversation.origin,
        cuts=rendering.cuts.tolist(),
        needs_before=rendering.columns["weights"] > 0,
    )


def weighed(columns: dict[str, np.ndarray]) -> Example:
    """The example of `ids` and `weights`, whose own weight is their sum.

    The first token counts nothing, as nothing comes before it to predict it from.
    """
    weights = columns["weights"].copy()
    weights[:1] = 0
    return Example(columns | {"weights": weights}, len(weights), weight=float(weights.sum(dtype=np.float64)))


def inputs(example: Example, view: View, context: Context) -> dict[str, np.ndarray]:
    """Ids, and as label of each token the next one where that counts, with what it counts."""
    ids, weights = example.ids.astype(np.int64), np.zeros(len(example.ids), np.float32)
    weights[:-1] = example.columns["weights"][1:]
    labels = np.full_like(ids, IGNORE_INDEX)
    labels[:-1] = np.where(weights[:-1] > 0, ids[1:], IGNORE_INDEX)
    return {"input_ids": ids, "labels": labels, "target_weights": weights}


def loss(forward: Forward, batch: Batch, settings: TaskConfig) -> Outcome:
    """Summed negative log-likelihood of the supervised tokens, in nats, and first guesses, each times its weight."""
    nll = forward.nll(batch)
    return Outcome(nll.total, {"correct": nll.correct})


def split_prompt(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """Token ids before the first supervised token, and those of its run; plain text is split in the middle."""
    supervised = example.columns["weights"] > 0
    begin = int(supervised.argmax())
    if begin <= 1:
        begin = max(1, len(example.ids) // 2)
    unsupervised = np.flatnonzero(~supervised[begin:])
    end = begin + int(unsupervised[0]) if len(unsupervised) else len(example.ids)
    return example.ids[:begin], example.ids[begin:end]


def sample(sampling: Sampling, example: Example, context: Context) -> dict[str, str]:
    """The answer to an example's prompt.

    Raises:
        ValueError: The prompt leaves no room for one.
    """
    prompt, reference = (part.tolist() for part in split_prompt(example))
    parts = {"prompt": prompt, "reference": reference, "answer": _answered(sampling, prompt, context)}
    return {name: context.tokenizer.decode(part, skip_special_tokens=True) for name, part in parts.items()}


def ask(record: Conversation, context: Context) -> Prompt:
    """A chat up to its last question, or a text to go on with; beside the answer that the chat has, if any.

    Raises:
        ValueError: The chat template refuses it.
    """
    tokenizer, turns, told = context.tokenizer, list(record.messages), dict[str, Any]()
    if record.text is not None:
        ids = open_end(tokenizer, record.text)
    else:
        if turns[-1]["role"] == "assistant":
            told["reference"] = turns.pop()["content"]
        text, _ = chat_template(tokenizer, record.tools).write(turns, record.tools, prompt=True)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return Prompt(ids, told)


def open_end(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text with what the tokenizer puts in front of it, and without what it puts behind."""
    plain, framed = (
        tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"] for special in (False, True)
    )
    begin = next((at for at in range(len(framed) - len(plain) + 1) if framed[at : at + len(plain)] == plain), 0)
    return framed[: begin + len(plain)]


def _answered(sampling: Sampling, prompt: list[int], context: Context) -> list[int]:
    positions = getattr(sampling.model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    room = positions - len(prompt)
    if room < 1:
        raise ValueError("the prompt alone fills the model")
    return sampling.generate(prompt, context.tokenizer.pad_token_id, room)[len(prompt) :]


METRICS = token_metrics("supervised")

TASK = Task(
    shapes=SHAPES,
    encode=encode,
    inputs=inputs,
    loss=loss,
    kind=CAUSAL,
    metrics=METRICS,
    target="supervised_tokens",
    settings=frozenset(
        "data.prompt_template data.few_shot.path data.few_shot.count data.train_on data.on_rewritten_history "
        "data.reasoning model.chat_template model.logits_chunk train.samples train.sample_tokens".split()
    ),
    sample=sample,
    asked=ASKED,
    ask=ask,
)
