"""Documents of a row do not see each other, and each gets what transformers' own attention gives it alone."""

import copy

import numpy as np
import pytest
import tiny
import torch
from tiny import collate

from dsft.config.schema import Attention
from dsft.errors import UserError
from dsft.model import attention

CPU = torch.device("cpu")
DOCUMENTS = tiny.documents
EXAMPLES = tiny.examples(5, shortest=2, longest=17, vocabulary=100)
WORKING = {
    "llama": {},
    "llama without grouped heads": {"num_key_value_heads": 4},
    "llama with one key for all heads": {"num_key_value_heads": 1},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"sliding_window": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "opt": {},
    "olmo2": {},
    "cohere2": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": {"attention_multiplier": 0.3},
    "mixtral": {"sliding_window": 4, "num_local_experts": 4},
}
MINIMAX = {"num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"]}
LEAKING = {
    "bloom": ({"n_layer": 1, "n_head": 4}, "keep the documents of a row apart"),  # hands nothing down
    "stablelm": ({}, "keep the documents of a row apart"),  # hands nothing down
    "bart": ({"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 32}, "apart"),
    "mamba": ({"state_size": 4}, "keep the documents of a row apart"),  # recurrent
    "minimax": (MINIMAX, "keep the documents of a row apart"),  # recurrent in one layer of two
    "gemma2": ({}, "Gemma2Attention asks for attention with softcap"),
    "gpt_oss": ({"num_local_experts": 2}, "GptOssAttention asks for attention with s_aux"),
    "doge": ({}, "DogeAttention asks for attention with attention_mask"),
}


def ids_of(example) -> torch.Tensor:
    return torch.from_numpy(example.ids.astype(np.int64))[None]


@torch.no_grad()
def in_a_row(model, examples) -> torch.Tensor:
    batch = collate(examples)
    inputs = {
        "input_ids": batch.tensors["input_ids"],
        "position_ids": batch.tensors["position_ids"],
        "use_cache": False,
    }
    return model(**inputs, documents=DOCUMENTS(batch.lengths, CPU)).logits[0]


@torch.no_grad()
def alone(model, examples) -> torch.Tensor:
    return torch.cat([model(input_ids=ids_of(e), use_cache=False).logits[0] for e in examples])


@pytest.mark.parametrize("name", WORKING)
def test_packed_and_unpacked_logits_agree_with_transformers_alone(name):
    ours = tiny.causal(name.split()[0], attention.NAME, **WORKING[name])
    theirs = tiny.causal(name.split()[0], "eager", **WORKING[name])
    expected = alone(theirs, EXAMPLES)
    scale = expected.abs().max()
    torch.testing.assert_close(in_a_row(ours, EXAMPLES) / scale, expected / scale, rtol=0, atol=1e-5)
    unpacked = torch.cat([in_a_row(ours, [e]) for e in EXAMPLES])
    torch.testing.assert_close(unpacked / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_an_examples_logits_do_not_change_with_its_neighbours(name):
    """SDPA with packing leaks across documents (axolotl, LLaMA-Factory)."""
    model = tiny.causal(name, attention.NAME, **WORKING[name])
    middle = EXAMPLES[1]
    length = len(middle.ids)

    def logits(before, after):
        row = in_a_row(model, [before, middle, after])
        return row[len(before.ids) : len(before.ids) + length]

    first = logits(EXAMPLES[0], EXAMPLES[2])
    other = copy.deepcopy(EXAMPLES[0]), copy.deepcopy(EXAMPLES[2])
    for example in other:
        example.ids[:] = 99 - example.ids
    assert torch.equal(logits(*other), first)
    # of other lengths too, where only the rounding of differently cut matrix products may differ
    torch.testing.assert_close(logits(EXAMPLES[3], EXAMPLES[4]), first, rtol=1e-6, atol=1e-6)


def test_gradients_stay_within_a_document_too():
    model = tiny.causal("llama", attention.NAME)
    batch = collate(EXAMPLES[:3])
    embedded = model.get_input_embeddings()(batch.tensors["input_ids"]).detach().requires_grad_()
    rest = {
        "position_ids": batch.tensors["position_ids"],
        "use_cache": False,
        "documents": DOCUMENTS(batch.lengths, CPU),
    }
    logits = model(inputs_embeds=embedded, **rest).logits[0]
    begin, end = batch.lengths[0], batch.lengths[0] + batch.lengths[1]
    logits[begin:end].square().sum().backward()
    touched = embedded.grad[0].abs().sum(-1) > 0
    assert touched[begin:end].all()
    assert not touched[:begin].any() and not touched[end:].any()


@pytest.mark.parametrize("window", [1, 3, 6, 50, None])
def test_a_token_sees_its_window_and_no_further(window):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 10, 8) for heads in (4, 2, 2))
    module = torch.nn.Identity()
    found, _ = attention.attention(
        module, query, key, value, None, documents=DOCUMENTS([6, 4], CPU), sliding_window=window
    )
    owner = torch.tensor([0] * 6 + [1] * 4)
    back = torch.arange(10)[:, None] - torch.arange(10)
    visible = (back >= 0) & (back < (window or 99)) & (owner[:, None] == owner)
    key, value = (t.repeat_interleave(2, dim=1) for t in (key, value))
    scores = (query @ key.mT / 8**0.5).masked_fill(~visible, -torch.inf)
    expected = (scores.softmax(-1) @ value).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LEAKING)
def test_a_model_that_would_mix_documents_or_lose_part_of_its_attention_is_refused(name):
    changes, message = LEAKING[name]
    model = tiny.causal(name, attention.NAME, **changes)
    task = tiny.task(model, 16).train()
    with pytest.raises(UserError, match=message):
        task(collate(EXAMPLES))


@pytest.mark.parametrize("name", ["xglm", "lfm2", "bamba"])
def test_a_small_leak_is_refused_in_bf16_as_in_fp32(name):
    """bf16's rounding is larger than what these models leak; that nothing may move at all shows it."""
    changes = {
        "xglm": {},
        "lfm2": {"layer_types": ["conv", "full_attention"]},
        "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
    }[name]
    for dtype in (torch.float32, torch.bfloat16):
        task = tiny.task(tiny.causal(name, attention.NAME, **changes).to(dtype), 16).train()
        with pytest.raises(UserError, match="keep the documents of a row apart"):
            task(collate(EXAMPLES))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("initializer_range", [0.02, 0.2, 1.0])
def test_a_sound_model_passes_in_half_precision(name, initializer_range):
    """Experts get other numbers of tokens behind another document, and large weights round coarsely."""
    changes = {"num_local_experts": 4} if name == "mixtral" else {}
    if name == "qwen3_moe":
        changes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny.causal(name, attention.NAME, initializer_range=initializer_range, **changes).to(dtype)
        loss, _ = tiny.task(model, 16).train()(collate(EXAMPLES))
        assert torch.isfinite(loss)


def test_attention_dropout_needs_a_kernel_that_can():
    cuda_like = torch.device("cpu")
    assert attention.choose_kernel(Attention.auto, cuda_like, torch.float32, dropout=True) is Attention.per_document
    assert attention.has_dropout(tiny.llama_config(attention_dropout=0.1))
    assert not attention.has_dropout(tiny.llama_config())
    documents = tiny.documents([3], CPU, Attention.torch_varlen)
    query = torch.randn(1, 2, 3, 8)
    with pytest.raises(UserError, match=r"use model\.attention=per_document, or model\.attention=flash"):
        attention.attention(torch.nn.Identity(), query, query, query, None, dropout=0.1, documents=documents)


def test_a_document_longer_than_an_attention_chunk_is_refused():
    changes = {"num_local_experts": 2, "attention_chunk_size": 16, "no_rope_layers": [1, 1]}
    model = tiny.causal("llama4_text", attention.NAME, **changes)
    in_a_row(model, [EXAMPLES[0]])
    with pytest.raises(UserError, match="attention_chunk_size=16"):
        in_a_row(model, tiny.examples(1, shortest=17, longest=17, vocabulary=100))


def test_training_without_document_boundaries_is_refused():
    model = tiny.causal("llama", attention.NAME).train()
    with pytest.raises(UserError, match="no document boundaries"):
        model(input_ids=ids_of(EXAMPLES[0]))


def test_a_sliding_window_is_not_forgotten_without_documents():
    """`generate` drops a mask that pads nothing, and with it the only other trace of the window."""
    ours = tiny.causal("mistral", attention.NAME, sliding_window=4)
    theirs = tiny.causal("mistral", "eager", sliding_window=4)
    ids = torch.arange(10)[None] + 5
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        for mask in (None, torch.ones_like(ids)):
            found = ours(input_ids=ids, attention_mask=mask).logits
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        cache = ours(input_ids=ids[:, :7], use_cache=True).past_key_values
        rest = ours(input_ids=ids[:, 7:], past_key_values=cache).logits
        torch.testing.assert_close(rest, expected[:, 7:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_generation_equals_sdpa_and_padding_changes_nothing(name):
    prompts = [ids_of(e)[:, :n] for e, n in zip(EXAMPLES, (2, 7, 5))]
    length = max(p.shape[1] for p in prompts)
    padded = torch.cat([torch.nn.functional.pad(p, (length - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (length - p.shape[1], 0)) for p in prompts])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}

    def answers(implementation):
        model = tiny.causal(name, implementation, **WORKING[name])
        single = [model.generate(p, attention_mask=torch.ones_like(p), **options)[:, p.shape[1] :] for p in prompts]
        return torch.cat(single), model.generate(padded, attention_mask=mask, **options)[:, length:]

    single, batched = answers(attention.NAME)
    assert torch.equal(single, batched)
    assert torch.equal(single, answers("sdpa")[0])
    assert len({tuple(answer) for answer in single.tolist()}) == len(prompts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_attends_per_document(dtype):
    assert attention.choose_kernel(Attention.auto, CPU, dtype) is Attention.per_document
    assert attention.choose_kernel(Attention.per_document, CPU, dtype) is Attention.per_document


def test_cuda_attends_by_variable_length_kernels_in_half_precision_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda = torch.device("cuda", 0)
    assert attention.choose_kernel(Attention.auto, cuda, torch.float32) is Attention.per_document
    assert attention.choose_kernel(Attention.auto, cuda, torch.bfloat16) is not Attention.per_document
    assert attention.choose_kernel(Attention.torch_varlen, cuda, torch.float16) is Attention.torch_varlen
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))  # a T4 has no such kernel
    assert attention.choose_kernel(Attention.auto, cuda, torch.float16) is Attention.per_document


@pytest.mark.parametrize("kernel", [Attention.flash, Attention.torch_varlen])
def test_a_kernel_that_cannot_run_here_is_refused(kernel):
    with pytest.raises(
        UserError, match=rf"model\.attention={kernel.value} needs a CUDA device.*device is cpu.*bfloat16"
    ):
        attention.choose_kernel(kernel, CPU, torch.bfloat16)
