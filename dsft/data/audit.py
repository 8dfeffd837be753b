"""What became of the records: counts, lengths, supervised share and one example, to read before a run begins."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from dsft.data.blocks import TARGET, WEIGHTS
from dsft.data.held_out import repeated
from dsft.data.prompting import left_out
from dsft.types import Example

if TYPE_CHECKING:
    from dsft.data.dataset import TokenDataset

BAD = "malformed (data.on_bad_record=skip)"

MAX_LISTED = 100
"""Bad records, and notes, that are listed; all are counted."""

PERCENTILES = {"min": 0, "p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "p99": 99, "max": 100}


def part(source: str, report: dict[str, Any], dataset: TokenDataset, held_out: int) -> dict[str, Any]:
    """One split's part of `audit.json`; `read = kept + held out + dropped`, all in records.

    Args:
        source: What was read.
        report: `read` (records), `dropped` (reason -> records), `parts_dropped` (reason -> parts of kept records),
            `notes` (what is to be said of records -> records read), `bad` (origin and problem of the first malformed
            records) and `files` (what was found of files, see `_about_files`).
        dataset: The split.
        held_out: Records that were kept, but for the other split.
    """
    # "lower" takes lengths that occur, so that no half tokens are shown
    lengths = np.percentile(dataset.lengths, list(PERCENTILES.values()), method="lower")
    return {
        "source": source,
        "files": report["files"],
        "records_read": report["read"],
        "records_kept": count_records(dataset),
        "records_held_out": held_out,
        "records_repeated": repeated(dataset.contents[begins(dataset.records)]),
        "records_dropped": report["dropped"],
        "records_truncated": int(begins(dataset.records[dataset.truncated]).sum()),
        "examples": len(dataset),
        "parts_dropped": report["parts_dropped"],
        "notes": report["notes"],
        "bad_records": [{"origin": origin, "problem": problem} for origin, problem in report["bad"]],
        "tokens": int(dataset.lengths.sum()),
        **_supervision(dataset),
        "lengths": {name: int(length) for name, length in zip(PERCENTILES, lengths, strict=True)},
    }


def idle_ignores(parts: dict[str, Any], names: list[str]) -> list[str]:
    """Warnings of fields that are to be left out (`data.ignore_fields`), and that no record has.

    Args:
        parts: Of each split its `part`, or None.
        names: Of the fields.
    """
    counted = [part["notes"] for part in parts.values() if part]
    idle = [name for name in names if not any(found.get(left_out(name)) for found in counted)]
    return [f"data.ignore_fields names `{name}`, which no record has" for name in idle]


def notes(counts: Counter[str]) -> dict[str, int]:
    """The notes as they are kept: by name, and the rarest together where they are very many."""
    kept = counts.most_common(MAX_LISTED)
    others = counts - Counter(dict(kept))
    rest = {f"{len(others)} further kinds of note": others.total()} if others else {}
    return dict(sorted(kept)) | rest


def count_records(dataset: TokenDataset | None) -> int:
    """How many records a split's examples were made of; 0 where there is no split."""
    return int(begins(dataset.records).sum()) if dataset else 0


def begins(records: np.ndarray) -> np.ndarray:
    """Which examples are the first of their record; bool, from the never falling records of all."""
    first = np.ones(len(records), dtype=np.bool_)
    np.not_equal(records[1:], records[:-1], out=first[1:])
    return first


def _supervision(dataset: TokenDataset) -> dict[str, Any]:
    """How many tokens are learnt, where a task says it of each."""
    if WEIGHTS not in dataset.entry.columns:
        return {}
    supervised = int(dataset.entry.learnt[dataset.selection].sum())
    total = float(dataset.weights.sum())
    weight = {} if total == supervised else {"supervised_weight": total}
    return {"supervised_tokens": supervised, "supervised_share": supervised / int(dataset.lengths.sum())} | weight


def example_spans(example: Example, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, bool | None]]:
    """The example as text, cut where supervision begins or ends: (text, supervised) in order.

    Tokens are decoded together, so that a character that several tokens share comes out whole. Without a column that
    says which tokens are supervised it is one text, and None.
    """
    if TARGET in example.columns:
        parts = zip((example.ids, example.columns[TARGET]), (False, True))
        return [(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False), told) for ids, told in parts]
    if WEIGHTS not in example.columns:
        return [(tokenizer.decode(example.ids.tolist(), clean_up_tokenization_spaces=False), None)]
    spans, end, shown = [], 0, ""
    for supervised, run in groupby((example.columns[WEIGHTS] > 0).tolist()):
        end += len(list(run))
        text = tokenizer.decode(example.ids[:end].tolist(), clean_up_tokenization_spaces=False)
        spans.append((text[len(shown) :], supervised))
        shown = text
    return spans


def show(audit: dict[str, Any], example: Example, tokenizer: PreTrainedTokenizerFast, console: Console) -> None:
    """Print the audit as a table and one example; its supervised part is green, or in ⟦brackets⟧ without colour."""
    splits = {name: audit[name] for name in ("train", "validation", "test") if audit.get(name)}
    table = Table(title="Data", title_justify="left")
    table.add_column("")
    for name in splits:
        table.add_column(name, justify="right", overflow="fold")
    for label, cells in _rows(list(splits.values())):
        table.add_row(label, *cells)
    console.print(table)
    if packing := audit.get("packing"):
        fill = f"{packing['row_fill']:.1%} full" if "row_fill" in packing else f"{packing['padding']:.1%} padding"
        console.print(
            f"packing={packing['packing']}: {packing['examples']:,} examples in {packing['rows']:,} rows, "
            f"{fill}; {packing['steps_per_epoch']:,} steps per epoch",
            highlight=False,
        )
    for name, split in splits.items():
        for line in _about_files(split["files"]):
            console.print(Text(f"{name}: {line}"))
        for bad in split["bad_records"][:3]:
            console.print(Text(f"{name}: left out {bad['origin']}: {bad['problem']}"))
    console.print(Panel(_coloured(example_spans(example, tokenizer), console), title="Example", title_align="left"))


def _about_files(files: dict[str, Any]) -> Iterator[str]:
    """What there is to say of a split's files: `formats` (format -> files), `left_out` and `noticed` (what -> how many
    `files`, and the `first` of them) and `unread` (settings of a data set's card)."""
    if len(formats := files.get("formats", {})) > 1:
        yield "files of several formats: " + ", ".join(f"{count} {kind}" for kind, count in formats.items())
    for key, are in (("left_out", "left out"), ("noticed", "")):
        for what, about in files.get(key, {}).items():
            count, first = about["files"], ", ".join(about["first"])
            more = ", ..." if count > len(about["first"]) else ""
            yield f"{count} {'file' if count == 1 else 'files'} {what}{are and f', {are}'}: {first}{more}"
    if unread := files.get("unread"):
        yield f"settings of the data set's card that are not read: {', '.join(unread)}"


def _rows(splits: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Labels, and a cell for each split; what no split has, or what says nothing new, is left out."""
    reasons = sorted({reason for split in splits for reason in split["records_dropped"]})
    dropped = {f"dropped: {r}": [f"{split['records_dropped'].get(r, 0):,}" for split in splits] for r in reasons}
    parts = sorted({reason for split in splits for reason in split["parts_dropped"]})
    dropped |= {f"left out: {r}": [f"{split['parts_dropped'].get(r, 0):,}" for split in splits] for r in parts}
    noted = sorted({note for split in splits for note in split["notes"]})
    dropped |= {note: [f"{split['notes'].get(note, 0):,}" for split in splits] for note in noted}
    several = any(split["examples"] != split["records_kept"] for split in splits)
    counts = {
        label: [f"{split[key]:,}" for split in splits]
        for label, key in (
            ("records read", "records_read"),
            ("records kept", "records_kept"),
            ("held out", "records_held_out"),
            *(
                [("say what an earlier one says", "records_repeated")]
                if any(split["records_repeated"] for split in splits)
                else []
            ),
            *([("examples of these", "examples")] if several else []),
            ("truncated", "records_truncated"),
            ("tokens", "tokens"),
            ("supervised tokens", "supervised_tokens"),
        )
        if key in splits[0]
    }
    also = [split.get("records_also_trained_on", 0) for split in splits]
    if any(also):
        dropped["warning: also trained on"] = [f"{count:,}" for count in also]
    supervised = [f"{split['supervised_share']:.1%}" for split in splits if "supervised_share" in split]
    rest = {
        **({"supervised share": supervised} if supervised else {}),
        f"length {', '.join(PERCENTILES)}": [" ".join(map(str, split["lengths"].values())) for split in splits],
    }
    return list({"source": [split["source"] for split in splits], **counts, **dropped, **rest}.items())


def _coloured(spans: list[tuple[str, bool | None]], console: Console) -> Text:
    text = Text()
    in_colour = console.color_system is not None and not console.no_color
    for piece, supervised in spans:
        marked = f"⟦{piece}⟧" if supervised and not in_colour else piece
        text.append(marked, style="bold green" if supervised and in_colour else "")
    if any(supervised is not None for _, supervised in spans):
        text.append("\nsupervised: " + ("green" if in_colour else "in ⟦ ⟧"), style="dim")
    return text
