"""What is imported is declared, and what is declared is imported."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OF_PACKAGE = {"yaml": "pyyaml", "hydra": "hydra-core", "PIL": "pillow", "sklearn": "scikit-learn"}
"""Modules whose package has another name."""
PROGRAMS = {"mypy", "ruff", "pytest-timeout", "types-pyyaml", "openmpi", "gguf", "dsft", "import-linter"}
"""Declared without being imported: programs, plug-ins, types, our own extras, what transformers imports for GGUF."""


def imported(*rooms: str) -> set[str]:
    """Packages outside the standard library that the files of these directories import."""
    own = {"dsft", *(file.stem for file in (ROOT / "tests").rglob("*.py"))}
    found = set()
    for room in rooms:
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    found.add(node.module.partition(".")[0])
    return {OF_PACKAGE.get(name, name).replace("_", "-") for name in found - own - sys.stdlib_module_names}


def declared(entries: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", entry)[0].lower() for entry in entries}


def test_imports_are_declared_and_used():
    needed, extras = declared(PROJECT["dependencies"]), PROJECT["optional-dependencies"]
    optional = {"flash-attn", "triton"} | declared(
        [entry for name in extras if name != "test" for entry in extras[name]]
    )
    package = imported("dsft", "launch")
    assert package - optional <= needed, "imported, but not among pyproject's dependencies"
    everything = package | imported("tests")
    assert everything - optional <= needed | declared(extras["test"]), "imported by tests, but not in the extra `test`"
    assert (needed | declared(extras["test"])) - PROGRAMS <= everything, "declared, but imported nowhere"
