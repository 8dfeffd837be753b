"""Evaluation gives the same numbers for any batch size and number of ranks, and the right ones."""

from __future__ import annotations

import json
import shutil

import cases
import numpy as np
import pairwise
import pytest
import seqeval.metrics
import tiny
import torch
import torch.nn.functional as F
from sklearn import metrics as judge
from transformers import LlamaForCausalLM

from dsft.metrics import answers

EXAMPLES = 23


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> str:
    return str(tiny.save(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def expected(model_dir):
    """A loop over single examples with transformers alone."""
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()
    nll = correct = tokens = 0.0
    for example in tiny.examples(EXAMPLES):
        ids = torch.from_numpy(example.ids.astype(np.int64))[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        targets = torch.where(torch.from_numpy(example.columns["weights"][1:] > 0), ids[0, 1:], -100)
        nll += float(F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
        correct += int((logits.argmax(-1) == targets)[targets != -100].sum())
        tokens += int((targets != -100).sum())
    return {"eval/loss": nll / tokens, "eval/token_accuracy": correct / tokens, "eval/supervised_tokens": tokens}


@pytest.mark.parametrize(
    ("ranks", "micro_batch_size", "stage"), pairwise.cases((1, 2), (1, 5, 64, None), ("zero2", "zero3"))
)
def test_any_batch_size_and_world(pools, model_dir, expected, ranks, micro_batch_size, stage):
    """23 examples over 2 ranks are ragged; none is counted twice or left out (transformers#39241, trl#7010)."""
    rows = pools(ranks).run(
        cases.evaluate, model_dir=model_dir, micro_batch_size=micro_batch_size, stage=stage, examples=EXAMPLES
    )
    for found in rows:
        assert found["eval/examples"] == EXAMPLES
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-6), name


@pytest.fixture(scope="module", params=["bert", "llama"])
def classifier(request, tmp_path_factory) -> tuple[str, dict[str, float]]:
    """A model with a head for labels, and what scikit-learn says of its answers to single texts."""
    directory = str(tmp_path_factory.mktemp("classifier"))
    model = tiny.classifier(request.param, vocab_size=400)
    model.save_pretrained(directory)
    examples = tiny.labelled_examples(EXAMPLES)
    counts = np.array([example.weight for example in examples])
    targets = [tiny.labels_of(example)[0] for example in examples]
    logits = []
    for example in examples:
        typed = {"token_type_ids": torch.from_numpy(example.columns["token_types"].astype(np.int64))[None]}
        with torch.no_grad():
            ids = torch.from_numpy(example.ids.astype(np.int64))[None]
            logits.append(model(input_ids=ids, **(typed if request.param == "bert" else {})).logits[0])
    scores = torch.stack(logits).double().softmax(-1).numpy()
    predicted = scores.argmax(-1)
    labels = list(range(len(tiny.LABELS)))
    return directory, {
        "eval/loss": judge.log_loss(targets, scores, labels=labels, sample_weight=counts),
        "eval/accuracy": judge.accuracy_score(targets, predicted, sample_weight=counts),
        "eval/f1_macro": judge.f1_score(targets, predicted, average="macro", sample_weight=counts, zero_division=0),
        "eval/mcc": judge.matthews_corrcoef(targets, predicted, sample_weight=counts),
        "eval/roc_auc": judge.roc_auc_score(targets, scores, multi_class="ovr", sample_weight=counts),
        "eval/records": round(counts.sum()),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "micro_batch_size", "stage", "padded"),
    pairwise.cases((1, 2), (1, 7), ("zero2", "zero3"), (False, True)),
)
def test_labels_for_any_batch_size_and_world(pools, classifier, ranks, micro_batch_size, stage, padded):
    """23 texts divide by neither; smoothing and focal loss are training's alone."""
    model_dir, expected = classifier
    rows = pools(ranks).run(
        cases.evaluate,
        model_dir=model_dir,
        micro_batch_size=micro_batch_size,
        stage=stage,
        padded=padded,
        examples=EXAMPLES,
        task="classify",
        settings=tiny.CLASSIFYING,
    )
    for found in rows:
        assert found["eval/examples"] == EXAMPLES
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize(("ranks", "micro_batch_size"), [(1, 7), (2, 1)])
def test_numbers_for_any_batch_size_and_world(pools, tmp_path_factory, ranks, micro_batch_size):
    directory = str(tmp_path_factory.mktemp("rated"))
    model = tiny.classifier("llama", names=("a", "b"), vocab_size=400)
    model.save_pretrained(directory)
    examples, found = tiny.rated_examples(EXAMPLES), []
    for example in examples:
        with torch.no_grad():
            found.append(
                model(input_ids=torch.from_numpy(example.ids.astype(np.int64))[None]).logits[0].double().numpy()
            )
    targets = np.array([example.columns["numbers"] for example in examples])
    counts = {"sample_weight": np.array([example.weight for example in examples])}
    expected = {
        "eval/mae": judge.mean_absolute_error(targets, found, **counts),
        "eval/rmse": judge.mean_squared_error(targets, found, **counts) ** 0.5,
        "eval/r2": judge.r2_score(targets, found, **counts),
    }
    options = {"micro_batch_size": micro_batch_size, "examples": EXAMPLES, "task": "regress"}
    for row in pools(ranks).run(cases.evaluate, model_dir=directory, **options):
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize(("ranks", "micro_batch_size", "padded"), [(1, 7, False), (2, 1, True), (2, 7, False)])
def test_tags_for_any_batch_size_and_world(pools, tmp_path_factory, ranks, micro_batch_size, padded):
    """Windows of a record may be answered by several ranks, in any order."""
    directory = str(tmp_path_factory.mktemp("tagged"))
    model = tiny.classifier("bert", names=tiny.TAGS)
    model.save_pretrained(directory)
    examples, rows = tiny.tagged_examples(EXAMPLES), tiny.tagged_rows(EXAMPLES)
    records: dict[int, tuple[list[str], list[str]]] = {}
    for example in examples:
        (at,) = np.nonzero(example.columns["words"] >= 0)
        with torch.no_grad():
            found = model(input_ids=torch.from_numpy(example.ids.astype(np.int64))[None]).logits[0, at].argmax(-1)
        ours, theirs = records.setdefault(example.record, ([], []))
        ours += [tiny.TAGS[int(tag)] for tag in found]
        theirs += [rows[example.record]["tags"][word] for word in example.columns["words"][at]]
    assert len(records) < len(examples), "some records take several windows"
    counts = [rows[record].get("weight", 1.0) for record in records]
    right = sum(w * sum(a == b for a, b in zip(*pair)) for w, pair in zip(counts, records.values()))
    words = sum(w * len(pair[0]) for w, pair in zip(counts, records.values()))
    # seqeval knows no weights
    repeated = [pair for pair, count in zip(records.values(), counts) for _ in range(round(count * 10))]
    ours, theirs = ([pair[side] for pair in repeated] for side in (0, 1))
    options = {"micro_batch_size": micro_batch_size, "examples": EXAMPLES, "task": "tag", "padded": padded}
    for row in pools(ranks).run(cases.evaluate, model_dir=directory, **options):
        assert row["eval/accuracy"] == pytest.approx(right / words)
        assert row["eval/words"] == round(words)
        assert row["eval/f1"] == pytest.approx(seqeval.metrics.f1_score(theirs, ours))
        assert row["eval/recall"] == pytest.approx(seqeval.metrics.recall_score(theirs, ours))


def test_fewer_examples_than_ranks(pools, model_dir):
    """A rank with nothing to evaluate still takes part, or ZeRO-3 would hang (DeepSpeed#5394)."""
    for found in pools(2).run(cases.evaluate, model_dir=model_dir, micro_batch_size=1, stage="zero3", examples=1):
        assert found["eval/examples"] == 1


@pytest.mark.parametrize(("ranks", "micro_batch_size", "padded"), pairwise.cases((1, 2), (1, 7, None), (False, True)))
def test_answers_in_texts_for_any_batch_size_and_world(pools, tmp_path_factory, ranks, micro_batch_size, padded):
    """23 windows of questions, against a loop over single windows that tries every span."""
    directory = str(tmp_path_factory.mktemp("asked"))
    model = tiny.classifier("bert", names=tiny.ENDS, vocab_size=400)
    model.save_pretrained(directory)
    examples, rows = tiny.asked_examples(EXAMPLES), tiny.asked_rows(EXAMPLES)
    loss, best, nothing = 0.0, {}, {}
    for example in examples:
        columns = example.columns
        ids = {"input_ids": torch.from_numpy(example.ids.astype(np.int64))[None]}
        ids["token_type_ids"] = torch.from_numpy(columns["token_types"].astype(np.int64))[None]
        start, end = torch.from_numpy(columns["target"].astype(np.int64))[:, None]
        with torch.no_grad():
            out = model(**ids, start_positions=start, end_positions=end)
        loss += float(out.loss) * example.weight
        here = np.flatnonzero(columns["begins"] >= 0)
        for b in here:
            for e in here[(here >= b) & (here < b + 5)]:
                score = float(out.start_logits[0, b] + out.end_logits[0, e])
                text = rows[example.record]["context"][columns["begins"][b] : columns["ends"][e]].strip()
                best[example.record] = max(best.get(example.record, (-np.inf, "")), (score, text))
        none = float(out.start_logits[0, 0] + out.end_logits[0, 0])
        nothing[example.record] = min(nothing.get(example.record, np.inf), none)
    margins = sorted(nothing[record] - best[record][0] for record in best)
    threshold = float(np.mean(margins[len(margins) // 2 :][:2]))
    exact = counts = 0.0
    for record, (score, text) in best.items():
        right = [answer["text"] for answer in rows[record]["answers"]]
        said = "" if nothing[record] - score > threshold else text
        scores = answers.score(said, right, answers.is_chinese(rows[record]["context"]))
        exact += rows[record].get("weight", 1.0) * scores.exact
        counts += rows[record].get("weight", 1.0)
    assert 0 < exact < counts
    settings = {"max_answer_tokens": 5, "no_answer_threshold": threshold}
    options = {"micro_batch_size": micro_batch_size, "examples": EXAMPLES, "task": "extract", "padded": padded}
    for found in pools(ranks).run(cases.evaluate, model_dir=directory, settings=settings, **options):
        assert found["eval/loss"] == pytest.approx(loss / sum(one.weight for one in examples), rel=1e-6)
        assert found["eval/questions"] == pytest.approx(counts)
        assert found["eval/exact"] == pytest.approx(exact / counts, abs=1e-6)


@pytest.mark.parametrize(
    ("ranks", "micro_batch_size", "stage", "family"),
    pairwise.cases((1, 2), (1, 7), ("zero2", "zero3"), ("t5", "bart")),
)
def test_texts_from_texts_for_any_batch_size_and_world(pools, tmp_path, ranks, micro_batch_size, stage, family):
    """23 texts divide by neither; the loss is transformers' own of single texts."""
    model = tiny.two_sided(family)
    model.save_pretrained(tmp_path)
    nll = correct = tokens = 0.0
    for example in tiny.written_examples(EXAMPLES):
        labels = torch.from_numpy(example.columns["target_ids"].astype(np.int64))[None]
        with torch.no_grad():
            found = model(input_ids=torch.from_numpy(example.ids.astype(np.int64))[None], labels=labels)
        counts = float(example.columns["counts"][0])
        nll += float(found.loss) * labels.shape[1] * counts
        correct += float((found.logits.argmax(-1) == labels).sum()) * counts
        tokens += labels.shape[1] * counts
    options = {"micro_batch_size": micro_batch_size, "stage": stage, "examples": EXAMPLES, "task": "seq2seq"}
    for found in pools(ranks).run(cases.evaluate, model_dir=str(tmp_path), padded=True, **options):
        assert found["eval/loss"] == pytest.approx(nll / tokens, rel=1e-6)
        assert found["eval/token_accuracy"] == pytest.approx(correct / tokens, rel=1e-6)
        assert found["eval/examples"] == EXAMPLES


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_answers_are_those_of_transformers(pools, model_dir, stage):
    """Greedy answers under ZeRO-3 equal a plain generate (LLaMA-Factory#5629)."""
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    prompts = [[5, 6, 7, 8], [300, 4, 9]]
    plain = [
        model.generate(torch.tensor([p]), max_new_tokens=8, do_sample=False)[0, len(p) :].tolist() for p in prompts
    ]
    for found in pools(2).run(cases.generate, model_dir=model_dir, prompts=prompts, stage=stage):
        assert found == plain


def test_samples_take_no_settings_of_the_models(pools, model_dir, tmp_path):
    """Beams, sampling, stop strings, assistants ... in generation_config.json would crash step 0 or change answers."""
    hostile = {
        "do_sample": True,
        "temperature": 0.1,
        "num_beams": 4,
        "num_beam_groups": 2,
        "num_return_sequences": 4,
        "penalty_alpha": 0.6,
        "top_k": 4,
        "stop_strings": ["the"],
        "max_length": 3,
        "min_new_tokens": 7,
        "forced_eos_token_id": 5,
        "suppress_tokens": [3, 4, *range(6, 200)],
        "no_repeat_ngram_size": 1,
        "repetition_penalty": 5.0,
        "prompt_lookup_num_tokens": 3,
        "dola_layers": "high",
        "cache_implementation": "static",
        "guidance_scale": 3.0,
        "watermarking_config": {"bias": 9.0},
        "return_dict_in_generate": True,
        "output_scores": True,
        "eos_token_id": 2,
    }
    shutil.copytree(model_dir, tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text(json.dumps(hostile))
    prompts = [[5, 6, 7, 8], [300, 4, 9]]
    expected, _ = pools(2).run(cases.generate, model_dir=model_dir, prompts=prompts)
    for found in pools(2).run(cases.generate, model_dir=str(tmp_path / "model"), prompts=prompts):
        assert found == expected
    stop = expected[0][2]
    for found in pools(2).run(cases.generate, model_dir=model_dir, prompts=prompts, stop=(stop,), method="lora"):
        assert found[0] == expected[0][: expected[0].index(stop) + 1]


@pytest.mark.parametrize(
    ("stage", "failing", "where"),
    [("zero2", [1], "inside"), ("zero2", [0, 1], "before"), ("zero3", [0, 1], "before"), ("zero3", [0, 1], "inside")],
)
def test_a_sample_that_fails_is_reported_and_the_run_goes_on(pools, model_dir, stage, failing, where):
    """On some ranks below ZeRO-3, on all of them under it; the training step after it is as without."""
    options = {"model_dir": model_dir, "stage": stage, "where": where}
    clean = pools(2).run(cases.failing_samples, **options, failing=[])
    rows = pools(2).run(cases.failing_samples, **options, failing=failing)
    for (said, problems, nll), (all_said, _, expected) in zip(rows, clean):
        assert said == all_said[1:]
        assert problems == [f"record 1: rank {failing[0]}: RuntimeError: the device is out of memory"]
        assert nll == expected
