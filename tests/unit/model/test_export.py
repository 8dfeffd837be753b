"""What is written is what was trained, whole, and nothing is lost on the way."""

import errno
import importlib.util
import json
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import collate
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from dsft import checkpoint
from dsft.assemble import DTYPES
from dsft.commands import export as command
from dsft.config import load as configs
from dsft.config.schema import Config, Method, Precision, TuningConfig
from dsft.errors import UserError
from dsft.model import export, shards, tuning
from dsft.model import load as loading
from dsft.types import Probe

IDS = torch.arange(12).reshape(1, 12)
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}


def tiny_llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=True, **SHAPE, **changes)).eval()


def tiny_qwen2() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=32, tie_word_embeddings=False, num_key_value_heads=1, **SHAPE)
    return Qwen2ForCausalLM(config).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=3, n_head=2)).eval()


def tiny_moe() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_key_value_heads": 1}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=32, head_dim=8, **moe, **SHAPE)).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "好": 2}, unk_token="<unk>"))
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<end>")
    made.chat_template = "{{ messages[0]['content'] }}<end>"
    return made


def adapted(model, trained: float = 0.3, **settings) -> PeftModel:
    """The model with adapters that have moved away from their first values."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    model = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(trained * torch.randn_like(p))
    return model


def write(model, directory, merge=True, dtype=torch.float32, **settings):
    settings = {"gather": lambda parameters: nullcontext(), "is_writer": True} | settings
    generation = model.generation_config.to_json_string().encode()
    companions = export.companion_files(tokenizer(), generation)
    export.write_model(model, companions, directory, merge=merge, dtype=dtype, **settings)
    return directory


def probe(model) -> Probe:
    """What the model answers to IDS."""
    return Probe(IDS, logits(model).float())


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2, tiny_gpt2, tiny_moe])
def test_a_plain_model_comes_back_bit_for_bit(build, tmp_path):
    model = build()
    model.config.use_cache = False
    write(model, tmp_path / "model")
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = again.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert again.config.use_cache


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2, tiny_gpt2, tiny_moe])
def test_the_layout_is_that_of_save_pretrained(build, tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "theirs")
    write(model, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / which / "model.safetensors") for which in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    configs = [json.loads((tmp_path / which / "config.json").read_text()) for which in ("theirs", "ours")]
    assert configs[0] == configs[1]


def test_tokenizer_template_and_generation_settings_go_along(tmp_path):
    model = tiny_llama()
    model.generation_config.temperature = 0.7  # inconsistent with greedy decoding, as in many a published model
    write(model, tmp_path / "model")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert loaded.apply_chat_template([{"role": "user", "content": "好"}], tokenize=False) == "好<end>"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config.temperature == 0.7


def test_shards_stay_below_their_size_and_are_indexed(tmp_path):
    model = tiny_llama()
    write(model, tmp_path / "model", max_shard_bytes=8000)
    files = sorted(tmp_path.glob("model/*.safetensors"))
    assert len(files) > 2
    assert [f.name for f in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    held = {name: f.name for f in files for name in load_file(f)}
    assert all(sum(t.nbytes for t in load_file(f).values()) <= 8000 for f in files)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), logits(model))


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2, tiny_gpt2])
def test_merged_adapters_are_what_peft_merges(build, settings, tmp_path):
    model = adapted(build(), **settings)
    trained = logits(model)
    with model.disable_adapter():
        assert not torch.allclose(trained, logits(model), atol=1e-2)
    write(model, tmp_path / "model", merge=True)
    written = load_file(tmp_path / "model" / "model.safetensors")
    merged = model.merge_and_unload().state_dict()
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)
    report = export.verify(tmp_path / "model", Probe(IDS, trained), torch.float32)
    assert report.relative < 1e-5
    assert report.argmax_agreement == 1


def test_merging_rounds_once(tmp_path):
    model = adapted(tiny_llama().bfloat16())
    write(model, tmp_path / "model", dtype=torch.bfloat16)
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    exact = (
        layer.weight.double() + 1.5 * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    written = load_file(tmp_path / "model" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert written.dtype == torch.bfloat16
    assert torch.equal(written, exact.float().bfloat16())


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapters_alone_go_back_onto_their_base(settings, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = adapted(base, **settings)
    write(model, tmp_path / "adapter", merge=False)
    assert (tmp_path / "adapter" / "tokenizer.json").is_file()
    assert not list((tmp_path / "adapter").glob("model*"))
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    assert export.verify(tmp_path / "adapter", probe(model), torch.float32).max_abs < 1e-6


def test_parameters_are_gathered_a_module_at_a_time_and_the_same_on_every_rank(tmp_path):
    model = adapted(tiny_llama())
    names = {id(p): name for name, p in model.named_parameters()}
    calls, open_now = {True: [], False: []}, []

    def run(is_writer):
        @contextmanager
        def gather(parameters):
            open_now.append(1)
            assert len(open_now) == 1
            calls[is_writer].append([names[id(p)] for p in parameters])
            yield
            open_now.pop()

        write(model, tmp_path / f"writer-{is_writer}", gather=gather, is_writer=is_writer)

    run(True)
    run(False)
    assert calls[True] == calls[False]
    assert max(len(group) for group in calls[True]) == 3  # a linear layer and its adapter
    assert sorted(name for group in calls[True] for name in group) == sorted(names.values())
    assert not (tmp_path / "writer-False").exists()


def test_weights_are_read_only_while_gathered(tmp_path):
    """As under ZeRO-3, where a parameter is empty outside of its gather."""
    model = adapted(tiny_llama(), use_dora=True)
    expected = logits(model)
    whole = {id(p): p.data for p in model.parameters()}

    @contextmanager
    def gather(parameters):
        for p in parameters:
            p.data = whole[id(p)]
        yield
        for p in parameters:
            p.data = torch.empty(0)

    for p in model.parameters():
        p.data = torch.empty(0)
    write(model, tmp_path / "model", gather=gather)
    export.verify(tmp_path / "model", Probe(IDS, expected), torch.float32)


def test_a_full_disk_leaves_the_old_model_and_keeps_no_rank_waiting(tmp_path, monkeypatch):
    write(tiny_llama(), tmp_path / "model")
    before = {f.name: f.read_bytes() for f in (tmp_path / "model").iterdir()}
    saved, gathered = [], []

    def save(tensors, path, metadata):
        if saved:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append(path)
        path.write_bytes(b"half")

    monkeypatch.setattr(shards, "save_file", save)
    model = tiny_qwen2()

    def gather(parameters):
        gathered.extend(parameters)
        return nullcontext()

    with pytest.raises(UserError, match="No space left on device"):
        write(model, tmp_path / "model", max_shard_bytes=8000, gather=gather)
    assert len(gathered) == len(list(model.parameters()))
    assert {f.name: f.read_bytes() for f in (tmp_path / "model").iterdir()} == before
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_a_new_model_replaces_the_old_one_whole(tmp_path):
    write(tiny_llama(), tmp_path / "model", max_shard_bytes=8000)
    write(tiny_qwen2(), tmp_path / "model")
    assert [f.name for f in (tmp_path / "model").glob("*.safetensors*")] == ["model.safetensors"]
    assert [f.name for f in tmp_path.iterdir()] == ["model"]
    export.verify(tmp_path / "model", probe(tiny_qwen2()), torch.float32)


def test_a_directory_of_other_things_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds no model, so it is not replaced"):
        write(tiny_llama(), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_verification_finds_one_wrong_projection(dtype, tmp_path):
    model = tiny_llama(initializer_range=0.3).to(dtype)
    write(model, tmp_path / "model", dtype=dtype)
    report = export.verify(tmp_path / "model", probe(model), dtype)
    assert report.relative < export.TOLERANCE[dtype] / 2
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= -1
    with pytest.raises(UserError, match="is not the one that was trained"):
        export.verify(tmp_path / "model", probe(model), dtype)


def test_the_weights_are_as_readable_as_the_rest(tmp_path):
    write(tiny_llama(), tmp_path / "model")
    assert len({f.stat().st_mode for f in (tmp_path / "model").iterdir()}) == 1


def test_verification_refuses_logits_that_are_not_numbers(tmp_path):
    write(tiny_llama(), tmp_path / "model")
    with pytest.raises(UserError, match="is not the one that was trained"):
        export.verify(tmp_path / "model", Probe(IDS, torch.full((1, 12, 32), torch.nan)), torch.float32)


class Engine:
    """Stands where a DeepSpeed engine would: saves the trained weights as a stage below 3 does, and answers."""

    stage = 2

    def __init__(self, model):
        self.model = model

    def save(self, directory, tag, frozen):
        trained = {f"model.{name}": p.float() for name, p in self.model.named_parameters() if p.requires_grad}
        torch.save({"module": trained}, Path(directory) / tag / "mp_rank_00_model_states.pt")

    def logits(self, batch):
        with torch.no_grad():
            return self.model.eval()(input_ids=batch.tensors["input_ids"]).logits.float()


WORLD = SimpleNamespace(rank=0, size=1, is_main=True, gather_objects=lambda value: [value], all_succeed=lambda _: None)


def trained(home: Path, precision: str = "bf16", **settings) -> Path:
    """The run directory of a LoRA run whose adapters have moved far, with one checkpoint."""
    config = Config()
    config.task.name = "causal_lm"
    config.deepspeed.json, config.model.path = "zero2.json", str(home / "base")
    config.tuning = TuningConfig(method=Method.lora, rank=4, **settings)
    source = loading.resolve(str(tiny.save(home / "base")))
    model = tuning.apply(loading.load_model(source, DTYPES[Precision[precision]], "eager"), config.tuning, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    identity = {
        "precision": precision,
        "model.path": {"origin": source.origin, "revision": None, "fingerprint": source.fingerprint}
        | {"files": source.files},
    }
    words = {"first": 400, "pieces": []}
    state = {"identity": identity, "adapters": tuning.adapters(model), "new_tokens": words, "best_step": 1}
    record = checkpoint.Record(configs.to_yaml(config), export.companion_files(tiny.tokenizer(), b"{}"))
    document = collate([tiny.examples(1)[0]])
    checkpoint.save(home / "run", 1, Engine(model), WORLD, state, False, record, document)
    return home / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that no test changes."""
    return trained(tmp_path_factory.mktemp("run"))


def rewrite(path: Path, name: str, change) -> None:
    """Change a file of a checkpoint, and let its manifest agree."""
    (path / name).write_bytes(change((path / name).read_bytes()))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = checkpoint._describe(path / name)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_checkpoint_becomes_a_merged_model_or_adapters(run, tmp_path):
    output, report = command.export(run, "best", merge=True, output=tmp_path / "model")
    assert load_file(output / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert 0 < report.relative < export.TOLERANCE[torch.bfloat16]
    output, report = command.export(run, "best", merge=False, output=tmp_path / "adapter")
    assert report.max_abs == 0
    stored = load_file(output / "adapter_model.safetensors")
    masters = checkpoint.weights(checkpoint.find(run, "last"))
    assert len(stored) == len(masters)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B"
    assert torch.equal(stored[f"{name}.weight"], masters[f"{name}.default.weight"].bfloat16())


def test_only_the_checkpoint_says_what_its_model_is_made_of(tmp_path):
    """After a refused `tuning.alpha=256`, or whatever else was written into the run's directory."""
    run = trained(tmp_path)
    (run / "config.yaml").write_text("{model: {path: elsewhere}, tuning: {alpha: 256}, deepspeed: {json: x.json}}")
    (run / "ds_config.json").write_text('{"fp16": {"enabled": true}}')
    output, _ = command.export(run)
    assert load_file(output / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(output).chat_template == tiny.CHATML


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("which", ["alpha", "base"])
def test_the_check_compares_with_what_was_trained(which, merge, tmp_path):
    """A wrong scale or another base is found by the logits alone, where all else agrees; nothing is replaced."""
    run = trained(tmp_path, "fp32")
    path = checkpoint.find(run, "last")
    command.export(run, merge=merge)
    before = {file.name: file.read_bytes() for file in (run / "model").iterdir()}
    if which == "alpha":
        rewrite(path, "config.yaml", lambda text: text.replace(b"alpha: 32.0", b"alpha: 40.0"))
        rewrite(path, "state.json", lambda text: text.replace(b" 8.0", b" 10.0"))
    else:
        source = loading.resolve(str(tiny.save(tmp_path / "base", seed=1)))
        old = json.loads((path / "state.json").read_text())["identity"]["model.path"]["files"]["model.safetensors"]
        rewrite(path, "state.json", lambda text: text.replace(old.encode(), source.files["model.safetensors"].encode()))
    with pytest.raises(UserError, match="is not the one that was trained: its logits differ by"):
        command.export(run, merge=merge)
    assert {file.name: file.read_bytes() for file in (run / "model").iterdir()} == before
    assert not [path for path in run.iterdir() if "unfinished" in path.name]


def test_adapters_of_another_scale_are_named(tmp_path):
    """In bf16 a scale that is off by a little hides below what the logits may deviate by."""
    run = trained(tmp_path)
    rewrite(checkpoint.find(run, "last"), "config.yaml", lambda text: text.replace(b"alpha: 32.0", b"alpha: 33.0"))
    with pytest.raises(
        UserError, match=r"q_proj had rank and scale \[4, 8.0\], and would have \[4, 8.25\]|had rank and"
    ):
        command.export(run)


def test_a_base_model_that_changed_or_moved_is_said(tmp_path):
    run = trained(tmp_path)
    base = tmp_path / "base"
    (base / "README.md").write_text("of no consequence")
    command.export(run)
    base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"no file or directory .* was moved since the run, say where: model\.path="):
        command.export(run)
    command.export(run, model_path=str(tmp_path / "moved"))
    tiny.save(base, seed=1)
    with pytest.raises(UserError, match=r"base is not the base model of the run: model\.safetensors changed"):
        command.export(run)


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
    run = trained(tmp_path)
    (checkpoint.find(run, "last") / "config.yaml").write_text("alpha: 256")
    with pytest.raises(UserError, match=r"step-000001 is no whole checkpoint: config\.yaml has 10 bytes"):
        command.export(run)


def test_adapters_alone_cannot_hold_new_tokens(tmp_path):
    """Their rows are no adapter: the base model lacks them, trained or not."""
    run = trained(tmp_path)
    change = lambda text: text.replace(b'"pieces": []', b'"pieces": [[7, 8]]')  # noqa: E731
    rewrite(checkpoint.find(run, "last"), "state.json", change)
    with pytest.raises(UserError, match=r"merge=false .* 1 new tokens, whose rows the base model .* lacks"):
        command.export(run, merge=False)
    assert not (run / "model").exists()


def test_adapters_alone_need_adapters(tmp_path):
    run = trained(tmp_path)
    rewrite(checkpoint.find(run, "last"), "config.yaml", lambda text: text.replace(b"method: lora", b"method: full"))
    with pytest.raises(UserError, match="trained with tuning=full"):
        command.export(run, merge=False)


def test_checkpoint_weights_have_to_fit_the_model():
    model = tiny_llama().requires_grad_(False)
    model.model.norm.requires_grad_(True)
    command.put_weights(model, {"model.norm.weight": torch.full((16,), 3.0)}, "step-1")
    assert torch.equal(model.model.norm.weight, torch.full((16,), 3.0))
    with pytest.raises(UserError, match=r"step-1 does not fit .* lacks 'model\.norm\.weight'"):
        command.put_weights(model, {}, "step-1")
    with pytest.raises(UserError, match=r"holds 'model\.norm\.weight', which the model has not in that shape"):
        command.put_weights(model, {"model.norm.weight": torch.zeros(0)}, "step-1")


def test_tied_weights_may_come_under_either_name():
    model = tiny_llama()
    weights = {name: t + 1 for name, t in tiny_llama().state_dict().items() if name != "model.embed_tokens.weight"}
    command.put_weights(model, weights, "step-1")
    assert torch.equal(model.model.embed_tokens.weight, weights["lm_head.weight"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run_dir=R", "chekpoint=best"], r"'chekpoint=best' is no key=value of .* Nearest: checkpoint="),
        (["run_dir=R", "--merge"], r"Nearest: merge="),
        (["run_dir=R", "merge=yes"], "merge=yes: give true or false"),
        (["run_dir=R", "checkpoint=1,2"], r"'checkpoint=1,2' is no key=value"),
        (["+run_dir=R"], "Nearest: run_dir="),
        (["checkpoint=best"], "Say which run to export: run_dir=DIR"),
    ],
)
def test_the_command_line_names_what_is_wrong(arguments, message):
    spec = importlib.util.spec_from_file_location("launch_export", Path(__file__).parents[3] / "launch" / "export.py")
    launch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launch)
    with pytest.raises(UserError, match=message):
        launch.parse(arguments)
    assert launch.parse(["run_dir=a=b", "merge=false"]) == {
        "run_dir": Path("a=b"),
        "which": "last",
        "merge": False,
        "output": None,
        "model_path": None,
    }
    read = launch.parse(["run_dir='runs/月 (1)'", "checkpoint=20", "output=007"])
    assert (read["run_dir"], read["which"], read["output"]) == (Path("runs/月 (1)"), "20", Path("007"))
    assert launch.parse(["run_dir=R", "output=null"])["output"] is None
