"""Functions of Python's own library as words, and what each name in them is: records to learn tags from.

What a name is shows from the whole function: which names are parameters, say, from its first line.
"""

from __future__ import annotations

import ast
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsft.data.sources import Raw

LEAST, MOST = 12, 96
"""Words of a function."""

OTHER = "O"
"""The tag of what is no name."""

LITERALS = {tokenize.STRING: "''", tokenize.NUMBER: "0"}
"""What stands for literals, whose text tells nothing of names."""

SILENT = {
    *(tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER),
}
"""Tokens that are no words."""

OPAQUE = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.ClassDef, ast.JoinedStr)
"""What has names of its own, or hides them from the tokenizer; functions with these inside are left out."""

Place = tuple[int, int]
"""Line, and byte of the line, as `ast` counts them."""


def records(path: Path, module: str) -> Iterator[Raw]:
    """Those of a source file: `tokens`, `tags` and its `module`, for each function and method of fitting length.

    Docstrings, comments and annotations are left out. A name is a `parameter`, a `variable` (assigned in the function),
    `outer` (any other), a `function` (an outer name that is called), an `attribute`, a `method` (an attribute that is
    called) or an `argument` (a parameter's name in a call); keywords and names that are none of these are O.

    Args:
        path: The file.
        module: Its name.
    """
    source = path.read_bytes()
    try:
        tree = ast.parse(source)
        with tokenize.open(path) as file:
            lines = file.read().splitlines(keepends=True)
    except (SyntaxError, ValueError):  # a template, or code for another version of Python
        return
    parents: list[tuple[Any, str]] = [(tree, module)]
    parents += [(node, f"{module}.{node.name}") for node in tree.body if isinstance(node, ast.ClassDef)]
    for parent, prefix in parents:
        for node in parent.body:
            if isinstance(node, ast.FunctionDef) and not node.decorator_list and not _hides(node):
                words, tags = _tagged(node, lines)
                if LEAST <= len(words) <= MOST and len(set(tags)) > 1:
                    yield Raw({"tokens": words, "tags": tags, "module": module}, f"pycode:{prefix}.{node.name}")


def _hides(function: ast.FunctionDef) -> bool:
    inside = (node for node in ast.walk(function) if node is not function)
    return any(isinstance(node, (*OPAQUE, ast.FunctionDef, ast.AsyncFunctionDef)) for node in inside)


def _tagged(function: ast.FunctionDef, lines: list[str]) -> tuple[list[str], list[str]]:
    """The words of a function and their tags."""
    kinds, left_out = _kinds(function), _left_out(function)
    first, words, tags = function.lineno, list[str](), list[str]()
    source = iter(lines[first - 1 : function.end_lineno])
    for token in tokenize.generate_tokens(lambda: next(source, "")):
        row, column = token.start
        place = row + first - 1, len(lines[row + first - 2][:column].encode()) if token.type not in SILENT else 0
        if token.type in SILENT or any(begin <= place < end for begin, end in left_out):
            continue
        words.append(LITERALS.get(token.type, token.string))
        tags.append(kinds.get(place, OTHER) if token.type == tokenize.NAME else OTHER)
    return words, tags


def _left_out(function: ast.FunctionDef) -> list[tuple[Place, Place]]:
    """Where annotations and the docstring are, with what stands before them."""
    spans: list[tuple[Place, Place]] = []
    arguments = function.args
    for one in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]:
        if one is not None and one.annotation is not None:
            named = one.lineno, one.col_offset + len(one.arg.encode())
            spans.append((named, _end(one.annotation)))
    if function.returns is not None:
        begin = function.returns.lineno, function.returns.col_offset - len("-> ")
        spans.append((begin, _end(function.returns)))
    if ast.get_docstring(function, clean=False) is not None:
        spans.append(((function.body[0].lineno, function.body[0].col_offset), _end(function.body[0])))
    return spans


def _end(node: Any) -> Place:
    return node.end_lineno, node.end_col_offset


def _kinds(function: ast.FunctionDef) -> dict[Place, str]:
    """What the names in a function are."""
    own = function.args
    parameters = [*own.posonlyargs, *own.args, *own.kwonlyargs, *filter(None, (own.vararg, own.kwarg))]
    kinds = {(one.lineno, one.col_offset): "parameter" for one in parameters}
    names = {one.arg for one in parameters}
    stored = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    stored |= {node.name for node in ast.walk(function) if isinstance(node, ast.ExceptHandler) and node.name}
    declared = (node for node in ast.walk(function) if isinstance(node, ast.Global | ast.Nonlocal))
    stored -= {name for node in declared for name in node.names}
    called = {id(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            outer = "function" if id(node) in called else "outer"
            kind = "parameter" if node.id in names else "variable" if node.id in stored else outer
            kinds[node.lineno, node.col_offset] = kind
        elif isinstance(node, ast.Attribute):
            line, end = _end(node)
            kinds[line, end - len(node.attr.encode())] = "method" if id(node) in called else "attribute"
        elif isinstance(node, ast.keyword) and node.arg is not None:
            kinds[node.lineno, node.col_offset] = "argument"
    return kinds
