"""The table of settings, made from the schema: `python -m dsft.config.table [FILE ...]`.

Without files it prints the table, else it puts the table between each file's two MARKs.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import omegaconf

from dsft.config import schema

MARK = "<!-- config table -->\n"


def markdown_table() -> str:
    """Every knob with its default and its docstring, in the schema's order, a bold row before each section."""
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    hints = get_type_hints(schema.Config)
    for field in fields(schema.Config):
        if is_dataclass(hints[field.name]):
            lines += [f"| **{field.name}** | | |", *_rows(hints[field.name], f"{field.name}.")]
    lines += ["| **run** | | |", *_rows(schema.Config, "")]
    return "\n".join(lines) + "\n"


def with_table(text: str, mark: str = MARK, table: Callable[[], str] = markdown_table) -> str:
    """`text` with what stands between its two `mark`s replaced by the table of today."""
    before, _, after = text.split(mark)
    return f"{before}{mark}\n{table()}\n{mark}{after}"


def main(files: list[str], mark: str = MARK, table: Callable[[], str] = markdown_table) -> None:
    """Put the table into each file, or print it where there is none."""
    if not files:
        print(table(), end="")
    for file in map(Path, files):
        file.write_text(with_table(file.read_text(encoding="utf-8"), mark, table), encoding="utf-8")


def docstrings(section: type) -> dict[str, str]:
    """The string under each knob of a schema class, on one line; a knob without one is left out."""
    body: Any = ast.parse(inspect.getsource(section)).body[0]
    found = {}
    for declared, text in pairwise(body.body):
        if isinstance(declared, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[ast.unparse(declared.target)] = inspect.cleandoc(str(text.value.value)).replace("\n", " ")
    return found


def _rows(section: type, prefix: str) -> list[str]:
    hints, texts = get_type_hints(section), docstrings(section)
    return [
        f"| `{prefix}{field.name}` | {_default(field)} | {texts[field.name]}{_choices(hints[field.name])} |"
        for field in fields(section)
        if not is_dataclass(hints[field.name])
    ]


def _default(field: Any) -> str:
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if value == omegaconf.MISSING:
        return "required"
    if isinstance(value, Enum):
        return f"`{value.name}`"
    if value is None or isinstance(value, bool):
        return f"`{'null' if value is None else str(value).lower()}`"
    return f"`[{', '.join(map(str, value))}]`" if isinstance(value, list) else f"`{value}`"


def _choices(hint: Any) -> str:
    if not (isinstance(hint, type) and issubclass(hint, Enum)):
        return ""
    return f" One of {', '.join(f'`{choice.name}`' for choice in hint)}."


if __name__ == "__main__":
    main(sys.argv[1:])
