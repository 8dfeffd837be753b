"""`launch/predict.py`: what a trained model says of records, in their order, on all ranks.

Records are taken in blocks. Rank 0 reads a block and every rank answers its share of it with the whole model; what
comes of a block is a file of its own, named by all that it depends on, so that a run that was killed goes on behind
the last whole one. At the end these files become the output.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dsft import __version__
from dsft.commands import trained
from dsft.commands.trained import Trained, Who
from dsft.config import effect, load
from dsft.config.schema import Packing
from dsft.data import prompting as prompts
from dsft.data.loader import evaluation_batches
from dsft.data.sources import BadRecord, Found, Raw
from dsft.errors import UserError
from dsft.evaluate import own_settings
from dsft.metrics import Tally
from dsft.model import attention, layout
from dsft.model.kind import Inseparable
from dsft.model.noise import Noise
from dsft.runtime.files import write_bytes, write_json
from dsft.runtime.locks import hold
from dsft.runtime.place import Place
from dsft.runtime.world import World, join, leave
from dsft.tasks import Task, isolation, settings_by_task
from dsft.tasks.collate import Collator
from dsft.tasks.forward import Forward
from dsft.tasks.labels import COLUMN
from dsft.tasks.module import TaskModule
from dsft.tasks.task import Context, Outcome, Sampling, read
from dsft.types import Batch, Dropped, Example

BLOCK, WRITTEN_BLOCK = 512, 32
"""Records of a block; of tasks that generate, which take longer."""

BUDGET = 8
"""Rows of `data.max_length` tokens that a forward pass takes at most, unless `eval.micro_batch_size` says otherwise."""

TOKENS = 256
"""Tokens of a generated answer at most, unless it is said."""

BY_ROWS = {"data.max_length", "data.on_overflow", "data.packing", "eval.micro_batch_size", "model.attention"}
"""Settings that a task reads which answers by rows; one that writes reads those that it says (`Task.writes_by`)."""

STDIN = "-"


@dataclass(frozen=True)
class Wanted:
    """What is to be predicted.

    Attributes:
        input: Anything that `data.train` may be, or `-` for JSON Lines from standard input.
        output: File to write, or `-` for standard output.
        tokens: Of an answer that is generated, at most; TOKENS if None.
        beams: Beginnings that are followed at once; greedy if None.
    """

    input: str
    output: str
    tokens: int | None = None
    beams: int | None = None


@dataclass
class Piece:
    """What one rank made of its share of a block.

    Attributes:
        lines: Number of a record -> what is written of it.
        rows: What `Task.judge` needs of those with a reference.
        examples: Theirs.
    """

    lines: dict[int, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)


def predict(place: Place, wanted: Wanted, who: Who, given: Mapping[str, Any]) -> dict[str, Any]:
    """Answer all records; every rank calls it.

    Args:
        place: This process's place.
        wanted: What is to be predicted.
        who: Which model answers.
        given: Settings, by name.

    Returns:
        What became of the records: `records`, `predicted`, `errors`; `decision` where the model keeps one
        (`Task.decision`), and `scores` where there are references.

    Raises:
        UserError: Model, input or a setting cannot be used, or the output is there already.
    """
    output = _free(wanted.output)
    found = None if wanted.input == STDIN else Found(wanted.input, header=given.get("data.header", ()))
    asked = trained.find(who, given)
    idle = (*effect.by_task(asked.config, settings_by_task()), *effect.by_choice(asked.config))
    effect.enforce(asked.config, idle, frozenset(given))
    _refuse_idle(asked.task, asked.config.task.name, wanted, given)
    answering = Answering(asked, wanted)
    world = join(place)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            parts = output.with_name(f".{output.name}.parts") if output else Path(scratch)
            with hold(parts, "output") if world.is_main and output else nullcontext():
                about = _run(answering, found, parts, output, world)
        if world.is_main and output:
            shutil.rmtree(parts, ignore_errors=True)
        return about
    finally:
        leave()


def _refuse_idle(task: Task, name: str, wanted: Wanted, given: Mapping[str, Any]) -> None:
    """Refuse what does nothing with this task.

    Raises:
        UserError: Something does not; it is named.
    """
    generates = "train.sample_tokens" in task.settings
    own = {"max_new_tokens": wanted.tokens, "beams": wanted.beams}
    idle = [] if generates else [argument for argument, value in own.items() if value is not None]
    if task.answer is None:
        idle += sorted(given.keys() & BY_ROWS - task.writes_by)
    if idle:
        raise UserError(f"{idle[0]} does nothing with task={name}: leave it out")


def _free(output: str) -> Path | None:
    """Where the output is to be; None is standard output.

    Raises:
        UserError: Something is there already, or there is no such place.
    """
    if output == STDIN:
        return None
    path = Path(output).expanduser().absolute()
    if path.exists():
        raise UserError(f"output={output} is there already: take it away, or choose another name")
    if not path.parent.is_dir():
        raise UserError(f"output={output}: there is no directory {path.parent}")
    return path


def _run(answering: Answering, found: Found | None, parts: Path, output: Path | None, world: World) -> dict[str, Any]:
    """Answer block by block, and let the parts become the output."""
    blocks = _blocks(found, answering.size) if world.is_main else iter(())
    names: list[Path] = []
    bar = tqdm(desc="predict", unit=" records", disable=not world.is_main, file=sys.stderr, mininterval=1)
    while True:
        taken = world.from_main(partial(_next, blocks, answering, parts, len(names)))
        if taken is None:
            break
        first, records, name = taken
        names.append(parts / name)
        if records is not None:
            mine = {first + n: raw for n, raw in enumerate(records) if n % world.size == world.rank}
            failure, piece = None, None
            try:
                piece = answering.piece(mine, world.device)
            except Exception as problem:
                failure = problem
            world.all_succeed(failure)
            pieces = world.gather_objects(piece)
            world.from_main(partial(_write, parts / name, pieces))
        bar.update(len(records) if records is not None else answering.size)
    bar.close()
    return world.from_main(partial(_finish, answering, names, parts, output))


def _next(
    blocks: Iterator[tuple[int, list[Raw | BadRecord]]], answering: Answering, parts: Path, number: int
) -> tuple[int, list[Raw | BadRecord] | None, str] | None:
    """The next block, if there is one: number of its first record, its records (None where its part is there already),
    and the name of its part."""
    block = next(blocks, None)
    if block is None:
        return None
    first, records = block
    said = [[raw.origin, raw.problem] if isinstance(raw, BadRecord) else [raw.origin, raw.fields] for raw in records]
    digest = hashlib.sha256(f"{answering.identity}{json.dumps(said, default=str)}".encode()).hexdigest()[:16]
    name = f"{number:06d}-{digest}.jsonl"
    return first, None if (parts / name).exists() else records, name


def _blocks(found: Found | None, size: int) -> Iterator[tuple[int, list[Raw | BadRecord]]]:
    records = found.records() if found else _from_stdin()
    first = 0
    while block := list(islice(records, size)):
        yield first, block
        first += len(block)
    if not first:
        raise UserError("input: there is no record in it")


def _from_stdin() -> Iterator[Raw | BadRecord]:
    for number, line in enumerate(sys.stdin.buffer, start=1):  # bytes, so that one that is no UTF-8 costs no other
        if not line.strip():
            continue
        origin = f"stdin:{number}"
        try:
            fields = json.loads(line)
        except ValueError as problem:
            yield BadRecord(origin, f"no JSON: {problem}")
            continue
        yield Raw(fields, origin) if isinstance(fields, dict) else BadRecord(origin, "no JSON object")


def _write(part: Path, pieces: list[Piece]) -> None:
    """Write what all ranks made of a block; what its scores need first, so that a whole part has it."""
    lines: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        lines |= piece.lines
    judged = [piece for piece in pieces if piece.examples]
    text = "".join(f"{json.dumps(lines[number], ensure_ascii=False)}\n" for number in sorted(lines))
    try:
        if judged:
            write_bytes(part.with_suffix(".scores"), _packed(judged))
        write_bytes(part, text.encode("utf-8", errors="backslashreplace"))
    except OSError as problem:
        raise UserError(
            f"{part.parent} cannot be written to: {problem.strerror}. Once it can, the same command goes on from there."
        ) from problem


def _packed(pieces: list[Piece]) -> bytes:
    """Rows and examples of pieces as NumPy's archive, which holds nothing but arrays."""
    arrays: dict[str, np.ndarray] = {}
    for number, piece in enumerate(pieces):
        arrays |= {f"{number}/rows/{name}": values for name, values in piece.rows.items()}
        for name in piece.examples[0].columns:
            values = [example.columns[name] for example in piece.examples]
            arrays[f"{number}/column/{name}"] = np.concatenate(values)
            arrays[f"{number}/sizes/{name}"] = np.array([len(one) for one in values])
        about = [[example.tokens, example.weight, example.record] for example in piece.examples]
        arrays[f"{number}/about"] = np.array(about, np.float64)
    file = io.BytesIO()
    keywords: Any = arrays  # mypy takes them for those of savez
    np.savez(file, **keywords)
    return file.getvalue()


def _unpacked(file: Path) -> Iterator[tuple[dict[str, np.ndarray], list[Example]]]:
    """What `_packed` packed."""
    with np.load(file, allow_pickle=False) as archive:
        for number in itertools.count():
            if f"{number}/about" not in archive:
                return
            found: dict[str, dict[str, np.ndarray]] = {"rows": {}, "column": {}, "sizes": {}}
            for key in archive.files:
                owner, kind, *name = key.split("/")
                if owner == str(number) and name:
                    found[kind][name[0]] = archive[key]
            columns = {
                name: np.split(values, np.cumsum(found["sizes"][name])[:-1]) for name, values in found["column"].items()
            }
            yield (
                found["rows"],
                [
                    Example({name: parts[place] for name, parts in columns.items()}, int(tokens), weight, int(record))
                    for place, (tokens, weight, record) in enumerate(archive[f"{number}/about"].tolist())
                ],
            )


def _finish(answering: Answering, names: list[Path], parts: Path, output: Path | None) -> dict[str, Any]:
    """Let the parts become the output, and sum up."""
    about: dict[str, Any] = {"records": 0, "predicted": 0, "errors": 0}
    whole = parts / "output"
    with whole.open("wb") as file:
        for name in names:
            content = name.read_bytes()
            failed = sum("error" in json.loads(line) for line in content.splitlines())
            about["records"] += content.count(b"\n")
            about["errors"] += failed
            file.write(content)
    about["predicted"] = about["records"] - about["errors"]
    if answering.context.decision:
        about["decision"] = dict(answering.context.decision)
    if scores := _scores(answering, names):
        about["scores"] = scores
    if output is None:
        with whole.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
        return about
    if scores:
        write_json(output.with_name(f"{output.name}.scores.json"), scores)
    whole.replace(output)
    return about


def _scores(answering: Answering, names: list[Path]) -> dict[str, Any]:
    """The numbers of an evaluation over all records with a reference."""
    judge, examples, rows = answering.task.judge, list[Example](), list[dict[str, np.ndarray]]()
    for name in names if judge else ():
        file = name.with_suffix(".scores")
        for made, own in _unpacked(file) if file.exists() else ():
            shift = {"number": made["number"] + len(examples)} if "number" in made else {}
            rows.append(made | shift)
            examples += own
    if judge is None or not rows:
        return {}
    joined = {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}
    numbers, shown = judge(joined, answering.context, examples)
    return {"references": len({one.record for one in examples})} | numbers | shown


class Answering:
    """Answers shares of blocks.

    Args:
        asked: The model.
        wanted: How.

    Attributes:
        context: What the task's functions may know.
        size: Records of a block.
    """

    def __init__(self, asked: Trained, wanted: Wanted) -> None:
        self._asked, self._wanted = asked, wanted
        config = asked.config
        shapes = {**self.task.shapes, **self.task.asked}
        self._read = partial(read, shapes, ignored=config.data.ignore_fields)
        prompting = prompts.load(config.data, config.train.seed, self._read)
        labels = asked.labels
        sections = config.data, config.task, config.eval, config.train
        self.context = Context(asked.tokenizer, *sections, prompting, labels, asked.decision)
        self.size = BLOCK if self.task.answer else WRITTEN_BLOCK
        self._module: TaskModule | None = None
        self._plain: Any = None
        self._padded = config.data.packing is Packing.padded or bool(
            layout.why_padded(self.task.kind, asked.model_config)
        )

    @property
    def task(self) -> Task:
        return self._asked.task

    @property
    def identity(self) -> str:
        """All that an answer depends on beside its record."""
        settings = load.to_yaml(replace(self._asked.config, run_dir=""))
        how = [self._wanted.tokens, self._wanted.beams, str(self._asked.dtype), __version__, self._asked.decision]
        return json.dumps([settings, self._asked.fingerprint, *how])

    def piece(self, raws: Mapping[int, Raw | BadRecord], device: torch.device) -> Piece:
        """What becomes of a share of a block.

        Args:
            raws: Records by their numbers.
            device: Where the model computes.
        """
        piece, records = Piece(), dict[int, Any]()
        for number, raw in raws.items():
            piece.lines[number] = line = {"record": number + 1, "origin": raw.origin}
            if isinstance(raw, BadRecord):
                line["error"] = raw.problem
                continue
            line |= {"id": raw.fields["id"]} if raw.fields.get("id") is not None else {}
            try:
                records[number] = self.context.prompting.record(raw, self._read)
            except BadRecord as problem:
                line["error"] = problem.problem
        for number, told in self._told(records, piece, device):
            piece.lines[number] |= told
        return piece

    def _told(
        self, records: dict[int, Any], piece: Piece, device: torch.device
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        if self.task.answer is None:
            yield from self._written(records, device)
            return
        examples: dict[bool, list[Example]] = {False: [], True: []}
        for number, record in records.items():
            try:
                made = self.task.encode(record, self.context)
            except BadRecord as problem:
                yield number, {"error": problem.problem}
                continue
            except ValueError as problem:
                yield number, {"error": str(problem)}
                continue
            parts = [made] if isinstance(made, Dropped) else made
            whole = [replace(part, record=number) for part in parts if isinstance(part, Example)]
            if not whole:
                yield number, {"error": next(part.reason for part in parts if isinstance(part, Dropped))}
                continue
            told = self._references(record, whole)
            if told is None:
                yield number, {"note": "its reference does not fit the model's outputs: it is not scored"}
            examples[bool(told)] += whole
        for told, group in examples.items():
            if not group:
                continue
            numbered = [replace(example, number=place) for place, example in enumerate(group)]
            rows = self._rows(numbered, device)
            if told:
                piece.rows, piece.examples = rows, numbered
            yield from self.task.answer(
                rows, self.context, numbered, {one.record: records[one.record] for one in numbered}
            )

    def _references(self, record: Any, examples: list[Example]) -> bool | None:
        """Whether a record has what it is to be held against; None where that does not fit the model, and is taken
        out."""
        known = any(getattr(record, name, None) is not None for name in ("labels", "numbers", "tags", "answers"))
        names, columns = self.context.labels.names, [one.columns for one in examples if COLUMN in one.columns]
        named = {name for example in examples for name in example.labels}
        numbers = [column[COLUMN] for column in columns if column[COLUMN].dtype == np.float64]
        if not (columns and not numbers and named - {*names}) and all(len(one) == len(names) for one in numbers):
            return known
        for column in columns:
            del column[COLUMN]
        return None

    def _rows(self, examples: list[Example], device: torch.device) -> dict[str, np.ndarray]:
        """The rows of examples by the model, in their order where there is one for each."""
        if self._module is None:
            self._module = self._built(examples, device)
        collator = Collator(self.task, self.context, self._padded)
        data, size = self.context.data, self._asked.config.eval.micro_batch_size
        lengths = np.array([example.tokens for example in examples])
        tally, order = Tally(), list[int]()
        with torch.no_grad():
            for numbers in evaluation_batches(lengths, 0, 1, size, BUDGET * data.max_length):
                batch = collator.evaluate([examples[number] for number in numbers])
                tally.add(self._module(batch.to(device))[1])
                order += numbers
        rows = {name: torch.cat(parts).cpu().numpy() for name, parts in tally.rows.items()}
        if self.task.kind.by_document:
            rows = {name: values[np.argsort(order)] for name, values in rows.items()}
        return rows

    def _built(self, examples: list[Example], device: torch.device) -> TaskModule:
        """The model, after a first pass that shows whether it keeps the documents of a row apart."""
        try:
            return self._tried(examples, device)
        except Inseparable:
            if self._padded or self._asked.config.data.packing is not Packing.auto:
                raise
        self._padded = True
        return self._tried(examples, device)

    def _tried(self, examples: list[Example], device: torch.device) -> TaskModule:
        config, kind = self._asked.config, self.task.kind
        dropout = attention.has_dropout(self._asked.model_config)
        kernel = attention.choose_kernel(config.model.attention, device, self._asked.dtype, dropout)
        model = self._asked.load(layout.implementation(kind, self._asked.model_config, self._padded))
        probe = isolation.probe_tokens(examples)

        def loss(forward: Forward, batch: Batch) -> Outcome:
            return self.task.loss(forward, batch, self.context.task)

        module = TaskModule(
            model, loss, kernel, 1, Noise(model, 0), probe, self._padded, by_document=kind.by_document
        ).to(device)
        module.eval()
        collator = Collator(self.task, self.context, self._padded)
        with torch.no_grad():
            module(collator.evaluate(examples[:1]).to(device))
        return module

    def _written(self, records: dict[int, Any], device: torch.device) -> Iterator[tuple[int, dict[str, Any]]]:
        """What the model writes of each record."""
        assert self.task.write is not None, "a task answers in one of the two ways"
        if self._plain is None:
            kind, known = self.task.kind, self._asked.model_config
            self._plain = self._asked.load(layout.implementation(kind, known, padded=True)).to(device).eval()
        with own_settings(self._plain) as model, torch.no_grad():
            stops, wanted = self._asked.stop_tokens, self._wanted
            sampling = Sampling(model, device, stops, wanted.tokens or TOKENS, wanted.beams or 1)
            for number, record in records.items():
                try:
                    yield number, self.task.write(sampling, record, self.context)
                except BadRecord as problem:
                    yield number, {"error": problem.problem}
                except ValueError as problem:
                    yield number, {"error": str(problem)}
