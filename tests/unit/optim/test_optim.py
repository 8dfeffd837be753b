"""Parameter groups by name, layer-wise rates, and optimizers that step."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dsft.config.schema import Implementation, OptimConfig, OptimName, ParameterGroup
from dsft.errors import UserError
from dsft.optim import build, parameter_groups

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
MATRICES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
MATRICES += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
NORMS = ["input_layernorm", "post_attention_layernorm"]


def tiny_llama(layers: int = 2, **settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=layers, **settings))


def in_layers(parts: list[str], *layers: int) -> set[str]:
    return {f"model.layers.{layer}.{part}.weight" for layer in layers for part in parts}


def names_by_group(model: nn.Module, optim: OptimConfig) -> dict[str, set[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in parameter_groups(model, optim)}


def test_norms_and_embeddings_are_not_decayed():
    optim = OptimConfig(lr=1e-3, weight_decay=0.1)
    model = tiny_llama()
    assert names_by_group(model, optim) == {
        "decay": in_layers(MATRICES, 0, 1) | {"lm_head.weight"},
        "no decay": in_layers(NORMS, 0, 1) | {"model.norm.weight", "model.embed_tokens.weight"},
    }
    settings = [(group["lr"], group["weight_decay"]) for group in parameter_groups(model, optim)]
    assert settings == [(1e-3, 0.1), (1e-3, 0.0)]


def test_a_head_tied_to_the_embeddings_is_an_embedding():
    groups = names_by_group(tiny_llama(tie_word_embeddings=True), OptimConfig())
    assert "model.embed_tokens.weight" in groups["no decay"]
    assert groups["decay"] == in_layers(MATRICES, 0, 1)


def test_biases_and_every_kind_of_embedding_are_not_decayed():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    attention, mlp = "transformer.h.0.attn", "transformer.h.0.mlp"
    decayed = {f"{attention}.c_attn.weight", f"{attention}.c_proj.weight", f"{mlp}.c_fc.weight", f"{mlp}.c_proj.weight"}
    assert names_by_group(model, OptimConfig())["decay"] == decayed


def test_biases_and_norms_with_more_than_one_dimension_are_not_decayed():
    class ScaleNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 3))

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = ScaleNorm()
            self.gate_up_proj = nn.Parameter(torch.ones(2, 3, 4))
            self.gate_up_proj_bias = nn.Parameter(torch.ones(2, 4))

    groups = names_by_group(Experts(), OptimConfig())
    assert groups == {"decay": {"gate_up_proj"}, "no decay": {"norm.weight", "gate_up_proj_bias"}}


def test_shapes_that_zero3_keeps_aside_are_the_ones_that_count():
    model = tiny_llama()
    expected = names_by_group(model, OptimConfig())
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert names_by_group(model, OptimConfig()) == expected


def test_frozen_parameters_are_in_no_group():
    model = tiny_llama().requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(True)
    assert names_by_group(model, OptimConfig()) == {"decay": in_layers(MATRICES[4:], 1)}


def test_nothing_trainable_is_refused():
    with pytest.raises(UserError, match=r"tuning\.trainable"):
        parameter_groups(tiny_llama().requires_grad_(False), OptimConfig())


def test_layer_decay_slows_each_layer_below_the_top():
    model = tiny_llama(layers=3)
    optim = OptimConfig(lr=1.0, weight_decay=0.1, layer_decay=0.5)
    rates = [(group["name"], group["lr"], group["weight_decay"]) for group in parameter_groups(model, optim)]
    assert rates == [
        ("embeddings, no decay", 0.125, 0.0),
        ("layer 0, decay", 0.25, 0.1),
        ("layer 0, no decay", 0.25, 0.0),
        ("layer 1, decay", 0.5, 0.1),
        ("layer 1, no decay", 0.5, 0.0),
        ("layer 2, decay", 1.0, 0.1),
        ("layer 2, no decay", 1.0, 0.0),
        ("head, decay", 1.0, 0.1),
        ("head, no decay", 1.0, 0.0),
    ]
    names = names_by_group(model, optim)
    assert names["layer 1, decay"] == in_layers(MATRICES, 1)
    assert names["head, decay"] == {"lm_head.weight"}
    assert names["head, no decay"] == {"model.norm.weight"}


def test_groups_by_name_have_a_rate_and_a_decay_of_their_own():
    model = tiny_llama()
    given = [ParameterGroup("lm_head", lr=5.0), ParameterGroup(r"layers\.1\..*proj", weight_decay=0.3),
             ParameterGroup("norm", weight_decay=0.7)]  # fmt: skip
    optim = OptimConfig(lr=1.0, weight_decay=0.1, layer_decay=0.5, groups=given)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: group for group in parameter_groups(model, optim) for p in group["params"]}
    plain = {
        names[id(p)]: group
        for group in parameter_groups(model, OptimConfig(lr=1.0, weight_decay=0.1, layer_decay=0.5))
        for p in group["params"]
    }
    assert found.keys() == plain.keys()
    for name, group in found.items():
        rate, decay = plain[name]["lr"], plain[name]["weight_decay"]
        rate = 5.0 if "lm_head" in name else rate
        decay = 0.3 if "layers.1." in name and "proj" in name else decay
        assert (group["lr"], group["weight_decay"]) == (rate, decay), name


def test_a_group_that_finds_nothing_or_only_what_an_earlier_one_has_is_refused():
    with pytest.raises(UserError, match=r"optim.groups\[0\].match='nosuch' is found in no trainable parameter's name"):
        parameter_groups(tiny_llama(), OptimConfig(groups=[ParameterGroup("nosuch", lr=1.0)]))
    taken = [ParameterGroup("lm_head", lr=1.0), ParameterGroup("head", lr=2.0)]
    with pytest.raises(UserError, match=r"optim.groups\[1\].*those that it finds are of an earlier group"):
        parameter_groups(tiny_llama(), OptimConfig(groups=taken))


def test_layer_decay_counts_frozen_layers_too():
    model = tiny_llama(layers=3)
    model.model.layers[2].requires_grad_(False)
    rates = {group["name"]: group["lr"] for group in parameter_groups(model, OptimConfig(lr=1.0, layer_decay=0.5))}
    assert rates["layer 1, decay"] == 0.5


def test_layer_decay_puts_what_stands_beside_the_embeddings_below_the_layers():
    model = BertModel(BertConfig(**SIZES, num_hidden_layers=2))
    groups = names_by_group(model, OptimConfig(layer_decay=0.5))
    assert groups["embeddings, no decay"] == {n for n, _ in model.named_parameters() if n.startswith("embeddings.")}
    assert groups["head, decay"] == {"pooler.dense.weight"}


def test_layer_decay_without_layers_is_refused():
    with pytest.raises(UserError, match=r"optim\.layer_decay=0\.5"):
        parameter_groups(nn.Sequential(nn.Linear(2, 2)), OptimConfig(layer_decay=0.5))


@pytest.mark.parametrize("dora", [False, True])
def test_lora_trains_its_matrices_decayed_and_its_magnitudes_not(dora):
    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], use_dora=dora)
    model = get_peft_model(tiny_llama(layers=1), config)
    query, embedding = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.embed_tokens"
    magnitudes = {f"{part}.lora_magnitude_vector.default.weight" for part in (query, embedding)} if dora else set()
    assert names_by_group(model, OptimConfig()) == {
        "decay": {f"{query}.lora_A.default.weight", f"{query}.lora_B.default.weight"},
        "no decay": {f"{embedding}.lora_embedding_A.default", f"{embedding}.lora_embedding_B.default"} | magnitudes,
    }
    rates = {g["name"]: g["lr"] for g in parameter_groups(model, OptimConfig(lr=1.0, layer_decay=0.5))}
    assert rates["embeddings, no decay"] == 0.5
    assert rates["layer 0, decay"] == 1.0


def test_muon_takes_the_matrices_of_the_layers():
    optim = OptimConfig(name=OptimName.muon, weight_decay=0.1, momentum=0.8, betas=[0.9, 0.95])
    model = tiny_llama()
    assert names_by_group(model, optim) == {
        "decay, muon": in_layers(MATRICES, 0, 1),
        "decay, adamw": {"lm_head.weight"},
        "no decay, adamw": in_layers(NORMS, 0, 1) | {"model.norm.weight", "model.embed_tokens.weight"},
    }
    by_muon, *by_adamw = parameter_groups(model, optim)
    assert (by_muon["use_muon"], by_muon["momentum"]) == (True, 0.8)
    assert all((g["use_muon"], g["betas"], g["eps"]) == (False, (0.9, 0.95), 1e-8) for g in by_adamw)


def test_muon_without_a_trainable_matrix_is_refused():
    model = tiny_llama().requires_grad_(False)
    model.model.norm.requires_grad_(True)
    with pytest.raises(UserError, match=r"optim\.name=muon"):
        parameter_groups(model, OptimConfig(name=OptimName.muon))


def three_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    ids = torch.arange(12).view(2, 6)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(
    ("optim", "reference"),
    [
        (
            OptimConfig(lr=1e-2, weight_decay=0.1, betas=[0.9, 0.95], eps=1e-6),
            lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6, foreach=False),
        ),
        (
            OptimConfig(name=OptimName.sgd, lr=1e-2, weight_decay=0.1, momentum=0.8),
            lambda groups: torch.optim.SGD(groups, momentum=0.8, foreach=False),
        ),
    ],
    ids=["adamw", "sgd"],
)
def test_built_optimizers_step_like_plain_ones_and_repeat_bit_for_bit(optim, reference):
    model = tiny_llama()
    plain, again = copy.deepcopy(model), copy.deepcopy(model)
    decayed = [p for p in plain.parameters() if p.ndim == 2 and p is not plain.model.embed_tokens.weight]
    rest = [p for p in plain.parameters() if all(p is not other for other in decayed)]
    groups = [{"params": decayed, "lr": 1e-2, "weight_decay": 0.1}, {"params": rest, "lr": 1e-2, "weight_decay": 0.0}]

    def built(m: nn.Module) -> torch.optim.Optimizer:
        return build(parameter_groups(m, optim), optim, offload=False, deepspeed_classes={})

    before = [p.detach().clone() for p in model.parameters()]
    ours, theirs = three_steps(model, built(model)), three_steps(plain, reference(groups))
    for a, b, start in zip(ours, theirs, before, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert not torch.equal(a, start)
    assert all(torch.equal(a, b) for a, b in zip(ours, three_steps(again, built(again)), strict=True))


def test_groups_remember_their_peak_rate():
    optim = OptimConfig(lr=1.0, layer_decay=0.5)
    optimizer = build(parameter_groups(tiny_llama(), optim), optim, offload=False, deepspeed_classes={})
    assert [g["initial_lr"] for g in optimizer.param_groups] == [0.25, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0]


class Recorder(torch.optim.SGD):
    """Stands in for a DeepSpeed class and keeps what it was made with."""

    def __init__(self, groups, **settings):
        super().__init__(groups, lr=1.0)
        self.settings = settings


ADAM, LION = {"lr": 1e-4, "betas": (0.8, 0.9), "eps": 1e-8}, {"lr": 1e-4, "betas": (0.8, 0.9)}


@pytest.mark.parametrize(
    ("name", "implementation", "offload", "device", "expected", "settings"),
    [
        ("adamw", "auto", True, "cpu", "DeepSpeedCPUAdam", ADAM),
        ("adamw", "deepspeed", True, "cpu", "DeepSpeedCPUAdam", ADAM),
        ("adamw", "deepspeed", False, "cpu", "FusedAdam", ADAM),
        ("lion", "auto", False, "cpu", "DeepSpeedCPULion", LION),
        ("lion", "auto", False, "meta", "FusedLion", LION),
        ("lion", "auto", True, "meta", "DeepSpeedCPULion", LION),
        ("muon", "auto", False, "cpu", "MuonWithAuxAdam", {}),
    ],
)
def test_the_deepspeed_class_that_fits(name, implementation, offload, device, expected, settings):
    optim = OptimConfig(name=OptimName[name], implementation=Implementation[implementation], betas=[0.8, 0.9])
    groups = parameter_groups(tiny_llama().to(device), optim)
    optimizer = build(groups, optim, offload=offload, deepspeed_classes={expected: lambda: Recorder})
    assert optimizer.settings == settings


def test_muon_marks_its_matrices_for_zero():
    optim, model = OptimConfig(name=OptimName.muon), tiny_llama()
    build(parameter_groups(model, optim), optim, offload=False, deepspeed_classes={"MuonWithAuxAdam": lambda: Recorder})
    assert {name for name, p in model.named_parameters() if p.use_muon} == in_layers(MATRICES, 0, 1)


def test_torch_adamw_may_be_offloaded_by_choice():
    optim = OptimConfig(implementation=Implementation.torch)
    optimizer = build(parameter_groups(tiny_llama(), optim), optim, offload=True, deepspeed_classes={})
    assert type(optimizer) is torch.optim.AdamW


@pytest.mark.parametrize(("name", "implementation"), [("lion", "torch"), ("muon", "torch"), ("sgd", "deepspeed")])
def test_an_implementation_that_does_not_exist_is_refused(name, implementation):
    optim = OptimConfig(name=OptimName[name], implementation=Implementation[implementation])
    with pytest.raises(UserError, match=rf"optim\.implementation={implementation} with optim\.name={name}"):
        build(parameter_groups(tiny_llama(), optim), optim, offload=False, deepspeed_classes={})


def test_a_class_that_deepspeed_lacks_or_cannot_compile_is_explained():
    def missing() -> type:
        raise ImportError("no module named muon")

    class Uncompiled:
        def __init__(self, groups, **settings):
            raise RuntimeError("Ninja is required to load C++ extensions")

    optim = OptimConfig(name=OptimName.muon)
    with pytest.raises(UserError, match=r"no MuonWithAuxAdam.*set optim\.name=adamw"):
        groups = parameter_groups(tiny_llama(), optim)
        build(groups, optim, offload=False, deepspeed_classes={"MuonWithAuxAdam": missing})
    with pytest.raises(UserError, match=r"(?s)Ninja is required.*optim\.implementation=torch"):
        groups = parameter_groups(tiny_llama(), OptimConfig())
        build(groups, OptimConfig(), offload=True, deepspeed_classes={"DeepSpeedCPUAdam": lambda: Uncompiled})
