"""What split a file is of, by its name, as data sets are laid out on hubs and disks.

The words are those of the hub; shards as in `data/train_sft-00000-of-00002.parquet` name a split in full.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePath

from dsft.data.text import PACKED
from dsft.errors import UserError

WORDS = {
    "train": "train training 训练",
    "validation": "validation valid val dev 验证 开发集",
    "test": "test testing eval evaluation 测试 评测 评估",
}
"""Split -> words that name it, alone or with `set` or `data` behind them."""

_SPLIT_OF = {word: split for split, words in WORDS.items() for word in words.split()}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}\b.*")


def same(one: str, other: str) -> bool:
    """Whether two names are of the same split: `dev` is `validation`."""
    return _SPLIT_OF.get(one, one) == _SPLIT_OF.get(other, other)


def split_of(path: PurePath) -> str | None:
    """The split that a path says its file is of; the file's name goes before its directories', inner before outer.

    Args:
        path: Of the file, within the directory that holds the data set.

    Raises:
        UserError: One name says two.
    """
    name = (path.with_suffix("") if path.suffix.lower() in PACKED else path).stem
    if shard := _SHARD.fullmatch(name):
        on_hub = path.parts[:-1] == ("data",) and path.suffix != ".arrow"  # save_to_disk calls all of them data
        if on_hub or _named(shard[1], path):
            return shard[1]
    for part in (name, *reversed(path.parts[:-1])):
        if split := _named(part, path):
            return split
    return None


def _named(name: str, path: PurePath) -> str | None:
    words = [re.sub("(set|data)$", "", word.lower()) for word in _WORD.findall(name)]
    found = {_SPLIT_OF[word] for word in words if word in _SPLIT_OF}
    found |= {split for word, split in _SPLIT_OF.items() if not word.isascii() and word in name}
    if len(found) > 1:
        raise UserError(
            f"{path}: it cannot be told whether this is of the split {' or '.join(sorted(found))}: rename it, or give "
            "the files themselves"
        )
    return min(found, default=None)


def by_split(paths: list[Path], root: Path) -> dict[str, list[Path]]:
    """Files by their split; those that say none are of `train` where no other is, and else of the split ""; {} if no
    file says one.

    Args:
        paths: Files.
        root: The directory that holds the data set.

    Raises:
        UserError: It cannot be told of a file.
    """
    found: dict[str, list[Path]] = {}
    for path in paths:
        split = _saved(path, root) or split_of(path.relative_to(root)) or ""
        known = next((name for name in found if same(name, split)), split)
        found.setdefault(known, []).append(path)
    if set(found) == {""}:
        return {}
    if "" in found and not any(same(name, "train") for name in found):
        found["train"] = found.pop("")
    return found


def _saved(path: Path, root: Path) -> str | None:
    """The split of a file in what `DatasetDict.save_to_disk` wrote: a directory for each."""
    for directory in (path.parent, *path.parent.parents):
        if directory == root:
            return None
        if (directory.parent / "dataset_dict.json").is_file():
            return directory.name
    return None
