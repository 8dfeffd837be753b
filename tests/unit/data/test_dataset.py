"""The cache of tokenised data: what is kept, what is dropped and why, and when it is made anew."""

import errno
import json
import multiprocessing
import os
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import datasets
import numpy as np
import pytest
import tiny
from tiny import conversation as to_conversation
from tiny import prepare

from dsft.config.schema import DataConfig, OnBadRecord, OnOverflow, Source, TrainOn
from dsft.data import audit, blocks, cache, dataset, pydoc, sources
from dsft.data.sources import BadRecord
from dsft.errors import UserError
from dsft.tasks import causal_lm, fit, render
from dsft.types import Dropped, Example

TOKENIZER = tiny.byte_tokenizer()


def record(number):
    return {"instruction": f"第{number}个问题?", "output": f"答案 {number}." * (number % 7 + 1)}


def write(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def data(tmp_path):
    train = write(tmp_path / "train.jsonl", map(record, range(40)))
    return DataConfig(train=train, cache_dir=str(tmp_path / "cache"), validation_share=0.1, max_length=256)


@pytest.fixture
def renderings(monkeypatch):
    """Counts how many records are rendered, which a cache hit never does."""
    calls = []
    original = render.render
    monkeypatch.setattr(causal_lm, "render", lambda *args: (calls.append(1), original(*args))[1])
    return calls


def entries(data):
    return sorted(path for path in (dataset.Path(data.cache_dir) / "tokens").iterdir() if path.is_dir())


def texts(part):
    return [TOKENIZER.decode(part[i].ids.tolist()) for i in range(len(part))]


def test_the_examples_are_those_that_rendering_gives(data):
    train, validation, _ = prepare(replace(data, validation=data.train), TOKENIZER, "t", seed=0)
    for part in (train, validation):
        assert len(part) == 40
        for number in range(40):
            (expected,) = render.render(to_conversation(record(number), ""), TOKENIZER, DataConfig())
            assert part[number].ids.tolist() == expected.columns["ids"].tolist()
            assert part[number].columns["weights"].tolist() == expected.columns["weights"].tolist()
            assert part.lengths[number] == len(expected.columns["ids"])
            assert part.weights[number] == expected.columns["weights"].sum()
    assert (train.lengths.dtype, train.weights.dtype, train[0].ids.dtype) == (np.int32, np.float64, np.int32)


def test_every_record_is_either_trained_on_or_held_out(data):
    train, validation, report = prepare(data, TOKENIZER, "t", seed=0)
    assert (len(train), len(validation)) == (36, 4)
    whole, none, _ = prepare(replace(data, validation_share=0.0), TOKENIZER, "t", seed=0)
    assert none is None
    assert sorted(texts(train) + texts(validation)) == sorted(texts(whole))
    assert len(set(texts(train)) & set(texts(validation))) == 0
    assert report["train"]["records_held_out"] == report["validation"]["records_kept"] == 4


def test_the_split_depends_on_the_seed_alone_and_does_not_tokenise_again(data, renderings):
    first, held_out, _ = prepare(data, TOKENIZER, "t", seed=0)
    again, held_out_again, _ = prepare(data, TOKENIZER, "t", seed=0)
    other, other_held_out, _ = prepare(data, TOKENIZER, "t", seed=1)
    assert len(renderings) == 40
    assert first.key == again.key != other.key != held_out.key
    assert texts(held_out) == texts(held_out_again) != texts(other_held_out)


@pytest.mark.parametrize(
    ("records", "share", "held"), [(1, 0.5, 0), (2, 0.01, 1), (3, 0.99, 2), (40, 0.02, 1), (40, 0, 0)]
)
def test_the_size_of_the_held_out_share(tmp_path, data, records, share, held):
    train = write(tmp_path / "few.jsonl", map(record, range(records)))
    train, validation, _ = prepare(replace(data, train=train, validation_share=share), TOKENIZER, "t", seed=0)
    assert (len(train), len(validation or [])) == (records - held, held)


def test_a_second_run_reuses_the_entry_even_under_another_file_name(tmp_path, data, renderings):
    first, _, report = prepare(data, TOKENIZER, "t", seed=0)
    dataset.Path(data.train).rename(tmp_path / "renamed.jsonl")
    second, _, again = prepare(replace(data, train=str(tmp_path / "renamed.jsonl")), TOKENIZER, "t", seed=0)
    assert len(renderings) == 40
    assert first.key == second.key
    assert texts(first) == texts(second)
    assert report["train"]["lengths"] == again["train"]["lengths"]


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 100},
        {"train_on": TrainOn.last_assistant},
        {"on_overflow": OnOverflow.drop},
        {"on_bad_record": OnBadRecord.skip},
        {"max_records": 39},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_setting_that_matters_makes_a_new_entry(data, change):
    first, _, _ = prepare(data, TOKENIZER, "t", seed=0)
    second, _, _ = prepare(replace(data, **change), TOKENIZER, "t", seed=0)
    assert len(entries(data)) == 2
    assert first.key != second.key


def test_another_tokenizer_template_content_or_code_makes_a_new_entry(data, monkeypatch):
    prepare(data, TOKENIZER, "t", seed=0)
    prepare(data, TOKENIZER, "another tokenizer", seed=0)  # axolotl#1265
    assert len(entries(data)) == 2
    prepare(data, tiny.byte_tokenizer(tiny.CHATML.replace("\n", " ")), "t", seed=0)
    assert len(entries(data)) == 3
    size = dataset.Path(data.train).stat()
    text = dataset.Path(data.train).read_text(encoding="utf-8")
    dataset.Path(data.train).write_text(text.replace("答案 1", "答案 8"), encoding="utf-8")
    os.utime(data.train, ns=(size.st_atime_ns, size.st_mtime_ns))
    prepare(data, TOKENIZER, "t", seed=0)
    assert len(entries(data)) == 4
    monkeypatch.setattr(dataset, "_own_version", lambda: "next")
    prepare(data, TOKENIZER, "t", seed=0)
    assert len(entries(data)) == 5


def _cut_short(entry):
    path = entry / "ids.data.bin"
    path.write_bytes(path.read_bytes()[:-8])


def _flip(entry):
    path = entry / "weights.data.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        _cut_short,
        _flip,
        lambda entry: (entry / "ids.offsets.bin").unlink(),
        lambda entry: (entry / "entry.json").write_text("{"),
        lambda entry: (entry / "entry.json").write_text("{}"),
    ],
)
def test_a_damaged_entry_is_built_again(data, renderings, damage):
    before, _, _ = prepare(data, TOKENIZER, "t", seed=0)
    expected = texts(before)
    (entry,) = entries(data)
    damage(entry)
    after, _, _ = prepare(data, TOKENIZER, "t", seed=0)
    assert len(renderings) == 80
    assert texts(after) == expected
    assert entries(data) == [entry]


def test_a_build_that_fails_leaves_nothing_behind(data, monkeypatch):
    def full_disk(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache._Array, "append", full_disk)
        with pytest.raises(OSError, match=rf"No space left on device: '{data.cache_dir}/tokens'"):
            prepare(data, TOKENIZER, "t", seed=0)
    assert not [path for path in (dataset.Path(data.cache_dir) / "tokens").iterdir() if path.suffix != ".lock"]
    assert len(prepare(data, TOKENIZER, "t", seed=0)[0]) == 36


def test_those_who_come_together_build_once(data, renderings):
    threads = [threading.Thread(target=prepare, args=(data, TOKENIZER, "t", 0)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(renderings) == 40


def test_one_process_and_two_write_the_same_bytes(tmp_path, data, monkeypatch):
    monkeypatch.setattr(blocks, "POOL_FROM", 10)
    monkeypatch.setattr(blocks, "CHUNK", 3)
    with dataset.Path(data.train).open("a", encoding="utf-8") as file:
        file.write('{"text": \n{"instruction": "x"}\n' + json.dumps(record(41)))
    written = {}
    for workers in (1, 2):
        cache_dir = str(tmp_path / f"cache{workers}")
        skip = replace(data, num_workers=workers, cache_dir=cache_dir, on_bad_record=OnBadRecord.skip)
        prepare(skip, TOKENIZER, "t", seed=0)
        (entry,) = entries(skip)
        written[workers] = {path.name: path.read_bytes() for path in sorted(entry.iterdir())}
    assert written[1] == written[2]
    columns = {"ids.data", "ids.offsets", "weights.data"}  # offsets that are the same are kept once
    assert set(written[1]) == {"entry.json", *(f"{name}.bin" for name in {*columns, *cache.PER_EXAMPLE})}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_bad_record_stops_one_worker_and_two(tmp_path, data, monkeypatch, workers):
    monkeypatch.setattr(blocks, "POOL_FROM", 10)
    monkeypatch.setattr(blocks, "CHUNK", 3)
    # threads instead of processes, which take seconds to start
    monkeypatch.setattr(blocks, "ProcessPoolExecutor", lambda count, _, **rest: ThreadPoolExecutor(count, **rest))
    with dataset.Path(data.train).open("a", encoding="utf-8") as file:
        file.write('{"text": \n{"instruction": "x"}\n' + json.dumps(record(41)))
    with pytest.raises(BadRecord, match=r"train.jsonl:41: not JSON"):
        prepare(replace(data, num_workers=workers), TOKENIZER, "t", seed=0)


def test_a_bad_record_stops_the_run_or_is_counted_and_listed(tmp_path, data):
    rows = [record(0), {"instruction": "no output"}, record(1), *[{"messages": []}] * audit.MAX_LISTED, record(2)]
    data = replace(data, train=write(tmp_path / "bad.jsonl", rows), validation_share=0)
    with pytest.raises(
        BadRecord, match=r"bad.jsonl:2: field `output` is missing beside `instruction` .*on_bad_record=skip"
    ):
        prepare(data, TOKENIZER, "t", seed=0)
    train, _, report = prepare(replace(data, on_bad_record=OnBadRecord.skip), TOKENIZER, "t", seed=0)
    assert texts(train) == [
        TOKENIZER.decode(
            render.render(to_conversation(record(n), ""), TOKENIZER, DataConfig())[0].columns["ids"].tolist()
        )
        for n in range(3)
    ]
    assert report["train"]["records_dropped"] == {audit.BAD: 1 + audit.MAX_LISTED}
    assert len(report["train"]["bad_records"]) == audit.MAX_LISTED
    assert report["train"]["bad_records"][0] == {
        "origin": f"{tmp_path}/bad.jsonl:2",
        "problem": "field `output` is missing beside `instruction`",
    }


def chat(question, answer):
    return {"prompt": "q" * question, "completion": "a" * answer}


def test_records_that_do_not_fit_are_cut_dropped_or_refused(tmp_path, data):
    # one token per byte, and 19 for the question's frame and the answer's header
    rows = [chat(10, 10), chat(10, 300), chat(300, 10)]
    data = replace(data, train=write(tmp_path / "long.jsonl", rows), validation_share=0, max_length=64)
    train, _, report = prepare(data, TOKENIZER, "t", seed=0)
    assert train.lengths.tolist()[1:] == [64]
    assert TOKENIZER.decode(train[1].ids[train[1].columns["weights"] > 0].tolist()) == "a" * int(train.weights[1])
    assert (train[0].truncated, train[1].truncated) == (False, True)
    assert report["train"]["records_truncated"] == 1
    assert report["train"]["records_dropped"] == {causal_lm.CUT_OFF: 1}
    _, _, report = prepare(replace(data, on_overflow=OnOverflow.drop), TOKENIZER, "t", seed=0)
    assert report["train"]["records_dropped"] == {fit.TOO_LONG: 2}
    with pytest.raises(UserError, match=r"long.jsonl:2: 3\d\d tokens, but data.max_length is 64"):
        prepare(replace(data, on_overflow=OnOverflow.error), TOKENIZER, "t", seed=0)


def test_a_data_set_without_a_label_is_refused(tmp_path, data):
    data = replace(data, train=write(tmp_path / "masked.jsonl", [chat(300, 1)] * 3), max_length=64)
    with pytest.raises(UserError, match=r"every label is masked; no token of 3 records .*3 no supervised tokens left"):
        prepare(data, TOKENIZER, "t", seed=0)
    marks = tiny.CHATML.replace("<|im_end|>", "{% generation %}{% endgeneration %}<|im_end|>", 1)
    with pytest.raises(UserError, match=r"every label is masked.*marks enclose nothing"):
        prepare(replace(data, max_length=512), tiny.byte_tokenizer(marks.replace("<|im_end|>", "")), "t", seed=0)
    assert entries(data) == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"no record is left of 0 read \(it is empty\)"),
        ([{"a": 1}], r"no record is left of 1 read \(1 malformed.*\n.*:1: fields a are none"),
    ],
)
def test_a_data_set_without_records_is_refused(tmp_path, data, rows, message):
    data = replace(data, train=write(tmp_path / "none.jsonl", rows), on_bad_record=OnBadRecord.skip)
    with pytest.raises(UserError, match=message):
        prepare(data, TOKENIZER, "t", seed=0)


def test_max_records_takes_the_first_of_training_alone(data):
    data = replace(data, validation=data.train, max_records=5)
    train, validation, report = prepare(data, TOKENIZER, "t", seed=0)
    assert (len(train), len(validation)) == (5, 40)
    assert texts(train) == texts(validation)[:5]
    assert report["train"]["records_read"] == 5


def test_documentation_needs_no_file(data, monkeypatch):
    raws = [
        sources.Raw(
            {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "doc"}]}, f"pydoc:{n}"
        )
        for n in range(4)
    ]
    monkeypatch.setattr(pydoc, "records", lambda packages, kinds: iter(raws))
    monkeypatch.setattr(pydoc.Documentation, "fingerprint", lambda self: "docs")
    train, validation, report = prepare(replace(data, source=Source.pydoc, train=None), TOKENIZER, "t", seed=0)
    assert (len(train), len(validation), report["train"]["source"]) == (3, 1, "pydoc")
    with pytest.raises(UserError, match=r"data\.train is not set"):
        prepare(replace(data, train=None), TOKENIZER, "t", seed=0)


def task(record):
    """A task of another kind: a number of examples of a record, with columns of their own."""
    number = record.fields["n"]
    if number == 7:
        return Dropped("seven")
    if number == 3:
        raise BadRecord(record.origin, "three")
    parts = [
        Example(
            {
                "ids": np.full(number + 1, part, np.int32),
                "spans": np.arange(part, dtype=np.int16),
                "label": np.array([number / 2]),
                "none": np.empty(0, np.uint8),
            },
            tokens=number + 1,
            weight=0.5,
            truncated=part == 1,
        )
        for part in range(number % 4)
    ]
    return [*parts, Dropped("rest")] if parts else Dropped("none of four")


@pytest.fixture
def numbers(tmp_path):
    train = write(tmp_path / "numbers.jsonl", ({"n": n} for n in range(40)))
    return DataConfig(
        train=train, cache_dir=str(tmp_path / "cache"), validation_share=0.3, on_bad_record=OnBadRecord.skip
    )


def test_a_record_may_become_several_examples_of_any_columns(numbers):
    made = dataset.prepare(numbers, task, {}, seed=1)
    train, held_out = made.train, made.validation
    found = sorted((part[i].record, i, part[i]) for part in (train, held_out) for i in range(len(part)))
    kept = [n for n in range(40) if n % 4 and n not in (3, 7)]
    assert [record for record, _, _ in found] == [n for n in kept for _ in range(n % 4)]
    for record, _, example in found:
        (part,) = set(example.ids.tolist())
        assert example.columns["spans"].tolist() == list(range(part))
        assert (example.columns["label"].tolist(), len(example.columns["none"])) == ([record / 2], 0)
        assert (example.tokens, example.weight, example.truncated) == (record + 1, 0.5, part == 1)
        dtypes = {name: column.dtype.str for name, column in example.columns.items()}
        assert dtypes == {"ids": "<i4", "spans": "<i2", "label": "<f8", "none": "|u1"}


def test_hold_out_and_counts_go_by_record(numbers):
    made = dataset.prepare(numbers, task, {}, seed=1)
    train, held_out, report = made.train, made.validation, made.audit
    sides = [set(part.records.tolist()) for part in (train, held_out)]
    assert not sides[0] & sides[1]
    part = report["train"]
    assert (part["records_read"], part["records_kept"], part["records_held_out"]) == (40, *map(len, sides))
    assert len(sides[1]) == round(28 * 0.3)
    assert part["records_dropped"] == {audit.BAD: 1, "none of four": 10, "seven": 1}
    assert part["parts_dropped"] == {"rest": 28}
    assert part["examples"] == len(train) == sum(n % 4 for n in sides[0])
    assert part["records_truncated"] == sum(n % 4 > 1 for n in sides[0])
    assert "supervised_tokens" not in part


@pytest.mark.parametrize("at", [3, 20])
@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"ids": np.zeros(2, np.int64)}, r"has the columns ids \(int64\), and those before have ids \(int32\)"),
        ({"ids": np.zeros(2, np.int32), "x": np.zeros(1)}, r"has the columns ids \(int32\), x \(float64\), and"),
        ({"ids": np.zeros((1, 2), np.int32)}, "column ids is no one-dimensional array"),
        ({"ids": np.array([{}])}, "column ids is no one-dimensional array"),
        ({"ids": [1, 2]}, "column ids is no one-dimensional array"),
    ],
)
def test_examples_of_different_columns_are_refused_by_record(numbers, monkeypatch, at, columns, problem):
    monkeypatch.setattr(blocks, "CHUNK", 16)

    def encode(record):
        odd = record.fields["n"] == at
        return [Example(columns if odd else {"ids": np.zeros(2, np.int32)}, tokens=2, weight=1.0)]

    with pytest.raises(UserError, match=rf"numbers.jsonl:{at + 1}: its example.*{problem}"):
        dataset.prepare(numbers, encode, {}, seed=0)


def test_few_examples_are_in_memory_at_a_time(numbers, monkeypatch):
    monkeypatch.setattr(blocks, "CHUNK", 4)
    alive, most = weakref.WeakSet(), []

    def encode(record):
        example = Example({"ids": np.zeros(2, np.int32)}, tokens=2, weight=1.0)
        alive.add(Watched(example))
        most.append(len(alive))
        return [example]

    class Watched:
        def __init__(self, example):
            example.watched = self

    dataset.prepare(numbers, encode, {}, seed=0)
    assert len(most) == 40 and max(most) <= 8


FORK = multiprocessing.get_context("fork")
TICK = 0.03
"""The kernel counts the beginnings of processes in hundredths of a second."""


def _rank(data, barrier, keys):
    barrier.wait()
    time.sleep(TICK)
    train, held_out, _ = prepare(data, TOKENIZER, "t", seed=0)
    keys.put((train.key, held_out.key, texts(train)))


def start(data, ranks=4):
    """What each of some ranks that start together gets."""
    barrier, keys = FORK.Barrier(ranks), FORK.Queue()
    processes = [FORK.Process(target=_rank, args=(data, barrier, keys)) for _ in range(ranks)]
    for process in processes:
        process.start()
    found = [keys.get(timeout=20) for _ in processes]
    for process in processes:
        process.join()
    time.sleep(TICK)
    return found


def test_files_and_entries_are_hashed_once_by_the_ranks_of_a_host_and_damage_is_found_at_the_next_start(
    tmp_path, data, monkeypatch
):
    log = tmp_path / "log"

    def hash_file(hasher, path):
        with log.open("a") as out:
            out.write(f"{path.name}\n")
        original(hasher, path)

    original = cache.hash_file
    for module in (sources, cache):
        monkeypatch.setattr(module, "hash_file", hash_file)
    # a flipped bit of a disk leaves no trace in times
    monkeypatch.setattr(cache, "describe", lambda path: [path.name, path.stat().st_ino])
    (expected,) = start(data, ranks=1)
    (entry,) = entries(data)
    once = sorted(["train.jsonl", *(path.name for path in entry.glob("*.bin"))])
    assert sorted(log.read_text().split()) == once
    for _ in range(2):
        log.write_text("")
        assert start(data) == [expected] * 4
        assert sorted(log.read_text().split()) == once
    content = bytearray((entry / "ids.data.bin").read_bytes())
    content[40] ^= 1
    (entry / "ids.data.bin").write_bytes(content)
    assert start(data) == [expected] * 4
    assert (entry / "ids.data.bin").read_bytes() != content


def test_a_source_that_changes_is_another_one_for_the_rank_that_looks_later(data):
    first, _, _ = prepare(data, TOKENIZER, "t", seed=0)
    with dataset.Path(data.train).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record(40)) + "\n")
    second, _, _ = prepare(data, TOKENIZER, "t", seed=0)
    assert first.key != second.key


def test_a_hub_data_set_is_loaded_once_by_all_ranks_of_a_host(tmp_path, data, monkeypatch):
    log = tmp_path / "log"

    def load_dataset(spec, split):
        with log.open("a") as out:
            out.write(f"{spec} {split}\n")
        return datasets.Dataset.from_list([record(n) for n in range(40)])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = replace(data, train="owner/set", split="test")
    assert len(set(map(str, start(hub)))) == 1
    assert log.read_text() == "owner/set test\n"
    assert len(set(map(str, start(hub)))) == 1
    assert log.read_text() == "owner/set test\n" * 2, "the next start asks the hub what is there now"
