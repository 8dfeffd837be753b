"""Which weights are trained, and that nothing else moves."""

import math

import pytest
import tiny
import torch
from peft import PeftModel
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from dsft.config.schema import Method, TuningConfig
from dsft.errors import UserError
from dsft.model import tuning


def tiny_llama(tie: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=tie, **shape))


def tiny_qwen2() -> Qwen2ForCausalLM:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=32, tie_word_embeddings=False, num_key_value_heads=1, **shape))


def tiny_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=3, n_head=2))


def trained(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def freeze(model, **settings):
    return tuning.apply(model, TuningConfig(method=Method.freeze, **settings), seed=0)


def lora(model, seed=0, **settings):
    return tuning.apply(model, TuningConfig(method=Method.lora, **settings), seed=seed)


def test_full_trains_everything_and_counts_tied_weights_once():
    model = tuning.apply(tiny_llama(), TuningConfig(), seed=0)
    layer = 4 * 16 * 16 + 3 * 16 * 24 + 2 * 16
    assert tuning.describe(model) == tuning.Counts(trainable=32 * 16 + 3 * layer + 16, total=32 * 16 + 3 * layer + 16)


def test_freeze_trains_what_a_pattern_finds():
    model = freeze(tiny_llama(), trainable=[r"layers\.1\..*_proj", "norm"])
    assert all(("layers.1." in name and "_proj" in name) or "norm" in name for name in trained(model))
    assert len(trained(model)) == 7 + 3 * 2 + 1


def test_freeze_by_layers_takes_the_last_ones_the_final_norm_and_an_untied_head():
    names = trained(freeze(tiny_llama(tie=False), last_layers=1))
    assert {n for n in names if ".layers." not in n} == {"model.norm.weight", "lm_head.weight"}
    assert {n.split(".")[2] for n in names if ".layers." in n} == {"2"}
    assert trained(freeze(tiny_llama(tie=True), last_layers=0)) == {"model.norm.weight"}


def test_freeze_by_layers_knows_no_architecture_by_name():
    names = trained(freeze(tiny_gpt2(), last_layers=2))
    assert {n for n in names if ".h." not in n} == {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    assert {n.split(".")[2] for n in names if ".h." in n} == {"1", "2"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable": ["mpl.up_proj"]}, r"'mpl.up_proj' is found in no .* Nearest: model\.layers\.0\.mlp\.up_proj"),
        ({"trainable": ["("]}, "no regular expression"),
        ({"last_layers": 4}, "the model has 3 layers. Give 0 to 3"),
        ({}, "nothing would be trained"),
    ],
)
def test_a_freeze_that_does_not_fit_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        freeze(tiny_llama(), **settings)


def test_lora_trains_adapters_on_every_linear_layer_but_the_head():
    model = lora(tiny_llama(tie=False), rank=4)
    assert isinstance(model, PeftModel)
    assert all(".lora_A." in name or ".lora_B." in name for name in trained(model))
    per_layer = 4 * 4 * (16 + 16) + 3 * 4 * (16 + 24)
    assert tuning.describe(model).trainable == 3 * per_layer


def test_lora_starts_as_the_model_it_adapts_and_in_its_type():
    ids = torch.randint(32, (1, 7))
    plain = tiny_llama().eval()(ids).logits
    model = lora(tiny_llama()).eval()
    torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=0)
    half = lora(tiny_llama().bfloat16())
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_the_seed_alone_decides_the_adapters_and_no_random_state_moves():
    def weights(seed, draws_before):
        model = tiny_qwen2()
        torch.rand(draws_before)
        state = torch.get_rng_state()
        adapted = lora(model, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat([p.detach().flatten() for p in adapted.parameters() if p.requires_grad])

    assert torch.equal(weights(seed=3, draws_before=0), weights(seed=3, draws_before=5))
    assert not torch.equal(weights(seed=3, draws_before=0), weights(seed=4, draws_before=0))


def test_rslora_and_dora_reach_peft():
    def layer(**settings):
        return lora(tiny_llama(), rank=4, alpha=8.0, **settings).get_base_model().model.layers[0].mlp.up_proj

    assert layer().scaling["default"] == 8 / 4
    assert layer(use_rslora=True).scaling["default"] == 8 / math.sqrt(4)
    dora = layer(use_dora=True)
    torch.testing.assert_close(dora.lora_magnitude_vector["default"].weight.data, dora.weight.data.norm(dim=1))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_pro"], r"'q_pro' is the name of no linear layer .* Nearest: q_proj"),
        (["q_proj", "embed_tokens"], "'embed_tokens' is the name of no linear layer"),
        (["lm_head"], "'lm_head' is the name of no linear layer that can take an adapter"),
        ([], "target_modules is empty"),
    ],
)
def test_target_modules_that_do_not_fit_are_refused(targets, message):
    with pytest.raises(UserError, match=message):
        lora(tiny_llama(tie=True), target_modules=targets)


def test_target_modules_by_name_reach_only_those():
    names = trained(lora(tiny_llama(), target_modules=["q_proj", "v_proj"]))
    assert {n.split(".")[6] for n in names} == {"q_proj", "v_proj"}
    names = trained(lora(tiny_gpt2(), target_modules=["c_attn"]))
    assert {n.split(".")[6] for n in names} == {"c_attn"}


@pytest.mark.parametrize("problem", [ValueError("no such layer"), AttributeError("no such layer")])
def test_whatever_peft_cannot_do_is_refused_with_the_setting(problem, monkeypatch):
    def fail(*_, **__):
        raise problem

    monkeypatch.setattr(tuning, "get_peft_model", fail)
    with pytest.raises(UserError, match=r"takes no adapters for this model: .*no such layer.*tuning\.target_modules"):
        tuning.apply(tiny.llama(), TuningConfig(method=Method.lora, rank=2), seed=0)


def test_adapters_other_than_those_that_were_trained_are_refused_by_name():
    """A run that went on would leave the weights of those that are gone, and begin new ones anew."""
    then = tuning.adapters(tuning.apply(tiny.llama(), TuningConfig(method=Method.lora, rank=2), seed=0))
    fewer = TuningConfig(method=Method.lora, rank=2, target_modules=["q_proj", "k_proj"])
    now = tuning.apply(tiny.llama(), fewer, seed=0)
    tuning.check_adapters(now, tuning.adapters(now))
    with pytest.raises(UserError, match=r"layers\.0\.\S+ had rank and scale \[2, .*\], and would have None .*peft"):
        tuning.check_adapters(now, then)
