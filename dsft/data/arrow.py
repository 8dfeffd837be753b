"""Parquet files, and the Arrow files of `datasets.save_to_disk`, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsft.data.raw import BadRecord, Raw, Reading
from dsft.errors import UserError

ROWS = 256
"""Rows that are Python objects at a time; of an Arrow file, a whole batch (1,000 rows) is in memory beside them."""


def parquet(path: Path, reading: Reading) -> Iterator[Raw | BadRecord]:
    """The rows of a Parquet file, as `datasets` decodes them, without the nulls that Arrow fills in.

    Raises:
        UserError: It is none, or is damaged.
    """
    from pyarrow import parquet

    if not path.stat().st_size:
        return
    # `datasets` would hold a whole group of rows, and files often have but one
    with _named(path, "Parquet"), parquet.ParquetFile(path) as file:
        yield from _rows(path, file.schema_arrow, file.iter_batches(batch_size=ROWS))


def arrow(path: Path, reading: Reading) -> Iterator[Raw | BadRecord]:
    """The rows of an Arrow file, in the format for streams or that for files; otherwise as `parquet`."""
    import pyarrow

    if not path.stat().st_size:
        return
    with _named(path, "Arrow"), pyarrow.OSFile(str(path)) as file:
        begin = file.read(6)
        file.seek(0)
        if begin == b"ARROW1":
            opened = pyarrow.ipc.open_file(file)
            batches = map(opened.get_batch, range(opened.num_record_batches))
        else:
            batches = opened = pyarrow.ipc.open_stream(file)
        cut = (batch.slice(at, ROWS) for batch in batches for at in range(0, batch.num_rows, ROWS))
        yield from _rows(path, opened.schema, cut)


@contextmanager
def _named(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Arrow and datasets each have their own
        raise UserError(f"{path}: cannot be read as {what}: {error}") from error


def _rows(path: Path, schema: Any, batches: Iterator[Any]) -> Iterator[Raw | BadRecord]:
    import datasets

    decode = datasets.Features.from_arrow_schema(schema).decode_example
    number = 0
    for batch in batches:
        for row in _python(batch):
            number += 1
            origin = f"{path}:{number}"
            try:
                if isinstance(row, Exception):
                    raise row
                yield Raw(without_nulls(decode(row)), origin)
            except Exception as error:  # a picture that is none, text that is no UTF-8
                yield BadRecord(origin, f"cannot be decoded: {error}")


def _python(batch: Any) -> Iterator[dict[str, Any] | Exception]:
    """The rows of a batch; in place of one that cannot be had (its text is no UTF-8), why.

    Arrow trusts what a file says of its own layout, and reads wherever that points to: a damaged one would end the
    process, if it were not validated.
    """
    try:
        batch.validate(full=True)
    except ValueError:
        rows = (batch.slice(at, 1) for at in range(batch.num_rows))
    else:
        yield from batch.to_pylist()
        return
    for row in rows:
        try:
            row.validate(full=True)
            yield from row.to_pylist()
        except ValueError as error:
            yield error


def without_nulls(value: Any) -> Any:
    """Undo Arrow's filling in of keys that other rows have."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
