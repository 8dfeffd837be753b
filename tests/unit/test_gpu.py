"""What only a CUDA device can show; skipped elsewhere."""

from __future__ import annotations

import pytest
import tiny
import torch

from dsft.config.schema import Attention
from dsft.data.batch import collate
from dsft.model import attention

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kernel", [Attention.torch_varlen, Attention.flash])
@pytest.mark.parametrize("window", [None, 8])
def test_variable_length_kernels_equal_the_loop_over_documents(kernel, window):
    """Forward and gradient, with grouped heads and a sliding window, up to bf16's rounding."""
    device = torch.device("cuda")
    try:
        attention.choose_kernel(kernel, device, torch.bfloat16)
    except Exception as missing:
        pytest.skip(str(missing))
    lengths = [5, 31, 1, 64]
    torch.manual_seed(0)
    query = torch.randn(1, 8, sum(lengths), 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    key, value = (
        torch.randn(1, 2, sum(lengths), 64, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)
    )
    layer = torch.nn.Module()
    outputs = []
    for chosen in (kernel, Attention.per_document):
        documents = attention.Documents.of(lengths, device, chosen)
        output, _ = attention.attention(layer, query, key, value, None, documents=documents, sliding_window=window)
        gradients = torch.autograd.grad(output.float().square().sum(), (query, key, value))
        outputs.append((output, *gradients))
    for found, expected in zip(*outputs, strict=True):
        assert torch.allclose(found.float(), expected.float(), atol=3e-2, rtol=3e-2)


def test_loss_on_cuda_equals_the_cpu():
    """A flat batch in bf16 on the device against fp32 on the CPU."""
    batch = collate(tiny.examples(6))
    losses = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        model = tiny.llama(attn_implementation=attention.NAME).to(device, dtype)
        kernel = attention.choose_kernel(Attention.auto, torch.device(device), dtype)
        task = tiny.task(model, 16, kernel=kernel)
        loss, _ = task(batch.to(torch.device(device)))
        losses.append(float(loss))
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
