"""Noise that is a function of seed, step, example, position and place: the same for any split of the work."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import collate
from torch import nn
from torch.utils.checkpoint import checkpoint

from dsft.config.schema import ActivationCheckpointing, Method, TuningConfig
from dsft.errors import UserError
from dsft.model import attention, noise, tuning
from dsft.model.load import activation_checkpointing

EXAMPLES = [
    replace(example, number=number)
    for number, example in enumerate(tiny.examples(5, shortest=6, longest=20, vocabulary=100))
]
CPU = torch.device("cpu")
GPT2 = {"attn_pdrop": 0.3, "resid_pdrop": 0.2, "embd_pdrop": 0.1}
MODELS = {
    "modules and attention": ("gpt2", GPT2),
    "functions and skipped layers": ("opt", {"dropout": 0.2, "attention_dropout": 0.3, "layerdrop": 0.5}),
    "adapters": ("llama", {"attention_dropout": 0.2}),
}


def made(name: str, checkpointing: bool = False, seed: int = 3):
    """A training task with every kind of noise that the model has, and noise on its embeddings."""
    family, changes = MODELS[name]
    model = tiny.causal(family, attention.NAME, **changes)
    if name == "adapters":
        lora = TuningConfig(method=Method.lora, rank=2, dropout=0.25)
        model = tuning.apply(model, lora, seed=1)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(key)))
    task = tiny.task(model, 7, seed=seed, alpha=5.0).train()
    if checkpointing:
        activation_checkpointing(model, ActivationCheckpointing.full, task.noise.checkpointing)
    return task


def step(task, *batches, number=(1, 4)) -> tuple[float, dict[str, torch.Tensor]]:
    """The summed loss of batches and its gradient."""
    task.zero_grad()
    total = 0.0
    for examples in batches:
        loss, _ = task(collate(examples, number, seed=task.noise._seed))
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert set(found[1]) == set(expected[1])
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("name", MODELS)
def test_any_split_of_the_work_draws_the_same(name):
    task = made(name)
    whole = step(task, EXAMPLES)
    assert_same(step(task, EXAMPLES[3:], [EXAMPLES[1], EXAMPLES[0]], [EXAMPLES[2]]), whole)
    assert_same(step(made(name), *([e] for e in EXAMPLES)), whole)


@pytest.mark.parametrize("name", MODELS)
def test_recomputed_activations_draw_the_same(name):
    assert_same(step(made(name, checkpointing=True), EXAMPLES), step(made(name), EXAMPLES))


@pytest.mark.parametrize("name", MODELS)
def test_what_the_noise_depends_on(name):
    task = made(name)
    losses = [
        step(task, EXAMPLES)[0],
        step(task, EXAMPLES, number=(1, 5))[0],
        step(task, EXAMPLES, number=(2, 4))[0],
        step(task, [replace(e, number=e.number + 1) for e in EXAMPLES])[0],
        step(made(name, seed=4), EXAMPLES)[0],
    ]
    assert len(set(losses)) == len(losses)
    task.eval()
    with torch.no_grad():
        assert float(task(collate(EXAMPLES))[0]) == float(task(collate(EXAMPLES, (7, 7)))[0])


def reference(seed, step, number, position, place, feature) -> int:
    """The draw of one element in Python's whole numbers."""

    def mix(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    def chain(*numbers):
        key = 0
        for n in numbers:
            key = mix((key + 0x9E3779B97F4A7C15 + n) % 2**64)
        return key

    def signed(x):
        return (x + 2**31) % 2**32 - 2**31

    import hashlib

    named = int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest(), "little")
    token = mix((chain(seed, *step, number) + (position + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 32
    pair = mix((chain(named) + (feature // 2 + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 32
    x = signed(signed(token ^ pair) * 0x7FEB352D)
    x = signed(x + (x >> 15))
    x = signed(x * (0x846CA68B - 2**32))
    x = signed(x + (x >> 16))
    half = (x >> 16 * (feature % 2)) % 2**16
    return half - 2**16 if half >= 2**15 else half


def test_a_draw_is_what_its_formula_says():
    tokens = noise.token_keys(7, (2, 3), [4, 6], [11, 5])
    bits = noise.draw(tokens.unsqueeze(1), noise.feature_keys("model.layers.0#1", 9))
    for row, number, position in ((0, 11, 0), (3, 11, 3), (4, 5, 0), (9, 5, 5)):
        for feature in (0, 1, 2, 17):
            assert int(bits[row, feature]) == reference(7, (2, 3), number, position, "model.layers.0#1", feature)


def test_draws_are_uniform_and_independent():
    """Over tokens, features, places and steps; bounds are five standard deviations."""
    tokens, pairs = 1000, 300

    def kept(step, place):
        bits = noise.draw(noise.token_keys(0, (0, step), [tokens], [3]).unsqueeze(1), noise.feature_keys(place, pairs))
        return (bits >= round(0.3 * noise.LEVELS) - noise.LEVELS // 2).double()

    first = kept(1, "a")
    count = first.numel()
    assert abs(first.mean() - 0.7) < 5 * (0.21 / count) ** 0.5
    assert (first.mean(0) - 0.7).abs().max() < 5 * (0.21 / tokens) ** 0.5
    assert (first.mean(1) - 0.7).abs().max() < 5 * (0.21 / (2 * pairs)) ** 0.5
    x = (first - 0.7) / 0.21**0.5
    for other in (kept(2, "a"), kept(1, "b"), first.roll(1, 0), first.roll(1, 1), first.roll((1, 1), (0, 1))):
        assert abs((x * (other - 0.7) / 0.21**0.5).mean()) < 5 / count**0.5
    square = x[1:, 1:] * x[:-1, :-1] * x[1:, :-1] * x[:-1, 1:]
    assert abs(square.mean()) < 5 / count**0.5
    bits = noise.draw(noise.token_keys(0, (0, 0), [tokens], [0]).unsqueeze(1), noise.feature_keys("c", pairs))
    filled = np.histogram(bits.numpy(), bins=64, range=(-(2**15), 2**15))[0] / (2 * tokens * pairs / 64)
    assert abs(filled - 1).max() < 5 * (64 / (2 * tokens * pairs)) ** 0.5


def test_dropout_keeps_the_expectation_and_the_rate():
    layer = nn.Dropout(0.1)
    ours = noise.Noise(nn.Sequential(layer), seed=0)
    tiny.begin(ours, (0, 0), [200], [0])
    x = torch.ones(1, 200, 501, requires_grad=True)
    y = layer.train()(x)
    dropped = float((y == 0).double().mean())
    assert dropped == pytest.approx(0.1, abs=5 * (0.09 / x.numel()) ** 0.5)
    assert torch.allclose(y[y != 0], torch.tensor(1 / 0.9), rtol=1e-4)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y.detach())
    assert torch.equal(layer.eval()(x), x)
    for p, expected in ((0.0, x), (1.0, x * 0)):
        layer.p = p
        assert torch.equal(layer.train()(x), expected)


def test_attention_dropout_is_that_of_its_weights():
    """Against matrix products with the very weights dropped; grouped heads, a window, two documents."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 11, 8) for heads in (4, 2, 2))
    layer = nn.Identity()
    ours = noise.Noise(nn.Sequential(layer), seed=0)
    tiny.begin(ours, (0, 0), [7, 4], [3, 8])
    documents = tiny.documents([7, 4], noise=ours)
    found, _ = attention.attention(layer, query, key, value, None, dropout=0.4, documents=documents, sliding_window=3)
    tiny.begin(ours, (0, 0), [7, 4], [3, 8])
    key, value = (t.repeat_interleave(2, dim=1) for t in (key, value))
    for begin, length in ((0, 7), (7, 4)):
        rows = slice(begin, begin + length)
        back = torch.arange(length)[:, None] - torch.arange(length)
        scores = (query[0, :, rows] @ key[0, :, rows].mT / 8**0.5).masked_fill((back < 0) | (back >= 3), -torch.inf)
        weights = ours.attention_dropout(layer, scores.softmax(-1), begin, 0.4)
        share = weights[:, back >= 0].eq(0).double().mean()
        assert 0.2 < share < 0.9
        torch.testing.assert_close(found[0, rows], (weights @ value[0, :, rows]).transpose(0, 1), rtol=1e-5, atol=1e-6)


def test_embedding_noise_is_scaled_by_each_documents_own_length():
    model = tiny.llama().train()
    ours = noise.Noise(model, seed=0, neftune_alpha=5.0)
    embed, ids = model.get_input_embeddings(), torch.randint(400, (1, 104))
    tiny.begin(ours, (0, 0), [4, 100], [0, 1])
    added = (embed(ids) - embed.eval()(ids))[0]
    for part, length in ((added[:4], 4), (added[4:], 100)):
        bound = 5.0 / (length * 32) ** 0.5
        assert 0.9 * bound < part.abs().max() <= bound * 1.001
        assert part.mean().abs() < 5 * bound / (3 * part.numel()) ** 0.5


class Draws(nn.Module):
    """A model that draws by a function of its own."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return x + self.draw(x)


def rehearsed(draw) -> tuple[noise.Noise, nn.Module]:
    model = Draws(draw).train()
    ours = noise.Noise(model, seed=0)
    tiny.begin(ours, (0, 1), [6], [0])
    ours.rehearse(lambda: model(torch.zeros(1, 6, 4)))
    return ours, model


@pytest.mark.parametrize(
    "draw",
    [
        torch.randn_like,
        lambda x: torch.rand(x.shape),
        lambda x: torch.empty_like(x).uniform_(-1, 1),
        lambda x: torch.bernoulli(torch.full_like(x, 0.5)),
        lambda x: F.alpha_dropout(x + 1, 0.5, training=True),
        F.gumbel_softmax,
        lambda x: F.scaled_dot_product_attention(*[x[None]] * 3, dropout_p=0.5)[0],
    ],
    ids=[
        "randn_like",
        "rand",
        "uniform_",
        "bernoulli",
        "alpha_dropout",
        "gumbel_softmax",
        "scaled_dot_product_attention",
    ],
)
def test_draws_that_are_laid_out_by_the_batch_are_refused_by_name(draw, request):
    function = request.node.callspec.id
    with pytest.raises(
        UserError, match=rf"the model \(Draws\) draws random numbers by torch's {function} .*config\.json"
    ):
        rehearsed(draw)


def test_a_tensor_that_is_not_the_row_is_refused_with_the_setting():
    """As inside experts, which see some of the tokens."""
    with pytest.raises(UserError, match=r"shape \(3, 4\).*batch's 6 tokens.*tuning\.dropout=0"):
        rehearsed(lambda x: F.pad(F.dropout(x[0, :3], 0.5), (0, 0, 0, 3)))


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.rand([]),
        lambda x: torch.rand(1),
        lambda x: torch.empty(1).uniform_(2, 3),
        lambda x: random.random(),
        lambda x: float(np.random.rand()),
    ],
    ids=["rand", "rand of size 1", "uniform_", "python", "numpy"],
)
def test_single_numbers_are_the_same_for_every_batch_of_a_step(draw):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    ours, model = rehearsed(draw)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])

    def value(step, lengths):
        tiny.begin(ours, (0, step), lengths, list(range(len(lengths))))
        with ours.drawing():
            return float(model(torch.zeros(1, sum(lengths), 4))[0, 0, 0])

    assert value(1, [6]) == value(1, [2, 3])
    assert value(1, [6]) != value(2, [6])


def test_what_draws_without_a_name_is_refused():
    """By torch's own C functions, say: only the generator's state tells."""

    def draw(x):
        with torch._C.DisableTorchFunction():
            return torch.rand(x.shape)

    with pytest.raises(UserError, match="draws random numbers while it trains in a way that"):
        rehearsed(draw)


class Shared(nn.Module):
    """Two layers that share their dropout, by modules and functions, and draw single numbers of every kind."""

    def __init__(self, checkpointing: bool):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.drop = nn.Dropout(0.5)
        self.checkpointing = checkpointing
        self.contexts = None

    def layer(self, linear, x):
        x = F.dropout(self.drop(linear(x)).tanh(), 0.5)
        return x * (1 + random.random()) * (1 + np.random.rand()) * (1 + torch.rand(1))

    def forward(self, x):
        for linear in self.linears:
            if self.checkpointing:
                x = checkpoint(self.layer, linear, x, use_reentrant=False, context_fn=self.contexts)
            else:
                x = self.layer(linear, x)
        return x


def test_layers_that_share_dropout_are_recomputed_with_their_own_noise():
    """They are repeated from the last to the first."""
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = Shared(checkpointing).train()
        ours = noise.Noise(model, seed=0)
        model.contexts = ours.checkpointing
        x = torch.randn(1, 9, 4)
        tiny.begin(ours, (0, 1), [9], [0])
        ours.rehearse(lambda model=model, x=x: model(x))
        tiny.begin(ours, (0, 1), [9], [0])
        with ours.drawing():
            loss = model(x).sum()
        after = random.getstate(), np.random.get_state()[1].tolist()
        loss.backward()
        assert after == (random.getstate(), np.random.get_state()[1].tolist())
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_a_dropout_of_another_kind_keeps_its_own_forward():
    class Doubling(nn.Dropout):
        def forward(self, x):
            return 2 * torch.dropout(input=x, p=self.p, train=self.training)

    layer = Doubling(0.5)
    model = nn.Sequential(layer).train()
    ours = noise.Noise(model, seed=0)
    tiny.begin(ours, (0, 0), [6], [0])
    ours.rehearse(lambda: model(torch.ones(1, 6, 4)))
    tiny.begin(ours, (0, 0), [6], [0])
    with ours.drawing():
        assert set(model(torch.ones(1, 6, 4)).flatten().tolist()) == {0.0, 4.0}


@pytest.mark.parametrize("padded", [False, True])
def test_a_table_of_the_models_own_draws_the_same_for_all_batches_of_a_step(padded):
    """DeBERTa drops entries of its relative positions, which no batch lays out."""

    class Relative(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(400, 6))
            self.drop = nn.Dropout(0.5)

        def forward(self):
            return self.drop(self.weight)

    model = Relative().train()
    ours = noise.Noise(model, 3)

    def drawn(step, lengths):
        tiny.begin(ours, step, lengths, list(range(len(lengths))), max(lengths) if padded else None)
        return model()

    with pytest.raises(UserError, match=r"drop draws dropout on a tensor of shape \(400, 6\)"):
        drawn((0, 1), [5, 3])
    ours.rehearse(lambda: drawn((0, 0), [5, 3]), lambda: drawn((0, 0), [4, 4, 2]))
    kept = drawn((0, 1), [5, 3]) > 0
    assert 0.4 < kept.float().mean() < 0.6
    assert torch.equal(drawn((0, 1), [400]) > 0, kept), "though this batch has as many tokens as the table rows"
    assert not torch.equal(drawn((0, 2), [5, 3]) > 0, kept)
