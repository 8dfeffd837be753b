"""Documentation becomes records: parsed and not imported, always in the same order."""

import inspect
import re
import sys
import textwrap

import pytest
from tiny import conversation as to_conversation

from dsft.data import pydoc
from dsft.errors import UserError

LONG = "Says something that is long enough to be worth learning."


@pytest.fixture(scope="module")
def stdlib():
    return list(pydoc.records([]))


def test_thousands_of_records_that_are_whole_conversations(stdlib):
    assert len(stdlib) > 3000
    answers = [to_conversation(raw.fields, raw.origin).messages[1]["content"] for raw in stdlib]
    assert min(map(len, answers)) >= pydoc.MIN_CHARACTERS
    assert len(set(answers)) == len(answers)


def test_a_record_asks_by_qualified_name_and_signature_and_answers_with_the_docstring(stdlib):
    by_origin = {raw.origin: raw.fields["messages"] for raw in stdlib}
    question, answer = by_origin["pydoc:textwrap.dedent"]
    assert "`textwrap.dedent(text)`" in question["content"]
    assert answer == {"role": "assistant", "content": inspect.getdoc(textwrap.dedent)}
    assert "`textwrap.TextWrapper.fill(text)`" in by_origin["pydoc:textwrap.TextWrapper.fill"][0]["content"]
    assert "`str.split(sep=None, maxsplit=-1)`" in by_origin["pydoc:str.split"][0]["content"].replace("/, ", "")
    assert "pydoc:itertools.chain" in by_origin


def test_nothing_private_and_no_test_suite(stdlib):
    names = [raw.origin.removeprefix("pydoc:").split(".") for raw in stdlib]
    assert not [name for name in names if any(part.startswith("_") for part in name)]
    assert not [name for name in names if name[0] in ("test", "idlelib", "lib2to3", "site-packages")]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A standard library of one file, and a place for packages."""
    (tmp_path / "stdlib").mkdir()
    (tmp_path / "stdlib/only.py").write_text(f'"""Only. {LONG}"""', encoding="utf-8")
    monkeypatch.setattr(pydoc.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "stdlib")})
    monkeypatch.setattr(pydoc.sys, "builtin_module_names", ("itertools",))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


CORE = f'''
class A(dict):
    """中文 {LONG}"""
    def m(self, /, x, *, y=1):
        """Method. {LONG}"""
    @classmethod
    def c(cls):
        """Class. {LONG}"""
    def _p(self):
        """Private. {LONG}"""

async def f(*a: int, **k):
    """
    Async.

        {LONG}
    """

def g():
    """Short."""

def again():
    """Method. {LONG}"""
'''


@pytest.fixture
def package(small):
    root = small / "made_up_package"
    (root / "tests").mkdir(parents=True)
    (root / "__init__.py").write_text(f'"""Package. {LONG}"""\nraise SystemExit("imported!")\n', encoding="utf-8")
    (root / "tests/test_a.py").write_text(f'"""Tests. {LONG}"""', encoding="utf-8")
    (root / "broken.py").write_text("def (", encoding="utf-8")
    (root / "core.py").write_text(CORE, encoding="utf-8")
    return root


def test_a_package_is_read_without_being_imported(package):
    records = [raw for raw in pydoc.records(["made_up_package"]) if "made_up" in raw.origin]
    assert [raw.origin for raw in records] == [
        "pydoc:made_up_package",
        "pydoc:made_up_package.core.A",
        "pydoc:made_up_package.core.A.m",
        "pydoc:made_up_package.core.A.c",
        "pydoc:made_up_package.core.f",
    ]
    questions = [raw.fields["messages"][0]["content"] for raw in records]
    shown = ["`made_up_package`", "`made_up_package.core.A(dict)`", ".m(x, *, y=1)`", ".c()`", ".f(*a: int, **k)`"]
    assert all(part in question for part, question in zip(shown, questions, strict=True))
    assert records[1].fields["messages"][1]["content"] == f"中文 {LONG}"
    assert records[-1].fields["messages"][1]["content"] == f"Async.\n\n    {LONG}"
    assert "made_up_package" not in sys.modules


def test_the_order_is_always_the_same(package):
    assert list(pydoc.records(["made_up_package"])) == list(pydoc.records(["made_up_package"]))


def test_the_fingerprint_follows_the_source(package):
    before = pydoc.Documentation(["made_up_package"]).fingerprint()
    assert pydoc.Documentation(["made_up_package"]).fingerprint() == before != pydoc.Documentation([]).fingerprint()
    (package / "core.py").write_text(f'"""Other. {LONG}"""', encoding="utf-8")
    assert pydoc.Documentation(["made_up_package"]).fingerprint() != before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_package", "no installed package 'no_such_package'"),
        ("os.path", "without dots"),
        ("silent", "silent has no docstrings of 40 characters"),
        ("compiled", "compiled is installed without Python source"),
    ],
)
def test_a_package_without_documentation_is_named(small, name, message):
    (small / "silent.py").write_text("x = 1\n")
    (small / "compiled").mkdir()
    with pytest.raises(UserError, match=message):
        list(pydoc.records([name]))


def test_texts_are_labelled_by_the_kind_of_thing_and_do_not_name_it(package):
    found = {raw.origin.rpartition(".")[2]: raw.fields for raw in pydoc.records(["made_up_package"], kinds=True)}
    assert {name: found[name]["label"] for name in ("A", "m", "f")} == {"A": "class", "m": "method", "f": "function"}
    assert found["m"]["text"] == f"_. {LONG}" and found["c"]["text"] == f"_. {LONG}"
    assert found["A"]["text"] == f"中文 {LONG}"


def test_thousands_of_labelled_texts_of_four_kinds(stdlib):
    texts = [raw.fields for raw in pydoc.records([], kinds=True)]
    assert len(texts) == len(stdlib)
    assert {row["label"] for row in texts} == {"module", "class", "function", "method"}
    telling = re.compile(r"\b(class|method|function|module|package)(es|s)?\b", re.I)
    assert not [row for row in texts if telling.search(row["text"])]
