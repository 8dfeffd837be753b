"""What the card of a data set (README.md) says of its subsets and splits, in the YAML at its head."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dsft.errors import UserError

CARD = "README.md"
_READ = {"config_name", "data_files", "data_dir", "default", "description", "version"}


@dataclass(frozen=True)
class Subset:
    """One subset (`config` in a card's words).

    Attributes:
        name: Its name.
        directory: Where its files are.
        patterns: Split -> globs within the directory; empty where the card leaves that to the files' names.
        is_default: Whether it is meant where none is named.
        unread: Settings of readers of the hub's own, which have no effect here.
    """

    name: str
    directory: Path
    patterns: dict[str, list[str]]
    is_default: bool
    unread: list[str]

    def files(self) -> dict[str, list[Path]]:
        """Split -> its files, by pattern, sorted.

        Raises:
            UserError: A glob finds nothing.
        """
        found: dict[str, list[Path]] = {}
        for split, patterns in self.patterns.items():
            paths: dict[Path, None] = {}
            for pattern in patterns:
                matches = sorted(path for path in self.directory.glob(pattern) if not path.is_dir())
                if not matches:
                    raise UserError(
                        f"{self.directory / CARD}: its split {split} of {self.name} is {pattern}, and there is no such "
                        "file: fetch it, or give the files themselves"
                    )
                paths |= dict.fromkeys(matches)
            found[split] = [*paths]
        return found


def is_card(path: Path) -> bool:
    """Whether a file is a data set's card and no document: it has its name, and begins with YAML."""
    if path.name.lower() != CARD.lower():
        return False
    try:
        with path.open("rb") as file:
            return file.read(64).removeprefix(b"\xef\xbb\xbf").startswith(b"---")
    except OSError:  # a link to nothing, or a file that may not be read: whoever wants its text will say so
        return False


def subsets(root: Path) -> list[Subset]:
    """The subsets that the card in a directory names; none without a card, or where it names none.

    Raises:
        UserError: The card cannot be read.
    """
    path = root / CARD
    if not path.is_file() or not is_card(path):
        return []
    head = path.read_text(encoding="utf-8-sig", errors="replace").split("---", 2)
    try:
        said = yaml.safe_load(head[1])
        configs = said.get("configs", []) if isinstance(said, dict) else []
        return [_subset(config, root, alone=len(configs) == 1) for config in configs]
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: the YAML at its head does not say what the data set's files are: {error}") from error


def _subset(config: dict[str, Any], root: Path, alone: bool) -> Subset:
    name = str(config["config_name"])
    files = config.get("data_files") or {}
    if isinstance(files, str) or (isinstance(files, list) and all(isinstance(one, str) for one in files)):
        files = {"train": files}
    elif isinstance(files, list):
        files = {str(one["split"]): one["path"] for one in files}
    patterns = {split: [paths] if isinstance(paths, str) else [*map(str, paths)] for split, paths in files.items()}
    for pattern in (pattern for some in patterns.values() for pattern in some):
        if "://" in pattern or pattern.startswith("/"):
            raise ValueError(f"{pattern} lies elsewhere")
    return Subset(
        name,
        root / str(config.get("data_dir") or ""),
        patterns,
        alone or name == "default" or config.get("default") is True,
        sorted({*config} - _READ),
    )
