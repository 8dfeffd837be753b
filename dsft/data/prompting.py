"""A row's fields under the names that a task knows, with a prompt that a template writes, and with examples before it.

What is chosen for a record, a template or examples, depends on the seed and its content alone: it is the same for any
number of processes, and whatever else is read.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, Undefined, UndefinedError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsft.config.schema import DataConfig
from dsft.data.raw import BadRecord, Fields, Raw
from dsft.data.sources import Found
from dsft.errors import UserError
from dsft.types import Record

PROMPT = "prompt"
"""The field that a template writes."""

EXAMPLES, WHOLE = "few_shot", "record"
"""Variables of a template beside the record's fields: the examples' fields, and all of the record's own."""

Read = Callable[[Fields, str], Record]
"""What makes a record of fields and their origin; it raises BadRecord."""


@dataclass(frozen=True)
class PromptTemplate:
    """A template for prompts.

    Attributes:
        name: Where it stands.
        source: Jinja.
        variables: Names that it reads.
    """

    name: str
    source: str
    variables: frozenset[str]

    def write(self, fields: Fields, examples: list[Fields]) -> Fields:
        """The fields with `prompt` in place of those that the template reads.

        Raises:
            ValueError: A field is missing, or is nothing that can be written; the message names it.
        """
        if PROMPT in fields and PROMPT not in self.variables:
            raise ValueError(f"field `{PROMPT}` is there already, and {self.name} would write over it")
        if EXAMPLES in fields and EXAMPLES in self.variables:
            raise ValueError(f"field `{EXAMPLES}` is what templates call the examples: rename it with data.columns")
        try:
            text = _compiled(self.source).render({WHOLE: fields, EXAMPLES: examples} | fields)
        except UndefinedError as error:
            raise ValueError(f"{self.name} writes a field that the record has not: {error.message}") from error
        except Exception as error:  # a template is a program
            raise ValueError(f"{self.name} fails: {error}") from error
        return {name: value for name, value in fields.items() if name not in self.variables} | {PROMPT: text}

    def summed_up(self, fields: Fields) -> Fields:
        """The fields with all that the template reads in `prompt`, in an order of its own."""
        read = {name: value for name, value in fields.items() if name in self.variables}
        return {name: value for name, value in fields.items() if name not in read} | {PROMPT: _canonical(read)}


@dataclass(frozen=True)
class Prompting:
    """What is done to each row before it is read.

    Attributes:
        columns: Name of a field -> the row's own name of it, or a dotted path.
        templates: Those to choose from.
        count: Examples before each record.
        fields: Each example's fields.
        texts: Each example's texts, by which a record that is one of them is recognised.
        examples: For each template, or once, every example as it is read.
        seed: What choices depend on.
    """

    columns: tuple[tuple[str, str], ...] = ()
    templates: tuple[PromptTemplate, ...] = ()
    count: int = 0
    fields: tuple[Fields, ...] = ()
    texts: tuple[dict[str, str], ...] = ()
    examples: tuple[tuple[Record, ...], ...] = ()
    seed: int = 0

    def recipe(self) -> dict[str, Any]:
        """All that it depends on, in JSON types."""
        chosen = len(self.templates) > 1 or self.count < len(self.fields)
        return {
            "columns": list(self.columns),
            "templates": [template.source for template in self.templates],
            "examples": [self.count, *map(_canonical, self.fields)],
            "seed": self.seed if chosen else None,
        }

    def record(self, raw: Raw, read: Read) -> Record:
        """The record that a row holds. What there is to say of it is added to the row's notes.

        Raises:
            BadRecord: It is malformed, or nothing reads a field that is made here.
        """
        if not (self.columns or self.templates or self.count):
            return read(raw.fields, raw.origin)
        fields, notes = self._renamed(raw.fields)
        raw.notes |= notes.keys()
        absent = [path for path in notes.values() if path]
        which, shown = 0, list[int]()
        said: dict[str, str] = {}
        try:
            if self.chooses:
                said = read(self._summed_up(_present(fields)), raw.origin).texts()
                which, shown = self._which(said), self._shown(said, raw)
            if self.templates:
                fields = self.templates[which].write(_present(fields), [self.fields[number] for number in shown])
            record = read(fields, raw.origin)
            self._refuse_unread(record)
            if self.count and not self._written(which):
                record = record.with_examples([self.examples[which][number] for number in shown])
        except BadRecord as bad:
            also = "".join(f"; there is no field `{path}`, which data.columns names" for path in absent)
            raise BadRecord(bad.origin, bad.problem + also) from bad
        except ValueError as error:
            raise BadRecord(raw.origin, str(error)) from error
        record.said = tuple(said.values())
        if len(self.templates) > 1:
            raw.notes.add(f"with the prompt of {Path(self.templates[which].name).name}")
        return record

    def _renamed(self, fields: Fields) -> tuple[Fields, dict[str, str]]:
        """The fields under other names, and notes -> the path that the row does not have, if that is noted."""
        found = {target: (path, value_at(fields, path)) for target, path in self.columns}
        notes = {absent(path): path for path, value in found.values() if value is None}
        made = {target: value for target, (_, value) in found.items() if value is not None}
        moved = {path for path, value in found.values() if value is not None}
        for target in made:
            if fields.get(target) is not None and target not in moved:
                notes[f"field `{target}` left out, as data.columns takes it from `{dict(self.columns)[target]}`"] = ""
        return {name: value for name, value in fields.items() if name not in moved} | made, notes

    @property
    def chooses(self) -> bool:
        """Whether there is anything to choose for a record, which is done by what it says."""
        return len(self.templates) > 1 or self.count > 0

    def _which(self, said: dict[str, str]) -> int:
        return _number(self.seed, "template", _canonical(said)) % max(1, len(self.templates))

    def _written(self, which: int) -> bool:
        """Whether a template writes the examples itself."""
        return bool(self.templates) and EXAMPLES in self.templates[which].variables

    def _shown(self, said: dict[str, str], raw: Raw) -> list[int]:
        """Numbers of the examples for a row, rising; exact duplicates of it are none."""
        if not self.count:
            return []
        others = [number for number, texts in enumerate(self.texts) if texts != said]
        if len(others) < self.count:
            raw.notes.add("with fewer few-shot examples, being one of them")
        drawn = random.Random(_number(self.seed, "examples", _canonical(said)))
        return sorted(drawn.sample(others, min(self.count, len(others))))

    def _summed_up(self, fields: Fields) -> Fields:
        return self.templates[0].summed_up(fields) if self.templates else fields

    def _refuse_unread(self, record: Record) -> None:
        made = {target: "data.columns" for target, _ in self.columns}
        made |= {PROMPT: "data.prompt_template"} if self.templates else {}
        for name in sorted(made.keys() & record.metadata.keys()):
            raise ValueError(f"{made[name]} makes the field `{name}`, and nothing reads it in a record of this shape")


def load(data: DataConfig, seed: int, read: Read) -> Prompting:
    """What the settings ask for.

    Args:
        data: `columns`, `prompt_template` and `few_shot`.
        seed: `train.seed`.
        read: As of `Prompting.record`.

    Raises:
        UserError: A file is missing, a template is none, or an example cannot be read.
    """
    plain = Prompting(tuple(data.columns.items()), _templates(data.prompt_template), seed=seed)
    if data.few_shot.path is None:
        return plain
    where = f"data.few_shot.path={data.few_shot.path}"
    rows: list[Fields] = []
    origins: list[str] = []
    for row in Found(data.few_shot.path, header=data.header).records():
        if isinstance(row, BadRecord):
            raise UserError(f"{where}: {row.origin}: {row.problem}")
        rows.append(_present(plain._renamed(row.fields)[0]))
        origins.append(row.origin)
    if len(rows) < data.few_shot.count:
        raise UserError(f"{where} has {len(rows)} examples, fewer than data.few_shot.count={data.few_shot.count}")
    try:
        texts = tuple(read(plain._summed_up(row), where).texts() for row, where in zip(rows, origins))
        examples = tuple(_read_with(template, rows, origins, read) for template in plain.templates or (None,))
    except BadRecord as bad:
        raise UserError(f"{where}: {bad.origin}: {bad.problem}") from bad
    return Prompting(plain.columns, plain.templates, data.few_shot.count, tuple(rows), texts, examples, seed)


def _read_with(
    template: PromptTemplate | None, rows: list[Fields], origins: list[str], read: Read
) -> tuple[Record, ...]:
    """Every example with the template's prompt; none where the template writes them itself."""
    if template and EXAMPLES in template.variables:
        return ()
    records = []
    for row, origin in zip(rows, origins):
        try:
            record = read(template.write(row, []) if template else row, origin)
            record.with_examples([record])
        except ValueError as error:
            raise BadRecord(origin, str(error)) from error
        records.append(record)
    return tuple(records)


def absent(path: str) -> str:
    """The note of a record that has not what `data.columns` names."""
    return f"without the field `{path}` of data.columns"


def left_out(name: str) -> str:
    """The note of a record of which a field is treated as if it were not there."""
    return f"field `{name}` left out (data.ignore_fields)"


def value_at(fields: Any, path: str) -> Any:
    """What stands in a field, or deeper in at a dotted path; None where nothing does."""
    if isinstance(fields, dict) and path in fields:
        return fields[path]
    step, dot, rest = path.partition(".")
    if isinstance(fields, dict):
        inner = fields.get(step)
    elif isinstance(fields, list) and step.isdecimal() and int(step) < len(fields):
        inner = fields[int(step)]
    else:
        return None
    return value_at(inner, rest) if dot else inner


def _templates(setting: str | None) -> tuple[PromptTemplate, ...]:
    if setting is None:
        return ()
    if "{{" in setting or "{%" in setting:
        return (_template("data.prompt_template", setting),)
    path = Path(setting).expanduser()
    if not path.exists():
        raise UserError(
            f"data.prompt_template={setting} is neither a file or directory nor a template: there is no {{{{ field }}}}"
        )
    inside = (
        sorted(one for one in path.iterdir() if one.is_file() and not one.name.startswith("."))
        if path.is_dir()
        else [path]
    )
    if not inside:
        raise UserError(f"data.prompt_template={setting}: the directory has no files")
    try:
        return tuple(_template(str(one), one.read_text(encoding="utf-8-sig")) for one in inside)
    except UnicodeDecodeError as error:
        raise UserError(f"data.prompt_template={setting}: not UTF-8 at byte {error.start}: save it as UTF-8") from error


def _template(name: str, source: str) -> PromptTemplate:
    """The template, if it is one.

    Raises:
        UserError: It is no valid Jinja, wants other files, or writes nothing of the record.
    """
    environment = _environment()
    try:
        parsed = environment.parse(source)
        environment.from_string(source)
    except TemplateSyntaxError as error:
        raise UserError(f"{name}:{error.lineno}: not a valid Jinja template: {error.message}") from error
    others = (nodes.Include, nodes.Extends, nodes.Import, nodes.FromImport)
    if foreign := next(parsed.find_all(others), None):
        raise UserError(f"{name}:{foreign.lineno}: a prompt template stands alone, without include, import or extends")
    variables = frozenset(meta.find_undeclared_variables(parsed)) - environment.globals.keys()
    if not variables - {EXAMPLES}:
        raise UserError(f"{name} writes nothing of a record: name its fields, as in {{{{ question }}}}")
    return PromptTemplate(name, source, variables)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as chat templates have it, which writes only what is there and draws nothing at random."""
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_writable
    )
    del environment.filters["random"], environment.globals["lipsum"]
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    return environment


@lru_cache(maxsize=256)
def _compiled(source: str) -> Template:
    return _environment().from_string(source)


def _writable(value: Any) -> Any:
    """A value that a template writes; a list would come out in Python's notation, and None as a word."""
    if isinstance(value, str | int | float | Undefined):
        return value
    raise ValueError(f"{type(value).__name__} is no text: name what is in it, or write it with `| tojson`")


def _present(fields: Fields) -> Fields:
    return {name: value for name, value in fields.items() if value is not None}


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _number(seed: int, purpose: str, content: str) -> int:
    """A number that looks random, of 64 bits."""
    text = f"{seed}\0{purpose}\0{content}".encode(errors="surrogatepass")
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big")
