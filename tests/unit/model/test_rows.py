"""Rows of new tokens: made from their pieces, trained by themselves, written in their places."""

from contextlib import nullcontext

import pytest
import tiny
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Gemma3nForCausalLM, Gemma3nTextConfig

from dsft.config.schema import Method, OptimConfig, TuningConfig
from dsft.errors import UserError
from dsft.model import export, rows, tuning
from dsft.model.vocabulary import Vocabulary
from dsft.optim import parameter_groups
from dsft.tasks.nll import plain_head

GROWN = Vocabulary(100, pieces=((7, 12, 99), (3,)), texts=("一", "二"))
SPARE = Vocabulary(96, pieces=((7, 12, 95), (3,)), texts=("一", "二"))
FAMILIES = ["llama", "gpt2", "phi", "gemma3_text"]
"""Untied or tied, a head with a bias (Phi), an embedding that scales what it looks up (Gemma 3)."""


def grown(family: str, words: Vocabulary, **changes):
    """The model with its rows, and a copy of it as it was."""
    before, model = (tiny.causal(family, "eager", **changes) for _ in range(2))
    rows.grow(model, words, lambda parameters: nullcontext())
    return before, model


def matrices(model) -> list[torch.Tensor]:
    head = model.get_output_embeddings()
    found = [model.get_input_embeddings().weight, head.weight, head.bias]
    return [tensor.detach() for tensor in found if tensor is not None]


def trained(family: str, words: Vocabulary, method: Method = Method.freeze, **changes):
    model = grown(family, words, **changes)[1]
    return tuning.apply(model, TuningConfig(method=method, new_tokens=True, rank=2), 0, words)


def step(model, tokens: int) -> None:
    """One step of plain gradient descent on the next token, by transformers' own loss."""
    ids = torch.arange(tokens)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad)


@pytest.mark.parametrize("words", [GROWN, SPARE], ids=["grown", "spare"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_row_is_the_mean_of_the_rows_of_its_pieces(family, words):
    before, model = grown(family, words)
    size = max(100, words.size)
    assert model.config.vocab_size == size == model.get_input_embeddings().num_embeddings
    assert model.get_output_embeddings().out_features == size
    for old, new in zip(matrices(before), matrices(model), strict=True):
        assert len(new) == size
        for place, pieces in enumerate(words.pieces, words.first):
            torch.testing.assert_close(new[place], sum(old[piece] for piece in pieces) / len(pieces))
        assert torch.equal(new[: words.first], old[: words.first])
        assert torch.equal(new[words.size :], old[words.size :])


def test_tied_matrices_stay_tied_and_untied_ones_differ():
    for tie in (True, False):
        model = grown("llama", GROWN, tie_word_embeddings=tie)[1]
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tie


def test_means_are_taken_in_fp32_and_rounded_once():
    model = tiny.causal("llama", "eager").bfloat16()
    old = model.get_input_embeddings().weight.detach()
    rows.grow(model, GROWN, lambda parameters: nullcontext())
    new = model.get_input_embeddings().weight
    assert new.dtype is torch.bfloat16
    assert torch.equal(new[100], old[[7, 12, 99]].float().mean(0).bfloat16())
    assert not torch.equal(new[100], old[[7, 12, 99]].cumsum(0)[-1] / 3)


def test_an_id_without_a_token_gets_the_mean_of_all_rows():
    before, model = grown("llama", Vocabulary(100, pieces=((), (3,)), texts=(None, "二")))
    for old, new in zip(matrices(before), matrices(model), strict=True):
        torch.testing.assert_close(new[100], old.mean(0))


def test_no_new_tokens_change_nothing():
    before, model = grown("llama", Vocabulary(100))
    assert all(torch.equal(*pair) for pair in zip(matrices(before), matrices(model), strict=True))


def test_a_model_with_further_tables_is_refused():
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"head_dim": 8, "num_key_value_heads": 1, "hidden_size_per_layer_input": 4, "laurel_rank": 2}
    layers = {
        "layer_types": ["full_attention"] * 2,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0] * 2,
    }
    model = Gemma3nForCausalLM(
        Gemma3nTextConfig(vocab_size=32, vocab_size_per_layer_input=32, pad_token_id=0, **shape, **layers)
    )
    with pytest.raises(UserError, match="Gemma3n.* has more tables with a row per token"):
        rows.grow(model, Vocabulary(32, pieces=((1,),), texts=("一",)), lambda parameters: nullcontext())


@pytest.mark.parametrize("words", [GROWN, SPARE], ids=["grown", "spare"])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_new_rows_are_trained_as_if_all_were_and_the_rest_put_back(family, words):
    """Logits and one step's change are those of a model whose whole matrices take a gradient."""
    model, plain = trained(family, words), grown(family, words)[1]
    ids = torch.arange(max(100, words.size))[None]
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    names = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert names == ({"new_weight", "new_bias"} if family == "phi" else {"new_weight"})
    step(model, words.size)
    step(plain, words.size)
    head = model.get_output_embeddings()
    found = [rows.whole(model.get_input_embeddings(), "weight"), rows.whole(head, "weight"), rows.whole(head, "bias")]
    before = matrices(grown(family, words)[1])
    for own, all_, old in zip([t for t in found if t is not None], matrices(plain), before, strict=True):
        new = slice(words.first, words.size)
        torch.testing.assert_close(own[new], all_[new], rtol=1e-4, atol=1e-6)
        assert not torch.allclose(own[new], old[new])
        assert torch.equal(own[: words.first], old[: words.first])
        assert torch.equal(own[words.size :], old[words.size :])


@pytest.mark.parametrize("chunk", [3, 1000])
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_the_chunked_loss_knows_the_new_rows(family, chunk):
    """Loss and every gradient are those of the plain head; the hidden states' too."""
    model = trained(family, SPARE)
    step(model, SPARE.size)  # so that the new rows are other than those of the frozen matrix
    head = model.get_output_embeddings()
    hidden = torch.randn(11, head.in_features, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(90, 100, (11,), generator=torch.Generator().manual_seed(1))

    def gradients(loss_of):
        model.zero_grad()
        states = hidden.clone().requires_grad_()
        loss = loss_of(states)
        loss.backward()
        trained = [p.grad.clone() for p in head.parameters() if p.requires_grad]
        return [loss.detach().float(), states.grad, *trained]

    expected = gradients(lambda states: F.cross_entropy(head(states), targets, reduction="sum"))
    assert plain_head(model) is head
    found = gradients(lambda states: head(states, targets, None, chunk)[0])
    assert len(found) == (4 if family == "phi" else 3)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


def test_a_bias_trained_as_a_whole_keeps_its_new_entries():
    """BitFit beside new rows: the head's bias is one parameter, its weight's new rows another."""
    model = grown("phi", GROWN)[1]
    settings = TuningConfig(method=Method.freeze, trainable=[r"bias$"], new_tokens=True)
    tuning.apply(model, settings, 0, GROWN)
    head = model.get_output_embeddings()
    assert head.bias.requires_grad and not hasattr(head, "new_bias")
    hidden, targets = torch.randn(5, 32), torch.tensor([1, 100, 101, 3, 4])
    F.cross_entropy(head(hidden), targets, reduction="sum").backward()
    expected = head.bias.grad.clone()
    head.bias.grad = None
    plain_head(model)(hidden, targets, None, 2)[0].backward()
    torch.testing.assert_close(head.bias.grad, expected)


def test_adapters_and_new_rows_are_trained_together_and_nothing_else():
    model = trained("llama", GROWN, Method.lora)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {n.rpartition(".")[2] if "lora" not in n else "lora" for n in names} == {"new_weight", "lora"}
    assert sum("new_weight" in name for name in names) == 2


def test_new_rows_are_not_decayed_even_those_of_an_untied_head():
    groups = parameter_groups(trained("llama", GROWN), OptimConfig(weight_decay=0.1))
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(2, 0.0)]


@pytest.mark.parametrize(
    "settings",
    [{"method": Method.freeze, "trainable": ["embed_tokens"]}, {"method": Method.freeze, "last_layers": 1}, {}],
)
def test_a_matrix_that_is_trained_as_a_whole_has_no_rows_beside_it(settings):
    """The pattern takes the input embedding, the last layers the output head, `full` both."""
    model = tuning.apply(grown("llama", GROWN)[1], TuningConfig(new_tokens=True, **settings), 0, GROWN)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert module.weight.requires_grad is not hasattr(module, "new_weight")


def test_dora_on_the_head_is_refused():
    model = grown("llama", GROWN)[1]
    settings = TuningConfig(method=Method.lora, target_modules=["lm_head"], use_dora=True, new_tokens=True)
    with pytest.raises(UserError, match=r"tuning\.use_dora=true: tuning\.target_modules names the output head"):
        tuning.apply(model, settings, 0, GROWN)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *((family, {"method": Method.freeze}) for family in FAMILIES),
        ("llama", {"method": Method.lora}),
        ("llama", {"method": Method.lora, "target_modules": ["lm_head", "q_proj"]}),
        ("gpt2", {"method": Method.lora}),
    ],
)
def test_the_written_model_has_the_trained_rows(tmp_path, family, settings):
    model = grown(family, GROWN)[1]
    model = tuning.apply(model, TuningConfig(new_tokens=True, rank=2, **settings), 0, GROWN)
    step(model, GROWN.size)
    if settings["method"] is Method.lora:
        step(model, GROWN.size)  # the first moves one half of an adapter alone
    export.write_model(
        model,
        export.companion_files(tiny.tokenizer(), None),
        tmp_path / "model",
        gather=lambda parameters: nullcontext(),
        is_writer=True,
        merge=True,
        dtype=torch.float32,
    )
    ids = torch.tensor([[5, 100, 101, 7, 100]])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32, attn_implementation="eager")
    assert again.config.vocab_size == 102
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        torch.testing.assert_close(again(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
