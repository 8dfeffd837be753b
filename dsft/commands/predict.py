"""`launch/predict.py`: what a trained model says of records, in their order, on all ranks.

Records are taken in blocks. Rank 0 reads a block and every rank answers its share of it with the whole model; what
comes of a block is a file of its own, named by all that it depends on, so that a run that was killed goes on behind
the last whole one. At the end these files become the output.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
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
from dsft.commands import parts as parting
from dsft.commands import trained
from dsft.commands.parts import Piece
from dsft.commands.trained import Trained, Who
from dsft.config import effect, load
from dsft.config.schema import Packing
from dsft.data import prompting as prompts
from dsft.data.loader import evaluation_batches
from dsft.data.sources import BadRecord, Found, Raw
from dsft.errors import UserError
from dsft.evaluate import own_settings
from dsft.metrics import Tally, groups
from dsft.metrics.scores import Choices, chosen, intervals, total
from dsft.metrics.scores import language as languages
from dsft.model import attention, layout
from dsft.model.kind import Inseparable
from dsft.model.noise import Noise
from dsft.runtime.files import write_json
from dsft.runtime.locks import hold
from dsft.runtime.place import Place
from dsft.runtime.world import World, join, leave
from dsft.tasks import Task, isolation, settings_by_task
from dsft.tasks.collate import Collator
from dsft.tasks.forward import Forward
from dsft.tasks.generate import Decoding, Prompt, Writer, Written
from dsft.tasks.labels import COLUMN
from dsft.tasks.module import TaskModule
from dsft.tasks.task import Context, Outcome, Sampling, read
from dsft.types import Batch, Dropped, Example

BLOCK, WRITTEN_BLOCK = 512, 64
"""Records of a block; of tasks that generate, which take longer."""

BUDGET = 8
"""Rows of `data.max_length` tokens that a forward pass takes at most, unless `eval.micro_batch_size` says otherwise."""

DEFAULT_SCORES = ("bleu", "chrf", "rouge", "answer")
"""Of texts that have references, unless it is said."""

BY_ROWS = {"data.max_length", "data.on_overflow", "data.packing", "eval.micro_batch_size", "model.attention"}
"""Settings that a task reads which answers by rows; one that generates reads those that it says (`Task.asks_by`)."""

STDIN = "-"


@dataclass(frozen=True)
class Wanted:
    """What is to be predicted.

    Attributes:
        input: Anything that `data.train` may be, or `-` for JSON Lines from standard input.
        output: File to write, or `-` for standard output.
        said: Options of generated texts, by name, that were given.
        decoding: How these are generated.
        scores: Names of scores of generated texts that have references; DEFAULT_SCORES if None.
        language: Of the references, or `auto` (`language.told`).
        choices: How they are counted.
        group_by: Names of fields of records; scores are given for the records of each value too.

    Raises:
        UserError: It is no language.
    """

    input: str
    output: str
    said: frozenset[str] = frozenset()
    decoding: Decoding = field(default_factory=Decoding)
    scores: tuple[str, ...] | None = None
    language: str = languages.AUTO
    choices: Choices = field(default_factory=Choices)
    group_by: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not languages.LANGUAGE.fullmatch(self.language):
            raise UserError(f"language={self.language} is auto, other, or a code of two or three letters, such as zh")


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
    read = {"group_by"} if task.kind.by_document and task.judge else set()
    idle = sorted(wanted.said - read) if task.ask is None else []
    if task.answer is None:
        own = task.asks_by | ({"eval.micro_batch_size"} if task.ask else set())
        idle += sorted(given.keys() & BY_ROWS - own)
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
            world.from_main(partial(parting.write, parts / name, pieces))
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
    if not number:
        _refuse_unknown_groups(answering.group_by, records)
    said = [[raw.origin, raw.problem] if isinstance(raw, BadRecord) else [raw.origin, raw.fields] for raw in records]
    digest = hashlib.sha256(f"{answering.identity}{json.dumps(said, default=str)}".encode()).hexdigest()[:16]
    name = f"{number:06d}-{digest}.jsonl"
    return first, None if (parts / name).exists() else records, name


def _refuse_unknown_groups(group_by: tuple[str, ...], records: list[Raw | BadRecord]) -> None:
    """Refuse a field to group by that no record of the first block has.

    Raises:
        UserError: There is one.
    """
    raws = [raw for raw in records if isinstance(raw, Raw)]
    for name in group_by:
        if raws and all(groups.value(raw.fields, name) == groups.NOTHING for raw in raws):
            known = sorted({key for raw in raws for key in raw.fields})
            raise UserError(
                f"group_by: none of the first {len(raws)} records has a field {name!r}; they have {', '.join(known)}"
            )


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
    if answering.task.ask is not None:
        return _text_scores(answering, names)
    judge, examples, rows = answering.task.judge, list[Example](), list[dict[str, np.ndarray]]()
    for name in names if judge else ():
        file = name.with_suffix(".scores")
        for made, own in parting.unpacked(file) if file.exists() else ():
            shift = {"number": made["number"] + len(examples)} if "number" in made else {}
            rows.append(made | shift)
            examples += own
    if judge is None or not rows:
        return {}
    joined = {name: np.concatenate([part[name] for part in rows]) for name in rows[0]}
    numbers, shown = judge(joined, answering.context, examples)
    about: dict[str, Any] = {"references": len({one.record for one in examples})} | numbers | shown
    if not answering.group_by:
        return about

    def judged(own: dict[str, np.ndarray], places: list[int]) -> tuple[dict[str, float], dict[str, Any]]:
        return judge(own, answering.context, [examples[place] for place in places])

    records = np.array([one.record for one in examples])
    better = {metric.of[0]: metric.better for metric in answering.task.metrics.values()}
    keys = _groups(names)
    by_field = {
        field: groups.compare_judged(judged, joined, records, {n: own[field] for n, own in keys.items()}, better)
        for field in answering.group_by
    }
    return about | {"groups": by_field}


def _groups(names: list[Path]) -> dict[int, dict[str, str]]:
    """The groups of each record, by its number."""
    lines = (json.loads(line) for name in names for line in name.read_text(encoding="utf-8").splitlines())
    return {line["record"] - 1: line["groups"] for line in lines}


def _text_scores(answering: Answering, names: list[Path]) -> dict[str, Any]:
    """Scores of all generated texts that have a reference, and of groups of them; and how they were counted."""
    scores, fields = answering.scores, answering.group_by
    rows: dict[str, list[np.ndarray]] = {name: [] for name in scores}
    keys: list[tuple[str, ...]] = []
    counts: Counter[str] = Counter()
    for name in names:
        for line in name.read_text(encoding="utf-8").splitlines():
            told = json.loads(line)
            if "scores" not in told:
                continue
            counts[told["language"]] += 1
            keys.append(tuple(told.get("groups", {}).get(field, "") for field in fields))
            for score, how in scores.items():
                rows[score].append(how.statistics(told["prediction"], [told["reference"]], told["language"]))
    if not keys:
        return {}
    tables = {name: np.stack(own) for name, own in rows.items()}
    about: dict[str, Any] = {"references": counts.total(), "languages": dict(counts)}
    between: dict[str, tuple[float, float]] = {}
    for score, table in tables.items():
        about |= scores[score].form(total(table))
        between |= intervals(scores[score], table)
    about["intervals"] = between
    if fields:
        about["groups"] = {
            name: groups.compare(scores, tables, [key[place] for key in keys]) for place, name in enumerate(fields)
        }
    signatures = {score: {own: how.signature(own) for own in sorted(counts)} for score, how in scores.items()}
    return about | {"signatures": signatures}


class Answering:
    """Answers shares of blocks.

    Args:
        asked: The model.
        wanted: How.

    Attributes:
        context: What the task's functions may know.
        size: Records of a block.
        scores: Of what is generated.
        group_by: `Wanted.group_by`.
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
        names = DEFAULT_SCORES if wanted.scores is None else wanted.scores
        self.scores = chosen(names, wanted.choices) if self.task.ask else {}
        self.group_by = wanted.group_by
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
        wanted = self._wanted
        how: list[Any] = [repr(wanted.decoding), wanted.scores, wanted.language, repr(wanted.choices), wanted.group_by]
        how += [str(self._asked.dtype), __version__, self._asked.decision]
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
            if self.group_by:
                line["groups"] = {name: groups.value(raw.fields, name) for name in self.group_by}
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
        """What the model writes of each record, or fills in where its task does not generate."""
        if self._plain is None:
            kind, known = self.task.kind, self._asked.model_config
            self._plain = self._asked.load(layout.implementation(kind, known, padded=True)).to(device).eval()
        ask, write = self.task.ask, self.task.write
        with own_settings(self._plain) as model, torch.no_grad():
            if ask is None:
                assert write is not None, "a task answers in one of three ways"
                sampling = Sampling(model, device, self._asked.stop_tokens, self._wanted.decoding.max_new_tokens)
                yield from _each(records, lambda record: write(sampling, record, self.context))
                return
            prompts: dict[int, Prompt] = {}
            for number, made in _each(records, lambda record: ask(record, self.context)):
                if isinstance(made, Prompt):
                    prompts[number] = made
                else:
                    yield number, made
            ids = {number: prompt.ids for number, prompt in prompts.items()}
            for number, texts in self._writer(model, device).write(ids):
                yield number, {"error": texts} if isinstance(texts, str) else self._told_of(texts, prompts[number].told)

    def _writer(self, model: Any, device: torch.device) -> Writer:
        begin, asked = self.task.begin, self._asked
        return Writer(
            model,
            device,
            asked.tokenizer,
            asked.stop_tokens,
            self._wanted.decoding,
            begin(model, asked.tokenizer) if begin else None,
            asked.config.eval.micro_batch_size,
        )

    def _told_of(self, texts: list[Written], about: dict[str, Any]) -> dict[str, Any]:
        """What is told of a record by its texts, the first of which is scored where it has a reference."""
        first = texts[0]
        told: dict[str, Any] = {"prediction": first.text, "stopped": first.stopped, "tokens": first.tokens}
        if len(texts) > 1:
            told["predictions"] = [{"text": t.text, "stopped": t.stopped, "tokens": t.tokens} for t in texts]
        told |= about
        if isinstance(reference := about.get("reference"), str):
            language = languages.told(self._wanted.language, [reference])
            try:
                found = [how.of_record(first.text, [reference], language) for how in self.scores.values()]
            except ValueError as problem:  # a reference of another kind than is compared
                return told | {"note": f"it is not scored: {problem}"}
            told |= {"language": language, "scores": {k: v for numbers in found for k, v in numbers.items()}}
        return told


def _each(records: dict[int, Any], make: Callable[[Any], Any]) -> Iterator[tuple[int, Any]]:
    """What is made of each record, or the error that says why it cannot be."""
    for number, record in records.items():
        try:
            yield number, make(record)
        except BadRecord as problem:
            yield number, {"error": problem.problem}
        except ValueError as problem:
            yield number, {"error": str(problem)}
