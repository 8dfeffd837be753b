"""What would fail at the end of a run fails before its first step, and what can be written is written."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_export import adapted, tiny_gpt2, tiny_llama, tiny_moe
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from dsft.config.schema import DataConfig, Method, TuningConfig
from dsft.errors import UserError
from dsft.model import export, rehearsal, vocabulary
from dsft.model.load import load_model, load_tokenizer, resolve
from dsft.model.stopping import find_stopping
from dsft.tasks import render, template
from dsft.tasks.conversation import Conversation
from dsft.types import Probe

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1}
SHAPE = {"vocab_size": 400, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
LORA = {"method": Method.lora, "rank": 4}


def tiny_mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(num_attention_heads=2, **SHAPE, **EXPERTS)).eval()


def tiny_gpt_oss():
    """Experts with biases, and stored as (experts, in, out)."""
    torch.manual_seed(0)
    return GptOssForCausalLM(GptOssConfig(num_attention_heads=2, head_dim=8, **SHAPE, **EXPERTS)).eval()


def saved(directory: Path, model=None, tokenizer=None) -> Path:
    (model or tiny.llama()).save_pretrained(directory)
    (tokenizer or tiny.tokenizer()).save_pretrained(directory)
    return directory


def rehearse(directory: Path, destination: Path | None = None, tokenizer=None, new=(), dtype=torch.float32, **tuned):
    """As a run begins, up to its first step; returns the files beside the weights."""
    source = resolve(str(directory))
    tokenizer = tokenizer or load_tokenizer(source)
    words = vocabulary.extend(tokenizer, list(new), load_model(source, dtype, "eager", "meta").config.vocab_size)
    stopping = find_stopping(source, tokenizer, template.turn_end(tokenizer))
    companions = export.companion_files(tokenizer, stopping.generation_config)
    destination = destination or directory.parent / "run/model"
    rehearsal.rehearse(source, tokenizer, words, companions, TuningConfig(**tuned), dtype, destination)
    return companions


@pytest.mark.parametrize("tuned", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["gemma2", "gpt_neox", "bloom", "phi3", "qwen2_moe", "granitemoe", "lfm2"])
def test_no_family_is_refused_for_nothing(family, tuned, tmp_path):
    """Other names, tied and untied heads, fused projections, buffers, tensors that files hold under other names."""
    saved(tmp_path / "base", tiny.causal(family, "eager", vocab_size=400))
    rehearse(tmp_path / "base", **tuned)


@pytest.mark.parametrize("tuned", [{}, LORA, {**LORA, "use_dora": True}], ids=["full", "lora", "dora"])
def test_a_model_that_can_be_written_passes_and_nothing_is_left(tmp_path, tuned):
    saved(tmp_path / "base")
    before = sorted(tmp_path.rglob("*"))
    rehearse(tmp_path / "base", **tuned)
    rehearse(tmp_path / "base", new=["狐狸狐狸"], **tuned)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "alone"])
@pytest.mark.parametrize("build", [tiny_moe, tiny_mixtral, tiny_gpt_oss])
def test_adapters_on_experts_that_are_one_tensor_are_written(build, merge, tmp_path):
    """`all-linear` reaches them as parameters, nested, of which each has its own adapter (and the router)."""
    base = build()
    saved(tmp_path / "base", base)
    if base.config.vocab_size == 400:
        rehearse(tmp_path / "base", **LORA)
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        probe = Probe(ids, model(input_ids=ids).logits)
        with model.disable_adapter():
            assert not torch.allclose(probe.logits, model(input_ids=ids).logits, atol=1e-2)
    report = export.write_model(
        model,
        export.companion_files(tiny.tokenizer(), None),
        tmp_path / "out",
        gather=lambda parameters: nullcontext(),
        is_writer=True,
        merge=merge,
        dtype=torch.float32,
        probe=probe,
    )
    assert report.relative < 1e-5


@pytest.mark.parametrize("change", [{"dropout": 0.1}, {"use_dora": True}])
def test_what_peft_cannot_do_to_experts_is_refused_in_settings(change, tmp_path):
    saved(tmp_path / "base", tiny_mixtral())
    name, value = next(iter(change.items()))
    with pytest.raises(UserError, match=rf"tuning\.{name}={str(value).lower()} cannot be had with .*all-linear"):
        rehearse(tmp_path / "base", **LORA, **change)


def named_templates() -> object:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = {
        "default": tiny.CHATML,
        "tool_use": "{{ tools }}" + tiny.CHATML,
        "rag": "{{ documents }}",
    }
    return tokenizer


def test_a_tokenizer_with_several_chat_templates_is_written_with_all_of_them(tmp_path):
    saved(tmp_path / "base", tokenizer=named_templates())
    companions = rehearse(tmp_path / "base")
    model = tiny.llama().eval()
    export.write_model(
        model,
        companions,
        tmp_path / "out",
        gather=lambda parameters: nullcontext(),
        is_writer=True,
        merge=True,
        dtype=torch.float32,
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == named_templates().chat_template


def test_templates_without_a_default_are_refused_in_words(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = {"rag": tiny.CHATML, "tool_use": tiny.CHATML}
    chat = Conversation(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    with pytest.raises(UserError, match=r"several chat templates \(rag, tool_use\), and none is called default"):
        render.render(chat, tokenizer, DataConfig())


def test_a_tokenizer_that_cannot_be_saved_is_refused(tmp_path):
    saved(tmp_path / "base")
    tokenizer = load_tokenizer(resolve(str(tmp_path / "base")))
    tokenizer.init_kwargs["made_by"] = object()
    with pytest.raises(UserError, match="the tokenizer cannot be saved, so no model could be written at the end"):
        rehearse(tmp_path / "base", tokenizer=tokenizer)


def test_a_tokenizer_that_comes_back_as_another_is_refused(tmp_path, monkeypatch):
    saved(tmp_path / "base")
    other = SimpleNamespace(from_pretrained=lambda directory: tiny.byte_tokenizer())
    monkeypatch.setattr(rehearsal, "AutoTokenizer", other)
    with pytest.raises(UserError, match="the written tokenizer comes back with another ids of text"):
        rehearse(tmp_path / "base")


def test_weights_that_cannot_be_given_back_their_names_are_refused(tmp_path, monkeypatch):
    saved(tmp_path / "base")

    def fail(model, tensors):
        raise NotImplementedError("no way back")

    monkeypatch.setattr(export, "revert_weight_conversion", fail)
    with pytest.raises(UserError, match=r"could not be written at the end .*no way back.*train\.export=false"):
        rehearse(tmp_path / "base")
    monkeypatch.setattr(
        export, "revert_weight_conversion", lambda model, tensors: {f"x.{n}": t for n, t in tensors.items()}
    )
    with pytest.raises(UserError, match="its files would have 21 missing tensors, "):
        rehearse(tmp_path / "base")


def test_a_place_that_is_taken_or_too_small_is_refused(tmp_path, monkeypatch):
    saved(tmp_path / "base")
    place = tmp_path / "run/model"
    place.mkdir(parents=True)
    (place / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds no model, so it is not replaced"):
        rehearse(tmp_path / "base")
    shutil.rmtree(place)
    monkeypatch.setattr(rehearsal.shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, free=1000))
    with pytest.raises(UserError, match=r"the model takes 0\.00 GiB, and 0\.00 GiB are free there"):
        rehearse(tmp_path / "base")


def test_generation_settings_in_an_old_config_move_to_the_generation_config(tmp_path):
    """transformers refuses to write them where it read them."""
    saved(tmp_path / "base")
    (tmp_path / "base/generation_config.json").unlink()
    file = tmp_path / "base/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_beams": 3, "auto_map": {"AutoConfig": "x.Y"}}))
    companions = rehearse(tmp_path / "base")
    assert json.loads(companions["generation_config.json"])["num_beams"] == 3
    model = load_model(resolve(str(tmp_path / "base")), torch.float32, "eager")
    export.write_configs(model, tmp_path, False, torch.float32)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "num_beams" not in written and "auto_map" not in written


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_rehearsal_meets_the_tensors_that_the_export_writes(build, tmp_path):
    source = resolve(str(saved(tmp_path / "base", build())))
    meta, real = (load_model(source, torch.float32, "eager", device) for device in ("meta", None))
    shapes = [{n: (t.shape, t.dtype) for part in _stream(m) for n, t in part.items()} for m in (meta, real)]
    assert shapes[0] == shapes[1]


def _stream(model):
    return export.stream(model, False, lambda parameters: nullcontext(), True, torch.bfloat16)
