"""Texts written from texts: records, both lengths, languages, and a loss that is transformers' own."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import sentencepiece
import tiny
import torch
from transformers import AutoTokenizer, MarianTokenizer, NllbTokenizer, PreTrainedTokenizerFast
from transformers.trainer_pt_utils import LabelSmoother

from dsft.config.schema import DataConfig, Method, OnOverflow, OptimConfig, TaskConfig, TuningConfig
from dsft.data.sources import BadRecord, Raw
from dsft.errors import UserError
from dsft.model import tuning
from dsft.model.kind import SEQ2SEQ
from dsft.model.load import ModelSource, load_tokenizer, tokenizer_fingerprint
from dsft.optim import parameter_groups
from dsft.tasks import TASKS, encode, seq2seq
from dsft.tasks.task import Sampling, read
from dsft.types import Dropped

ROW = {"source": "the red fox sees a blue bird", "target": "花都开了 。 the owl"}


def encoded(row=ROW, tokens=None, data=None, **settings):
    context = replace(tiny.collator("seq2seq", tokens=tokens, **settings).context, data=data or DataConfig())
    found = encode(Raw(row, "rows:1"), TASKS["seq2seq"], context)
    return found if isinstance(found, Dropped) else found[0]


@pytest.mark.parametrize("names", [names for names in seq2seq.SHAPES if len(names) == 2])
def test_two_fields_are_read_in_their_order(names):
    record = read(seq2seq.SHAPES, dict(zip(names, ("a", "b"))) | {"id": 7}, "rows:1")
    assert record.written == {"source": "a", "target": "b"} and record.metadata == {"id": 7}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"source": "a", "target": " "}, "field `target` is empty"),
        ({"source": ["a"], "target": "b"}, "field `source` is text, but this is list"),
        ({"source": "a"}, "field `target` is missing beside `source`"),
        ({"translation": {"en": "a"}}, "field `translation` is an object with a text for each of two"),
        ({"translation": {"en": "a", "zh": 3}}, "field `translation.zh` is text, but this is int"),
        ({"source": "a", "target": "b", "weight": -1}, "field `weight` is a weight"),
        ({"source": "a\ud800", "target": "b"}, "half a character"),
    ],
)
def test_a_malformed_row_is_refused_by_its_field(row, message):
    with pytest.raises(BadRecord, match=message):
        read(seq2seq.SHAPES, row, "rows:1")


def test_texts_are_framed_as_transformers_frames_them():
    example, tokens = encoded(source_prefix="translate: "), tiny.TWO_SIDED_TOKENIZER
    expected = tokens("translate: " + ROW["source"], text_target=ROW["target"])
    assert example.ids.tolist() == expected["input_ids"]
    assert example.columns["target_ids"].tolist() == expected["labels"]
    assert example.tokens == len(expected["input_ids"]) + len(expected["labels"])
    assert example.weight == len(expected["labels"]) and not example.truncated


def test_the_end_of_a_target_that_was_cut_is_not_learnt():
    whole, data = encoded(), DataConfig(max_length=5, max_target_length=6)
    example = encoded(ROW | {"weight": 0.5}, data=data)
    assert example.ids.tolist() == [*whole.ids[:4], 2]
    assert example.columns["target_ids"].tolist() == [*whole.columns["target_ids"][:5], 2]
    assert example.columns["counts"].tolist() == [0.5] * 5 + [0] and example.weight == 2.5 and example.truncated
    made = seq2seq.inputs(example, None, None)
    assert made["labels"].tolist() == [*whole.columns["target_ids"][:5], -100] and made["decoder_labels"][-1] == 2
    source_alone = encoded(data=DataConfig(max_length=5))
    assert source_alone.truncated and source_alone.weight == whole.weight


def test_what_is_too_long_is_dropped_or_refused_by_its_setting():
    for data, setting in (
        ({"max_length": 5}, r"data\.max_length is 5"),
        ({"max_target_length": 6}, r"data\.max_target_length is 6"),
    ):
        assert isinstance(encoded(data=DataConfig(on_overflow=OnOverflow.drop, **data)), Dropped)
        with pytest.raises(UserError, match=rf"rows:1: \d+ tokens, but {setting}"):
            encoded(data=DataConfig(on_overflow=OnOverflow.error, **data))
    with pytest.raises(UserError, match="no part of a source text belongs to a part of the target"):
        encoded(data=DataConfig(on_overflow=OnOverflow.split))
    assert encoded(ROW | {"weight": 0}).reason == "weight 0"


def test_texts_by_language_are_chosen_by_the_settings():
    row = {"translation": {"en": "the fox", "zh": "狐狸", "de": "der Fuchs"}}
    chosen = encoded(row, source_language="zh", target_language="en")
    plain = encoded({"source": "狐狸", "target": "the fox"})
    assert chosen.ids.tolist() == plain.ids.tolist()
    assert chosen.columns["target_ids"].tolist() == plain.columns["target_ids"].tolist()
    with pytest.raises(ValueError, match=r"texts for en, zh, de, and task\.target_language is fr"):
        encoded(row, source_language="zh", target_language="fr")
    with pytest.raises(ValueError, match=r"task\.source_language is not given"):
        encoded(row)


@pytest.fixture(scope="module")
def nllb():
    """An NLLB tokenizer, small; its languages frame the texts."""
    state = json.loads(tiny.TWO_SIDED_TOKENIZER.backend_tokenizer.to_str())["model"]
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    vocabulary |= {letter: 4 + n for n, letter in enumerate(sorted({*"".join(tiny.WORDS), "▁"}))}
    assert state["type"] == "BPE"
    codes = ["eng_Latn", "zho_Hans", "fra_Latn"]
    return NllbTokenizer(vocab=vocabulary, merges=[], additional_special_tokens=codes)


def test_a_tokenizer_with_languages_is_told_them(nllb):
    settings = TaskConfig(name="seq2seq", source_language="zho_Hans", target_language="fra_Latn")
    seq2seq.ready(nllb, settings)
    seq2seq.frame.cache_clear()
    example = encoded({"source": "花都开了", "target": "the owl"}, tokens=nllb)
    code = dict(zip(codes := ["zho_Hans", "fra_Latn"], nllb.convert_tokens_to_ids(codes)))
    assert example.ids[0] == code["zho_Hans"] and example.ids[-1] == nllb.eos_token_id
    target = example.columns["target_ids"]
    assert target[0] == code["fra_Latn"] and target[-1] == nllb.eos_token_id
    expected = nllb("花都开了", text_target="the owl")
    assert (example.ids.tolist(), target.tolist()) == (expected["input_ids"], expected["labels"])
    model = tiny.two_sided("m2m_100", vocab_size=len(nllb), pad_token_id=1, decoder_start_token_id=2)
    begun = seq2seq.beginning(model, torch.from_numpy(target.astype(np.int64))[None], 2)
    assert begun.tolist() == [[2, code["fra_Latn"]]], "as generate begins with forced_bos_token_id"


def test_a_language_that_the_tokenizer_does_not_know_is_refused(nllb):
    with pytest.raises(UserError, match=r"task\.target_language=zh: .* does not know this language; it knows eng_Latn"):
        seq2seq.ready(nllb, TaskConfig(name="seq2seq", target_language="zh"))


FAMILIES = ["t5", "mt5", "bart", "mbart", "marian", "m2m_100", "pegasus", "blenderbot", "umt5"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_a_padded_batch_is_transformers_own_of_single_texts(family):
    model = tiny.two_sided(family)
    examples = [replace(one, number=number) for number, one in enumerate(tiny.written_examples(6))]
    batch = tiny.collator("seq2seq", padded=True).train(examples, (0, 0))
    module = tiny.task(model, name="seq2seq", padded=True).eval()
    expected = 0.0
    with torch.no_grad():
        found, tally = module(batch)
        for example in examples:
            labels = torch.from_numpy(example.columns["target_ids"].astype(np.int64))[None]
            ids = torch.from_numpy(example.ids.astype(np.int64))[None]
            expected += float(model(input_ids=ids, labels=labels).loss) * example.weight
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert float(tally.sums["weight"]) == pytest.approx(sum(example.weight for example in examples))
    assert module.chunked, "no logits of the whole batch are made"


@pytest.mark.parametrize(
    ("family", "why"),
    [("longt5", "LocalSelfAttention draws dropout"), ("switch_transformers", "Top1Router.* draws random numbers")],
)
def test_noise_that_would_depend_on_the_batch_is_refused(family, why):
    module = tiny.task(tiny.two_sided(family), name="seq2seq", padded=True)
    with pytest.raises(UserError, match=why):
        module(tiny.collator("seq2seq", padded=True).train(tiny.written_examples(3), (0, 0)))


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_smoothing_is_transformers_own_and_training_alone(family):
    model = tiny.two_sided(family, **dict.fromkeys(("dropout_rate", "dropout"), 0.0))
    batch = tiny.collator("seq2seq", padded=True, label_smoothing=0.2).train(tiny.written_examples(1), (0, 0))
    module = tiny.task(model, name="seq2seq", padded=True, label_smoothing=0.2).train()
    found, _ = module(batch)
    labels = batch.tensors["decoder_labels"]
    outputs = model(input_ids=batch.tensors["input_ids"], labels=labels)
    counts = batch.weight / labels.numel()
    expected = LabelSmoother(0.2)({"logits": outputs.logits}, labels) * labels.numel() * counts
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    trained = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(found, trained, allow_unused=True)
    theirs = torch.autograd.grad(expected, trained, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        plain = float(outputs.loss) * labels.numel() * counts
        assert float(module.eval()(batch)[0]) == pytest.approx(plain, rel=1e-5)


def test_a_sample_is_what_generate_writes():
    model = tiny.two_sided("t5")
    example = tiny.written_examples(1)[0]
    context = tiny.collator("seq2seq").context
    said = seq2seq.sample(Sampling(model, torch.device("cpu"), [2], 6), example, context)
    ids = torch.from_numpy(example.ids.astype(np.int64))[None]
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)[0].tolist()
    assert said["answer"] == context.tokenizer.decode(expected, skip_special_tokens=True)
    assert said["reference"] == tiny.written_rows(1)[0]["target"]


@pytest.mark.parametrize("settings", [{"neftune_alpha": 5.0}, {"method": Method.lora, "new_tokens": True}])
def test_what_would_miss_one_of_its_embeddings_is_refused(settings):
    name, value = list(settings.items())[-1]
    with pytest.raises(UserError, match=rf"tuning\.{name}={str(value).lower()}: encoder-decoders"):
        tuning.apply(tiny.two_sided("t5"), TuningConfig(**settings), 0, kind=SEQ2SEQ)


@pytest.mark.parametrize(("family", "layers"), [("t5", "decoder.block."), ("bart", "model.decoder.layers.")])
def test_the_last_layers_are_the_decoders(family, layers):
    model = tuning.apply(tiny.two_sided(family), TuningConfig(Method.freeze, last_layers=1), 0, kind=SEQ2SEQ)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any(name.startswith(f"{layers}1.") for name in names)
    assert not [name for name in names if name.startswith(("encoder", "model.encoder", f"{layers}0."))]


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_decoders_layers_are_above_its_encoders(family):
    model = tiny.two_sided(family)
    groups = parameter_groups(model, OptimConfig(lr=1.0, layer_decay=0.5))
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    found = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    kind = "block" if family == "t5" else "layers"
    for side, first in (("encoder", 0.125), ("decoder", 0.5)):
        inside = {name: rate for name, rate in found.items() if f"{side}.{kind}.0." in name and "bias" not in name}
        assert {*inside.values()} == {first}
        assert {rate for name, rate in found.items() if f"{side}.{kind}.1." in name} == {2 * first}
    assert found["shared.weight" if family == "t5" else "model.shared.weight"] == 0.5**4


def test_a_slow_tokenizer_of_two_vocabularies_will_do(tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(tiny.texts(300)), encoding="utf-8")
    pieces: list[str] = ["</s>", "<unk>"]
    for side, size in (("source", 60), ("target", 70)):
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "texts.txt"), model_prefix=str(tmp_path / side), vocab_size=size,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        model = (tmp_path / f"{side}.model").rename(tmp_path / f"{side}.spm")
        spm = sentencepiece.SentencePieceProcessor(model_file=str(model))
        pieces += [spm.id_to_piece(number) for number in range(spm.get_piece_size())]
    vocabulary = {piece: n for n, piece in enumerate(dict.fromkeys([*pieces, "<pad>"]))}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it recommends a package of its own
        made = MarianTokenizer(*(str(tmp_path / name) for name in ("source.spm", "target.spm", "vocab.json")))
    made.save_pretrained(tmp_path)
    tiny.two_sided("marian", vocab_size=len(vocabulary)).save_pretrained(tmp_path)
    tokens = load_tokenizer(ModelSource(str(tmp_path), None, "", str(tmp_path), kind=SEQ2SEQ))
    assert not tokens.is_fast and not isinstance(tokens, PreTrainedTokenizerFast)
    seq2seq.frame.cache_clear()
    example, expected = encoded(tokens=tokens), tokens(ROW["source"], text_target=ROW["target"])
    assert example.ids.tolist() == expected["input_ids"]
    assert example.columns["target_ids"].tolist() == expected["labels"]
    assert tokenizer_fingerprint(tokens) == tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path))
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary | {"new": len(vocabulary)}), encoding="utf-8")
    assert tokenizer_fingerprint(tokens) != tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path))
