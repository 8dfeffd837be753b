"""Peak memory and speed of preparing a data set: records of a file become examples in the cache.

    python tests/bench/preparation.py [--records 10000 100000 300000] [--workers 1] [--rounds 1]

Each size is prepared by a process of its own, from a file that is written before, a record at a time, with a tiny
tokenizer of the tests. Memory is the largest resident set of that process, and what it is above that of preparing 100
records.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = "the red fox sees a blue bird and the bird sees the fox ; where is the moon ? it is over the hill".split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[10_000, 100_000, 300_000])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.workers)
        return
    with tempfile.TemporaryDirectory() as home:
        few = run(Path(home), 100, options.workers)
        for count in options.records * options.rounds:
            found = run(Path(home), count, options.workers)
            print(
                f"{count:>9,} records: {count / found['seconds']:7,.0f} records/s, "
                f"{found['mib']:6,.0f} MiB, {found['mib'] - few['mib']:6,.0f} MiB above 100 records",
                flush=True,
            )


def run(home: Path, count: int, workers: int) -> dict[str, float]:
    """Write a file of `count` records, and prepare it in another process."""
    file = home / "train.jsonl"
    chance = random.Random(0)
    with file.open("w", encoding="utf-8") as out:
        for number in range(count):
            answer = " ".join(chance.choices(WORDS, k=chance.randint(20, 80)))
            out.write(json.dumps({"instruction": f"question {number} ?", "output": answer}) + "\n")
    command = [sys.executable, __file__, "--measure", str(file), "--workers", str(workers)]
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout)


def measure(file: Path, workers: int) -> None:
    """Prepare the file's records, and print how long it took and the peak of this process's memory."""
    import tiny

    from dsft.config.schema import DataConfig

    tokenizer = tiny.tokenizer()
    with tempfile.TemporaryDirectory() as cache:
        data = DataConfig(train=str(file), cache_dir=cache, num_workers=workers)
        begun = time.perf_counter()
        tiny.prepare(data, tokenizer)
        seconds = time.perf_counter() - begun
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    print(json.dumps({"seconds": seconds, "mib": mib}))


if __name__ == "__main__":
    main()
