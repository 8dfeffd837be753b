"""Rows of new tokens, alone and with the rest, against a plain PyTorch loop over a model resized by hand."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import cases
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from dsft import checkpoint
from dsft.commands.export import put_weights
from dsft.model import export, load, rows, tuning
from dsft.model.vocabulary import Vocabulary

STEPS = 4
EXAMPLES = 40
GLOBAL_BATCH = 12
LIMIT = 1e-5
GROWN = Vocabulary(400, pieces=((7, 12, 99), (3,), (250, 251)), texts=("一", "二", "三"))
"""Three tokens more than the model of 400 rows has."""
SPARE = Vocabulary(396, pieces=((7, 12, 99), (3,)), texts=("一", "二"))
"""Two tokens that take two of the four rows that the model has to spare."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directory of the tiny model, tied or not."""
    home = tmp_path_factory.mktemp("models")
    return cache(lambda tied: str(tiny.save(home / str(tied), tie_word_embeddings=tied)))


def resized(model_dir: str, words: Vocabulary) -> LlamaForCausalLM:
    """The model resized by transformers, its new rows filled in by hand."""
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    model.resize_token_embeddings(max(400, words.size), mean_resizing=False)
    with torch.no_grad():
        for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            for place, pieces in enumerate(words.pieces, words.first):
                matrix[place] = torch.stack([matrix[piece] for piece in pieces]).sum(0) / len(pieces)
    return model


@cache
def plain_loop(model_dir: str, words: Vocabulary, method: str):
    """One process, one example at a time; the old rows are kept by taking their gradient away."""
    model = resized(model_dir, words)
    matrices = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    if method == "lora":
        model = tuning.apply(model, cases.tuning_config("lora"), seed=5)
    if method == "freeze":
        model.requires_grad_(False)
    if method != "full":
        for matrix in matrices.values():
            matrix.requires_grad_(True)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    undecayed = ("norm", "embed_tokens", *(() if method == "full" else ("lm_head",)))
    groups = [[p for n, p in trained if any(u in n for u in undecayed) is flag] for flag in (False, True)]
    optimizer = torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (0.1, 0.0)) if group],
        lr=1e-3,
        foreach=False,
    )
    data = cases.Examples(tiny.examples(EXAMPLES, vocabulary=words.size))
    plan = cases.planner(data, "bfd", GLOBAL_BATCH)
    losses, norms, epoch, place = [], [], 0, 0
    for number in range(STEPS):
        if place == plan.steps(epoch):
            epoch, place = epoch + 1, 0
        batch = [data[int(i)] for row in plan.step_rows(epoch, place) for i in row]
        place += 1
        tokens = sum(int(e.columns["weights"].sum()) for e in batch)
        optimizer.zero_grad()
        total = 0.0
        for example in batch:
            ids = torch.from_numpy(example.ids.astype(np.int64))[None]
            targets = torch.where(torch.from_numpy(example.columns["weights"] > 0), ids[0], -100)
            logits = model(input_ids=ids).logits[0]
            loss = F.cross_entropy(logits[:-1], targets[1:], ignore_index=-100, reduction="sum") / tokens
            loss.backward()
            total += float(loss.detach())
        if method != "full":
            for matrix in matrices.values():
                matrix.grad[: words.first] = 0
                matrix.grad[words.size :] = 0
        norms.append(float(torch.nn.utils.clip_grad_norm_([p for _, p in trained], 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * cases.SCHEDULE[number]
        optimizer.step()
        losses.append(total)
    return losses, norms, {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("ranks", "accumulation", "stage", "tied", "method", "words"),
    [
        (1, 1, "zero0", True, "freeze", GROWN),
        (2, 3, "zero3", False, "freeze", GROWN),
        (2, 1, "zero2", True, "freeze", SPARE),
        (2, 1, "zero2", False, "lora", GROWN),
        (1, 3, "zero3", True, "lora", SPARE),
        (2, 3, "zero0", True, "full", GROWN),
        (2, 1, "zero3", False, "full", GROWN),
    ],
)
def test_same_as_a_plain_loop(pools, models, ranks, accumulation, stage, tied, method, words):
    """`freeze` trains the new rows alone, `lora` beside the adapters, `full` with all other weights."""
    model_dir = models(tied)
    losses, norms, expected = plain_loop(model_dir, words, method)
    before = resized(model_dir, words).get_output_embeddings().weight
    for found in pools(ranks).run(
        cases.train,
        model_dir=model_dir,
        steps=STEPS,
        packing="bfd",
        micro_batch_size=GLOBAL_BATCH // ranks // accumulation,
        accumulation=accumulation,
        stage=stage,
        method=method,
        lora={"new_tokens": method != "full"},
        words=words,
        examples=EXAMPLES,
        vocabulary=words.size,
    ):
        np.testing.assert_allclose(found["loss"], losses, rtol=LIMIT)
        np.testing.assert_allclose(found["grad_norm"], norms, rtol=LIMIT)
        weights = found["weights"]
        assert weights.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (weights[name] - tensor).norm() <= LIMIT * tensor.norm(), name
        if method == "full":
            continue
        for name in [name for name in weights if name.endswith(("embed_tokens.weight", "lm_head.weight"))]:
            assert torch.equal(weights[name][: words.first], expected[name][: words.first].float())
            assert torch.equal(weights[name][words.size :], expected[name][words.size :].float())
            assert not torch.allclose(weights[name][words.first : words.size], before[words.first : words.size])


@pytest.mark.parametrize(
    ("stage", "tied", "method", "words", "precision"),
    [("zero3", False, "freeze", GROWN, "fp32"), ("zero2", True, "lora", GROWN, "bf16")],
)
def test_saved_resumed_and_exported(pools, models, tmp_path, stage, tied, method, words, precision):
    """A checkpoint without frozen weights goes on bit for bit, and gives a model that transformers loads."""
    model_dir = models(tied)
    settings = {"new_tokens": True}
    for result in pools(2).run(
        cases.save,
        model_dir=model_dir,
        run_dir=str(tmp_path),
        stage=stage,
        method=method,
        precision=precision,
        lora=settings,
        words=words,
        vocabulary=words.size,
    ):
        (steps, expected), (steps_again, found) = result["straight"], result["resumed"]
        assert steps_again == steps
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    path = checkpoint.checkpoints(tmp_path)[0]
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = load.load_model(load.ModelSource(model_dir, None, "", model_dir), dtype, "eager")
    rows.grow(model, words, lambda parameters: nullcontext())
    model = tuning.apply(model, cases.tuning_config(method, **settings), 5, words)
    put_weights(model, checkpoint.weights(path), str(path))
    export.write_model(
        model,
        export.companion_files(tiny.tokenizer(), None),
        tmp_path / "model",
        gather=lambda parameters: nullcontext(),
        is_writer=True,
        merge=True,
        dtype=dtype,
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    assert again.config.vocab_size == words.size
    new = {n: t for n, t in result["saved"].items() if n.endswith("new_weight")}
    assert len(new) == (1 if tied else 2)
    for name, tensor in new.items():
        head = "lm_head" in name
        matrix = (again.get_output_embeddings() if head else again.get_input_embeddings()).weight.detach().float()
        assert torch.equal(matrix[words.first : words.size], tensor)
        assert torch.equal(
            matrix[: words.first],
            resized(model_dir, words)
            .to(dtype)
            .state_dict()["lm_head.weight" if head else "model.embed_tokens.weight"][: words.first]
            .float(),
        )
    ids = torch.tensor([[5, 400, 401, 7, 402]])
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        limit = {"fp32": 1e-4, "bf16": 6e-2}[precision]
        assert (again(input_ids=ids).logits - expected).float().norm() <= limit * expected.float().norm()
