"""Which files a path stands for: those of one subset and one split, and what of the others is left out, by name."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from dsft.data.card import Subset, is_card, subsets
from dsft.data.splits import by_split, same, split_of
from dsft.data.text import PACKED, format_of
from dsft.errors import UserError

DOCUMENTS = {".txt", ".md"}
METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
"""Files about a data set, which `datasets` and the hub write beside it."""


@dataclass(frozen=True)
class Asked:
    """What of a data set is asked for.

    Attributes:
        split: A split's name.
        subset: A subset's, or None.
        setting: The setting that chooses the split, for messages.
    """

    split: str = "train"
    subset: str | None = None
    setting: str = "data.split"


@dataclass
class Choice:
    """The files, and how they were chosen.

    Attributes:
        paths: In the order in which they are read.
        by_split: Whether a split was chosen: there are any.
        by_subset: Whether a subset was.
        left_out: Why -> files that are not read for it.
        unread: Settings of the data set's card that have no effect here.
    """

    paths: list[Path]
    by_split: bool = False
    by_subset: bool = False
    left_out: dict[str, list[Path]] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)


def choose(spec: str, asked: Asked, known: Callable[[Path], bool]) -> Choice | None:
    """The files that a spec stands for; None where nothing is at that path.

    Args:
        spec: Path of a file, of a directory, which is searched recursively, or a glob.
        asked: What of a directory's or a glob's files is wanted.
        known: Whether a file is of a format that can be read.

    Raises:
        UserError: There are splits or subsets, and those asked for are not among them.
    """
    path = Path(spec).expanduser()
    if is_file(path):
        return Choice([path])
    if path.is_dir():
        return _of_directory(path, asked, known)
    if glob.has_magic(spec):
        return _of_glob(path, asked, known)
    return None


def is_file(path: Path) -> bool:
    """A file, or a link to something that is not there."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def _of_directory(root: Path, asked: Asked, known: Callable[[Path], bool]) -> Choice:
    named = subsets(root)
    subset = _subset(root, named, asked)
    if isinstance(subset, Subset) and subset.patterns:
        files = subset.files()
        chosen = Choice([], by_subset=asked.subset is not None, unread=subset.unread)
        _take(chosen, files, asked, root)
        return chosen
    within = subset.directory if isinstance(subset, Subset) else subset
    found = [p for p in within.rglob("*") if is_file(p) and not _hidden(p.relative_to(within))]
    chosen = _sorted_out(found, known)
    chosen.by_subset = asked.subset is not None
    _take(chosen, by_split(chosen.paths, within), asked, root)
    return chosen


def _of_glob(pattern: Path, asked: Asked, known: Callable[[Path], bool]) -> Choice:
    """A glob that says a split itself, as `test-*.jsonl`, means that one, whichever is asked for."""
    root = Path(*takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    chosen = _sorted_out([path for path in map(Path, glob.glob(str(pattern), recursive=True)) if is_file(path)], known)
    files = by_split(chosen.paths, root)
    said = split_of(pattern.relative_to(root))
    if not (said and len(files) == 1 and same(said, min(files))):
        _take(chosen, files, asked, pattern)
    return chosen


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _subset(root: Path, named: list[Subset], asked: Asked) -> Subset | Path:
    """The subset that is asked for, as the card has it or as a directory."""
    wanted = [one for one in named if (one.name == asked.subset if asked.subset else one.is_default)]
    if wanted:
        return wanted[0]
    if asked.subset is None and not named:
        return root
    places = [root / asked.subset, root / "data" / asked.subset] if asked.subset else []
    if found := [place for place in places if place.is_dir() and root.resolve() in place.resolve().parents]:
        return found[0]
    inner = [
        path for path in (*root.iterdir(), *root.glob("data/*")) if path.is_dir() and not path.name.startswith(".")
    ]
    there = ", ".join([one.name for one in named] or sorted(path.name for path in inner)) or "none"
    wrong = f"no subset {asked.subset}" if asked.subset else "it has several subsets"
    raise UserError(f"{root}: {wrong}; there are {there}: choose one with data.subset=NAME")


def _sorted_out(found: list[Path], known: Callable[[Path], bool]) -> Choice:
    """Files with records, in order; without those about a data set, and without texts that lie beside records."""
    left_out: dict[str, list[Path]] = {}
    paths = []
    listed = {path.parent: _listed(path) for path in found if path.name == "state.json"}
    for path in sorted(path for path in found if known(path)):
        names = listed.get(path.parent)
        if path.name in METADATA or (names and path.name == "state.json") or is_card(path):
            left_out.setdefault("about the data set", []).append(path)
        elif names and path.suffix == ".arrow" and path.name not in names:
            left_out.setdefault("not in state.json", []).append(path)
        else:
            paths.append(path)
    _refuse_copies(paths)
    texts = [path for path in paths if format_of(path) in DOCUMENTS]
    if 0 < len(texts) < len(paths):
        left_out["texts beside records"] = texts
        paths = [path for path in paths if path not in {*texts}]
    return Choice(paths, left_out=left_out)


def _refuse_copies(paths: list[Path]) -> None:
    """Refuse files that lie beside a packed copy of themselves, by name: their records would count twice.

    Raises:
        UserError: There are two of one.
    """
    seen: dict[Path, Path] = {}
    for path in paths:
        plain = path.with_suffix("") if path.suffix.lower() in PACKED else path
        if plain in seen:
            raise UserError(f"{seen[plain]} and {path.name} are the same file, packed or not: take one of them away")
        seen[plain] = path


def _listed(state: Path) -> set[str] | None:
    """Names of the files that `save_to_disk` says it wrote; None if it did not write this.

    Raises:
        UserError: One is not there.
    """
    try:
        names = {one["filename"] for one in json.loads(state.read_bytes())["_data_files"]}
    except (ValueError, KeyError, TypeError, OSError):
        return None
    if missing := sorted(name for name in names if not (state.parent / name).exists()):
        raise UserError(f"{state}: {missing[0]} is not there: fetch it, or save the data set again")
    return names


def _take(chosen: Choice, files: dict[str, list[Path]], asked: Asked, spec: Path) -> None:
    """Choose the split that is asked for, where there are any."""
    if not files:
        return
    mine = next((split for split in files if split and same(split, asked.split)), None)
    if mine is None:
        there = ", ".join(sorted(split for split in files if split))
        raise UserError(f"{spec}: no split {asked.split}; there are {there}: choose one with {asked.setting}=NAME")
    chosen.by_split, chosen.paths = True, files[mine]
    for split, paths in sorted(files.items()):
        if split != mine:
            chosen.left_out[f"of the split {split}" if split else "of no split"] = paths
