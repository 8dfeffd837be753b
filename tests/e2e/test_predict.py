"""What trained models say of records, by the real command: every task, on one rank and two, killed and gone on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import helpers
import numpy as np
import pytest
import sacrebleu
import tiny
import torch
from sklearn import metrics as judge
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

TOKENIZERS = {"llama": tiny.TOKENIZER, "t5": tiny.TWO_SIDED_TOKENIZER}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Models for all tasks, each with its tokenizer."""
    path = tmp_path_factory.mktemp("asked")
    tiny.save(path / "causal")
    made = {
        "classify": tiny.classifier("bert"),
        "tag": tiny.classifier("bert", names=tiny.TAGS),
        "extract": tiny.classifier("bert", names=tiny.ENDS),
        "masked": tiny.masked("bert", "eager"),
        "written": tiny.two_sided("t5"),
    }
    for name, model in made.items():
        model.save_pretrained(path / name)
        (tiny.TWO_SIDED_TOKENIZER if name == "written" else tiny.ENCODER_TOKENIZER).save_pretrained(path / name)
    return path


def ask(scratch: Path, *arguments: str, ranks: int = 1):
    with helpers.Command(["launch/predict.py", "precision=fp32", *arguments], scratch, forked=ranks) as running:
        return running.wait()


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


BAD = [
    *('{"text": "no end', '{"text": 7, "label": "red"}', '{"label": "red"}'),
    *('"nothing"', '{"text": "", "label": "red"}'),
]
"""Lines that are no records of texts with labels."""


def mixed(path: Path, count: int = 23) -> tuple[Path, list[dict]]:
    """Texts with labels and without, and what is none; and what was written in each line, {} of the latter."""
    rows = tiny.labelled_rows(count)
    for number, row in enumerate(rows):
        row["id"] = f"text {number}"
        if number % 5 == 2:
            del row["label"]
    rows[4]["label"] = "green"
    written = [json.dumps(row, ensure_ascii=False) for row in rows]
    for number, bad in enumerate(BAD):
        written.insert(1 + 4 * number, bad)
        rows.insert(1 + 4 * number, {})
    file = path / "混合.jsonl"
    file.write_text("\n".join(written) + "\n", encoding="utf-8")
    return file, rows


@pytest.mark.parametrize("ranks", [1, 2])
def test_labels_of_records_good_and_bad_stand_in_their_order(home, scratch, tmp_path, ranks):
    file, rows = mixed(tmp_path)
    output = tmp_path / "said.jsonl"
    given = [f"model.path={home / 'classify'}", f"input={file}", f"output={output}", "eval.micro_batch_size=7"]
    result = ask(scratch, *given, ranks=ranks)
    assert result.code == 0, result.err
    assert "28 records, 23 predicted, 5 errors" in result.err
    model = AutoModelForSequenceClassification.from_pretrained(home / "classify").eval()
    said, expected = lines(output), []
    assert [line["record"] for line in said] == list(range(1, 29))
    for line, row in zip(said, rows, strict=True):
        assert ("error" in line) == (not row) and line["origin"].startswith(str(file))
        if not row:
            continue
        pair = [row["text"], row["text_pair"]] if "text_pair" in row else [row["text"]]
        with torch.no_grad():
            chances = model(**tiny.ENCODER_TOKENIZER(*pair, return_tensors="pt")).logits[0].softmax(-1)
        assert line["id"] == row["id"]
        assert [*line["probabilities"].values()] == pytest.approx(chances.tolist(), abs=1e-5)
        assert line["prediction"] == tiny.LABELS[int(chances.argmax())]
        assert ("note" in line) == (row.get("label") == "green")
        if row.get("label") in tiny.LABELS:
            expected.append((row["label"], line["prediction"], row.get("weight", 1.0)))
    true, predicted, counts = zip(*expected)
    scores = json.loads((tmp_path / "said.jsonl.scores.json").read_text(encoding="utf-8"))
    assert scores["references"] == len(expected)
    assert scores["accuracy"] == pytest.approx(judge.accuracy_score(true, predicted, sample_weight=counts))
    assert {path.name for path in tmp_path.iterdir()} == {file.name, output.name, "said.jsonl.scores.json"}


def test_groups_of_records_are_told_apart(home, scratch, tmp_path):
    """Two large groups, one small, on two ranks; records that cannot be read or scored are of none."""
    rows = [
        row | {"about": {"side": "abc"[min(n % 2, 1) if n < 76 else 2]}} for n, row in enumerate(tiny.labelled_rows(80))
    ]
    for row in rows:
        row.pop("weight", None)
    rows[3]["label"], rows[7]["text"] = "green", ""
    file, output = tiny.write_jsonl(tmp_path / "x.jsonl", rows), tmp_path / "said.jsonl"
    given = [f"model.path={home / 'classify'}", f"input={file}", f"output={output}", "group_by=[about.side]"]
    result = ask(scratch, *given, ranks=2)
    assert result.code == 0, result.err
    scores, said = json.loads((tmp_path / "said.jsonl.scores.json").read_text()), lines(output)
    found = scores["groups"]["about.side"]
    for key, own in found["groups"].items():
        mine = [n for n, row in enumerate(rows) if row["about"]["side"] == key and n not in (3, 7)]
        true, told = [rows[n]["label"] for n in mine], [said[n]["prediction"] for n in mine]
        assert own["records"] == len(mine) and own["accuracy"] == pytest.approx(judge.accuracy_score(true, told))
        assert own["intervals"]["accuracy"][0] <= own["accuracy"] <= own["intervals"]["accuracy"][1]
        assert own.get("small", False) == (key == "c")
    assert set(found["fairness"]) == {*tiny.LABELS} and found["gap"]["accuracy"] >= 0


def test_killed_it_goes_on_behind_the_last_whole_block(home, scratch, tmp_path):
    rows = [{"text": text} for text in tiny.texts(1500)]
    file = tiny.write_jsonl(tmp_path / "x.jsonl", rows)
    given = [f"model.path={home / 'classify'}", f"input={file}"]
    straight = ask(scratch, *given, f"output={tmp_path / 'straight.jsonl'}", ranks=2)
    assert straight.code == 0, straight.err
    parts = tmp_path / ".killed.jsonl.parts"
    command = ["launch/predict.py", "precision=fp32", *given, f"output={tmp_path / 'killed.jsonl'}"]
    with helpers.Command(command, scratch, forked=2) as running:
        running.until(lambda: parts.exists() and any(parts.glob("000000-*.jsonl")))
        running.kill()
    (first,) = parts.glob("000000-*.jsonl")
    kept = first.stat().st_mtime_ns
    with helpers.Command(command, scratch, forked=2) as running:
        # the first part is not made again
        running.until(lambda: any(parts.glob("000001-*.jsonl")))
        assert first.stat().st_mtime_ns == kept
        result = running.wait()
    assert result.code == 0, result.err
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "straight.jsonl").read_bytes()
    assert not parts.exists()


def test_standard_input_and_output(home, scratch):
    environment = {"PATH": "/usr/bin", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(helpers.ROOT)}
    command = [sys.executable, "launch/predict.py", f"model.path={home / 'classify'}", "input=-", "output=-"]
    said = subprocess.run(
        command,
        input='{"text": "狐狸 the owl"}\n\n[]\n'.encode() + b'{"text": "\xff"}\n',
        capture_output=True,
        cwd=helpers.ROOT,
        env=environment,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    first, second, third = map(json.loads, said.stdout.splitlines())
    assert first["prediction"] in tiny.LABELS and first["origin"] == "stdin:1"
    assert second == {"record": 2, "origin": "stdin:3", "error": "no JSON object"}
    assert third["origin"] == "stdin:4" and third["error"].startswith("no JSON: 'utf-8' codec can't decode")


def test_tags_of_words_and_of_plain_text_in_windows(home, scratch, tmp_path):
    rows = tiny.tagged_rows(9, longest=60)
    asked = [{"tokens": rows[0]["tokens"]}, *rows[1:], {"text": "月亮 over the hill!"}]
    file, output = tiny.write_jsonl(tmp_path / "词.jsonl", asked), tmp_path / "said.jsonl"
    given = [f"model.path={home / 'tag'}", f"input={file}", f"output={output}", "data.max_length=24", "task.overlap=8"]
    result = ask(scratch, *given, ranks=2)
    assert result.code == 0, result.err
    said = lines(output)
    for line, row in zip(said, rows):
        assert line["words"] == row["tokens"] and len(line["prediction"]) == len(row["tokens"])
        assert all(0 < chance <= 1 for chance in line["probabilities"])
        text = "".join(line["words"])
        assert all(one["text"].replace(" ", "") in text for one in line["entities"])
    assert said[-1]["words"] == ["月", "亮", "over", "the", "hill", "!"]
    legal = {"O", *(f"{prefix}-{kind}" for prefix in "BI" for kind in ("ANIMAL", "天体"))}
    assert {tag for line in said for tag in line["prediction"]} <= legal
    assert json.loads((tmp_path / "said.jsonl.scores.json").read_text())["references"] == 8


def test_answers_with_their_places(home, scratch, tmp_path):
    rows = tiny.asked_rows(11, longest=50)
    asked = [*rows[1:], {name: rows[0][name] for name in ("question", "context")}]
    file, output = tiny.write_jsonl(tmp_path / "q.jsonl", asked), tmp_path / "said.jsonl"
    given = [f"model.path={home / 'extract'}", f"input={file}", f"output={output}", "data.max_length=32"]
    result = ask(scratch, *given, "task.overlap=8", ranks=2)
    assert result.code == 0, result.err
    for line, row in zip(lines(output), asked, strict=True):
        assert row["context"][line["start"] : line["end"]] == line["prediction"] != ""
    scores = json.loads((tmp_path / "said.jsonl.scores.json").read_text(encoding="utf-8"))
    assert scores["references"] == 10 and 0 <= scores["exact"] <= scores["f1"] <= 1
    nothing = tmp_path / "nothing.jsonl"
    result = ask(scratch, *given[:2], f"output={nothing}", "task.no_answer_threshold=-1e9")
    assert result.code == 0, result.err
    assert {line["prediction"] for line in lines(nothing)} == {""}


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_are_those_of_generate(home, scratch, tmp_path, beams):
    rows = [{"source": text} for text in tiny.texts(5)] + tiny.written_rows(2, seed=4)
    file, output = tiny.write_jsonl(tmp_path / "x.jsonl", rows), tmp_path / "said.jsonl"
    given = [f"model.path={home / 'written'}", f"input={file}", f"output={output}", "max_new_tokens=6"]
    result = ask(scratch, *given, f"beams={beams}", "task.source_prefix='say: '", ranks=2)
    assert result.code == 0, result.err
    model = AutoModelForSeq2SeqLM.from_pretrained(home / "written").eval()
    for line, row in zip(lines(output), rows, strict=True):
        tokens = tiny.TWO_SIDED_TOKENIZER("say: " + row["source"], return_tensors="pt")
        expected = model.generate(**tokens, max_new_tokens=6, num_beams=beams, do_sample=False)[0]
        assert line["prediction"] == tiny.TWO_SIDED_TOKENIZER.decode(expected, skip_special_tokens=True)
        assert line.get("reference") == row.get("target")


def test_chats_and_texts_are_answered(home, scratch, tmp_path):
    chat = [{"role": "user", "content": "where is the moon ?"}]
    rows = [
        {"messages": chat},
        {"messages": [*chat, {"role": "assistant", "content": "在山上"}]},
        {"prompt": "where is the moon ?", "completion": "在山上"},
        {"instruction": "where is", "input": "the moon ?"},
        {"text": "the red fox"},
        {"messages": [{"role": "system", "content": "be brief"}]},
        {"prompt": "the fox " * 300},
    ]
    file, output = tiny.write_jsonl(tmp_path / "x.jsonl", rows), tmp_path / "said.jsonl"
    result = ask(scratch, f"model.path={home / 'causal'}", f"input={file}", f"output={output}", "max_new_tokens=6")
    assert result.code == 0, result.err
    said, tokens = lines(output), tiny.TOKENIZER
    model = AutoModelForCausalLM.from_pretrained(home / "causal").eval()

    def expected(ids):
        ids = torch.tensor([ids])
        stops = [tokens.eos_token_id, model.config.eos_token_id]
        written = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=stops, pad_token_id=0)
        return tokens.decode(written[0, ids.shape[1] :], skip_special_tokens=True)

    prompt = tokens.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert said[0]["prediction"] == said[1]["prediction"] == said[2]["prediction"] == expected(prompt)
    assert "reference" not in said[0] and said[1]["reference"] == said[2]["reference"] == "在山上"
    assert said[4]["prediction"] == expected(tokens("the red fox")["input_ids"])
    assert "prediction" in said[3]
    assert "has no turn" in said[5]["error"] and "the prompt alone fills the model" in said[6]["error"]


def test_texts_are_the_same_for_any_ranks_and_batches_and_scored_as_the_judges_do(home, scratch, tmp_path):
    """Drawn and greedy; 23 records, which neither divides; killed scores cannot be, as they are counted at the end."""
    words = [text.split() for text in tiny.texts(23)]
    rows = [
        {"prompt": " ".join(text[: 1 + n % 7]), "completion": " ".join(text[1:4]), "of": n % 2}
        for n, text in enumerate(words)
    ]
    rows[5], rows[11] = {"text": "the red fox"}, {"prompt": 3}
    file, found = tiny.write_jsonl(tmp_path / "x.jsonl", rows), {}
    usual = [f"model.path={home / 'causal'}", f"input={file}", "max_new_tokens=6", "scores=[bleu,chrf,ter,rouge]"]
    usual += ["group_by=[of]"]
    for drawn in ([], ["temperature=1.2", "top_p=0.95", "answers=2", "seed=3"]):
        for ranks, size in ((1, 1), (2, 3), (1, 16)):
            output = tmp_path / f"{len(drawn)}-{ranks}-{size}.jsonl"
            result = ask(scratch, *usual, *drawn, f"output={output}", f"eval.micro_batch_size={size}", ranks=ranks)
            assert result.code == 0, result.err
            said = output.read_bytes(), (tmp_path / f"{output.name}.scores.json").read_bytes()
            assert found.setdefault(len(drawn), said) == said, (drawn, ranks, size)
    for lot, (said, scores) in found.items():
        told, numbers = [json.loads(line) for line in said.splitlines()], json.loads(scores)
        scored = [line for line in told if "scores" in line]
        assert "error" in told[11] and "scores" not in told[5] and numbers["references"] == len(scored) > 15
        texts, references = [line["prediction"] for line in scored], [line["reference"] for line in scored]
        assert numbers["chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, [references]).score, abs=1e-9)
        languages = [line["language"] for line in scored]
        assert numbers["languages"] == {name: languages.count(name) for name in set(languages)}
        if lot:
            assert all(len(line["predictions"]) == 2 for line in scored)
            assert any(line["predictions"][0]["text"] != line["predictions"][1]["text"] for line in scored)
            assert scored[0]["prediction"] == scored[0]["predictions"][0]["text"]
        by = numbers["groups"]["of"]["groups"]
        assert {name: own["records"] for name, own in by.items()} == {
            name: sum(line["groups"]["of"] == name for line in scored) for name in ("0", "1")
        }
        assert numbers["intervals"]["bleu"][0] <= numbers["bleu"] <= numbers["intervals"]["bleu"][1]
        rouge = np.mean([line["scores"]["rouge1"] for line in scored])
        assert numbers["rouge1"] == pytest.approx(rouge, abs=1e-9)


def test_masks_are_filled(home, scratch, tmp_path):
    file = tiny.write_jsonl(tmp_path / "x.jsonl", [{"text": "the red [MASK] sees"}, {"text": "nothing"}])
    output = tmp_path / "said.jsonl"
    result = ask(scratch, f"model.path={home / 'masked'}", f"input={file}", f"output={output}")
    assert result.code == 0, result.err
    filled, other = lines(output)
    (guesses,) = filled["guesses"]
    chances = [guess["probability"] for guess in guesses]
    assert len(guesses) == 5 and chances == sorted(chances, reverse=True)
    tokens = tiny.ENCODER_TOKENIZER("the red [MASK] sees", return_tensors="pt")
    with torch.no_grad():
        logits = AutoModelForMaskedLM.from_pretrained(home / "masked").eval()(**tokens).logits[0]
    at = tokens["input_ids"][0].tolist().index(tiny.ENCODER_TOKENIZER.mask_token_id)
    logits[:, tiny.ENCODER_TOKENIZER.all_special_ids] = -torch.inf
    tokens["input_ids"][0, at] = logits[at].argmax()
    assert filled["prediction"] == tiny.ENCODER_TOKENIZER.decode(tokens["input_ids"][0], skip_special_tokens=True)
    assert other["error"] == "its text has no [MASK] to be filled"


def test_a_run_its_model_and_its_adapters_say_the_same(home, scratch, tmp_path):
    data = tiny.write_jsonl(tmp_path / "x.jsonl", [row | {"score": len(row["text"])} for row in tiny.labelled_rows(40)])
    run = tmp_path / "run"
    arguments = [f"run_dir={run}", "task=regress", f"model.path={home / 'masked'}", "data=jsonl", "tuning=lora"]
    arguments += [f"data.train={data}", f"data.cache_dir={tmp_path / 'cache'}", "data.columns={value: score}"]
    arguments += ["data.ignore_fields=[label]", "data.max_length=48", "precision=fp32", "train.max_steps=6"]
    result = helpers.train([*arguments, "optim.lr=0.01"], scratch)
    assert result.code == 0, result.err
    exported = ["launch/export.py", f"run_dir={run}", "merge=false", f"output={tmp_path / 'adapters'}"]
    assert helpers.script(exported, scratch).code == 0
    said = []
    usual = ["data.columns={value: score}", "data.ignore_fields=[label]", "data.max_length=48"]
    for number, who in enumerate(
        ([f"run_dir={run}"], [f"model.path={run / 'model'}", *usual], [f"model.path={tmp_path / 'adapters'}", *usual])
    ):
        output = tmp_path / f"{number}.jsonl"
        result = ask(scratch, *who, f"input={data}", f"output={output}", ranks=1 + number % 2)
        assert result.code == 0, result.err
        said.append([line["prediction"] for line in lines(output)])
        scores = json.loads((tmp_path / f"{number}.jsonl.scores.json").read_text())
        assert scores["references"] == 40 and "pearson" in scores
    assert np.std(said[0]) > 0
    for other in said[1:]:
        assert other == pytest.approx(said[0], rel=1e-4)


def test_thresholds_of_the_validation_set_decide_the_test_set_and_predictions(home, scratch, tmp_path):
    """Several labels at once; a run, its model and its adapters keep them, and scikit-learn counts the same."""
    parts = {name: tmp_path / f"{name}.jsonl" for name in ("train", "validation", "test")}
    for seed, (file, count) in enumerate(zip(parts.values(), (40, 17, 23))):
        rows = [{"text": row["text"], "labels": row["label"]} for row in tiny.labelled_rows(count, seed, several=True)]
        tiny.write_jsonl(file, rows)
    run = tmp_path / "run"
    arguments = [f"run_dir={run}", "task=classify", "task.multi_label=true", f"model.path={home / 'masked'}"]
    arguments += [
        "data=jsonl",
        *(f"data.{name}={file}" for name, file in parts.items()),
        "tuning=lora",
        "optim.lr=0.003",
    ]
    arguments += [f"data.cache_dir={tmp_path / 'cache'}", "data.max_length=48", "precision=fp32", "train.max_steps=6"]
    result = helpers.train(arguments, scratch)
    assert result.code == 0, result.err
    exported = ["launch/export.py", f"run_dir={run}", "merge=false", f"output={tmp_path / 'adapters'}"]
    assert helpers.script(exported, scratch).code == 0
    about = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    thresholds = about["validation"]["thresholds"]
    assert about["test"]["thresholds"] == thresholds and set(thresholds.values()) != {0.5}
    tested = next(row for row in helpers.rows(run) if "test/f1_macro_tuned" in row)
    names, usual = list(thresholds), ["data.max_length=48"]
    true = [[name in row["labels"] for name in names] for row in lines(parts["test"])]
    for number, who in enumerate(
        ([f"run_dir={run}"], [f"model.path={run / 'model'}", *usual], [f"model.path={tmp_path / 'adapters'}", *usual])
    ):
        output = tmp_path / f"{number}.jsonl"
        result = ask(scratch, *who, f"input={parts['test']}", f"output={output}")
        assert result.code == 0, result.err
        assert "the model keeps thresholds: {" in result.err
        said = lines(output)
        for line in said:
            assert line["prediction"] == [name for name in names if line["probabilities"][name] >= thresholds[name]]
        given = [[name in line["prediction"] for name in names] for line in said]
        macro = judge.f1_score(true, given, average="macro", zero_division=0)
        assert macro == pytest.approx(tested["test/f1_macro_tuned"], abs=1e-9)
        scores = json.loads((tmp_path / f"{number}.jsonl.scores.json").read_text())
        assert scores["f1_macro_tuned"] == pytest.approx(macro, abs=1e-9)
    output = tmp_path / "half.jsonl"
    result = ask(scratch, f"run_dir={run}", "task.thresholds=half", f"input={parts['test']}", f"output={output}")
    assert result.code == 0, result.err
    for line in lines(output):
        assert line["prediction"] == [name for name in names if line["probabilities"][name] >= 0.5]


def test_what_the_data_have_told_of_questions_without_an_answer_is_kept(home, scratch, tmp_path):
    data, run = tiny.write_jsonl(tmp_path / "x.jsonl", tiny.asked_rows(40)), tmp_path / "run"
    arguments = [f"run_dir={run}", "task=extract", f"model.path={home / 'masked'}", "data=jsonl", "tuning=lora"]
    arguments += [f"data.train={data}", f"data.cache_dir={tmp_path / 'cache'}", "data.max_length=48", "precision=fp32"]
    result = helpers.train([*arguments, "train.max_steps=24", "optim.lr=0.03"], scratch)
    assert result.code == 0, result.err
    exported = ["launch/export.py", f"run_dir={run}", "merge=false", f"output={tmp_path / 'adapters'}"]
    assert helpers.script(exported, scratch).code == 0
    usual = ["data.max_length=48"]
    places = [
        [f"run_dir={run}"],
        [f"model.path={run / 'model'}", *usual],
        [f"model.path={tmp_path / 'adapters'}", *usual],
    ]
    for number, who in enumerate([*places, [*places[0], "task.no_answer_threshold=-1000"]]):
        output = tmp_path / f"{number}.jsonl"
        result = ask(scratch, *who, f"input={data}", f"output={output}")
        assert result.code == 0, result.err
        assert "the model keeps no_answer_threshold: 0.0" in result.err
        least, said = -1000 if number == len(places) else 0, lines(output)
        assert any(line["prediction"] == "" for line in said)
        for line in said:
            assert (line["prediction"] == "") == (line["no_answer_score"] - line["score"] > least)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["input=nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["model.path=nowhere"], "no directory"),
        (["task.overlap=8"], "task.overlap=8 does nothing with task=classify"),
        (["beam=2"], "Nearest: beams="),
        (["beams=2"], "beams does nothing with task=classify"),
        (
            ["task=causal_lm", "model.path={causal}", "data.max_length=9"],
            "data.max_length does nothing with task=causal_lm",
        ),
        (["task.thresholds=half"], "task.thresholds=half does nothing with task.multi_label=false"),
        (["task=causal_lm", "model.path={causal}", "scores=[blue]"], "Did you mean bleu?"),
        (["task=causal_lm", "model.path={causal}", "language=Deutsch"], "language=Deutsch is auto"),
        (["task=causal_lm", "model.path={causal}", "temperature=warm"], "temperature=warm is to be a number"),
        (["task=causal_lm", "model.path={causal}", "top_p=0.5"], "top_p does nothing with temperature=0"),
        (
            ["task=causal_lm", "model.path={causal}", "group_by=[topic]"],
            "none of the first 1 records has a field 'topic'",
        ),
        (["task=causal_lm", "model.path={causal}", "normalize=[upper]"], "normalize: there is no 'upper'"),
        (["task=tag", "model.path={tag}", "group_by=[a]"], "group_by does nothing with task=tag"),
        (["scores=[bleu]"], "scores does nothing with task=classify"),
        (["beams=0"], "beams=0 is a whole number, at least 1"),
        (["checkpoint=best"], "checkpoint=best does nothing without run_dir"),
        (["data.max_length=999"], "is more than the 128 positions of"),
        (["task=clasify"], "there is no such task. Did you mean task=classify?"),
        (["task=tag"], "without a head for task=tag"),
        (["data.on_overflow=split"], "what is learnt is said of the whole text"),
        (["output={there}"], "is there already"),
        (["input={empty}"], "there is no record in it"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_left(home, scratch, tmp_path, given, message):
    file = tiny.write_jsonl(tmp_path / "x.jsonl", [{"text": "a"}])
    (tmp_path / "empty.jsonl").write_text("\n")
    usual = {"model.path": home / "classify", "input": file, "output": tmp_path / "said.jsonl"}
    places = {"causal": home / "causal", "tag": home / "tag", "there": file, "empty": tmp_path / "empty.jsonl"}
    changed = dict(one.format(**places).split("=", 1) for one in given)
    result = ask(scratch, *(f"{name}={value}" for name, value in (usual | changed).items()))
    assert result.code == 2, result.err
    assert message in result.err and "Traceback" not in result.err
    assert {path.name for path in tmp_path.iterdir()} == {"x.jsonl", "empty.jsonl"}
