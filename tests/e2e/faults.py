"""How a run ends in which one rank fails, under every launcher: a table in Markdown.

    PYTHONPATH=.:tests python tests/e2e/faults.py [--count 30] [--seed 0] [--limit 90] [--kinds A,B] [--places A,B]

Every fault is a run of two ranks of a tiny model. Place, rank, ZeRO stage, launcher and kind of exception are dealt
out evenly and shuffled by the seed. Measured are the seconds from the fault until the last process is gone, the exit
code that a shell sees, and whether the message of the failed rank is the last that is heard of any rank.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import faulty
import helpers
import tiny

LAUNCHERS = ("deepspeed", "torchrun", "mpirun")
PLACES = ("building", "step", "evaluation", "sampling", "saving", "export")
KINDS = ("ValueError", "KeyError", "RuntimeError", "MemoryError", "unpicklable", "several lines")
SCRIPT = "tests/e2e/faulty.py"
RIDDLE = re.compile(r"gloo|c10d|Connection|terminate called|Fatal Python|Traceback")
GONE = ("SIGKILL", "SIGSEGV")
"""Kinds whose rank can say nothing itself."""


@dataclass(frozen=True)
class Fault:
    """One run's fate."""

    place: str
    rank: int
    stage: int
    launcher: str
    kind: str


@dataclass(frozen=True)
class Ending:
    """What became of it.

    Attributes:
        seconds: From the fault to the end of the last process; None where the limit was reached, or no fault came.
        code: The launcher's exit code; None where the limit was reached.
        heard: Whether the last that any rank wrote is the failed rank's message.
        output: All that was written to stderr.
    """

    seconds: float | None
    code: int | None
    heard: bool
    output: str


def deal(count: int, seed: int, places: tuple[str, ...] = PLACES, kinds: tuple[str, ...] = KINDS) -> list[Fault]:
    """`count` faults, each place, rank, stage, launcher and kind equally often as far as they divide it."""
    generator = random.Random(seed)

    def column(values) -> list:
        repeated = (list(values) * count)[: -(-count // len(values)) * len(values)]
        generator.shuffle(repeated)
        return repeated[:count]

    return [Fault(*row) for row in zip(*map(column, (places, (0, 1), (0, 3), LAUNCHERS, kinds)))]


def arguments(home: Path) -> list[str]:
    """Arguments of a run that evaluates, samples, saves and exports within two steps."""
    model = tiny.save(home / "model")
    train = tiny.write_jsonl(home / "train.jsonl", tiny.records(24))
    validation = tiny.write_jsonl(home / "validation.jsonl", tiny.records(6, seed=1))
    return [
        f"model.path={model}",
        "data=jsonl",
        f"data.train={train}",
        f"data.validation={validation}",
        f"data.cache_dir={home / 'cache'}",
        "data.max_length=64",
        "precision=fp32",
        "batch.micro_batch_size=1",
        "batch.gradient_accumulation_steps=2",
        "train.max_steps=2",
        "train.save_every=1",
        "train.samples=1",
        "train.sample_tokens=4",
    ]


def command(launcher: str) -> list:
    """The launcher for two ranks on this host, up to the script's arguments."""
    port = ["--master_port", helpers.free_port()]
    return {
        "deepspeed": [helpers.BIN / "deepspeed", "--num_accelerators", 2, *port, SCRIPT],
        "torchrun": [helpers.BIN / "torchrun", "--nproc_per_node", 2, *port, SCRIPT],
        "mpirun": [*mpirun(), "-np", 2, sys.executable, SCRIPT],
    }[launcher]


def mpirun() -> list:
    """An mpirun that starts on any machine; empty where there is none."""
    found = shutil.which("mpirun", path=f"{helpers.BIN}{os.pathsep}{os.environ['PATH']}")
    return [found, "--allow-run-as-root", "--oversubscribe"] if found else []


def run(fault: Fault, base: list[str], scratch: Path, limit: float = 90.0) -> Ending:
    """Run to the end of all processes, or for `limit` seconds after the fault."""
    stamp = scratch / f"{time.monotonic_ns()}.stamp"
    zero = f"deepspeed=zero{fault.stage}"
    # each place is met several times; the second is amid the run, but for what comes once
    call = 1 if fault.place in ("tokenising", "building", "sampling", "saving") else 2
    os.environ |= {"FAULT": f"{fault.place}:{fault.rank}:{call}:{fault.kind}", "FAULT_STAMP": str(stamp)}
    run_dir = stamp.with_suffix(".run")
    with helpers.Command([*command(fault.launcher), f"run_dir={run_dir}", *base, zero], scratch) as running:
        begun = time.time()
        while running.popen.poll() is None or running._processes():
            since = float(stamp.read_text() or begun) if stamp.exists() else begun + limit
            if time.time() - since > limit:
                running.kill()
                shutil.rmtree(run_dir, ignore_errors=True)
                return Ending(None, None, False, running.err)
            time.sleep(0.05)
        end = time.time()
        code, output = running.popen.returncode, running.err
    shutil.rmtree(run_dir, ignore_errors=True)
    seconds = end - float(stamp.read_text()) if stamp.exists() else None
    return Ending(seconds, code, heard(fault, output), output)


def heard(fault: Fault, output: str) -> bool:
    """Whether the message is there, and no rank says anything of another kind after it."""
    sign = "without a word" if fault.kind in GONE else faulty.MESSAGE
    _, found, after = output.rpartition(sign)
    return bool(found) and not RIDDLE.search(after) and after.count("\n") < 60


def main() -> None:
    """Run them all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=90.0)
    parser.add_argument("--places", type=lambda text: tuple(text.split(",")), default=PLACES)
    parser.add_argument("--kinds", type=lambda text: tuple(text.split(",")), default=KINDS)
    parser.add_argument("--keep", type=Path, help="directory for what each run wrote")
    options = parser.parse_args()
    print(
        "| # | launcher | ZeRO | rank | place | kind | seconds until all are gone | exit code | its message is last |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    endings = []
    with tempfile.TemporaryDirectory() as home:
        base = arguments(Path(home))
        for number, fault in enumerate(deal(options.count, options.seed, options.places, options.kinds), 1):
            ending = run(fault, base, Path(home), options.limit)
            endings.append(ending)
            if options.keep:
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / f"{number}.txt").write_text(ending.output, encoding="utf-8")
            row = (
                number,
                fault.launcher,
                fault.stage,
                fault.rank,
                fault.place,
                fault.kind,
                *shown(ending, options.limit),
            )
            print("|", *(f"{value} |" for value in row), flush=True)
    ended = [ending for ending in endings if ending.code != 0]
    within = [ending.seconds for ending in ended if ending.seconds is not None]
    print(
        f"\n{sum(s <= 10 for s in within)} of {len(ended)} gone within 10 s (the slowest "
        f"{max(within, default=float('nan')):.1f} s), {sum(e.heard for e in ended)} with their own message last; "
        f"{len(endings) - len(ended)} went on"
    )


def shown(ending: Ending, limit: float) -> tuple[str, str, str]:
    """Seconds, exit code and whether the message is last, for the table. A failed sample does not end a run."""
    if ending.code == 0:
        return "went on", "0", "a warning" if ending.heard else "**no**"
    seconds = f"over {limit:.0f}" if ending.seconds is None else f"{ending.seconds:.1f}"
    return seconds, str(ending.code), "yes" if ending.heard else "**no**"


if __name__ == "__main__":
    main()
