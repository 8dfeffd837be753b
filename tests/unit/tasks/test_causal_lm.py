"""The task's loss: the sum of what transformers says of every example alone."""

import numpy as np
import pytest
import tiny
import torch
from tiny import collate, task
from torch.nn import functional as F

from dsft.config.schema import Method, TuningConfig
from dsft.errors import UserError
from dsft.model import attention, tuning
from dsft.tasks.isolation import probe_tokens
from dsft.types import IGNORE_INDEX, Example

EXAMPLES = tiny.examples(6, shortest=3, longest=20, vocabulary=100)
SUPERVISED = sum(int(e.columns["weights"].sum()) for e in EXAMPLES)


def lora(model, **changes):
    return tuning.apply(model, TuningConfig(method=Method.lora, rank=2, **changes), seed=1)


def plain(model, example: Example):
    """Transformers' own loss of one example alone, as a sum, and how often its first guess is right."""
    ids = torch.from_numpy(example.ids.astype(np.int64))[None]
    labels = torch.where(torch.from_numpy(example.columns["weights"] > 0)[None], ids, IGNORE_INDEX)
    output = model(input_ids=ids, labels=labels, use_cache=False)
    hits = (output.logits[0, :-1].argmax(-1) == ids[0, 1:]) & torch.from_numpy(example.columns["weights"][1:] > 0)
    return output.loss * int(example.columns["weights"].sum()), int(hits.sum())


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs) -> None:
    found, wanted = gradients(ours), gradients(theirs)
    assert found and set(found) == set(wanted)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


FAMILIES = {
    "llama": {"tie_word_embeddings": False},
    "llama, tied": {"tie_word_embeddings": True},
    "phi": {},  # a head with a bias
    "cohere": {"logit_scale": 0.3},  # no plain head, like the three that follow
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.4},
    "llama4_text": {"num_local_experts": 2},
    "modernbert-decoder": {"global_attn_every_n_layers": 1},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_the_sum_of_transformers_own_per_example(name):
    family = name.partition(",")[0]
    ours, theirs = (tiny.causal(family, way, **FAMILIES[name]) for way in (attention.NAME, "eager"))
    loss, tally = task(ours)(collate(EXAMPLES))
    expected, hits = zip(*(plain(theirs, e) for e in EXAMPLES))
    torch.testing.assert_close(float(loss.detach()), float(sum(expected).detach()), rtol=1e-5, atol=0)
    assert float(tally.sums["loss"]) == float(loss.detach())
    assert float(tally.sums["correct"]) == sum(hits)
    assert float(tally.sums["weight"]) == SUPERVISED
    assert not any(value.requires_grad for value in tally.sums.values())
    (loss / SUPERVISED).backward()
    (sum(expected) / SUPERVISED).backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("changes", [{}, {"target_modules": ["q_proj", "lm_head"]}])
def test_lora_trains_its_adapters_alone_and_counts_the_same_loss(changes):
    """Tied embeddings stay one tensor, and an adapter on the head is not passed by."""
    ours, theirs = (lora(tiny.causal("llama", way), **changes) for way in (attention.NAME, "eager"))
    for model in (ours, theirs):
        torch.manual_seed(2)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    loss, _ = task(ours)(collate(EXAMPLES))
    expected = sum(plain(theirs, e)[0] for e in EXAMPLES)
    torch.testing.assert_close(float(loss.detach()), float(expected.detach()), rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    assert all("lora" in name for name in gradients(ours))
    assert_same_gradients(ours, theirs)


def test_the_head_stands_once_in_the_module_tree():
    """Twice, it would be saved twice, and ZeRO would count it twice."""
    model = tiny.causal("llama", attention.NAME, tie_word_embeddings=False)
    names = [f"model.{name}" for name, _ in model.named_parameters()]
    assert [name for name, _ in task(model).named_parameters()] == names
    assert list(task(model).state_dict()) == names


@pytest.mark.parametrize("family", ["llama", "cohere"])
def test_a_batch_without_targets_weighs_nothing_and_still_goes_all_the_way(family):
    """trl#6668: NaN, or a loss of 0.0 that pretends to be one. Here it is a filler beside ranks that do train."""
    model = tiny.causal(family, attention.NAME)
    masked = [tiny.example(e.ids, np.zeros_like(e.columns["weights"])) for e in EXAMPLES]
    for batch in (collate([]), collate(masked)):
        loss, tally = task(model)(batch)
        assert {name: float(value) for name, value in tally.sums.items()} == {"loss": 0, "correct": 0, "weight": 0}
        model.zero_grad()
        loss.backward()
        assert set(gradients(model)) == set(dict(model.named_parameters()))
        assert all((gradient == 0).all() for gradient in gradients(model).values())


def test_logits_are_those_of_every_position():
    model = tiny.causal("llama", attention.NAME)
    batch = collate(EXAMPLES)
    with torch.no_grad():
        logits = task(model).logits(batch)
        loss, _ = task(model)(batch)
    assert logits.shape == (batch.tokens, 100)
    at, targets = batch.tensors["target_at"], batch.tensors["target_ids"]
    nll = F.cross_entropy(logits[at], targets, reduction="sum")
    torch.testing.assert_close(float(loss), float(nll), rtol=1e-5, atol=0)


def test_only_supervised_positions_reach_the_head():
    model = tiny.causal("llama", attention.NAME)
    ours = task(model)
    ours(collate(EXAMPLES))  # the first call checks the model
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    ours(collate(EXAMPLES))
    assert seen == [SUPERVISED]


def test_a_head_that_is_given_something_else_gives_its_loss_from_within_the_model():
    """ModernBERT's decoder has one more layer before its head, of which no config key tells."""
    model = tiny.causal("modernbert-decoder", attention.NAME, **FAMILIES["modernbert-decoder"])
    ours = task(model)
    ours(collate(EXAMPLES))
    assert ours.chunked
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, output: seen.append(output.shape))
    ours(collate(EXAMPLES))
    assert [shape[-1] for shape in seen] == [0], "no logits of all positions"


def test_a_model_is_checked_once_and_the_check_draws_no_random_number():
    """A resumed run checks again, and must go on with the same dropout as one that was never stopped."""
    model = lora(tiny.causal("llama", attention.NAME), dropout=0.5).train()
    ours = task(model)
    calls = []
    model.get_base_model().model.register_forward_hook(lambda *_: calls.append(1))

    def loss():
        torch.manual_seed(5)
        return float(ours(collate(EXAMPLES))[0].detach())

    first = loss()
    checks = len(calls) - 1
    assert checks > 0 and model.training
    assert loss() == first
    assert len(calls) == checks + 2


def test_a_model_that_leaks_is_refused_in_every_call(monkeypatch):
    monkeypatch.setattr(attention, "_per_document", leaking)
    ours = task(tiny.causal("llama", attention.NAME))
    for _ in range(2):
        with pytest.raises(UserError, match="LlamaForCausalLM does not keep the documents of a row apart"):
            ours(collate(EXAMPLES))


def leaking(query, key, value, lengths, scale, window, causal):
    """Attention over the whole row, as plain SDPA would give it."""
    heads = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(heads, dim=1) for t in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale).transpose(1, 2)


@pytest.mark.parametrize("family", ["phimoe", "llama4_text"])
def test_adapters_that_the_model_cannot_run_are_refused_with_the_setting(family):
    """peft wraps routers whose code then asks for attributes, or results, that the wrapper does not have."""
    changes = {"num_local_experts": 2} | ({"router_jitter_noise": 0.0} if family == "phimoe" else {})
    model = lora(tiny.causal(family, attention.NAME, **changes))
    with pytest.raises(
        UserError, match=r"fails in its first forward pass: \w+: .*\.py:\d+\).*tuning\.target_modules=\["
    ):
        task(model)(collate(EXAMPLES))


def test_a_model_that_fails_is_refused_by_name_and_one_without_room_says_so():
    model = tiny.causal("llama", attention.NAME)
    for problem, expected in (
        (TypeError("no such argument"), (UserError, r"LlamaForCausalLM fails .*TypeError: no such argument")),
        (torch.OutOfMemoryError("of 80 GiB"), (torch.OutOfMemoryError, "of 80 GiB")),
    ):

        def fail(*_, problem=problem, **__):
            raise problem

        model.forward = fail
        with pytest.raises(expected[0], match=expected[1]):
            task(model)(collate(EXAMPLES))


@pytest.mark.parametrize(
    ("dtype", "advice"), [(torch.float16, "use precision=bf16"), (torch.float32, r"weights in model\.path are damaged")]
)
def test_logits_that_are_not_finite_are_told_from_a_leak(dtype, advice):
    model = tiny.causal("llama", attention.NAME).to(dtype)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.inf
    with pytest.raises(UserError, match=f"LlamaForCausalLM gives logits that are not finite .*{advice}"):
        task(model)(collate(EXAMPLES))


@pytest.mark.parametrize("mask", [-torch.inf, torch.finfo(torch.float32).min, torch.finfo(torch.float16).min])
def test_masked_logits_do_not_hide_a_leak(mask, monkeypatch):
    def masked(seed):
        model = tiny.causal("llama", attention.NAME, seed)
        forward = model.forward

        def bent(*args, **kwargs):
            output = forward(*args, **kwargs)
            output.logits[..., :3] = mask
            return output

        model.forward = bent
        return task(model)

    sound = masked(0)
    sound(collate(EXAMPLES))
    assert not sound.chunked
    monkeypatch.setattr(attention, "_per_document", leaking)
    with pytest.raises(UserError, match="does not keep the documents of a row apart"):
        masked(0)(collate(EXAMPLES))


def test_documents_of_the_probe_differ_whatever_the_data():
    for ids in ([0, 0], [7] * 50, [5, 6], [4, 4, 9]):
        first, other, _ = probe_tokens([tiny.example(np.array(ids, np.int32), np.ones(len(ids), bool))])
        assert (first != other).all()
