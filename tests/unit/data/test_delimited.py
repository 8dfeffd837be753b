"""CSV and TSV as spreadsheets and data frames write them come out as they read them."""

import csv
import io
import random
from functools import partial

import pandas
import pytest
import tiny

from dsft.data import blocks, delimited, sources
from dsft.data.raw import BadRecord, Reading
from dsft.errors import UserError
from dsft.tasks import TASKS, encode

ROWS = [
    {"问题": "什么是“月亮”?", "answer": 'He said "no";\nthen, nothing.'},
    {"问题": "a;b,c\td", "answer": "007"},
    {"问题": " x ", "answer": "NA"},
]


def read(path, *header):
    return [
        one.problem if isinstance(one, BadRecord) else one.fields
        for one in sources.READERS[sources.format_of(path)](path, Reading(header))
    ]


def excel(rows, delimiter=","):
    """Bytes as Excel writes them: CRLF behind rows, LF within a cell, quotes where they are needed, doubled inside."""

    def cell(value):
        return '"' + value.replace('"', '""') + '"' if set(value) & {delimiter, '"', "\n"} else value

    lines = [list(rows[0]), *(row.values() for row in rows)]
    return "".join(delimiter.join(map(cell, line)) + "\r\n" for line in lines)


@pytest.mark.parametrize(
    ("delimiter", "encoding", "note"),
    [
        (",", "utf-8-sig", None),
        (";", "utf-8-sig", "with fields separated by ';'"),
        (",", "gb18030", "decoded as GB18030"),
        (";", "gbk", "decoded as GB18030"),
        ("\t", "utf-16", "decoded as UTF-16-LE"),
    ],
)
def test_as_excel_writes_it(tmp_path, delimiter, encoding, note):
    path = tmp_path / "x.csv"
    path.write_bytes(excel(ROWS, delimiter).encode(encoding))
    reading = Reading()
    found = list(sources.READERS[".csv"](path, reading))
    assert [one.fields for one in found] == ROWS
    assert [one.origin for one in found] == [f"{path}:{line}" for line in (2, 4, 5)]
    assert (note in reading.notes) if note else not reading.notes
    expected = pandas.read_csv(path, sep=delimiter, encoding=encoding, dtype=str, keep_default_na=False)
    assert expected.to_dict("records") == ROWS


@pytest.mark.parametrize("options", [{"index": False}, {}, {"sep": "\t"}, {"sep": ";"}, {"quoting": csv.QUOTE_ALL}])
def test_as_pandas_writes_it(tmp_path, options):
    """With its index too, a column without a name."""
    path = tmp_path / ("x.tsv" if options.get("sep") == "\t" else "x.csv")
    pandas.DataFrame(ROWS).to_csv(path, **options)
    index = {} if "index" in options else {"": None}
    expected = [{**{name: str(n) for name in index}, **row} for n, row in enumerate(ROWS)]
    assert read(path) == expected


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_any_cells_are_read_as_the_library_wrote_them(tmp_path, delimiter):
    chance, path = random.Random(0), tmp_path / "x.csv"
    for _ in range(100):
        names = ["text", "月 亮", "n"][: chance.randrange(2, 4)]
        rows = [["".join(chance.choices("ab\"',;\t\n\r月 ", k=chance.randrange(6))) for _ in names]
                for _ in range(chance.randrange(1, 5))]  # fmt: skip
        file = io.StringIO(newline="")
        csv.writer(file, delimiter=delimiter).writerows([names, *rows])
        path.write_text(file.getvalue(), encoding="utf-8", newline="")
        assert read(path) == [dict(zip(names, row, strict=True)) for row in rows]


def test_excel_may_be_told_the_delimiter(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"sep=;\r\ntext;n\r\na,b,c;1\r\n;;\r\n")
    assert read(path) == [{"text": "a,b,c", "n": "1"}, "3 fields where the header has 2"]
    assert [one.origin for one in sources.Found(str(path)).records()] == [f"{path}:3", f"{path}:4"]


def test_one_column_is_one_whatever_stands_in_it(tmp_path):
    (tmp_path / "x.csv").write_text('text\na;b\n"c,d;e;f"\ng\th\n')
    assert read(tmp_path / "x.csv") == [{"text": "a;b"}, {"text": "c,d;e;f"}, {"text": "g\th"}]


def test_empty_cells_at_the_end_that_a_spreadsheet_fills_in(tmp_path):
    (tmp_path / "x.csv").write_text("text,n,,\na,1,,\n,,,\nb,2,3,\n")
    assert read(tmp_path / "x.csv") == [
        {"text": "a", "n": "1"},
        {"text": "", "n": ""},
        "field 3 has no name in the header",
    ]


def test_without_a_header_names_are_given(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("你好;很好\n再见,再见;好\nx\n", encoding="gb18030")
    assert read(path, "prompt", "completion") == [
        {"prompt": "你好", "completion": "很好"},
        {"prompt": "再见,再见", "completion": "好"},
        "1 fields where the header has 2",
    ]
    path.write_text("prompt,completion\na,b\n")
    assert read(path, "prompt", "completion")[0].startswith("the names of the fields stand here again")


@pytest.mark.parametrize("first", ["你好,很好", "What is it?,A fox.", "1,2", ",b"])
def test_a_first_record_that_is_malformed_asks_whether_there_is_a_header(tmp_path, first):
    """Through the task, which alone knows the names; only once, and not where the names look like names."""
    path = tmp_path / "x.csv"
    context = tiny.collator().context
    for header in (first, "prompt,answer"):
        path.write_text(f"{header}\na,b\nc,d\n", encoding="utf-8")
        records = sources.Found(str(path)).records()
        (block,) = blocks.blocks(records, partial(encode, task=TASKS["causal_lm"], context=context), 1, False, tmp_path)
        asked = [bad.problem.endswith(delimited.NO_HEADER) for bad in block.bad]
        assert asked == [header == first, False]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,text\na,b\n", "x.csv:1: two fields have the name 'text'"),
        (f"{'long ' * 30},b\nc,d\n", r"x.csv:1: this is no line with the names of fields.*data\.header=\[prompt,"),
        ('"two\nlines",b\nc,d\n', r"x.csv:1: this is no line with the names of fields.*data\.header=\[prompt,"),
        ('"a"b,c\nd,e\n', "x.csv:1: the quotes of this row do not match"),
        ('a,b\n"c,d\n', None),
        ('a,b\n"c,d\ne,f\n"g"h,i\nj,k\n', "x.csv:2: the quotes of this row do not match: .* on line 4"),
    ],
)
def test_what_cannot_be_told_is_named(tmp_path, content, message):
    (tmp_path / "x.csv").write_text(content)
    if message is None:
        assert read(tmp_path / "x.csv") == ["the quotes of this row do not match: unexpected end of data"]
        return
    with pytest.raises(UserError, match=message):
        read(tmp_path / "x.csv")


def test_a_quote_that_never_ends_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(delimited, "LONGEST", 1000)
    (tmp_path / "x.csv").write_text('a,b\nc,d\n"e,f\n' + "g,h\n" * 1000)
    with pytest.raises(UserError, match=r"x\.csv:3: .*field larger than field limit \(1000\) on line 25"):
        read(tmp_path / "x.csv")
