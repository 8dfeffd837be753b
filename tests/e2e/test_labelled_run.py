"""Labels of texts by the real command: killed and resumed on two ranks, exported whole and as adapters with a head."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import pytest
import tiny
import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

STEPS = ["train.max_steps=12", "train.log_every=2", "train.eval_every=5", "train.save_every=4", "train.seed=3"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """An encoder without a head, with dropout, and texts with labels that a word in them tells."""
    path = tmp_path_factory.mktemp("labelled")
    tiny.masked("bert", "eager").save_pretrained(path / "model")
    tiny.ENCODER_TOKENIZER.save_pretrained(path / "model")
    tiny.write_jsonl(path / "标签.jsonl", tiny.labelled_rows(70))
    return path


def arguments(path: Path, run: str) -> list[str]:
    return [
        f"run_dir={path / run}",
        "task=classify",
        f"model.path={path / 'model'}",
        "data=jsonl",
        f"data.train={path / '标签.jsonl'}",
        f"data.cache_dir={path / 'cache'}",
        "data.validation_share=0.2",
        "data.test_share=0.1",
        "data.stratify_by_field=label",
        "data.max_length=32",
        "precision=fp32",
        "batch.micro_batch_size=2",
        "task.balance=balanced",
        *STEPS,
    ]


def test_killed_and_resumed_it_ends_as_if_nothing_had_happened_and_loads(home, scratch):
    straight = helpers.train(arguments(home, "straight"), scratch)
    assert straight.code == 0, straight.err
    assert "the head has 3 outputs: blue, red, 狐狸; new, by train.seed" in straight.err
    with helpers.start(arguments(home, "killed"), scratch) as running:
        running.until(helpers.reached(home / "killed", 6))
        running.kill()
    resumed = helpers.train(arguments(home, "killed"), scratch)
    assert resumed.code == 0, resumed.err
    assert "resuming from" in resumed.err
    assert helpers.numbers(home / "killed") == helpers.numbers(home / "straight")
    for name in ("model/model.safetensors", "evaluation.json"):
        files = [(home / run / name).read_bytes() for run in ("killed", "straight")]
        assert files[0] == files[1], name
    check_run(home / "straight")


def check_run(run: Path) -> None:
    """What was exported knows its labels; what was evaluated is shown."""
    model = AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    assert model.config.id2label == {0: "blue", 1: "red", 2: "狐狸"}
    assert model.config.problem_type == "single_label_classification"
    tokens = AutoTokenizer.from_pretrained(run / "model")("春天来了", return_tensors="pt")
    with torch.no_grad():
        assert model(**tokens).logits.shape == (1, 3)
    rows = helpers.rows(run)
    evaluated = [row for row in rows if "eval/f1_macro" in row]
    assert len(evaluated) == 4 and {"eval/mcc", "eval/roc_auc", "eval/calibration_error"} <= evaluated[-1].keys()
    assert "test/f1_macro" in rows[-1]
    about = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert about["validation"]["step"] == about["test"]["step"] == 12
    cells = about["validation"]["confusion"]["true_by_predicted"]
    assert sum(map(sum, cells)) == pytest.approx(evaluated[-1]["eval/records"], abs=0.5)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Labels of the validation set, step 12" in page and "<th>狐狸</th>" in page


def test_long_texts_in_chunks_are_evaluated_as_wholes_for_any_split(home, scratch, tmp_path):
    """Two splits have the same numbers, and predictions are those of a mean by hand."""
    rows = [{"text": text, "label": f"{number % 2}"} for number, text in enumerate(tiny.texts(36, seed=5, longest=90))]
    tiny.write_jsonl(home / "long.jsonl", rows)
    given = [f"model.path={home / 'model'}", "task=classify", "data=jsonl", f"data.train={home / 'long.jsonl'}"]
    given += [f"data.cache_dir={home / 'cache'}", "data.validation_share=0.3", "precision=fp32", "train.max_steps=3"]
    given += ["data.max_length=32", "task.chunk={length: 24, stride: 10}", "batch.global_batch_size=8", "optim.lr=1e-3"]
    found = []
    for ranks in (1, 2):
        run = home / f"long {ranks}"
        result = helpers.train([f"run_dir={run}", *given, f"eval.micro_batch_size={3 * ranks}"], scratch, ranks=ranks)
        assert result.code == 0, result.err
        found.append(helpers.numbers(run))
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    last = found[0][-1]
    audit = json.loads((home / "long 1/audit.json").read_text(encoding="utf-8"))
    held_out = audit["train"]["records_held_out"]
    assert last["eval/records"] == held_out < last["eval/examples"] and "eval/f1_macro" in last
    command = ["launch/predict.py", f"run_dir={home / 'long 1'}", f"input={home / 'long.jsonl'}"]
    with helpers.Command([*command, f"output={tmp_path / 'said.jsonl'}"], scratch, forked=2) as running:
        result = running.wait()
    assert result.code == 0, result.err
    model = AutoModelForSequenceClassification.from_pretrained(home / "long 1/model").eval()
    said = (tmp_path / "said.jsonl").read_text(encoding="utf-8").splitlines()
    for line, row in zip(map(json.loads, said), rows, strict=True):
        ids = tiny.ENCODER_TOKENIZER(row["text"])["input_ids"]
        body = ids[1:-1]
        begins = [*range(0, len(body) - 22, 10), len(body) - 22] if len(ids) > 24 else [0]
        parts = [[ids[0], *body[begin : begin + 22], ids[-1]] for begin in begins]
        with torch.no_grad():
            logits = torch.cat([model(torch.tensor([part])).logits for part in parts]).mean(0)
        assert [*line["probabilities"].values()] == pytest.approx(logits.softmax(-1).tolist(), abs=1e-4)


def test_adapters_alone_bring_their_head(home, scratch):
    given = [one for one in arguments(home, "lora") if not one.startswith("task.balance")]
    result = helpers.train([*given, "tuning=lora", "optim.lr=0.01", "data.balance=oversample"], scratch)
    assert result.code == 0, result.err
    taken = json.loads((home / "lora/audit.json").read_text(encoding="utf-8"))["train"]["balance"]
    assert taken["examples_after"] % 3 == 0 and taken["examples_after"] > taken["examples_before"]
    alone = home / "lora" / "alone"
    done = helpers.script(["launch/export.py", f"run_dir={home / 'lora'}", "merge=false", f"output={alone}"], scratch)
    assert done.code == 0, done.err
    config = AutoConfig.from_pretrained(alone)
    base = AutoModelForSequenceClassification.from_pretrained(home / "model", config=config)
    adapted = PeftModel.from_pretrained(base, str(alone)).eval()
    merged = AutoModelForSequenceClassification.from_pretrained(home / "lora" / "model").eval()
    tokens = tiny.ENCODER_TOKENIZER("月亮在哪里 ？ the red fox", return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(adapted(**tokens).logits, merged(**tokens).logits, atol=1e-5)


def test_labels_that_only_validation_has_are_refused_before_anything_is_written(home, scratch):
    tiny.write_jsonl(home / "other.jsonl", [{"text": "the owl", "label": "green"}])
    given = [one for one in arguments(home, "refused") if not one.startswith(("data.validation_share", "data.strat"))]
    result = helpers.train([*given, f"data.validation={home / 'other.jsonl'}"], scratch)
    assert result.code != 0
    assert "labels that no training record has: 'green' (1 records, the first" in result.err
    assert "other.jsonl:1" in result.err and "Traceback" not in result.err
    assert not (home / "refused").exists()


def test_tags_of_long_texts_in_columns(home, scratch):
    """Windows, two ranks, ZeRO-3; the exported model tags words with the names of their tags."""
    sentences = [zip(row["tokens"], row["tags"]) for row in tiny.tagged_rows(40, longest=60)]
    text = "\n\n".join("\n".join(f"{word}\t{tag}" for word, tag in sentence) for sentence in sentences)
    (home / "词.conll").write_text(text, encoding="utf-8")
    changed = ("task=", "data.", "task.", "train.")
    given = [one for one in arguments(home, "tags") if not one.startswith(changed)]
    given += ["task=tag", f"data.train={home / '词.conll'}", "data.validation_share=0.2", "data.max_length=24"]
    given += [
        f"data.cache_dir={home / 'cache'}",
        "task.overlap=8",
        "train.epochs=4",
        "deepspeed=zero3",
        "optim.lr=0.01",
    ]
    result = helpers.train(given, scratch)
    assert result.code == 0, result.err
    evaluated = [row for row in helpers.rows(home / "tags") if "eval/f1" in row]
    assert evaluated[-1]["eval/f1"] > evaluated[0]["eval/f1"] and evaluated[-1]["eval/accuracy"] > 0.8
    about = json.loads((home / "tags/evaluation.json").read_text(encoding="utf-8"))
    assert {"ANIMAL", "天体"} <= about["validation"]["labels"].keys()
    model = AutoModelForTokenClassification.from_pretrained(home / "tags/model").eval()
    assert sorted(model.config.label2id) == sorted(tiny.TAGS)


def test_answers_to_questions_in_nested_articles(home, scratch):
    """Windows, two ranks, adapters with their head; whole articles are held out."""
    questions = [row | {"id": f"q{number}", "weight": 1} for number, row in enumerate(tiny.asked_rows(60, longest=50))]
    articles = [
        {"title": f"文章 {number}", "paragraphs": [{"context": row.pop("context"), "qas": [row]} for row in part]}
        for number, part in enumerate(questions[begin : begin + 6] for begin in range(0, 60, 6))
    ]
    (home / "问题.json").write_text(json.dumps({"data": articles}, ensure_ascii=False), encoding="utf-8")
    changed = ("task=", "data.", "task.", "train.")
    given = [one for one in arguments(home, "answers") if not one.startswith(changed)]
    given += ["task=extract", f"data.train={home / '问题.json'}", "data.validation_share=0.2", "data.max_length=24"]
    given += ["data.group_by_field=title", f"data.cache_dir={home / 'cache'}", "task.overlap=8", "tuning=lora"]
    given += ["train.epochs=3", "train.best_metric=eval/f1", "optim.lr=0.01", "deepspeed=zero3"]
    result = helpers.train(given, scratch)
    assert result.code == 0, result.err
    last = [row for row in helpers.rows(home / "answers") if "eval/f1" in row][-1]
    assert last["eval/questions"] == 12 and last["eval/windows"] > 12
    assert {"eval/exact", "eval/f1_with_answer", "eval/no_answer_accuracy"} <= last.keys()
    about = json.loads((home / "answers/evaluation.json").read_text(encoding="utf-8"))
    assert about["validation"]["best_no_answer_threshold"]["f1"] >= last["eval/f1"] - 1e-9
    alone = home / "answers" / "alone"
    done = helpers.script(
        ["launch/export.py", f"run_dir={home / 'answers'}", "merge=false", f"output={alone}"], scratch
    )
    assert done.code == 0, done.err
    base = AutoModelForQuestionAnswering.from_pretrained(home / "model", config=AutoConfig.from_pretrained(alone))
    adapted = PeftModel.from_pretrained(base, str(alone)).eval()
    merged = AutoModelForQuestionAnswering.from_pretrained(home / "answers/model").eval()
    tokens = tiny.ENCODER_TOKENIZER("在哪里 ？", "月亮 在山上", return_tensors="pt")
    with torch.no_grad():
        ours, theirs = adapted(**tokens), merged(**tokens)
    assert torch.allclose(ours.start_logits, theirs.start_logits, atol=1e-5)
    assert torch.allclose(ours.end_logits, theirs.end_logits, atol=1e-5)
