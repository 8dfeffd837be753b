"""Numbers of texts: records, what is learnt of them, and models that give them as the records have them."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification

from dsft.config.schema import DataConfig, TaskConfig, TuningConfig
from dsft.data.sources import BadRecord, Raw
from dsft.errors import UserError
from dsft.model import export, tuning
from dsft.model.head import REGRESSION, Head
from dsft.model.kind import SEQUENCE
from dsft.model.load import ModelSource, load_model
from dsft.tasks import TASKS, encode, regress
from dsft.tasks.task import read


@pytest.mark.parametrize(
    ("value", "numbers"), [(3, (3.0,)), ("2.5", (2.5,)), (-1e3, (-1000.0,)), ([1, "2"], (1.0, 2.0)), (" 7 ", (7.0,))]
)
@pytest.mark.parametrize("field", ["label", "labels", "score", "value", "target"])
def test_numbers_are_read(field, value, numbers):
    assert read(regress.SHAPES, {"text": "月亮", field: value}, "rows:1").numbers == numbers


@pytest.mark.parametrize("value", ["", "high", True, float("nan"), float("inf"), "1e999", [], [None], {"a": 1}])
def test_what_is_no_number_is_refused_by_its_field(value):
    with pytest.raises(BadRecord, match=r"field `score(\[0\])?` is"):
        read(regress.SHAPES, {"text": "a", "score": value}, "rows:1")


def test_as_many_numbers_as_are_named():
    context = tiny.collator("regress", labels=["a", "b"]).context
    with pytest.raises(ValueError, match="it has 1 numbers, and task.labels names 2"):
        encode(Raw({"text": "a", "score": 1}, "rows:1"), TASKS["regress"], context)


def settled(tmp_path, rows, **settings):
    data = DataConfig(train=str(tiny.write_jsonl(tmp_path / "x.jsonl", rows)), cache_dir=str(tmp_path),
                      validation_share=0.0)  # fmt: skip
    train, _, _ = tiny.prepare(data, tiny.ENCODER_TOKENIZER, name="regress", **settings)
    context = tiny.collator("regress", **settings).context
    return regress.settle(context, SimpleNamespace(train=train, validation=None, test=None), []).labels


def test_mean_and_standard_deviation_are_those_of_the_weighed_training_records(tmp_path):
    rows = [{"text": "a", "labels": [n, 5], "weight": 1 + n % 2} for n in range(6)]
    found = settled(tmp_path, rows)
    weights, values = [1 + n % 2 for n in range(6)], np.arange(6.0)
    center = np.average(values, weights=weights)
    assert found.names == ("y0", "y1")
    assert found.shift == pytest.approx((center, 5.0))
    assert found.scale == pytest.approx((np.sqrt(np.average((values - center) ** 2, weights=weights)), 1.0))
    plain = settled(tmp_path, rows, standardise=False)
    assert plain.shift == (0.0, 0.0) and plain.scale == (1.0, 1.0)


def test_records_of_several_sizes_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"some records have 1 number\(s\), and some 2"):
        settled(tmp_path, [{"text": "a", "labels": [1, 2]}, {"text": "b", "labels": [1]}])


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_written_model_gives_numbers_as_the_records_have_them(family, method, tmp_path):
    body = tiny.masked if family != "llama" else tiny.causal
    body(family, "eager", vocab_size=400).save_pretrained(tmp_path / "base")
    head = Head(("a", "b"), REGRESSION, scale=(20.0, 0.1), shift=(150.0, -3.0), pad_token_id=0)
    source = ModelSource(str(tmp_path / "base"), None, "", "base", kind=SEQUENCE, head=head)
    model = load_model(source, torch.float32, "eager")
    model = tuning.apply(model, TuningConfig(method=tuning.Method(method), rank=2), 0, kind=SEQUENCE).eval()
    ids = torch.tensor([[5, 60, 70, 80]])
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        bare = (trained - torch.tensor([150.0, -3.0]) * (family != "llama")) / torch.tensor([20.0, 0.1])
        assert bare.abs().max() < 5
    options = {"gather": lambda parameters: nullcontext(), "is_writer": True, "merge": True, "dtype": torch.float32}
    companions = export.companion_files(tiny.ENCODER_TOKENIZER, None)
    export.write_model(model, companions, tmp_path / "out", kind=SEQUENCE, **options)
    written = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.allclose(written(input_ids=ids).logits, trained, rtol=1e-5)
    assert written.config.id2label == {0: "a", 1: "b"} and written.config.problem_type == "regression"


def test_a_trained_head_goes_on_in_its_own_unit(tmp_path):
    tiny.classifier("bert", names=("a", "b")).save_pretrained(tmp_path)
    head = Head(("a", "b"), REGRESSION, scale=(20.0, 0.1), shift=(150.0, -3.0))
    model = load_model(ModelSource(str(tmp_path), None, "", "x", kind=SEQUENCE, head=head), torch.float32, "eager")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[1, 60, 70, 2]])
    with torch.no_grad():
        assert torch.allclose(model.eval()(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-6)


def test_each_number_is_judged_too():
    context = SimpleNamespace(labels=SimpleNamespace(names=("a", "b")), task=TaskConfig())
    rows = {"logits": np.array([[1.0, 2], [3, 2]]), "targets": np.array([[1.0, 3], [4, 2]]), "counts": np.ones(2)}
    numbers, about = regress.judge(rows, context, [])
    assert numbers["mae"] == 0.5 and about["labels"]["a"]["mae"] == 0.5 and about["labels"]["b"]["mse"] == 0.5
