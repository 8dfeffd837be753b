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

from dsft.config import effect, schema

MARK = "<!-- config table -->\n"


def markdown_table() -> str:
    """Every setting with its default and its docstring, in the schema's order, a bold row before each section."""
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
    """The string under each setting of a schema class, on one line; a setting without one is left out."""
    body: Any = ast.parse(inspect.getsource(section)).body[0]
    found = {}
    for declared, text in pairwise(body.body):
        if isinstance(declared, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[ast.unparse(declared.target)] = inspect.cleandoc(str(text.value.value)).replace("\n", " ")
    return found


def _rows(section: type, prefix: str) -> list[str]:
    hints, texts, rows = get_type_hints(section), docstrings(section), []
    for field in fields(section):
        hint: Any = hints[field.name]
        name = prefix + field.name
        if isinstance(hint, type) and is_dataclass(hint) and prefix:
            rows += _rows(hint, f"{name}.")  # a section within a section
        elif not is_dataclass(hint):
            meaning = texts[field.name] + _choices(hint) + _limits(field)
            rows.append(f"| `{name}` | {_default(field)} | {meaning} |")
    return rows


def _default(field: Any) -> str:
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if value == omegaconf.MISSING:
        return "required"
    if isinstance(value, Enum):
        return f"`{value.name}`"
    if value is None or isinstance(value, bool):
        return f"`{'null' if value is None else str(value).lower()}`"
    if isinstance(value, dict):
        return f"`{effect.text(value)}`"
    return f"`[{', '.join(map(str, value))}]`" if isinstance(value, list) else f"`{value}`"


def _limits(field: Any) -> str:
    """Its range, and when it acts."""
    numbers, when = field.metadata.get("range"), field.metadata.get("acts")
    words = [numbers.words.capitalize() + "."] if numbers else []
    words += ["Acts with `{}`.".format(when.choose.replace("|", r"\|"))] if when else []
    words += ["Not all tasks read it."] if field.metadata.get("of_some_tasks") else []
    return "".join(f" {word}" for word in words)


def _choices(hint: Any) -> str:
    if not (isinstance(hint, type) and issubclass(hint, Enum)):
        return ""
    return f" One of {', '.join(f'`{choice.name}`' for choice in hint)}."


if __name__ == "__main__":
    main(sys.argv[1:])
