"""Other names for columns, prompts written by templates, and examples before a record."""

import json
import pickle
from collections import Counter

import numpy as np
import pytest
import tiny

from dsft.config.schema import DataConfig, FewShotConfig, OnBadRecord, TaskConfig, TrainOn
from dsft.data.prompting import absent, load, value_at
from dsft.data.sources import BadRecord, Raw
from dsft.errors import UserError
from dsft.tasks import TASKS, encode
from dsft.tasks.task import Context, reader

TASK = TASKS["causal_lm"]


def loaded(seed=0, **settings):
    data = DataConfig(max_length=512, **settings)
    return data, load(data, seed, reader(TASK, data))


def record(fields, seed=0, **settings):
    data, prompting = loaded(seed, **settings)
    raw = Raw(fields, "f.jsonl:7")
    made = prompting.record(raw, reader(TASK, data))
    made.notes |= raw.notes
    return made


def turns(made):
    return [(message["role"], message["content"]) for message in made.messages]


def pair(question, answer):
    return [("user", question), ("assistant", answer)]


def learnt(fields, **settings):
    """The text that is supervised, and all text, as the tiny tokenizer decodes it."""
    data, prompting = loaded(**settings)
    context = Context(tiny.TOKENIZER, data, TaskConfig(name="causal_lm"), prompting=prompting)
    (example,) = encode(Raw(fields, "f.jsonl:7"), TASK, context)
    weights = example.columns.get("weights", example.columns.get("supervised"))
    return tiny.TOKENIZER.decode(example.ids[np.asarray(weights) > 0]), tiny.TOKENIZER.decode(example.ids)


@pytest.mark.parametrize(
    ("columns", "fields"),
    [
        ({"prompt": "q", "completion": "a"}, {"q": "你好", "a": "世界"}),
        ({"prompt": "问题", "completion": "答案"}, {"问题": "你好", "答案": "世界", "编号": 3}),
        ({"prompt": "completion", "completion": "prompt"}, {"completion": "你好", "prompt": "世界"}),
        ({"completion": "answers.text.0"}, {"prompt": "你好", "answers": {"text": ["世界", "no"], "start": [1, 2]}}),
        ({"prompt": "a.b", "completion": "a"}, {"a.b": "你好", "a": "世界"}),
        (
            {"messages": "chat"},
            {"chat": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "世界"}]},
        ),
        ({"question": "Q"}, {"Q": "你好", "answer": "世界"}),
        ({"response": "A"}, {"query": "你好", "A": "世界"}),
    ],
)
def test_columns_under_their_own_names(columns, fields):
    assert turns(record(fields, columns=columns)) == pair("你好", "世界")


def test_a_column_that_takes_a_name_which_is_there_is_said():
    made = record({"q": "你好", "prompt": "other", "completion": "世界"}, columns={"prompt": "q"})
    assert turns(made) == pair("你好", "世界")
    assert "field `prompt` left out, as data.columns takes it from `q`" in made.notes
    own = record({"prompt": "你好", "completion": "世界"}, columns={"prompt": "q"})
    assert turns(own) == pair("你好", "世界") and absent("q") in own.notes


def test_what_a_column_makes_is_read():
    with pytest.raises(BadRecord, match=r"f\.jsonl:7: data\.columns makes the field `promt`, and nothing reads it"):
        record({"q": "x", "prompt": "你好", "completion": "世界"}, columns={"promt": "q"})
    with pytest.raises(BadRecord, match=r"`prompt` is missing beside `completion`; there is no field `q`, which"):
        record({"question": "你好", "completion": "世界"}, columns={"prompt": "q"})


def test_paths():
    nested = {"a": {"b": [{"c": 1}, None]}, "a.d": 2}
    assert [value_at(nested, path) for path in ("a.b.0.c", "a.d", "a.b.1", "a.b.2", "a.b.x", "a.b.0.c.d", "e")] == [
        1, 2, None, None, None, None, None,
    ]  # fmt: skip


def test_a_column_that_no_record_has_is_refused(tmp_path):
    rows = [{"q": "the moon", "a": "the owl"}, {"q": "the fox", "a": "a bird", "sys": "春天"}]
    settings = {"cache_dir": str(tmp_path), "validation_share": 0.0, "max_length": 64}
    path = str(tiny.write_jsonl(tmp_path / "x.jsonl", rows))
    columns = {"prompt": "q", "completion": "a", "system": "sys"}
    train, _, report = tiny.prepare(DataConfig(train=path, columns=columns, **settings), tiny.TOKENIZER)
    assert len(train) == 2 and report["train"]["notes"][absent("sys")] == 1
    for _ in range(2):  # the second time from the cache
        with pytest.raises(UserError, match=r"data\.columns names the field `sytem`, which no record of .*x\.jsonl"):
            tiny.prepare(DataConfig(train=path, columns=columns | {"system": "sytem"}, **settings), tiny.TOKENIZER)


def test_a_template_writes_the_prompt():
    template = "{% if context is defined %}\n材料：{{ context }}\n{% endif %}\n问：{{ q }}"
    fields = {"q": "月亮在哪里？", "context": "<山>", "answer": "在山上。", "id": 4}
    made = record(fields, prompt_template=template, columns={"completion": "answer"})
    assert turns(made) == pair("材料：<山>\n问：月亮在哪里？", "在山上。") and made.metadata == {"id": 4}
    made = record({"q": "x", "context": None, "completion": "y"}, prompt_template=template)
    assert turns(made) == pair("问：x", "y")
    assert turns(record({"q": {"题": [1]}, "completion": "y"}, prompt_template="{{ q | tojson }}")) == pair(
        '{"题": [1]}', "y"
    )
    odd = {"the question": "x", "completion": "y"}
    assert turns(record(odd, prompt_template="{{ record['the question'] }}!")) == pair("x!", "y")
    assert turns(record({"prompt": "{{ x }}", "completion": "y"}, prompt_template="{{ prompt }}?")) == pair(
        "{{ x }}?", "y"
    )


@pytest.mark.parametrize(
    ("template", "fields", "problem"),
    [
        ("{{ q }}", {"completion": "y"}, "writes a field that the record has not: 'q' is undefined"),
        ("{{ q }}", {"q": None, "completion": "y"}, "'q' is undefined"),
        ("{{ q.text }}", {"q": {}, "completion": "y"}, "no attribute 'text'"),
        ("{{ q }}", {"q": ["a"], "completion": "y"}, "list is no text"),
        ("{{ q.a }}", {"q": {"a": None}, "completion": "y"}, "NoneType is no text"),
        ("{{ q }}", {"q": " ", "completion": "y"}, "field `prompt` is empty"),
        ("{{ q }}", {"q": "x", "prompt": "z", "completion": "y"}, "field `prompt` is there already"),
        ("{{ q }}{{ completion }}", {"q": "x", "completion": "y"}, "`completion` is missing beside `prompt`"),
        ("{{ 1 // q }}", {"q": 0, "completion": "y"}, "data.prompt_template fails"),
        ("{{ q.__class__.__mro__ }}", {"q": "x", "completion": "y"}, "unsafe"),
        ("{{ q }}", {"q": "x", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
         "data.prompt_template makes the field `prompt`, and nothing reads it"),
        ("{{ q }}{{ few_shot }}", {"q": "x", "few_shot": "z", "completion": "y"}, "`few_shot` is what templates call"),
    ],
)  # fmt: skip
def test_a_record_that_a_template_cannot_write_is_bad_by_name(template, fields, problem):
    with pytest.raises(BadRecord, match=r"^f\.jsonl:7: ") as caught:
        record(fields, prompt_template=template)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("问题\n{{ q", "t.j2:2: not a valid Jinja template: unexpected end of template"),
        ("{% if q %}", "t.j2:1: not a valid Jinja template"),
        ("a\nb\n{{ q | rot13 }}", "t.j2:3: not a valid Jinja template: No filter named 'rot13'"),
        ("{{ q | random }}", "No filter named 'random'"),
        ("{{ q }}\n{% include 'x' %}", "t.j2:2: a prompt template stands alone"),
        ("春天来了", "t.j2 writes nothing of a record"),
        ("{{ few_shot }}", "t.j2 writes nothing of a record"),
    ],
)
def test_a_template_that_is_none_is_refused_before_reading(tmp_path, text, problem):
    path = tmp_path / "t.j2"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        loaded(prompt_template=str(path))
    assert problem in str(caught.value)


def test_files_of_templates_that_are_none(tmp_path):
    with pytest.raises(UserError, match="neither a file or directory nor a template"):
        loaded(prompt_template=str(tmp_path / "nowhere.j2"))
    with pytest.raises(UserError, match="the directory has no files"):
        loaded(prompt_template=str(tmp_path))
    (tmp_path / "a.j2").write_bytes("问：{{ q }}".encode("gb18030"))
    with pytest.raises(UserError, match="not UTF-8 at byte 0"):
        loaded(prompt_template=str(tmp_path))


@pytest.fixture
def three(tmp_path):
    home = tmp_path / "templates"
    home.mkdir()
    for name, text in (("a.j2", "A {{ q }}\n"), ("b.j2", "B {{ q }}\n"), ("c.j2", "丙 {{ q }}\n")):
        (home / name).write_text(text, encoding="utf-8")
    (home / ".hidden").write_text("{{ broken")
    return str(home)


def test_the_template_of_several_is_a_function_of_seed_and_record(three):
    def chosen(seed, numbers):
        data, prompting = loaded(seed, prompt_template=three)
        prompting = pickle.loads(pickle.dumps(prompting))
        made = {n: prompting.record(Raw({"q": f"题 {n}", "completion": "y"}, f"x:{n % 7}"), reader(TASK, data))
                for n in numbers}  # fmt: skip
        return {n: one.messages[0]["content"] for n, one in made.items()}

    there, back = chosen(0, range(1500)), chosen(0, reversed(range(1500)))
    assert there == back
    counts = Counter(text[0] for text in there.values())
    assert set(counts) == {"A", "B", "丙"}
    # chi-square of 2 degrees of freedom: 13.8 is passed once in 1,000
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 13.8
    other = chosen(1, range(1500))
    same = sum(there[n] == other[n] for n in range(1500)) / 1500
    assert 0.27 < same < 0.40


SHOTS = [{"q": f"the fox {n}", "a": f"the bird {n}", "id": n} for n in range(6)]
COLUMNS = {"prompt": "q", "completion": "a"}


@pytest.fixture
def shots(tmp_path):
    return str(tiny.write_jsonl(tmp_path / "shots.jsonl", SHOTS))


def test_examples_are_turns_before_the_record(shots):
    settings = {"few_shot": FewShotConfig(shots, 2), "columns": COLUMNS}
    made = record({"q": "月亮", "a": "在山上", "system": "Be brief."}, **settings)
    assert turns(made)[0] == ("system", "Be brief.") and turns(made)[-2:] == pair("月亮", "在山上")
    before = turns(made)[1:-2]
    assert len(before) == 4 and made.weights == [None, 0.0, 0.0, 0.0, 0.0, None, None]
    assert all(before[n : n + 2] in [pair(one["q"], one["a"]) for one in SHOTS] for n in (0, 2))
    templated = record({"q": "月亮", "completion": "在山上"}, prompt_template="问 {{ q }}", columns={"completion": "a"},
                       few_shot=FewShotConfig(shots, 6))  # fmt: skip
    assert turns(templated) == sum((pair(f"问 {one['q']}", one["a"]) for one in SHOTS), []) + pair("问 月亮", "在山上")


@pytest.mark.parametrize("train_on", [TrainOn.assistant, TrainOn.last_assistant, TrainOn.weights])
@pytest.mark.parametrize("shape", ["pair", "messages", "marked"])
def test_examples_are_never_learnt(shots, train_on, shape):
    fields = {"prompt": "where is the moon", "completion": "在山上 。"}
    if shape != "pair":
        mark = {"weight": 1.0} if shape == "marked" else {}
        fields = {"messages": [{"role": "user", "content": fields["prompt"]},
                               {"role": "assistant", "content": fields["completion"], **mark}]}  # fmt: skip
    few = {"few_shot": FewShotConfig(shots, 3), "columns": COLUMNS}
    target, whole = learnt(fields, train_on=train_on, **few)
    assert target == "在山上 。<|im_end|>" and whole.count("the bird ") == 3
    assert learnt(fields, train_on=train_on)[0] == target  # as without examples


def test_examples_that_the_template_writes_are_no_turns(shots):
    template = "{% for one in few_shot %}\n{{ one.q }} -> {{ one.completion }}\n{% endfor %}\n{{ q }} ->"
    settings = {"few_shot": FewShotConfig(shots, 6), "columns": {"completion": "a"}, "prompt_template": template}
    written = "".join(f"{one['q']} -> {one['a']}\n" for one in SHOTS)
    assert turns(record({"q": "月亮", "a": "山"}, **settings)) == pair(f"{written}月亮 ->", "山")
    made = record({"q": "the fox 2", "a": "the bird 2", "id": "other"}, **settings)
    assert "the fox 2 -> the bird" not in made.messages[0]["content"]


def test_a_record_is_never_its_own_example(shots):
    few = {"few_shot": FewShotConfig(shots, 6), "columns": COLUMNS}
    for number, one in enumerate(SHOTS):
        made = record(one | {"id": "another"}, **few)
        others = [other for other in SHOTS if other is not SHOTS[number]]
        assert turns(made) == sum((pair(other["q"], other["a"]) for other in [*others, one]), [])
        assert "with fewer few-shot examples, being one of them" in made.notes
    for seed in range(30):
        made = record(SHOTS[0], seed, few_shot=FewShotConfig(shots, 5), columns=COLUMNS)
        assert turns(made).count(("user", "the fox 0")) == 1


def test_which_examples_is_a_function_of_seed_and_record(shots):
    def before(seed, n):
        return turns(record({"q": f"题 {n}", "a": "答"}, seed, few_shot=FewShotConfig(shots, 1), columns=COLUMNS))[0]

    first = [before(0, n) for n in range(120)]
    assert first == [before(0, n) for n in range(120)]
    counts = Counter(first)
    assert len(counts) == 6 and sum((count - 20) ** 2 / 20 for count in counts.values()) < 20.5  # once in 1,000
    assert sum(before(1, n) == first[n] for n in range(120)) < 45


@pytest.mark.parametrize(
    ("rows", "count", "problem"),
    [
        ([{"prompt": "a", "completion": "b"}], 2, "has 1 examples, fewer than data.few_shot.count=2"),
        ([{"prompt": "a"}], 1, r"shots.jsonl:1: field `completion` is missing beside `prompt`"),
        ([{"text": "床前明月光"}], 1, "shots.jsonl:1: a plain text takes no few-shot examples"),
        ([{"prompt": "a", "completion": "b", "system": "c"}], 1, "a few-shot example has no system turn"),
    ],
)
def test_examples_that_cannot_stand_there_are_refused_before_reading(tmp_path, rows, count, problem):
    path = str(tiny.write_jsonl(tmp_path / "shots.jsonl", rows))
    with pytest.raises(UserError, match=problem):
        loaded(few_shot=FewShotConfig(path, count))
    with pytest.raises(UserError, match="no such file"):
        loaded(few_shot=FewShotConfig(str(tmp_path / "gone.jsonl"), count))


def test_a_text_takes_no_examples(shots):
    with pytest.raises(BadRecord, match="plain text takes no few-shot examples"):
        record({"text": "床前明月光"}, few_shot=FewShotConfig(shots, 1), columns=COLUMNS)


def test_all_of_it_enters_the_key_of_the_cache(tmp_path, three, shots):
    """Through `prepare`, over a file of 40 records; what the files say counts, not what they are called."""
    rows = [{"q": f"月亮 {n}", "a": f"在山上 {n}"} for n in range(40)]
    path = str(tiny.write_jsonl(tmp_path / "x.jsonl", rows))

    def key(seed=0, **settings):
        data = DataConfig(train=path, cache_dir=str(tmp_path / "cache"), max_length=256, validation_share=0.0,
                          on_bad_record=OnBadRecord.error, columns={"completion": "a"}, **settings)  # fmt: skip
        train, _, report = tiny.prepare(data, tiny.TOKENIZER, seed=seed)
        assert report["train"]["records_kept"] == 40
        return train.key.partition("-")[0], report["train"]["notes"]

    few = FewShotConfig(shots, 2)
    first, notes = key(prompt_template=three)
    assert sum(count for note, count in notes.items() if note.startswith("with the prompt of")) == 40
    keys = {first, key(prompt_template="A {{ q }}")[0], key(prompt_template=three, few_shot=few)[0],
            key(1, prompt_template=three)[0], key(1, prompt_template=three, few_shot=few)[0]}  # fmt: skip
    assert len(keys) == 5
    assert key(prompt_template="A {{ q }}") == key(1, prompt_template="A {{ q }}")  # nothing is drawn
    with open(f"{three}/a.j2", "a", encoding="utf-8") as file:
        file.write("!")
    keys.add(key(prompt_template=three)[0])
    with open(shots, "a", encoding="utf-8") as file:
        file.write(json.dumps({"q": "x", "a": "y"}) + "\n")
    keys.add(key(prompt_template=three, few_shot=few)[0])
    assert len(keys) == 7


def test_duplicates_stay_together_whatever_is_written_around_them(tmp_path, three, shots):
    """Of each of 60 texts there are three records, with ids of their own and in other letters."""
    rows = [{"q": text, "a": "on the hill", "id": n}
            for n in range(60) for text in (f"The moon {n}?", f"the  moon {n}?", f"THE MOON {n}?")]  # fmt: skip
    path = str(tiny.write_jsonl(tmp_path / "x.jsonl", rows))
    data = DataConfig(train=path, cache_dir=str(tmp_path / "cache"), max_length=256, validation_share=0.3,
                      columns={"completion": "a"}, prompt_template=three, few_shot=FewShotConfig(shots, 2))  # fmt: skip
    train, validation = tiny.prepare(data, tiny.TOKENIZER)[:2]
    contents = [set(side.contents.tolist()) for side in (train, validation)]
    assert len(contents[0] | contents[1]) == 60 and not contents[0] & contents[1] and len(validation) >= 30


def test_workers_make_the_same(tmp_path, three, shots, monkeypatch):
    from dsft.data import blocks

    rows = [{"q": f"月亮 {n}", "a": f"在山上 {n}"} for n in range(600)]
    path = str(tiny.write_jsonl(tmp_path / "x.jsonl", rows))
    monkeypatch.setattr(blocks, "POOL_FROM", 100)
    made = []
    for workers in (1, 2):
        data = DataConfig(train=path, cache_dir=str(tmp_path / str(workers)), max_length=256, validation_share=0.0,
                          columns={"completion": "a"}, prompt_template=three, few_shot=FewShotConfig(shots, 2),
                          num_workers=workers)  # fmt: skip
        train, _, report = tiny.prepare(data, tiny.TOKENIZER)
        made.append(([example.ids.tolist() for example in train], report["train"]["notes"]))
    assert made[0] == made[1] and len(made[0][0]) == 600
