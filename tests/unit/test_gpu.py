"""What only a CUDA device can show; skipped elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from tiny import collate
from transformers import masking_utils

from dsft.config.schema import ActivationCheckpointing, Attention
from dsft.data.ahead import Shipping
from dsft.engine import total_norm
from dsft.errors import UserError
from dsft.metrics import Tally
from dsft.model import attention, noise
from dsft.model.load import activation_checkpointing

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kernel", [Attention.torch_varlen, Attention.flash])
@pytest.mark.parametrize("window", [None, 8])
def test_variable_length_kernels_equal_the_loop_over_documents(kernel, window):
    """Forward and gradient, with grouped heads and a sliding window, up to bf16's rounding."""
    try:
        attention.choose_kernel(kernel, CUDA, torch.bfloat16)
    except UserError as missing:
        pytest.skip(str(missing))
    lengths = [5, 31, 1, 64]
    torch.manual_seed(0)
    query = torch.randn(1, 8, sum(lengths), 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    key, value = (
        torch.randn(1, 2, sum(lengths), 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)
    )
    layer = torch.nn.Module()
    outputs = []
    for chosen in (kernel, Attention.per_document):
        documents = tiny.documents(lengths, CUDA, chosen)
        output, _ = attention.attention(layer, query, key, value, None, documents=documents, sliding_window=window)
        gradients = torch.autograd.grad(output.float().square().sum(), (query, key, value))
        outputs.append((output, *gradients))
    for found, expected in zip(*outputs, strict=True):
        assert torch.allclose(found.float(), expected.float(), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("kernel", [Attention.auto, Attention.per_document])
def test_loss_on_cuda_equals_the_cpu(kernel):
    """A flat batch in bf16 on the device against fp32 on the CPU; a head size that every kernel takes."""
    batch = collate(tiny.examples(6))
    losses = []
    for device, dtype in ((torch.device("cpu"), torch.float32), (CUDA, torch.bfloat16)):
        model = tiny.llama(attn_implementation=attention.NAME, hidden_size=128).to(device, dtype)
        chosen = attention.choose_kernel(kernel, device, dtype)
        loss, _ = tiny.task(model, 16, kernel=chosen)(batch.to(device))
        losses.append(float(loss))
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


@pytest.mark.parametrize("kernel", [Attention.auto, Attention.per_document])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_sound_model_passes_the_isolation_probe_in_bf16(family, kernel):
    """A row and a document alone run different kernels here, and experts get other numbers of tokens."""
    changes = {"num_local_experts": 4} if family == "mixtral" else {}
    changes |= {"hidden_size": 256, "head_dim": 64}
    model = tiny.causal(family, attention.NAME, **changes).to(CUDA, torch.bfloat16)
    chosen = attention.choose_kernel(kernel, CUDA, torch.bfloat16)
    loss, _ = tiny.task(model, 16, kernel=chosen).train()(collate(tiny.examples(6, vocabulary=100)).to(CUDA))
    assert torch.isfinite(loss)


def test_a_small_leak_is_refused_in_bf16():
    changes = {"layer_types": ["conv", "full_attention"]}
    model = tiny.causal("lfm2", attention.NAME, **changes).to(CUDA, torch.bfloat16)
    with pytest.raises(UserError, match="keep the documents of a row apart"):
        tiny.task(model, 16).train()(collate(tiny.examples(6, vocabulary=100)).to(CUDA))


def test_noise_is_that_of_the_cpu():
    tokens = noise.token_keys(7, (2, 3), [40, 60], [11, 5]).unsqueeze(1)
    features = noise.feature_keys("model.layers.0#1", 33)
    assert torch.equal(noise.draw(tokens.to(CUDA), features.to(CUDA)).cpu(), noise.draw(tokens, features))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [1, 7, 576, 3001])
def test_dropout_in_one_kernel_is_that_of_the_cpu(features, dtype):
    """To the last bit, forward and gradient."""
    torch.manual_seed(0)
    x = torch.randn(1, 90, features, dtype=dtype)
    layer = torch.nn.Dropout(0.3)
    ours = noise.Noise(torch.nn.Sequential(layer), seed=1)
    results = []
    for device in (torch.device("cpu"), CUDA):
        tiny.begin(ours, (0, 3), [50, 40], [4, 9], device=device)
        ours._features.clear()
        given = x.to(device).requires_grad_()
        y = layer.train()(given)
        (gradient,) = torch.autograd.grad(y.float().square().sum(), given)
        results.append((y.detach().cpu(), gradient.cpu()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("mode", [ActivationCheckpointing.full, ActivationCheckpointing.offload])
def test_recomputed_activations_draw_the_same(mode):
    """Backward passes run in threads of their own here; dropout as modules, as functions, and of attention."""
    gradients = []
    for chosen in (ActivationCheckpointing.none, mode):
        model = tiny.causal("opt", attention.NAME, dropout=0.2, attention_dropout=0.3, layerdrop=0.5).to(CUDA)
        task = tiny.task(model, 7, alpha=5.0).train()
        activation_checkpointing(model, chosen, task.noise.checkpointing)
        loss, _ = task(collate(tiny.examples(6, vocabulary=100), (1, 4)).to(CUDA))
        loss.backward()
        gradients.append({name: p.grad for name, p in task.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).norm() <= 1e-5 * expected.norm() + 1e-7, name


@pytest.fixture
def nobody_waits():
    """Inside the test's own `with`, whatever makes the host wait for the device is an error."""

    @contextmanager
    def watched():
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return watched


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("chunk", "dropout"), [(7, 0.0), (10_000, 0.1)])
def test_our_part_of_a_step_makes_nobody_wait(nobody_waits, chunk, dropout, padded, monkeypatch):
    """From batches on the host to the sums and the gradient's norm, which stay on the device.

    Transformers itself asks whether a mask hides anything, once in each forward pass of padded rows.
    """
    monkeypatch.setattr(masking_utils, "fast_all", lambda mask: False)
    implementation = "sdpa" if padded else attention.NAME
    model = tiny.causal("llama", implementation, attention_dropout=0.0 if padded else dropout).to(CUDA)
    task = tiny.task(model, chunk, alpha=5.0, padded=padded).train()
    batches = [collate(tiny.examples(6, seed, vocabulary=100), (0, seed), padded=padded) for seed in range(3)]
    task(batches[0].to(CUDA))  # the first pass checks the model, which may take its time
    shipping, tally = Shipping(CUDA), Tally()
    torch.cuda.synchronize()
    with nobody_waits():
        for batch in shipping.receive(shipping.send(batches)):
            loss, part = task(batch)
            (loss * 0.5).float().backward()
            tally.add(part)
        norm = total_norm([p.grad for p in task.parameters()])
    assert torch.isfinite(norm) and tally.read()["weight"] == sum(batch.weight for batch in batches)


def test_batches_that_are_shipped_are_those_of_the_host():
    """Copies on a stream of their own, whose memory is used again while the computing stream is busy."""
    shipping, busy = Shipping(CUDA), torch.randn(4096, 4096, device=CUDA)
    for seed in range(20):
        batches = [collate(tiny.examples(8, seed)), collate(tiny.examples(5, seed + 100))]
        busy = busy @ busy.softmax(-1)
        found = shipping.receive(shipping.send(batches))
        copies = [{name: tensor.clone() for name, tensor in batch.tensors.items()} for batch in found]
        del found
        for batch, copy in zip(batches, copies, strict=True):
            assert copy.keys() == batch.tensors.keys()
            assert all(torch.equal(copy[name].cpu(), tensor) for name, tensor in batch.tensors.items())
            assert all(tensor.device.type == "cuda" for tensor in copy.values())


@pytest.mark.parametrize("stage", ["zero0", "zero2", "zero3"])
def test_a_run_from_beginning_to_end_over_nccl(stage, tmp_path):
    """bf16, packing, LoRA with dropout, evaluation, checkpoints, samples and the verified export."""
    model = tiny.save(tmp_path / "model", hidden_size=256, intermediate_size=256)
    arguments = [
        f"run_dir={tmp_path / 'run'}",
        f"model.path={model}",
        f"data.train={tiny.write_jsonl(tmp_path / 'train.jsonl', tiny.records(80))}",
        f"data.validation={tiny.write_jsonl(tmp_path / 'validation.jsonl', tiny.records(11, seed=1))}",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"deepspeed={stage}",
        *("data=jsonl", "data.max_length=64", "tuning=lora", "tuning.dropout=0.1", "precision=bf16"),
        *("train.max_steps=6", "train.save_every=3", "optim.lr=1e-2", "train.sample_tokens=8"),
    ]
    stderr = command("launch/train.py", *arguments)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 6
    assert (tmp_path / "run/model/model.safetensors").is_file() and "exported" in stderr


TASKS = {
    "classify": (tiny.masked, "bert", tiny.ENCODER_TOKENIZER, tiny.labelled_rows),
    "tag": (tiny.masked, "bert", tiny.ENCODER_TOKENIZER, tiny.tagged_rows),
    "extract": (tiny.masked, "bert", tiny.ENCODER_TOKENIZER, tiny.asked_rows),
    "seq2seq": (tiny.two_sided, "t5", tiny.TWO_SIDED_TOKENIZER, tiny.written_rows),
}
"""Task -> what makes its model, of which family, with which tokenizer, and records."""


@pytest.mark.parametrize("stage", ["zero0", "zero3"])
@pytest.mark.parametrize("task", TASKS)
def test_every_kind_of_task_trains_and_predicts_in_bf16(task, stage, tmp_path):
    """Attention both ways in flat rows, padded rows of two sides, heads; the verified export, and predictions."""
    make, family, tokenizer, rows = TASKS[task]
    make(family, "eager").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = tiny.write_jsonl(tmp_path / "data.jsonl", rows(60))
    stderr = command(
        "launch/train.py",
        f"run_dir={tmp_path / 'run'}",
        f"task={task}",
        f"model.path={tmp_path / 'model'}",
        f"data.train={data}",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"deepspeed={stage}",
        *(
            "data=jsonl",
            "data.validation_share=0.2",
            "data.max_length=48",
            "precision=bf16",
            "batch.micro_batch_size=2",
        ),
        *("train.max_steps=8", "train.eval_every=4", "train.samples=0", "optim.lr=5e-3"),
    )
    assert "exported" in stderr
    evaluated = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["eval/loss"] for row in evaluated if "eval/loss" in row]
    assert len(losses) == 3 and losses[-1] < losses[0]
    command("launch/predict.py", f"run_dir={tmp_path / 'run'}", f"input={data}", f"output={tmp_path / 'said.jsonl'}")
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert len(said) == 60 and all("prediction" in line for line in said)


def command(*arguments: str) -> str:
    """What a command that succeeds says."""
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stderr
