"""The chunked loss of the head: the same numbers as PyTorch's own, without the logits of a whole batch."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from dsft.tasks import nll

TOKENS, WIDTH, VOCABULARY = 23, 12, 50


def made(dtype=torch.float64, bias=True, seed=0):
    """A head, hidden states and targets."""
    torch.manual_seed(seed)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype)
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    nll.with_loss(head)
    return head, hidden, torch.randint(VOCABULARY, (TOKENS,))


def gradients(loss, head, hidden):
    wanted = {"hidden": hidden, **dict(head.named_parameters())}
    wanted = {name: tensor for name, tensor in wanted.items() if tensor.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values()))))


def reference(head, hidden, targets):
    """Autograd through torch's cross entropy of all logits, in fp32 or better."""
    logits = F.linear(hidden, head.weight, head.bias)
    return F.cross_entropy(logits, targets, reduction="sum"), (logits.argmax(-1) == targets).sum()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, TOKENS, TOKENS + 100])
def test_loss_and_gradients_are_those_of_cross_entropy_for_any_chunk(chunk, bias):
    head, hidden, targets = made(torch.float32, bias)
    loss, correct, _ = head(hidden, targets, None, chunk)
    expected, hits = reference(head, hidden, targets)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss.float(), expected, rtol=1e-6, atol=0)
    assert int(correct) == int(hits)
    expected_gradients = gradients(expected, head, hidden)
    found = gradients(loss, head, hidden)
    assert set(found) == {"hidden", "weight", *(["bias"] if bias else [])}
    torch.testing.assert_close(found, expected_gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", [["weight"], ["hidden"], ["bias"], ["weight", "bias"], ["hidden", "weight"]])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen):
    head, hidden, targets = made(torch.float32)
    for tensor in (hidden if name == "hidden" else getattr(head, name) for name in frozen):
        tensor.requires_grad_(False)
    found = gradients(head(hidden, targets, None, 7)[0], head, hidden)
    assert set(found) == {"hidden", "weight", "bias"} - set(frozen)
    expected = gradients(reference(head, hidden, targets)[0], head, hidden)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [3.0, 1 / 4096, 65536.0])
def test_a_factor_on_the_loss_is_a_factor_on_every_gradient(scale):
    """DeepSpeed's TiledFusedLogitsLoss forms its gradient in the forward pass, and forgets what comes after."""
    head, hidden, targets = made(torch.float32)
    plain = gradients(head(hidden, targets, None, 7)[0], head, hidden)
    scaled = gradients(head(hidden, targets, None, 7)[0] * scale, head, hidden)
    for name, gradient in plain.items():
        torch.testing.assert_close(scaled[name], gradient * scale, rtol=1e-6, atol=0)


def test_losses_of_two_micro_batches_add_up():
    head, hidden, targets = made(torch.float32)
    whole = gradients(head(hidden, targets, None, 7)[0], head, hidden)
    for part in (slice(0, 9), slice(9, None)):
        (head(hidden[part], targets[part], None, 4)[0]).backward()
    torch.testing.assert_close(hidden.grad, whole["hidden"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head.weight.grad, whole["weight"], rtol=1e-5, atol=1e-6)


def test_bf16_stays_near_fp32_and_does_not_lose_the_small_chunks():
    head, hidden, targets = made(torch.bfloat16)
    loss, *_ = head(hidden, targets, None, 1)
    found = gradients(loss, head, hidden)
    exact, precise = nn.Linear(WIDTH, VOCABULARY), hidden.detach().float().requires_grad_()
    exact.load_state_dict({name: p.float() for name, p in head.state_dict().items()})
    expected, _ = reference(exact, precise, targets)
    torch.testing.assert_close(loss.float(), expected, rtol=2e-3, atol=0)
    for name, gradient in gradients(expected, exact, precise).items():
        assert found[name].dtype == torch.bfloat16
        assert (found[name].float() - gradient).norm() / gradient.norm() < 0.01


def test_a_sum_over_many_tokens_is_exact_even_in_half_precision():
    """4,096 losses of about 8: a sum in bf16 would stop growing at 2,048, one in fp32 would round."""
    head = nn.Linear(4, 3000, bias=False, dtype=torch.bfloat16)
    nll.with_loss(head)
    nn.init.zeros_(head.weight)
    with torch.no_grad():
        loss, *_ = head(torch.ones(4096, 4, dtype=torch.bfloat16), torch.zeros(4096, dtype=torch.int64), None, 512)
    assert float(loss) == pytest.approx(4096 * torch.tensor(3000.0).log().item(), rel=1e-7)


def test_large_logits_overflow_nowhere_and_small_losses_stay_exact():
    head = nn.Linear(2, 3, bias=False)
    nll.with_loss(head)
    head.weight.data = torch.tensor([[200.0, 0.0], [185.0, 0.0], [0.0, 0.0]])
    hidden = torch.ones(1, 2, requires_grad=True)
    loss, *_ = head(hidden, torch.tensor([0]), None, 4)
    # log1p(exp(-15) + exp(-200)) = 3.06e-7, as near as fp32 can add it to 1
    assert float(loss.detach()) == pytest.approx(3.06e-7, abs=6e-8)
    far, *_ = head(hidden * 1e4, torch.tensor([2]), None, 4)
    assert float(far.detach()) == pytest.approx(2e6)
    assert torch.autograd.grad(far, hidden)[0].tolist() == [[2e6, 0]]


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_logits_never_exist_for_more_tokens_than_a_chunk(chunk, monkeypatch):
    """The vocabulary never sets the peak of memory."""
    head, hidden, targets = made(torch.float32)
    shapes = []
    linear = F.linear

    def watched(*args):
        output = linear(*args)
        shapes.append(tuple(output.shape))
        return output

    monkeypatch.setattr(nll.F, "linear", watched)
    loss, *_ = head(hidden, targets, None, chunk)
    rows = [rows for rows, _ in shapes]
    assert max(rows) <= chunk and sum(rows) == TOKENS
    kept = {tuple(t.shape) for t in loss.grad_fn.saved_tensors if t is not None}
    assert kept == {(TOKENS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,)}


def test_evaluation_forms_no_gradient(monkeypatch):
    head, hidden, targets = made(torch.float32)
    monkeypatch.setattr(nll.torch, "mm", None)
    monkeypatch.setattr(nll.torch, "zeros_like", None)
    with torch.no_grad():
        loss, *_ = head(hidden, targets, None, 7)
    monkeypatch.undo()
    torch.testing.assert_close(loss.float(), reference(head, hidden, targets)[0].detach(), rtol=1e-6, atol=0)


def test_without_targets_the_head_is_the_linear_layer_it_was():
    head, hidden, _ = made(torch.float32)
    assert torch.equal(head(hidden), F.linear(hidden, head.weight, head.bias))


def test_nll_of_logits_is_cross_entropy():
    head, hidden, targets = made(torch.float32)
    loss, correct, _ = nll.nll_of_logits(head(hidden), targets)
    expected, hits = reference(head, hidden, targets)
    torch.testing.assert_close(loss.float(), expected)
    assert loss.dtype == torch.float64 and int(correct) == int(hits)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("cohere", {"logit_scale": 0.0625}),
        ("granite", {"logits_scaling": 8.0}),
        ("gemma2", {"final_logit_softcapping": 30.0}),
        ("llama4_text", {"num_local_experts": 2}),  # has no base model to ask for its hidden states
    ],
)
def test_a_model_that_bends_its_logits_has_no_plain_head(family, changes):
    assert nll.plain_head(tiny.causal(family, "eager", **changes)) is None


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("cohere", {"logit_scale": 1.0}), ("granite", {"logits_scaling": 1.0}), ("gemma3_text", {})],
)
def test_a_model_with_a_linear_head_has_a_plain_head(family, changes):
    model = tiny.causal(family, "eager", **changes)
    assert nll.plain_head(model) is model.get_output_embeddings()
