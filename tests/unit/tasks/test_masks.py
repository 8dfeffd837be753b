"""Templates after real families, times kinds of conversation: what is learnt is what a second method says."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import masks
import numpy as np
import pairwise
import pytest
from masks import CONVERSATIONS, FAMILIES, TOOLS
from renderers.deepseek_v3 import DeepSeekV3Renderer
from renderers.glm45 import GLM45Renderer
from renderers.nemotron3 import Nemotron3Renderer
from renderers.qwen3 import Qwen3Renderer

from dsft.config.schema import DataConfig, TaskConfig
from dsft.data.sources import BadRecord, Raw
from dsft.tasks import TASKS, encode
from dsft.tasks.task import Context

ROOT = Path(__file__).parents[3]
TABLE: dict[tuple[str, str], str] = {}
PAIRS = [(name, kind) for name in FAMILIES for kind in CONVERSATIONS]

tokenizer = cache(masks.tokenizer)


def made(name: str, kind: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and weights of each example that a record gives."""
    fields = {"messages": CONVERSATIONS[kind]} | ({"tools": TOOLS} if kind in ("tools", "parallel calls") else {})
    context = Context(tokenizer(name), DataConfig(max_length=4096), TaskConfig(name="causal_lm"))
    parts = encode(Raw(fields, "f.jsonl:1"), TASKS["causal_lm"], context)
    return [(part.ids, part.columns["weights"]) for part in parts]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_what_is_learnt_is_what_the_model_has_to_write(name, kind):
    if named := FAMILIES[name].refused.get(kind):
        with pytest.raises(BadRecord) as refusal:
            made(name, kind)
        assert named in str(refusal.value)
        TABLE[name, kind] = "refused"
        return
    expected = masks.turns(name, kind, tokenizer(name))
    found = made(name, kind)
    assert not masks.faults(found, expected, tokenizer(name))
    TABLE[name, kind] = f"equal, {len(found)}" if len(found) > 1 else "equal"
    for shift in (-1, 1):
        for number, (ids, weights) in enumerate(found):
            shifted = [*found[:number], (ids, np.roll(weights, shift)), *found[number + 1 :]]
            assert masks.faults(shifted, expected, tokenizer(name)), "a span that is shifted by a token is not noticed"


JUDGED = {
    "qwen3": (Qwen3Renderer, ()),
    "deepseek_v3": (DeepSeekV3Renderer, ("tools", "parallel calls")),
    "glm45": (GLM45Renderer, ("tools", "parallel calls")),
    "nemotron3": (Nemotron3Renderer, ()),
}
"""Families that the package `renderers` writes too, without a system prompt of its own; there the kinds left out."""

PROMPTED = {"glm45": ("\n",), "nemotron3": ("<think></think>", "<think>\n")}
"""What the package and the template's own prompt see differently: GLM's prompt ends before a line break, which the
package takes for given; Nemotron's ends behind the tag that it opens, which the package has the model write."""


@pytest.mark.parametrize("name", JUDGED)
def test_the_second_method_agrees_with_the_package_renderers(name):
    """Of each turn it says itself which tokens the model has written."""
    kind_of_renderer, left_out = JUDGED[name]
    renderer = kind_of_renderer(tokenizer(name))
    compared = 0
    for kind in CONVERSATIONS.keys() - FAMILIES[name].refused.keys() - set(left_out):
        given = [{k: v for k, v in message.items() if k != "weight"} for message in CONVERSATIONS[kind]]
        learnt = [n for n, m in enumerate(CONVERSATIONS[kind]) if m["role"] == "assistant" and m.get("weight") != 0]
        expected = masks.turns(name, kind, tokenizer(name))
        for turn, ours in zip(learnt, expected, strict=True):
            theirs = renderer.render(given[: turn + 1], tools=TOOLS if kind in ("tools", "parallel calls") else None)
            pieces = masks.token_bytes(tokenizer(name), np.array(theirs.token_ids))
            ends = np.cumsum([len(piece) for piece in pieces])
            written = np.array(theirs.sampled_mask) & (np.array(theirs.message_indices) == turn)
            assert b"".join(pieces).startswith(ours.text), (kind, turn)
            begin = int((ends - [len(piece) for piece in pieces])[written].min())
            assert int(ends[written].max()) == len(ours.text), (kind, turn)
            between = ours.text[min(begin, ours.begin) : max(begin, ours.begin)].decode()
            assert between in ("", *PROMPTED.get(name, ())), (kind, turn)
            compared += 1
    assert compared > 10


def test_tokens_do_merge_across_the_boundaries():
    """Else a boundary inside of a token would not have been tried."""
    tokens = tokenizer("glm45")
    (turn,) = masks.turns("glm45", "single turn", tokens)
    ids = np.array(tokens(turn.text.decode(), add_special_tokens=False)["input_ids"])
    ends = np.cumsum([len(piece) for piece in masks.token_bytes(tokens, ids)])
    inside = 0
    for name, kind in PAIRS:
        if kind in FAMILIES[name].refused:
            continue
        for turn in masks.turns(name, kind, tokenizer(name)):
            ids = np.array(tokenizer(name)(turn.text.decode(), add_special_tokens=False)["input_ids"])
            ends = np.cumsum([len(piece) for piece in masks.token_bytes(tokenizer(name), ids)])
            inside += turn.begin not in ends
    assert inside


def test_the_table_is_published():
    """docs/MASKS.md shows the outcome of every pair; DSFT_PUBLISH=1 writes it."""
    file = ROOT / "docs" / "MASKS.md"
    if pairwise.PUBLISH and set(TABLE) == set(PAIRS):
        head, _, _ = file.read_text(encoding="utf-8").partition("<!-- table -->")
        lines = [f"| | {' | '.join(CONVERSATIONS)} |", "|---|" + "---|" * len(CONVERSATIONS)]
        lines += [f"| {name} | {' | '.join(TABLE[name, kind] for kind in CONVERSATIONS)} |" for name in FAMILIES]
        file.write_text(f"{head}<!-- table -->\n" + "\n".join(lines) + "\n", encoding="utf-8")
    shown = file.read_text(encoding="utf-8").partition("<!-- table -->")[2]
    refused = sum(kind in family.refused for family in FAMILIES.values() for kind in CONVERSATIONS)
    assert shown.count("| refused") == refused
    assert shown.count("| equal") == len(PAIRS) - refused
