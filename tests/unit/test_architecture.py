"""The house's storeys: imports go downward only, and each library is known to the rooms that own it."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST = 45
"""Lines of a function, docstring included."""

SEVERAL = {
    *("test_architecture", "test_dependencies", "test_gpu", "test_pairwise", "test_readme"),
    *("commands/test_run_plan", "config/test_conf_choices", "config/test_config", "config/test_text_settings"),
    *(
        "metrics/test_metrics",
        "model/test_model_load",
        "optim/test_optim",
        "tasks/test_masks",
        "tasks/test_mutations",
        "tasks/test_tasks",
        "tracking/test_tracking",
    ),
}
"""Files of unit tests that are about a whole room, or about files outside of the package."""

OWNERS = {
    "deepspeed": {"dsft/engine.py", "dsft/runtime", "dsft/checkpoint.py"},
    "hydra": {"launch", "dsft/config"},
    "omegaconf": {"launch", "dsft/config"},
    "mpi4py": {"dsft/runtime"},
    "wandb": {"dsft/tracking"},
}


@cache
def imports(file: Path) -> set[str]:
    """Top-level names of all modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def sources() -> list[Path]:
    return [file for room in ("dsft", "launch") for file in (ROOT / room).rglob("*.py")]


def test_every_import_contract_is_kept():
    lint = "from importlinter.cli import lint_imports; import sys; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", lint], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_is_imported_by_its_owners_alone(library):
    users = {file.relative_to(ROOT) for file in sources() if library in imports(file)}
    assert users, "nobody uses it: take it out of this table"
    strangers = [user for user in users if not any(user.is_relative_to(owner) for owner in OWNERS[library])]
    assert not strangers


def test_no_leaf_is_handed_the_root_config():
    """Rooms below the composition root take plain values or a section of their own."""
    above = {"dsft/assemble.py", "dsft/commands/train.py", "dsft/commands/export.py", "dsft/commands/trained.py"}
    for file in sources():
        name = file.relative_to(ROOT).as_posix()
        if name.startswith(("dsft/config/", "launch/")) or name in above:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "dsft.config.schema":
                assert "Config" not in {alias.name for alias in node.names}, name


def test_every_test_file_has_a_name_of_its_own():
    """pytest imports them by it: two of one name break the whole suite, though each runs alone."""
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert len(set(names)) == len(names)


def test_no_function_is_longer_than_a_reading():
    long = []
    for file in sources():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= LONGEST:
                long.append(f"{file.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not long


def test_unit_tests_stand_where_what_they_test_stands():
    """tests/unit/<room>/test_<module>.py for dsft/<room>/<module>.py; SEVERAL are about more than one module."""
    strays = set()
    for file in (ROOT / "tests" / "unit").rglob("test_*.py"):
        room, module = file.relative_to(ROOT / "tests" / "unit").parent, file.stem.removeprefix("test_")
        if not (ROOT / "dsft" / room / f"{module}.py").exists():
            strays.add((room / file.stem).as_posix())
    assert strays == SEVERAL
