"""A JSON array read in small pieces gives what json.loads gives, and mistakes are named as json.loads names them."""

import json
import random
import string

import pytest

from dsft.data import json_array
from dsft.data.json_array import elements
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


@pytest.mark.parametrize("block", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize("form", [{}, {"indent": 1}, {"ensure_ascii": False}, {"indent": 3, "ensure_ascii": False}])
def test_any_array_comes_out_as_json_reads_it(tmp_path, monkeypatch, block, form):
    monkeypatch.setattr(json_array, "BLOCK", block)
    chance = random.Random(block)
    path = tmp_path / "x.json"
    for _ in range(10):
        document = [value(chance) for _ in range(chance.randrange(12))]
        text = "\ufeff\n " * chance.randrange(2) + json.dumps(document, **form) + " \n" * chance.randrange(2)
        path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
        assert [found for found, _ in elements(path)] == document


@pytest.mark.parametrize("block", [1, 5, 1 << 20])
def test_elements_know_their_line(tmp_path, monkeypatch, block):
    monkeypatch.setattr(json_array, "BLOCK", block)
    (tmp_path / "x.json").write_bytes(b'\n[\r\n{"a": "x",\n"b": 1},\n\n 22, [\n],"\\n"\n,3]')
    assert [line for _, line in elements(tmp_path / "x.json")] == [3, 6, 6, 7, 8]


@pytest.mark.parametrize("block", [1, 5, 1 << 20])
def test_a_broken_array_is_named_where_json_finds_it_broken(tmp_path, monkeypatch, block):
    monkeypatch.setattr(json_array, "BLOCK", block)
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
                list(elements(path))
            assert str(caught.value) == f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}"
        else:
            assert [found for found, _ in elements(path)] == expected


def test_a_byte_that_is_not_utf8_is_counted_from_the_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(json_array, "BLOCK", 4)
    (tmp_path / "x.json").write_bytes('["月亮", "'.encode() + b'\xff"]')
    with pytest.raises(UserError, match="not UTF-8 at byte 12"):
        list(elements(tmp_path / "x.json"))


@pytest.mark.parametrize("text", [" {}", "3", "", "\n"])
def test_what_is_no_array_is_left_to_others(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    assert elements(tmp_path / "x.json") is None
