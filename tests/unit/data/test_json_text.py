"""JSON read in small pieces gives what json.loads gives, in every form; mistakes are named as json.loads names them."""

import json
import random
import string
import subprocess

import pytest

from dsft.data import json_stream, json_text
from dsft.data.json_decoder import DEEPEST
from dsft.data.raw import BadRecord, Reading
from dsft.errors import UserError


def value(chance, depth=0):
    kind = chance.randrange(5 if depth > 2 else 7)
    if kind < 2:
        return "".join(chance.choices('ab"\\\n[]{},: 月亮😀\u2028', k=chance.randrange(20)))
    if kind < 5:
        return [chance.randrange(10**9), chance.random(), -1e300, True, None][chance.randrange(5)]
    if kind == 5:
        return [value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {f"k{i}": value(chance, depth + 1) for i in range(chance.randrange(4))}


def values(path):
    return list(json_text.values(path, Reading()))


def records(path):
    """Fields, or what is wrong, by line."""
    return {
        int(one.origin.rpartition(":")[2]): one.problem if isinstance(one, BadRecord) else one.fields
        for one in json_text.records(path, Reading())
    }


@pytest.mark.parametrize("block", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize("form", [{}, {"indent": 1}, {"ensure_ascii": False}, {"indent": 3, "ensure_ascii": False}])
def test_any_array_comes_out_as_json_reads_it(tmp_path, monkeypatch, block, form):
    monkeypatch.setattr(json_stream, "BLOCK", block)
    chance = random.Random(block)
    path = tmp_path / "x.json"
    for _ in range(10):
        document = [value(chance) for _ in range(chance.randrange(12))]
        text = "\ufeff" * chance.randrange(2) + "\n " * chance.randrange(2) + json.dumps(document, **form) + " \n"
        path.write_bytes(text.encode())
        assert [one.value for one in values(path)] == document


@pytest.mark.parametrize("block", [1, 5, 64, 1 << 20])
@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.ndjson"])
def test_any_form_comes_out_as_json_reads_its_objects(tmp_path, monkeypatch, block, name):
    """In lines, pretty-printed one after the other, in an array, and under the key `data` among others."""
    monkeypatch.setattr(json_stream, "BLOCK", block)
    chance = random.Random(block)
    path = tmp_path / name
    for _ in range(20):
        rows = [{"text": value(chance), "more": value(chance)} for _ in range(chance.randrange(1, 6))]
        before, after = ({f"{side}{i}": value(chance) for i in range(chance.randrange(3))} for side in "ba")
        forms = {
            "lines": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
            "values": "\n".join(json.dumps(row, indent=2) for row in rows),
            "joined": "".join(json.dumps(row, indent=1) for row in rows),
            "glued": "".join(json.dumps(row) for row in rows),
            "array": json.dumps(rows, indent=chance.choice([None, 2])),
            "data": json.dumps({**before, "data": rows, **after}, indent=chance.choice([None, 2])),
        }
        for form, text in forms.items():
            path.write_text(text, encoding="utf-8")
            found = list(json_text.records(path, Reading()))
            assert [one.fields for one in found] == rows, form


@pytest.mark.parametrize("rows", [[{"data": ["a", "b"], "id": 1}, {"data": []}], [{"data": [{"a": 1}]}, {"data": [3]}]])
def test_a_field_called_data_is_a_field_where_records_follow(tmp_path, rows):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert records(path) == {1: rows[0], 2: rows[1]}


def test_fields_beside_data_are_named(tmp_path):
    (tmp_path / "x.json").write_text('{"version": 1, "data": [{"text": "a"}], "system": {"prompt": "b"}}')
    reading = Reading()
    assert [one.fields for one in json_text.records(tmp_path / "x.json", reading)] == [{"text": "a"}]
    assert [*reading.notes] == ["whose fields beside `data` are not read (version, system)"]


def test_files_with_marks_may_be_joined(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n' * 3)
    assert records(tmp_path / "x.jsonl") == {line: {"text": "a"} for line in (1, 2, 3)}


def test_objects_as_jq_prints_them(tmp_path):
    """Bytes of `jq .` and `jq -c .` (1.7): two spaces, no space before a colon, a line feed at the end."""
    pretty = b'{\n  "text": "\xe6\x9c\x88\\u0001",\n  "n": [\n    1,\n    {}\n  ],\n  "m": {}\n}\n{\n  "text": "b"\n}\n'
    compact = b'{"text":"\xe6\x9c\x88\\u0001","n":[1,{}],"m":{}}\n{"text":"b"}\n'
    first, second = {"text": "月\x01", "n": [1, {}], "m": {}}, {"text": "b"}
    (tmp_path / "pretty.json").write_bytes(pretty)
    (tmp_path / "compact.json").write_bytes(compact)
    assert records(tmp_path / "pretty.json") == {1: first, 9: second}
    assert records(tmp_path / "compact.json") == {1: first, 2: second}


@pytest.mark.parametrize("block", [1, 5, 1 << 20])
def test_values_know_their_line(tmp_path, monkeypatch, block):
    monkeypatch.setattr(json_stream, "BLOCK", block)
    (tmp_path / "x.json").write_bytes(b'\n[\r\n{"a": "x",\n"b": 1},\n\n 22, [\n],"\\n"\n,3]')
    assert [one.line for one in values(tmp_path / "x.json")] == [3, 6, 6, 7, 8]
    (tmp_path / "x.json").write_bytes(b'{\n"v": "data",\n"data": [\n\n{"a":\n1}, {\n}]}\n\n')
    assert [one.line for one in values(tmp_path / "x.json")] == [5, 6]


@pytest.mark.parametrize("block", [1, 5, 1 << 20])
def test_a_broken_array_is_named_where_json_finds_it_broken(tmp_path, monkeypatch, block):
    monkeypatch.setattr(json_stream, "BLOCK", block)
    whole = '[{"text": "a\\u6708月"},\n  {"n": [1, -2.5e3, true]},\n null, "x"]'
    chance, path = random.Random(0), tmp_path / "x.json"
    broken = [whole[:at] for at in range(1, len(whole))]
    for _ in range(200):
        at = chance.randrange(1, len(whole))
        broken.append(whole[:at] + chance.choice(string.printable) + whole[at + chance.randrange(2) :])
    for text in broken:
        path.write_text(text, encoding="utf-8", newline="")
        try:
            expected = json.loads(text)
        except json.JSONDecodeError as error:
            with pytest.raises(UserError) as caught:
                values(path)
            assert str(caught.value) == f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}"
        else:
            assert [one.value for one in values(path)] == expected


@pytest.mark.parametrize("block", [3, 1 << 20])
def test_a_broken_object_is_one_and_the_next_one_is_read(tmp_path, monkeypatch, block):
    monkeypatch.setattr(json_stream, "BLOCK", block)
    path = tmp_path / "x.json"
    good = ['{\n "text": "a"\n}', '{\n "text": "{"\n}']
    for bad in ('{\n "text": oh\n}', '{\n "text": "b",\n}', '{\n "text": ["b"\n}', '}\n"', "{\n"):
        path.write_text("\n".join([good[0], bad, good[1]]))
        found = list(records(path).values())
        assert (found[0], found[-1]) == ({"text": "a"}, {"text": "{"})
        assert len(found) == 3 and found[1].startswith("not JSON: ") and " of line " in found[1]


DEEP = 100_000
HOSTILE = {
    "a key twice": ('{"text": "a", "text": "b"}', "the key `text` is there twice in one object"),
    "a key twice inside": ('{"m": [{"role": 1, "role": 1}]}', "the key `role` is there twice in one object"),
    "half a character": ('{"text": "\\ud800"}', "field `text` holds half a character, the lone surrogate U+D800"),
    "half a character as key": (
        '{"x": {"\\uDc00y": 1}}',
        "field `x` holds half a character, the lone surrogate U+DC00",
    ),
    "digits": ('{"n": %s}' % ("1" * 10_000), "not JSON that can be read: a number of 10,000 digits"),
    "a float of digits": (
        '{"n": %s.5}' % ("1" * 10_000),
        "not JSON that can be read: the number 11111111111111111111 is beyond",
    ),
    "an exponent": ('{"n": -1e999}', "not JSON that can be read: the number -1e999 is beyond what a float"),
    "deep lists": (
        '{"n": %s}' % ("[" * DEEP + "]" * DEEP),
        "not JSON that can be read: lists and objects lie more than 100 deep",
    ),
    "deep objects": (
        '{"n":' * DEEP + "1" + "}" * DEEP,
        "not JSON that can be read: lists and objects lie more than 100 deep",
    ),
    "just too deep": (
        '{"n": %s}' % ("[" * DEEPEST + "]" * DEEPEST),
        "not JSON that can be read: lists and objects lie more than 100 deep",
    ),
    "no object": ("[1]", "a record is an object, but this is list"),
    "nothing": ("null", "a record is an object, but this is NoneType"),
}
FINE = {
    "a pair": '{"text": "\\ud83d\\ude00 \\\\ud800"}',
    "deep enough": '{"n": %s}' % ("[" * (DEEPEST - 1) + "]" * (DEEPEST - 1)),
    "many brackets": json.dumps({"n": [{}] * 500, "text": "[{" * 500}),
    "the same key elsewhere": '{"a": {"b": 1}, "b": {"a": 1}}',
    "digits": '{"n": %s}' % ("1" * 1000),
    "of Python": '{"n": NaN, "m": -Infinity}',
}


@pytest.mark.parametrize("block", [50, 1 << 20])
@pytest.mark.parametrize("form", ["lines", "array", "data", "values"])
def test_one_hostile_record_is_one_bad_record(tmp_path, monkeypatch, form, block):
    monkeypatch.setattr(json_stream, "BLOCK", block)
    path = tmp_path / "x.jsonl"
    for name, (text, problem) in HOSTILE.items():
        one, two = '{"text": "before"}', '{"text": "after"}'
        path.write_text(
            {
                "lines": f"{one}\n{text}\n{two}\n",
                "array": f"[{one},\n{text},\n{two}]",
                "data": f'{{"x": 1, "data": [{one},\n{text},\n{two}]}}',
                "values": f'{{"text":\n"before"}}{text}\n{two}',
            }[form]
        )
        before, bad, after = json_text.records(path, Reading())
        assert (before.fields, after.fields) == (json.loads(one), json.loads(two)), name
        assert bad.problem.startswith(problem), name
        assert bad.origin == f"{path}:2"
        str(bad).encode()


@pytest.mark.parametrize("name", FINE)
def test_what_only_looks_hostile_is_read_as_json_reads_it(tmp_path, name):
    (tmp_path / "x.jsonl").write_text(f'{FINE[name]}\n{{"text": "b"}}')
    first, _ = json_text.records(tmp_path / "x.jsonl", Reading())
    assert repr(first.fields) == repr(json.loads(FINE[name]))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "cut of', "not JSON: Unterminated string starting at at column 10"),
        ('{"text": "a"} {"text": "b"}', "not JSON: Extra data at column 15"),
        ('{"text": "a\0b"}', "not JSON: Invalid control character at at column 12"),
        ("\0" * 40, "not JSON: Expecting value at column 1"),
        ("oid sha256:4d7a214614ab2935", "not JSON: Expecting value at column 1"),
        ("version https://git-lfs.github.com/spec/v1", "a line of a Git LFS pointer, not the file's own: run `git l"),
    ],
)
def test_a_line_that_is_no_json_is_one_bad_record_also_at_the_end(tmp_path, line, problem):
    path = tmp_path / "x.jsonl"
    for text, at in ((f'{{"text": "a"}}\n{line}\n\n{{"text": "c"}}\n', 2), (f'{{"text": "a"}}\n\n{line}', 3)):
        path.write_text(text)
        found = records(path)
        assert found.pop(at).startswith(problem)
        assert list(found.values()) == [{"text": "a"}, {"text": "c"}][: len(found)]


def test_bytes_that_are_no_text_are_of_one_record(tmp_path):
    path = tmp_path / "x.jsonl"
    lines = ['{"text": "月亮"}'.encode(), '{"月": "亮'.encode() + b'\xff"}', b"\xfe", b'{"text": "c"}']
    path.write_bytes(b"\n".join(lines))
    assert records(path) == {
        1: {"text": "月亮"},
        2: "not UTF-8: byte 0xff at column 13",
        3: "not UTF-8: byte 0xfe at column 1",
        4: {"text": "c"},
    }


@pytest.mark.parametrize("text", ["", "\n", " \r\n\t", "\ufeff", "[]", "[ ]\n", '{"data": []}'])
def test_no_record_is_no_mistake(tmp_path, text):
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    assert values(tmp_path / "x.json") == []


def test_a_broken_array_under_data_is_named_and_gives_no_records(tmp_path):
    (tmp_path / "x.json").write_text('{\n"data": [\n {"text": "a"},\n {"text": }]}')
    with pytest.raises(UserError, match=r"x\.json:4: not JSON: Expecting value at column 11"):
        values(tmp_path / "x.json")


def test_jq_itself_where_it_is_installed(tmp_path):
    rows = [{"text": "月\u2028" * n, "n": [n, None, {"a": {}}]} for n in range(5)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for options in ([], ["-c"], ["-s"], ["--tab"], ["-a"], ["-s", "{data: .}"]):
        try:
            done = subprocess.run(["jq", *options, *([] if "{" in "".join(options) else ["."])],
                                  input=lines.encode(), capture_output=True, check=True)  # fmt: skip
        except FileNotFoundError:
            pytest.skip("no jq")
        (tmp_path / "x.json").write_bytes(done.stdout)
        assert [one.value for one in values(tmp_path / "x.json")] == rows, options
