"""What the names in functions are, by hand; files that are no code for this Python; packages."""

from __future__ import annotations

import pytest

from dsft.data import pycode, pydoc
from dsft.errors import UserError

SOURCE = '''
import os

LIMIT = 3

class A:
    def m(self, 名: int = 0, *rest, key: "str | None" = None, **more) -> dict[str, int]:
        """No word
        of this."""
        global LIMIT
        LIMIT, found = found_in(self.parts), os.path.join(名, *rest, sep=key)  # nor of this
        try:
            return {"é": 名}, found[0].rest, more
        except OSError as problem:
            raise problem from None

    @property
    def decorated(self):
        return self.x + self.y + self.z + self.w

def short(): pass

def hidden(a, b):
    return [a for a in b if a is not b and a != b]

async def waited(a, b):
    return a + b + a + b + a + b
'''

EXPECTED = """
def m ( self/parameter , 名/parameter = 0 , * rest/parameter , key/parameter = None , ** more/parameter ) :
global LIMIT
LIMIT/outer , found/variable = found_in/function ( self/parameter . parts/attribute ) ,
os/outer . path/attribute . join/method ( 名/parameter , * rest/parameter , sep/argument = key/parameter )
try : return { '' : 名/parameter } , found/variable [ 0 ] . rest/attribute , more/parameter
except OSError/outer as problem :
raise problem/variable from None
"""


def test_names_are_what_the_whole_function_says(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(SOURCE, encoding="utf-8")
    (record,) = pycode.records(path, "pkg.m")
    assert (record.origin, record.fields["module"]) == ("pycode:pkg.m.A.m", "pkg.m")
    words = [
        word if tag == "O" else f"{word}/{tag}" for word, tag in zip(record.fields["tokens"], record.fields["tags"])
    ]
    assert words == EXPECTED.split()


def test_encodings_and_what_is_no_code(tmp_path):
    path = tmp_path / "m.py"
    text = "# -*- coding: gb18030 -*-\ndef f(名, b):\n    数 = 名 + b\n    return 数 * 名 - b\n"
    path.write_bytes(text.encode("gb18030"))
    (record,) = pycode.records(path, "m")
    assert record.fields["tags"].count("variable") == 2 and record.fields["tags"].count("parameter") == 6
    path.write_text("def (", encoding="utf-8")
    assert [*pycode.records(path, "m")] == []
    path.write_bytes(b"x = 1\0")
    assert [*pycode.records(path, "m")] == []


def test_every_wording_comes_once_and_in_one_order():
    first, second = ([*zip(range(400), pydoc.code([]))] for _ in range(2))
    assert first == second
    wordings = [tuple(raw.fields["tokens"]) for _, raw in first]
    assert len({*wordings}) == 400
    assert {len(words) for words in wordings} <= {*range(pycode.LEAST, pycode.MOST + 1)}


def test_a_package_without_a_fitting_function_is_refused(tmp_path, monkeypatch):
    (tmp_path / "made_up_code").mkdir()
    (tmp_path / "made_up_code/__init__.py").write_text("def f(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "m.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.setattr(pydoc, "_standard_library", lambda: (tmp_path, [tmp_path / "m.py"]))
    with pytest.raises(UserError, match="data.packages: made_up_code has no function of 12 to 96 words"):
        list(pydoc.code(["made_up_code"]))
