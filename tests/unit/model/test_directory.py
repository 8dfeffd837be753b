"""What is given as a model and is none: named for what it is, with a next step."""

import json
import re
import shlex
import shutil
import struct
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from dsft.errors import UserError
from dsft.model import load
from dsft.model.directory import check_tokenizer
from dsft.runtime.content import disguise, unsound_weights

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 538090408\n"
ANNEX = "/annex/objects/SHA256E-s538090408--4d7a.safetensors\n"
PAGE = "\n<!DOCTYPE html><html><body>404</body></html>"
PRETENDERS = {
    LFS: "a Git LFS pointer, not the file itself: run `git lfs pull`",
    ANNEX: "a git-annex pointer, not the file itself: run `git annex get`",
    PAGE: "a web page, such as a server's error message",
    "<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>": "a web page",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def model(whole, tmp_path) -> Path:
    """A directory to be spoilt."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def refused(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        source = load.resolve(str(path))
        load.load_tokenizer(source)
        load.load_config(source)
    return str(caught.value)


def configured(model: Path, **changes) -> Path:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes), encoding="utf-8")
    return model


@pytest.mark.parametrize("content", PRETENDERS)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_a_file_that_is_another_is_named_for_what_it_is(model, name, content):
    (model / name).write_text(content, encoding="utf-8")
    message = refused(model)
    assert name in message and PRETENDERS[content] in message


def test_a_gguf_file_that_is_another(tmp_path):
    file = tmp_path / "m.gguf"
    for content, words in {**PRETENDERS, "": "is no GGUF file", "PK": "is no GGUF file"}.items():
        file.write_text(content, encoding="utf-8")
        assert words in refused(file) and str(file) in refused(file)


def test_links_to_what_is_not_here(model, tmp_path):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("../.git/annex/objects/XJ/SHA256E-s5--1/SHA256E-s5--1")
    assert "model.safetensors is a git-annex link whose content is not here" in refused(model)
    (tmp_path / "m.gguf").symlink_to("gone")
    assert "m.gguf is a link to gone, which is not there" in refused(tmp_path / "m.gguf")


def test_weights_that_are_empty_cut_off_or_something_else(model):
    file = model / "model.safetensors"
    content = file.read_bytes()
    for harm, words in (
        (b"", "model.safetensors is empty"),
        (content[: len(content) // 2], f"{len(content) // 2:,} bytes long, and its header says {len(content):,}"),
        (content + b"x", "its header says"),
        (content[:100], "cut off in its header"),
        (content[:5], "no safetensors file"),
        (b"\xff" * 100, "no safetensors file"),
    ):
        file.write_bytes(harm)
        assert words in refused(model), words
    file.unlink()
    (model / "pytorch_model.bin").write_bytes(b"nonsense")
    assert "pytorch_model.bin is no file that torch.save wrote" in refused(model)


def test_sound_weights_of_every_kind_pass(tmp_path):
    tensors = {"a": torch.arange(6.0), "b": torch.zeros(0)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    save_file({}, tmp_path / "none.safetensors")
    torch.save(tensors, tmp_path / "zip.bin")
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for file in tmp_path.iterdir():
        assert unsound_weights(file) is None, file


def shards(model: Path) -> None:
    """The model's weights in three files."""
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names, index = sorted(weights), {}
    for number in range(3):
        part = f"model-0000{number + 1}-of-00003.safetensors"
        save_file({name: weights[name] for name in names[number::3]}, model / part, metadata={"format": "pt"})
        index |= dict.fromkeys(names[number::3], part)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_weights_in_several_files(model):
    shards(model)
    assert load.load_model(load.resolve(str(model)), torch.float32, "eager")
    part = model / "model-00002-of-00003.safetensors"
    content = part.read_bytes()
    part.write_text(LFS)
    assert "model-00002-of-00003.safetensors is a Git LFS pointer" in refused(model)
    part.write_bytes(content[:-1])
    assert "model-00002-of-00003.safetensors is " in refused(model)
    part.unlink()
    assert "names 3 files of weights, and 1 of them are not there: model-00002-of-00003.safetensors." in refused(model)
    index = model / "model.safetensors.index.json"
    index.rename(model / "pytorch_model.bin.index.json")
    assert "pytorch_model.bin.index.json names 3 files" in refused(model)
    (model / "pytorch_model.bin.index.json").write_text("{")
    assert "pytorch_model.bin.index.json is not valid JSON" in refused(model)


def test_no_weights_and_no_tokenizer(model):
    (model / "model.safetensors").rename(model / "weights.safetensors")
    assert re.search(r"a config\.json but no weights .*It holds weights\.safetensors", refused(model))
    (model / "weights.safetensors").rename(model / "tf_model.h5")
    assert "It holds some of TensorFlow" in refused(model)
    (model / "tf_model.h5").rename(model / "model.safetensors")
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert "holds no tokenizer (tokenizer.json)" in refused(model)


@pytest.mark.parametrize("beside", [True, False])
def test_adapters(model, beside):
    """Even beside a config.json: transformers would load the base model from wherever they name it."""
    if not beside:
        (model / "config.json").unlink()
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    message = refused(model)
    assert "holds adapters" in message and "model.path=org/base" in message
    assert "launch/export.py" in message and "merge_and_unload" in message
    (model / "adapter_config.json").write_text("{}")
    assert "which they do not name" in refused(model)


def test_adapters_on_the_hub(monkeypatch, tmp_path):
    about = tmp_path / "adapter_config.json"
    about.write_text(json.dumps({"base_model_name_or_path": "org/base"}))

    def cached_file(path, name, **_):
        if name == about.name:
            return str(about)
        raise OSError("no config.json")

    monkeypatch.setattr(load, "cached_file", cached_file)
    assert "model.path=org/base" in refused("org/adapters")


def test_a_run_its_checkpoint_and_a_directory_above_models(model, tmp_path):
    run = tmp_path / "runs" / "x"
    step = run / "checkpoints" / "step-000020"
    step.mkdir(parents=True)
    for file in (step / "manifest.json", step / "state.json", run / "config.yaml", run / "metrics.jsonl"):
        file.write_text("{}")
    assert f"export.py run_dir={run} checkpoint=20 output=DIR" in refused(step)
    assert "has written no model: python launch/export.py run_dir=" in refused(run)
    shutil.copytree(model, run / "model")
    assert f"its model is model.path={run}/model." in refused(run)
    shutil.copytree(model, tmp_path / "hub" / "models--org--name" / "snapshots" / "0123")
    assert f"give model.path={tmp_path}/hub/models--org--name/snapshots/0123." in refused(tmp_path / "hub")
    assert f"give model.path={tmp_path}/model." in refused(f"{tmp_path}/")
    (tmp_path / "hub" / "a.gguf").touch()
    assert f"give model.path={tmp_path}/hub/a.gguf." in refused(tmp_path / "hub")


def test_other_formats(tmp_path):
    (tmp_path / "consolidated.00.pth").touch()
    assert "the original publisher's layout" in refused(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "weights are quantised (quantization_config: gptq)",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"auto_map": {"AutoConfig": "own.C"}, "model_type": "own"}, "comes with code of its own (auto_map"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "BertModel (bert) is an encoder, not a causal"),
        ({"model_type": "xlm-roberta", "architectures": ["XLMRobertaForMaskedLM"]}, "is an encoder"),
        ({"model_type": "t5", "is_encoder_decoder": True, "architectures": ["T5Model"]}, "is an encoder-decoder"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "a model with another head, which would be left out"),
        (
            {"model_type": "vit", "architectures": ["ViTModel"]},
            "without such a model in transformers, not a causal",
        ),
    ],
)
def test_models_that_cannot_be_trained_here(model, changes, words):
    message = refused(configured(model, **changes))
    assert words in message and message.startswith(f"model.path={model}: ") and "Give " in message


def test_a_known_architecture_with_code_beside_it_passes(model):
    configured(model, auto_map={"AutoConfig": "own.C"})
    assert load.load_config(load.resolve(str(model))).model_type == "llama"


def test_binary_files_are_not_judged_as_text(tmp_path):
    file = tmp_path / "x"
    for content, as_text in {
        b"\xff\xfea\x00": "UTF-16 text, not UTF-8",
        b"\xff\xfe\x00\x00a": "UTF-32 text",
        b"\x1f\x8b\x08": "compressed (gzip): unpack it first",
        b"PK\x03\x04": "compressed (zip)",
    }.items():
        file.write_bytes(content)
        assert disguise(file) is None
        assert as_text in disguise(file, text=True)
    for fine in (b"", b"\xef\xbb\xbf{}", struct.pack("<Q", 5), "春天".encode()):
        file.write_bytes(fine)
        assert disguise(file, text=True) is None


def test_weights_that_are_not_loaded_do_not_count(model):
    """transformers takes the first it finds of safetensors, their index, pytorch_model.bin and its index."""
    index = json.dumps({"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}})
    (model / "pytorch_model.bin.index.json").write_text(index)
    (model / "pytorch_model.bin").write_text(LFS)
    assert load.load_model(load.resolve(str(model)), torch.float32, "eager")
    (model / "pytorch_model.bin").unlink()
    assert load.load_model(load.resolve(str(model)), torch.float32, "eager")
    shards(model)
    assert load.load_model(load.resolve(str(model)), torch.float32, "eager")
    (model / "model.safetensors").write_text(LFS)
    assert "model.safetensors is a Git LFS pointer" in refused(model)


def test_weights_of_a_name_of_their_own(model):
    (model / "model.safetensors").rename(model / "own.safetensors")
    configured(model, transformers_weights="own.safetensors")
    assert load.load_model(load.resolve(str(model)), torch.float32, "eager")
    (model / "own.safetensors").write_text(LFS)
    assert "own.safetensors is a Git LFS pointer" in refused(model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_json_with_a_byte_order_mark(model, name):
    file = model / name
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert f"{name} is JSON with a byte-order mark" in refused(model)


def test_a_tokenizer_of_sentencepiece_alone_is_one(tmp_path):
    (tmp_path / "sentencepiece.bpe.model").touch()
    check_tokenizer("m", tmp_path)
    (tmp_path / "sentencepiece.bpe.model").rename(tmp_path / "README.md")
    with pytest.raises(UserError, match="holds no tokenizer"):
        check_tokenizer("m", tmp_path)


def test_a_file_that_may_not_be_read(model, monkeypatch):
    opened = Path.open

    def closed(self, *args, **settings):
        if self.name == "config.json":
            raise PermissionError(13, "Permission denied")
        return opened(self, *args, **settings)

    monkeypatch.setattr(Path, "open", closed)
    assert "config.json is a file that this user may not read" in refused(model)


def test_commands_that_are_advised_can_be_pasted(tmp_path):
    run = tmp_path / "我的 runs" / "x"
    step = run / "checkpoints" / "step-000020"
    step.mkdir(parents=True)
    for file in (step / "manifest.json", step / "state.json", run / "config.yaml", run / "metrics.jsonl"):
        file.write_text("{}")
    for path in (run, step):
        command = re.search(r"python (launch/export\.py .*?)( checkpoint=| writes)", refused(path))[1]
        assert shlex.split(command) == ["launch/export.py", f"run_dir={run}"]


@pytest.mark.parametrize(
    ("content", "page"),
    [
        (b"<html>\n<head>\n<title>\n<body>\n<|tool|>\n", False),
        (b"<html>\r\n<head><title>404 Not Found</title></head>\r\n", True),
        (b"<html lang='en'>\n", True),
        (b"<html><body>Forbidden</body></html>", True),
    ],
)
def test_a_list_of_html_tags_is_no_page(tmp_path, content, page):
    (tmp_path / "x").write_bytes(content)
    assert ("a web page" in (disguise(tmp_path / "x", text=True) or "")) is page


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark(tmp_path, encoding):
    (tmp_path / "x").write_text('{"text": "月"}', encoding=encoding)
    assert disguise(tmp_path / "x", text=True).startswith(f"{encoding.upper().replace('16-', '16')} text, not UTF-8")


@pytest.mark.parametrize(
    "index", [{"weight_map": None}, {"weight_map": {}, "metadata": {}}, {}, {"weight_map": {"a": 5}, "metadata": {}}]
)
def test_an_index_that_is_none(model, index):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors.index.json is no index of weights" in refused(model)


@pytest.mark.parametrize(
    ("name", "content"), [("tokenizer.json", "{}"), ("tokenizer.json", "[]"), ("tokenizer_config.json", "[]")]
)
def test_a_tokenizer_that_is_broken(model, name, content):
    (model / name).write_text(content)
    assert f"model.path={model}: cannot load the tokenizer from {model}: " in refused(model)
    assert "Error: " in refused(model)


def test_a_tokenizer_that_is_cut_off(model):
    content = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(content[: len(content) // 2])
    assert "cannot load the tokenizer" in refused(model)
