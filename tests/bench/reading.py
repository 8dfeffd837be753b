"""Peak memory and speed of reading files of every format, records alone: nothing is tokenised.

    python tests/bench/reading.py [--records 1000 300000] [--formats lines array ...]

Each file is written a record at a time, and read by a process of its own. Memory is the largest resident set of that
process, and what it is above that of reading the first count.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import json
import lzma
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa

WORDS = "the red fox sees a blue bird and the bird sees the fox 月亮 在 哪里 ? 在 山 上 where is the moon".split()


def lines(rows: Iterator[dict[str, str]]) -> Iterator[str]:
    return (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def objects(rows: Iterator[dict[str, str]]) -> Iterator[str]:
    return (json.dumps(row, ensure_ascii=False, indent=2) + "\n" for row in rows)


def array(rows: Iterator[dict[str, str]]) -> Iterator[str]:
    yield "["
    for number, row in enumerate(rows):
        yield ("," if number else "") + json.dumps(row, ensure_ascii=False)
    yield "]"


def data(rows: Iterator[dict[str, str]]) -> Iterator[str]:
    yield '{"version": 1, "data": '
    yield from array(rows)
    yield "}"


def table(rows: Iterator[dict[str, str]]) -> Iterator[str]:
    yield "instruction,output\r\n"
    for row in rows:
        yield f'"{row["instruction"]}","{row["output"]}"\r\n'


FORMATS: dict[str, tuple[str, Callable[[Iterator[dict[str, str]]], Iterator[str]] | None, str]] = {
    "lines": ("x.jsonl", lines, "utf-8"),
    "lines in GB18030": ("x.jsonl", lines, "gb18030"),
    "lines in UTF-16": ("x.jsonl", lines, "utf-16"),
    "lines, gzip": ("x.jsonl.gz", lines, "utf-8"),
    "lines, zstd": ("x.jsonl.zst", lines, "utf-8"),
    "lines, bzip2": ("x.jsonl.bz2", lines, "utf-8"),
    "lines, xz": ("x.jsonl.xz", lines, "utf-8"),
    "array": ("x.json", array, "utf-8"),
    "data": ("x.json", data, "utf-8"),
    "objects": ("x.json", objects, "utf-8"),
    "csv": ("x.csv", table, "utf-8"),
    "csv in GB18030": ("x.csv", table, "gb18030"),
    "parquet": ("x.parquet", None, ""),
    "save_to_disk": ("saved", None, ""),
}
"""Name -> file, what writes its text (`datasets` writes the others), and the encoding."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[1000, 300_000])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=[*FORMATS])
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure)
        return
    for name in options.formats:
        least = None
        for count in options.records:
            with tempfile.TemporaryDirectory() as home:
                found = run(write(Path(home), name, count))
            least = found["mib"] if least is None else least
            print(
                f"{name:16} {count:>9,} records: {found['read'] / found['seconds']:9,.0f} records/s, "
                f"{found['mib']:6,.0f} MiB, {found['mib'] - least:6,.0f} MiB above the first",
                flush=True,
            )


def records(count: int) -> Iterator[dict[str, str]]:
    chance = random.Random(0)
    for number in range(count):
        answer = " ".join(chance.choices(WORDS, k=chance.randint(20, 80)))
        yield {"instruction": f"question {number} ?", "output": answer}


def write(home: Path, name: str, count: int) -> Path:
    """A file or directory with so many records."""
    file, text, encoding = FORMATS[name]
    path = home / file
    if text is None:
        import datasets

        made = datasets.Dataset.from_generator(records, gen_kwargs={"count": count}, cache_dir=str(home / "cache"))
        made.save_to_disk(path) if name == "save_to_disk" else made.to_parquet(path)
        return path
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    opener = openers.get(path.suffix, open)
    zstd = path.suffix == ".zst"
    with pa.CompressedOutputStream(str(path), "zstd") if zstd else opener(path, "wb") as out:
        if encoding == "utf-16":
            out.write(b"\xff\xfe")
        for piece in text(records(count)):
            out.write(piece.encode("utf-16-le" if encoding == "utf-16" else encoding))
    return path


def run(path: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", str(path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout)


def measure(path: str) -> None:
    """Read the records, and print how many there were, how long it took and the peak of this process's memory."""
    from dsft.data.sources import Found

    begun = time.perf_counter()
    read = sum(1 for _ in Found(path).records())
    seconds = time.perf_counter() - begun
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    print(json.dumps({"read": read, "seconds": seconds, "mib": mib}))


if __name__ == "__main__":
    main()
