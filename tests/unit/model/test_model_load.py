"""Finding a model by its name, and loading it whole or not at all."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dsft.config.schema import ActivationCheckpointing
from dsft.errors import UserError
from dsft.model import attention, load

WORDS = ["<unk>", "<end>", "the", "cat", "sat", "你", "好"]


def no_contexts():
    return nullcontext(), nullcontext()


def tiny_llama(tie: bool = True, vocab: int = 16) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, tie_word_embeddings=tie, **shape)).eval()


def tiny_tokenizer(**special) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"unk_token": "<unk>", "eos_token": "<end>"} | special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<end>{% endfor %}"
    return tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def test_a_directory_is_found_and_its_fingerprint_follows_its_content(saved, tmp_path):
    source = load.resolve(str(saved))
    assert (source.path, source.revision, source.name) == (str(saved), None, str(saved))
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    assert load.resolve(str(copy)).fingerprint == source.fingerprint
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert load.resolve(str(copy)).fingerprint != source.fingerprint


def test_a_package_holds_a_model_without_being_imported(saved, tmp_path, monkeypatch):
    package = tmp_path / "weights_of_mine"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    shutil.copytree(saved, package / "tiny")
    monkeypatch.syspath_prepend(tmp_path)
    assert load.resolve("package://weights_of_mine/tiny").path == str(package / "tiny")
    (package / "other.gguf").touch()
    with pytest.raises(UserError, match=r"has no file 'tinny'. It holds other\.gguf"):
        load.resolve("package://weights_of_mine/tinny")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("package://no_such_package/m.gguf", "pip install no-such-package"),
        ("./no/such/dir", "no file or directory at"),
        ("no_such.gguf", "no file or directory at"),
        ("{tmp}/empty", "holds no config.json"),
        ("{tmp}/notes.txt", "not a .gguf file"),
        ("{tmp}/broken.gguf", "transformers cannot read this GGUF file"),
    ],
)
def test_a_wrong_path_is_refused_with_what_was_tried(path, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "broken.gguf").write_bytes(b"GGUF, but not really")
    path = path.format(tmp=tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load.resolve(path, cache_dir=str(tmp_path / "cache"))
    assert Path(path).name.split("/")[-1] in str(caught.value)


def test_a_hub_id_is_pinned_to_a_commit(monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    file = f"/hub/models--org--name/snapshots/{commit}/config.json"
    monkeypatch.setattr(load, "cached_file", lambda *args, **kwargs: file)
    assert load.resolve("org/name", "main").revision == commit

    def offline(*args, **kwargs):
        raise OSError("We couldn't connect to the hub.\nAdvice.")

    monkeypatch.setattr(load, "cached_file", offline)
    with pytest.raises(UserError, match=r"org/name: no directory .*org/name, and the hub gave .*couldn't connect"):
        load.resolve("org/name")


def test_the_model_loads_in_the_type_asked_for_and_without_cache(saved):
    source = load.resolve(str(saved))
    model = load.load_model(source, torch.bfloat16, "eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.config.use_cache
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert load.load_config(source).num_hidden_layers == 2


def test_missing_weights_are_listed(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 weights of LlamaForCausalLM: model\.layers\.1\.mlp\.up_proj\.weight"):
        load.load_model(load.resolve(str(tmp_path)), torch.float32, "eager")


def test_an_architecture_with_attention_of_its_own_alone_is_refused(tmp_path):
    config = GPTJConfig(vocab_size=16, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, n_positions=32)
    GPTJForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"model.path={tmp_path}: this architecture takes no attention but its own"):
        load.load_model(load.resolve(str(tmp_path)), torch.float32, attention.NAME)


def test_damaged_files_are_a_message_not_a_traceback(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    source = load.resolve(str(saved))
    with pytest.raises(UserError, match="cannot load the model"):
        load.load_model(replace(source, path=str(tmp_path)), torch.float32, "eager")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_architecture"}))
    with pytest.raises(UserError, match=r"cannot load the config\.json.*no_such_architecture"):
        load.load_config(replace(source, path=str(tmp_path)))


def test_the_tokenizer_gets_a_padding_token_and_the_template_file(saved, tmp_path):
    source = load.resolve(str(saved))
    tokenizer = load.load_tokenizer(source)
    assert tokenizer.pad_token == "<end>"
    assert tokenizer("the cat sat 你 好")["input_ids"] == [2, 3, 4, 5, 6]
    template = tmp_path / "chat.jinja"
    template.write_text("{# 中文 #}{{ messages[0]['content'] }}", encoding="utf-8")
    tokenizer = load.load_tokenizer(source, str(template))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "你"}], tokenize=False) == "你"
    with pytest.raises(UserError, match=r"model\.chat_template=.*gone\.jinja"):
        load.load_tokenizer(source, str(tmp_path / "gone.jinja"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{{ messages[0]['content'] }}".decode().encode("utf-16"), "is UTF-16 text, not UTF-8: convert it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (b"<html>404</html>", "is a web page"),
        (b"", "is empty: give a file"),
        (b"\xef\xbb\xbf \n", "is empty: give a file"),
        ("{{ '好' }}".encode("gb18030"), "not UTF-8 at byte 4"),
        (b"{% for m in messages %}\n{{ m['content'] }}\n{% endfr %}", r":3: no valid Jinja template: .*endfr"),
    ],
)
def test_a_template_file_that_is_none_is_named_for_what_it_is(saved, tmp_path, content, message):
    file = tmp_path / "chat.jinja"
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"^model\.chat_template={file}(:| ).*{message.lstrip(':')}"):
        load.load_tokenizer(load.resolve(str(saved)), str(file))


def test_a_byte_order_mark_is_no_part_of_a_template(saved, tmp_path):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    file = tmp_path / "chat.jinja"
    file.write_text(template, encoding="utf-8-sig")
    assert load.load_tokenizer(load.resolve(str(saved)), str(file)).chat_template == template
    model = tmp_path / "model"
    shutil.copytree(saved, model)
    (model / "chat_template.jinja").write_text(template, encoding="utf-8-sig")
    assert load.load_tokenizer(load.resolve(str(model))).chat_template == template
    named = model / "additional_chat_templates" / "tool_use.jinja"
    named.parent.mkdir()
    named.write_text(template, encoding="utf-8-sig")
    assert load.load_tokenizer(load.resolve(str(model))).chat_template == {"default": template, "tool_use": template}


def test_a_slow_tokenizer_is_refused(saved, monkeypatch):
    slow = SimpleNamespace(is_fast=False)
    monkeypatch.setattr(load.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: slow)
    with pytest.raises(UserError, match="has no fast version"):
        load.load_tokenizer(load.resolve(str(saved)))


def test_the_tokenizer_fingerprint_changes_with_what_changes_ids_only():
    first = load.tokenizer_fingerprint(tiny_tokenizer(pad_token="<end>"))
    used = tiny_tokenizer(pad_token="<end>")
    used(["the cat", "the"], padding=True, truncation=True, max_length=1)
    assert load.tokenizer_fingerprint(used) == first
    other_template = tiny_tokenizer(pad_token="<end>")
    other_template.chat_template += " "
    more_words = tiny_tokenizer(pad_token="<end>")
    more_words.add_tokens(["dog"])
    other_end = tiny_tokenizer(pad_token="<end>", eos_token="the")
    changed = [load.tokenizer_fingerprint(t) for t in (other_template, more_words, other_end)]
    assert len({first, *changed}) == 4


@pytest.mark.parametrize("mode", [ActivationCheckpointing.full, ActivationCheckpointing.offload])
def test_activation_checkpointing_recomputes_layers_and_changes_no_gradient(mode):
    ids = torch.randint(16, (1, 9))

    def gradients(model):
        calls = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return len(calls), {name: p.grad for name, p in model.named_parameters()}

    plain_calls, plain = gradients(tiny_llama())
    model = tiny_llama()
    load.activation_checkpointing(model, mode, no_contexts)
    calls, recomputed = gradients(model)
    assert (plain_calls, calls) == (1, 2)
    torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


def test_activation_checkpointing_does_not_send_gradients_below_the_lowest_trained_layer():
    model = tiny_llama(tie=False).requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    load.activation_checkpointing(model, ActivationCheckpointing.full, no_contexts)
    outputs = []
    model.model.layers[0].register_forward_hook(lambda *args: outputs.append(args[2]))
    ids = torch.randint(16, (1, 9))
    model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert not outputs[0].requires_grad
    assert model.model.layers[1].mlp.up_proj.weight.grad.abs().sum() > 0


def test_plain_loading_hides_a_live_zero3_config_and_brings_it_back(saved):
    class Zero3:
        def is_zero3(self):
            return True

    config = Zero3()
    load.hf_deepspeed.set_hf_deepspeed_config(config)
    try:
        with load.plain_loading():
            assert not load.hf_deepspeed.is_deepspeed_zero3_enabled()
            AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
        assert load.hf_deepspeed.is_deepspeed_zero3_enabled()
    finally:
        load.hf_deepspeed.unset_hf_deepspeed_config()


def test_where_a_model_rotates_a_row_in_another_way():
    """And that it does so for short documents too, which is why they may not lie beside a long one."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    changes = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    model = tiny.causal("phi3", "eager", rope_parameters={"rope_type": "longrope", **factors}, **changes)
    assert load.rotation_switch(model.config) == 16
    assert load.rotation_switch(LlamaConfig()) is None
    ids, positions = torch.arange(40)[None] % 30, torch.cat([torch.arange(8), torch.arange(32)])[None]
    rotary, x = model.model.rotary_emb, model.model.embed_tokens(ids)
    assert not torch.equal(rotary(x, positions)[0][:, :8], rotary(x[:, :8], positions[:, :8])[0])
