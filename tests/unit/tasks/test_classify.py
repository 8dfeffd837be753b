"""Labels of texts: records, what they weigh, the loss, and the head that is put on a model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from transformers import AutoModelForSequenceClassification

from dsft.config.schema import Balance, DataConfig, HeadInit, OnOverflow, Pool, TaskConfig
from dsft.data import dataset
from dsft.data.sources import BadRecord, Raw
from dsft.errors import UserError
from dsft.model import head as heads
from dsft.model.head import SINGLE, Head
from dsft.model.kind import SEQUENCE
from dsft.model.load import ModelSource, load_model
from dsft.tasks import TASKS, classify, encode, fit, labels
from dsft.tasks.collate import Collator
from dsft.tasks.task import View, read

TASK = TASKS["classify"]


def record(**fields):
    return read(classify.SHAPES, fields, "rows:1")


def encoded(row: dict, tokens=None, data: DataConfig | None = None, **settings):
    context = tiny.collator("classify", tokens=tokens, **settings).context
    return encode(Raw(row, "rows:1"), TASK, replace(context, data=data or DataConfig()))


@pytest.mark.parametrize("label", ["label", "labels"])
@pytest.mark.parametrize(
    "names",
    [("text",), ("sentence",), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"),
     ("text", "text_pair")],
)  # fmt: skip
def test_texts_and_pairs_are_known_by_their_fields(names, label):
    made = record(**{name: f"春天 {name}" for name in names}, **{label: "好"}, id=7)
    assert list(made.texts()) == list(names)
    assert made.labels == ("好",) and made.metadata == {"id": 7}


@pytest.mark.parametrize(
    ("value", "name"),
    [("pos", "pos"), (" pos ", "pos"), (3, "3"), (2.0, "2"), (True, "true"), (-1, "-1"), ("负", "负")],
)
def test_labels_are_names_numbers_or_truth_values(value, name):
    assert record(text="a", label=value).labels == (name,)


@pytest.mark.parametrize("value", [0.5, "", " ", {"a": 1}, [["a"]], float("nan")])
def test_what_is_no_label_is_refused_by_its_field(value):
    with pytest.raises(BadRecord, match=r"field `label(\[0\])?` is"):
        record(text="a", label=value)


def test_the_same_label_twice_and_an_empty_text_are_refused():
    with pytest.raises(BadRecord, match="field `label` has the same label twice"):
        record(text="a", label=["x", "x"])
    with pytest.raises(BadRecord, match="field `text_pair` is empty"):
        record(text="a", text_pair=" ", label=1)


def test_the_tokens_are_those_of_the_tokenizer_for_a_pair():
    (made,) = encoded({"premise": "the red fox", "hypothesis": "春天 the owl", "label": "red"})
    expected = tiny.ENCODER_TOKENIZER("the red fox", "春天 the owl")
    assert made.ids.tolist() == expected["input_ids"]
    assert made.columns["token_types"].tolist() == expected["token_type_ids"]
    assert set(expected["token_type_ids"]) == {0, 1}


def test_several_labels_only_where_they_are_wanted():
    with pytest.raises(ValueError, match="it has 2 labels: set task.multi_label=true"):
        encoded({"text": "a", "label": ["red", "blue"]})
    with pytest.raises(ValueError, match="it has 0 labels"):
        encoded({"text": "a", "label": []})
    (none,), (two,) = (encoded({"text": "a", "labels": some}, multi_label=True) for some in ([], ["red", "狐狸"]))
    context = tiny.collator("classify", multi_label=True).context
    assert [classify.inputs(one, View(0), context)["document_target"].tolist() for one in (none, two)] == [
        [0, 0, 0],
        [1, 0, 1],
    ]


def test_what_is_too_long_is_cut_dropped_or_refused():
    row = {"text": "the red fox " * 30, "text_pair": "月亮", "label": "red"}
    (cut,) = encoded(row, data=DataConfig(max_length=20))
    assert cut.truncated and len(cut.ids) == 20
    # of a pair the longer text gives way
    assert tiny.ENCODER_TOKENIZER.decode(cut.ids).endswith("月亮[SEP]")
    dropped = encoded(row, data=DataConfig(max_length=20, on_overflow=OnOverflow.drop))
    assert dropped.reason == fit.TOO_LONG
    for how in (OnOverflow.error, OnOverflow.split):
        with pytest.raises(UserError, match="data.on_overflow|data.max_length is 20"):
            encoded(row, data=DataConfig(max_length=20, on_overflow=how))


def test_a_decoder_gets_no_padding_at_the_end():
    tokens = tiny.tokenizer()
    ends = "<|endoftext|>"  # this tokenizer's padding too
    (made,) = encoded({"text": f"the red fox{ends}{ends}", "label": "red"}, tokens=tokens)
    assert made.ids.tolist() == tokens("the red fox")["input_ids"]


def reports(**places):
    return {
        place: {name: [count, f"{place}:{n}"] for n, (name, count) in enumerate(found.items())}
        for place, found in places.items()
    }


def test_labels_are_in_the_order_of_numbers_of_the_alphabet_or_as_given():
    assert labels.collected(reports(train={"10": 1, "9": 2, "-1": 1}), [], []) == ("-1", "9", "10")
    assert labels.collected(reports(train={"b": 1, "a": 2}), [], []) == ("a", "b")
    assert labels.collected(reports(train={"b": 1, "a": 2}), ["b", "c", "a"], []) == ("b", "c", "a")
    assert labels.collected(reports(train={"b": 1, "a": 2}), [], ["b", "a"]) == ("b", "a"), "as the model has them"
    assert labels.collected(reports(train={"b": 1, "a": 2}), [], ["x", "y"]) == ("a", "b")


def test_a_label_that_training_lacks_is_named_with_its_place():
    with pytest.raises(UserError, match=r"dev: labels that no training record has: 'c' \(4 records, the first dev:1\)"):
        labels.collected(reports(train={"a": 1, "b": 1}, dev={"a": 1, "c": 4}), [], [])
    with pytest.raises(UserError, match=r"train: labels that task.labels does not name: 'b'"):
        labels.collected(reports(train={"a": 1, "b": 1}), ["a", "x"], [])
    with pytest.raises(UserError, match="only one label"):
        labels.collected(reports(train={"a": 1}), [], [])
    with pytest.raises(UserError, match="names a twice"):
        labels.collected(reports(train={"a": 1}), ["a", "a"], [])


def test_balanced_weights_are_scikit_learns():
    targets = np.repeat([0, 1, 2], [98, 50, 2])
    counts = np.bincount(targets).astype(float)
    found = labels.weights("abc", counts, counts.sum(), TaskConfig(balance=Balance.balanced))
    assert found == pytest.approx(compute_class_weight("balanced", classes=np.arange(3), y=targets))


def test_weights_by_the_effective_number_are_1_in_the_mean():
    counts = np.array([980.0, 20.0])
    settings = TaskConfig(balance=Balance.effective_number, effective_beta=0.99)
    found = np.array(labels.weights("ab", counts, 1000, settings))
    assert (found * counts).sum() == pytest.approx(1000)
    assert found[1] / found[0] == pytest.approx((1 - 0.99**980) / (1 - 0.99**20))


def test_weights_that_fit_no_labels_are_refused():
    for settings in (
        TaskConfig(label_weights=[1.0, 2.0]),
        TaskConfig(label_weights=[1.0], labels=["a", "b"]),
        TaskConfig(label_weights=[0.0, 0.0], labels=["a", "b"]),
        TaskConfig(label_weights=[1.0, -1.0], labels=["a", "b"]),
        TaskConfig(label_weights=[1.0, 2.0], labels=["a", "b"], balance=Balance.balanced),
    ):
        with pytest.raises(UserError, match="task.label_weights"):
            labels.weights("ab", np.ones(2), 2, settings)


def outcome(examples, training: bool, **settings):
    """The loss of examples by a padded model, and their logits."""
    module = tiny.task(tiny.classifier("bert"), name="classify", padded=True, **settings)
    collator = tiny.collator("classify", padded=True, **settings)
    batch = collator.train(examples, (0, 0)) if training else collator.evaluate(examples)
    module.eval()
    with torch.no_grad():
        logits = module.logits(batch)
        module.train(training)
        module.model.eval() if not training else module.model.train()
        loss, tally = module(batch)
    return float(loss), logits, tally


def test_the_loss_of_one_label_is_the_cross_entropy_times_what_a_record_counts():
    examples = tiny.labelled_examples(9)
    loss, logits, tally = outcome(examples, training=False, **tiny.CLASSIFYING)
    targets = torch.tensor([tiny.labels_of(example)[0] for example in examples])
    counts = torch.tensor([example.weight for example in examples])
    assert loss == pytest.approx(float((F.cross_entropy(logits, targets, reduction="none") * counts).sum()), rel=1e-6)
    assert float(tally.sums["weight"]) == sum(example.weight for example in examples)


def test_the_loss_of_several_labels_is_the_mean_of_binary_ones():
    examples = tiny.labelled_examples(9, multi_label=True)
    assert {len(example.labels) for example in examples} >= {0, 1, 2}
    loss, logits, _ = outcome(examples, training=False, multi_label=True)
    targets = torch.tensor([[float(name in example.labels) for name in tiny.LABELS] for example in examples])
    each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1)
    counts = torch.tensor([example.weight for example in examples])
    assert loss == pytest.approx(float((each * counts).sum()), rel=1e-6)


def test_focal_smoothed_and_weighed_binary_losses_by_their_formula():
    logits, target = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 0.0]])
    positive = torch.tensor([[3.0, 3.0]])
    found = classify._several(logits, target, positive, smoothing=0.2, gamma=2.0)
    p = [torch.tensor(2.0).sigmoid(), torch.tensor(-1.0).sigmoid()]
    first = -(3 * 0.9 * p[0].log() + 0.1 * (1 - p[0]).log()) * (1 - p[0]) ** 2
    second = -(3 * 0.1 * p[1].log() + 0.9 * (1 - p[1]).log()) * p[1] ** 2
    assert float(found) == pytest.approx(float((first + second) / 2), rel=1e-6)


@pytest.mark.parametrize(
    ("family", "pooling"),
    [
        *((family, None) for family in ("bert", "roberta", "distilbert", "electra", "llama", "gpt2", "qwen3")),
        ("modernbert", "cls"),
        ("modernbert", "mean"),
    ],
)
def test_a_flat_row_gives_what_transformers_gives_for_each_text(family, pooling):
    changes = {"classifier_pooling": pooling} if pooling else {}
    model = tiny.classifier(family, vocab_size=400, **changes)
    examples = tiny.labelled_examples(5)
    expected = []
    for example in examples:
        ids = torch.from_numpy(example.ids.astype(np.int64))[None]
        typed = {"token_type_ids": torch.from_numpy(example.columns["token_types"].astype(np.int64))[None]}
        with torch.no_grad():
            expected.append(
                model(input_ids=ids, **(typed if family in ("bert", "roberta", "electra") else {})).logits[0]
            )
    model.set_attn_implementation("dsft")
    module = tiny.task(model, name="classify").eval()
    with torch.no_grad():
        module(tiny.collator("classify").evaluate(examples))  # the first pass makes sure of it too
        found = module.logits(tiny.collator("classify").evaluate(examples))
    assert torch.allclose(found, torch.stack(expected), atol=1e-5)


def source(path, **changes) -> ModelSource:
    return ModelSource(str(path), None, "", str(path), kind=SEQUENCE, head=Head(("a", "b"), SINGLE, **changes))


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert")
    tiny.masked("bert", "eager").save_pretrained(path)
    return path


def test_a_new_head_depends_on_the_seed_and_its_name_alone(body):
    first = load_model(source(body, seed=3), torch.float32, "eager")
    torch.manual_seed(99)
    again, other = (load_model(source(body, seed=seed), torch.float32, "eager") for seed in (3, 4))
    assert first.new_parameters == [
        "bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight"
    ]  # fmt: skip
    for name, values in heads.parameters(first).items():
        assert torch.equal(values, heads.parameters(again)[name]), name
        assert name.endswith("bias") or not torch.equal(values, heads.parameters(other)[name])
    assert first.config.id2label == {0: "a", 1: "b"}
    std = first.bert.pooler.dense.weight.std().item()
    assert std == pytest.approx(first.config.initializer_range, rel=0.1)
    wide = load_model(source(body, init=HeadInit.xavier), torch.float32, "eager").bert.pooler.dense.weight
    assert wide.abs().max().item() <= (6 / 64) ** 0.5 and wide.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.1)


def test_a_head_for_the_same_labels_is_kept_and_for_others_made_anew(tmp_path):
    tiny.classifier("bert").save_pretrained(tmp_path)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for names, kept in ((tiny.LABELS, True), (("x", "y", "z"), False), (("x", "y"), False)):
        model = load_model(replace(source(tmp_path), head=Head(names, SINGLE)), torch.float32, "eager")
        assert bool(model.new_parameters) is not kept
        if kept:
            assert torch.equal(model.classifier.weight, saved.classifier.weight)
        else:
            assert model.classifier.weight.shape[0] == len(names) and model.classifier.bias.abs().max() == 0
        assert torch.equal(model.bert.pooler.dense.weight, saved.bert.pooler.dense.weight)


def test_a_head_of_another_kind_is_none_though_its_labels_are_called_the_same(tmp_path):
    tiny.classifier("bert", names=tiny.TAGS).save_pretrained(tmp_path)
    model = load_model(replace(source(tmp_path), head=Head(tiny.TAGS, SINGLE)), torch.float32, "eager")
    assert {"classifier.weight", "classifier.bias"} <= {*model.new_parameters}


def test_labels_of_a_validation_split_of_the_same_place_are_its_own(tmp_path):
    for name, label in (("train", "a"), ("validation", "c")):
        rows = [{"text": "the moon", "label": label}, {"text": "the owl", "label": "b"}]
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", rows)
    data = DataConfig(train=str(tmp_path), validation=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    context = tiny.collator("classify").context
    make = partial(encode, task=TASK, context=replace(context, data=data))
    found = dataset.prepare(data, make, {}, 0).labels
    assert [set(names) for names in found.values()] == [{"a", "b"}, {"b", "c"}]
    with pytest.raises(UserError, match=r"data\.validation=.*: labels that no training record has: 'c' \(1 records"):
        labels.collected(found, [], [])


def test_a_body_that_lacks_weights_is_refused_unless_that_is_allowed(tmp_path):
    model = tiny.masked("bert", "eager")
    state = {name: value for name, value in model.state_dict().items() if "layer.1.output" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match=r"lack 4 weights of BertForSequenceClassification: bert.encoder.layer.1.outp"):
        load_model(source(tmp_path), torch.float32, "eager")
    allowed = replace(source(tmp_path), allow_missing=(r"layer\.1\.output",))
    made = load_model(allowed, torch.float32, "eager")
    assert made.bert.encoder.layer[1].output.LayerNorm.weight.tolist() == [1.0] * 32


def test_pooling_and_dropout_that_the_model_cannot_have_are_refused(body, tmp_path):
    with pytest.raises(UserError, match="task.pool=mean: the head of bert models is given cls"):
        load_model(source(body, pool=Pool.mean), torch.float32, "eager")
    tiny.llama().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="task.pool=cls: the head of llama models is given last"):
        load_model(source(tmp_path, pool=Pool.cls), torch.float32, "eager")
    with pytest.raises(UserError, match="task.head_dropout=0.3"):
        load_model(source(tmp_path, dropout=0.3), torch.float32, "eager")
    assert load_model(source(body, dropout=0.3), torch.float32, "eager").dropout.p == 0.3


def test_the_numbers_of_an_evaluation_come_with_each_label_and_the_table():
    context = SimpleNamespace(labels=labels.Labels(tiny.LABELS), task=TaskConfig())
    rows = {
        "logits": np.array([[2.0, 0, 0], [0, 3.0, 0], [0, 1.0, 0]]),
        "targets": np.array([0, 1, 2]),
        "counts": np.ones(3),
    }
    numbers, about = classify.judge(rows, context, [])
    assert numbers["accuracy"] == pytest.approx(2 / 3)
    assert about["confusion"] == {"labels": [*tiny.LABELS], "true_by_predicted": [[1, 0, 0], [0, 1, 0], [0, 1, 0]]}
    assert about["labels"]["狐狸"]["recall"] == 0 and about["labels"]["blue"]["precision"] == 0.5


def test_a_filler_batch_goes_through_the_same_layers():
    module = tiny.task(tiny.classifier("bert"), name="classify", padded=True)
    collator = Collator(TASK, tiny.collator("classify").context, True)
    loss, tally = module.train()(collator.train([], (0, 0)))
    loss.backward()
    assert float(loss.detach()) == 0 and float(tally.sums["weight"]) == 0
    assert module.model.classifier.weight.grad is not None


def test_labels_are_counted_over_the_training_records_alone(tmp_path):
    rows = [{"text": f"the moon {number}", "label": "a" if number % 3 else "b", "weight": 2} for number in range(40)]
    data = DataConfig(train=str(tiny.write_jsonl(tmp_path / "x.jsonl", rows)), validation_share=0.5,
                      cache_dir=str(tmp_path))  # fmt: skip
    context = replace(tiny.collator("classify", balance=Balance.balanced).context, data=data)
    found = dataset.prepare(data, partial(encode, task=TASK, context=context), {}, 0)
    train = [rows[record]["label"] for record in found.train.records]
    expected = compute_class_weight("balanced", classes=np.array(["a", "b"]), y=train)
    made = classify.settle(context, found, []).labels
    assert made.names == ("a", "b") and made.weights == pytest.approx(expected)
