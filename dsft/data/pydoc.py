"""Records out of Python's own documentation, chats or labelled texts: real text that every machine with Python has.

Source files are parsed, never imported: importing all of the standard library has side effects (`this` prints,
`antigravity` opens a browser). Only modules that are built into the interpreter have to be looked at alive.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import xxhash

from dsft.config.schema import Source
from dsft.data import pycode
from dsft.data.sources import Raw
from dsft.errors import UserError
from dsft.runtime.files import describe, hash_file

MIN_CHARACTERS = 40
"""Docstrings shorter than this teach nothing."""

SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "__pycache__"}
"""Directories without documentation that anybody asks for."""

QUESTIONS = {
    "module": ["What is the Python module `{}` for?", "Describe the Python module `{}`."],
    "class": ["What is the Python class `{}`?", "Explain the class `{}`.", "What is `{}` used for in Python?"],
    "function": ["What does `{}` do in Python?", "Explain the Python function `{}`.", "How does `{}` work?"],
    "method": ["What does the method `{}` do?", "Explain the Python method `{}`.", "How does `{}` work?"],
}
"""Kind of thing -> forms of asking about it; `{}` is its qualified name and signature."""

TELLING = {word.rstrip("es") for word in (*QUESTIONS, "subclass", "classmethod", "staticmethod", "package")}
"""Words that name a kind of thing, without the ends of their plurals."""

WORD, MASK = re.compile(r"\w+"), "_"

Doc = tuple[str, str, str, str]  # kind, qualified name, signature, docstring


def records(packages: list[str], kinds: bool = False) -> Iterator[Raw]:
    """Records of what is documented, one per public thing, in an order that is always the same.

    Equal docstrings make one record, so that a held-out answer is never trained on under another name.

    Args:
        packages: Importable names of installed packages to add to the standard library and the built-in modules.
        kinds: Whether they are texts with the kind of thing as their label, and not chats.

    Yields:
        Raw: `messages` with a user's question and the cleaned docstring as the assistant's answer; or `text`, the
            docstring without words that give the label away, and `label`.

    Raises:
        UserError: A package is not installed, has no Python source or no documentation.
    """
    installed = _named(packages)  # mistakes first, the slow part after
    standard = chain(_documented(*_standard_library()), _built_in())
    added = ((place, _documented(root, paths)) for place, root, paths in installed)
    seen: set[str] = set()
    for place, docs in chain([("standard library", standard)], added):
        long_enough = [doc for doc in docs if len(doc[3]) >= MIN_CHARACTERS]
        if not long_enough:
            raise UserError(f"{place} has no docstrings of {MIN_CHARACTERS} characters or more")
        for doc in long_enough:
            if doc[3] not in seen:
                seen.add(doc[3])
                yield _labelled(*doc) if kinds else _record(*doc)


def code(packages: list[str]) -> Iterator[Raw]:
    """Functions as words with what each name is (`pycode.records`), each wording once, in an order that is always the
    same.

    Args:
        packages: As for `records`.

    Raises:
        UserError: A package is not installed, has no Python source or no function that fits.
    """
    seen: set[tuple[str, ...]] = set()
    for place, root, paths in [("standard library", *_standard_library()), *_named(packages)]:
        found = False
        for raw in chain.from_iterable(pycode.records(path, _module_name(path, root)) for path in paths):
            found, wording = True, tuple(raw.fields["tokens"])
            if wording not in seen:
                seen.add(wording)
                yield raw
        if not found:
            raise UserError(f"{place} has no function of {pycode.LEAST} to {pycode.MOST} words")


class Documentation:
    """Records of installed Python source, in the same shape as a file source.

    Args:
        packages: As for `records`.
        source: `pydoc` and `pydoc_kinds` are `records`, `pydoc_code` is `code`.

    Raises:
        UserError: A package is not installed, or has no Python source.
    """

    def __init__(self, packages: list[str], source: Source = Source.pydoc) -> None:
        self.name = self.key = source.value
        self._packages, self._source = packages, source
        self._places = [_standard_library(), *map(_installed, packages)]

    def state(self) -> list[Any]:
        """What tells its content from an earlier one without reading it."""
        return [sys.version, *(describe(path) for _, paths in self._places for path in paths)]

    def fingerprint(self) -> str:
        """A hash of everything that is read; much faster than making the records."""
        digest = xxhash.xxh3_128(f"{self.name} {sys.version}".encode())
        for root, paths in self._places:
            for path in paths:
                digest.update(f"{path.relative_to(root)}:{path.stat().st_size}:".encode())
                hash_file(digest, path)
        return digest.hexdigest()

    def records(self) -> Iterator[Raw]:
        """See `records` and `code`."""
        if self._source is Source.pydoc_code:
            return code(self._packages)
        return records(self._packages, self._source is Source.pydoc_kinds)

    def notes(self) -> dict[str, Any]:
        """Nothing is noticed of its files, which Python itself can read."""
        return {}

    def about(self) -> dict[str, Any]:
        """There is nothing to say of them."""
        return {}


def _named(packages: list[str]) -> list[tuple[str, Path, list[Path]]]:
    return [(f"data.packages: {package}", *_installed(package)) for package in packages]


def _standard_library() -> tuple[Path, list[Path]]:
    """The directory that module names start from, and the source files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return root, _python_files(root, root)


def _installed(package: str) -> tuple[Path, list[Path]]:
    # A dotted name is refused, because finding it would import its parent.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
        raise UserError(
            f"data.packages: there is no installed package {package!r}; give the name that Python imports "
            "(sklearn, not scikit-learn), without dots"
        )
    if spec.submodule_search_locations:
        roots = sorted(Path(place) for place in spec.submodule_search_locations)
        paths = [path for root in roots for path in _python_files(root, root.parent)]
        root = roots[0].parent
    else:
        paths = [Path(str(spec.origin))] if str(spec.origin).endswith(".py") else []
        root = paths[0].parent if paths else Path()
    if not paths:
        raise UserError(f"data.packages: {package} is installed without Python source files")
    return root, paths


def _python_files(directory: Path, root: Path) -> list[Path]:
    return sorted(
        path
        for path in directory.rglob("*.py")
        if not SKIPPED.intersection(path.relative_to(root).parts) and _public(_module_name(path, root))
    )


def _module_name(path: Path, root: Path) -> str:
    parts = list(path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _public(name: str) -> bool:
    return not any(part.startswith("_") for part in name.split("."))


def _documented(root: Path, paths: list[Path]) -> Iterator[Doc]:
    for path in paths:
        yield from _parsed(path, _module_name(path, root))


def _parsed(path: Path, module: str) -> Iterator[Doc]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a template, or code for another version of Python
        return
    yield "module", module, "", ast.get_docstring(tree) or ""
    yield from _parsed_body(tree, module, "function")


def _parsed_body(parent: ast.Module | ast.ClassDef, prefix: str, kind: str) -> Iterator[Doc]:
    for node in parent.body:
        if isinstance(node, ast.ClassDef) and _public(node.name):
            bases = ", ".join(map(ast.unparse, node.bases))
            yield "class", f"{prefix}.{node.name}", f"({bases})" if bases else "", ast.get_docstring(node) or ""
            yield from _parsed_body(node, f"{prefix}.{node.name}", "method")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _public(node.name):
            signature = f"({_arguments(node.args)})"
            yield kind, f"{prefix}.{node.name}", signature, ast.get_docstring(node) or ""


def _arguments(arguments: ast.arguments) -> str:
    first = (arguments.posonlyargs or arguments.args)[:1]
    text = ast.unparse(arguments)
    return text.removeprefix(first[0].arg).lstrip(", /") if first and first[0].arg in ("self", "cls") else text


def _built_in() -> Iterator[Doc]:
    for name in filter(_public, sorted(sys.builtin_module_names)):
        module = importlib.import_module(name)
        yield "module", name, "", inspect.getdoc(module) or ""
        yield from _members(module, "" if name == "builtins" else f"{name}.", "function")


def _members(parent: object, prefix: str, kind: str) -> Iterator[Doc]:
    for name, value in sorted(vars(parent).items()):
        if not _public(name):
            continue
        if inspect.isclass(value):
            yield "class", prefix + name, "", _docstring(value)
            if kind == "function":
                yield from _members(value, f"{prefix}{name}.", "method")
        elif callable(value):
            yield kind, prefix + name, _signature(value), _docstring(value)


def _docstring(value: object) -> str:
    doc = getattr(value, "__doc__", None)
    return inspect.cleandoc(doc) if isinstance(doc, str) else ""


def _signature(value: Any) -> str:
    try:
        parameters = list(inspect.signature(value).parameters.values())
    except (ValueError, TypeError):  # many C functions have none
        return "()"
    return str(inspect.Signature([p for p in parameters if p.name not in ("self", "type", "cls")]))


def _record(kind: str, name: str, signature: str, docstring: str) -> Raw:
    forms = QUESTIONS[kind]
    question = forms[zlib.crc32(name.encode()) % len(forms)].format(name + signature)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": docstring}]
    return Raw({"messages": messages}, f"pydoc:{name}")


def _labelled(kind: str, name: str, signature: str, docstring: str) -> Raw:
    """A docstring in which neither kinds of things are named nor this thing, nor what holds it."""
    own = {*name.split(".")}
    text = WORD.sub(
        lambda word: MASK if word[0] in own or word[0].lower().rstrip("es") in TELLING else word[0], docstring
    )
    return Raw({"text": text, "label": kind}, f"pydoc:{name}")
