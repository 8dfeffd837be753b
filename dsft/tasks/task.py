"""What a task is: one value made of plain functions, from the fields of a record to the numbers of an evaluation."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
import xxhash
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dsft.config.schema import DataConfig, EvalConfig, TaskConfig, TrainConfig
from dsft.data.prompting import Prompting, left_out
from dsft.data.sources import BadRecord, Fields, Raw
from dsft.metrics import Metric
from dsft.model.head import Head
from dsft.model.kind import Kind
from dsft.tasks.labels import Labels
from dsft.types import Batch, Dropped, Example, Record

if TYPE_CHECKING:
    from dsft.data.dataset import Prepared
    from dsft.tasks.forward import Forward
    from dsft.tasks.generate import Prompt

SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Context:
    """What a task's functions may know of the run; it pickles, as records are encoded in processes of their own.

    Attributes:
        tokenizer: The model's, with new tokens.
        data: The data's section of the config.
        task: The task's.
        eval: The evaluation's.
        train: The run's.
        prompting: What is done to each row before it is read.
        labels: The labels of the run, known when all records are read, where its task has any.
        decision: What decides answers beside the model (`Task.decision`); None where an evaluation is to find it.
        seed: What everything that is drawn depends on, `train.seed`.
    """

    tokenizer: PreTrainedTokenizerFast
    data: DataConfig
    task: TaskConfig
    eval: EvalConfig = field(default_factory=EvalConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    prompting: Prompting = field(default_factory=Prompting)
    labels: Labels = field(default_factory=partial(Labels, ()))
    decision: Mapping[str, Any] | None = None

    @property
    def seed(self) -> int:
        return self.train.seed


class Outcome(NamedTuple):
    """What a task makes of a batch.

    Attributes:
        loss: Summed over the batch, float64 scalar to go backward from.
        sums: Further sums, float64 scalars, detached.
        rows: Detached, for what sums cannot give, looked at in evaluations alone: a row for each document of a model
            that answers once for each, else as many as a task likes, in which their place stands too.
    """

    loss: torch.Tensor
    sums: Mapping[str, torch.Tensor] = MappingProxyType({})
    rows: Mapping[str, torch.Tensor] = MappingProxyType({})


@dataclass(frozen=True)
class View:
    """How an example is looked at.

    Attributes:
        epoch: Epoch of training; -1 in an evaluation, so that it is the same whenever it takes place.
        number: Which of an example's evaluation views it is (`Task.views`).
    """

    epoch: int = -1
    number: int = 0


@dataclass(frozen=True)
class Sampling:
    """What a sample is made with.

    Attributes:
        model: The transformers model, without adapters around it, on `device`, in evaluation mode.
        device: Where it computes.
        stop_tokens: Token ids that end an answer.
        tokens: How many an answer has at most.
    """

    model: PreTrainedModel
    device: torch.device
    stop_tokens: list[int]
    tokens: int

    def generate(self, ids: list[int], pad: int | None, room: int, **more: Any) -> list[int]:
        """Token ids that the model writes, of an encoder-decoder those that it begins with among them.

        Args:
            ids: What it reads.
            pad: The padding token's.
            room: Tokens that an answer may have beside `tokens`.
            more: Further arguments of its `generate`, and those of `GenerationConfig` under `settings`.
        """
        given = torch.tensor([ids], device=self.device)
        settings = GenerationConfig(
            max_new_tokens=min(self.tokens, room),
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=self.stop_tokens or None,
            **more.pop("settings", {}),
        )
        arguments = {"input_ids": given, "attention_mask": torch.ones_like(given), **more}
        return self.model.generate(**arguments, generation_config=settings)[0].tolist()


class Examples(Protocol):
    """Those of a data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Example: ...


Records = Mapping[int, Any]
"""Records by their numbers."""

Answers = Iterator[tuple[int, dict[str, Any]]]
"""Numbers of records, and what is said of each, in JSON types: `prediction` and whatever else there is."""

Judge = Callable[[dict[str, np.ndarray], Context, Examples], tuple[dict[str, float], dict[str, Any]]]
"""What `Task.judge` is."""


@dataclass(frozen=True)
class Task:
    """A kind of fine-tuning. All of its functions are plain: what they return depends on their arguments alone.

    Attributes:
        shapes: Names of fields -> what makes a record of a row's fields and its origin; the first that fits is taken.
            It raises ValueError, naming the field, for a malformed row.
        encode: (record, context) -> its examples; one record may give several, among them a Dropped for each part with
            nothing to learn. Their `record` is filled in later.
        inputs: (example, view, context) -> arrays by name. `input_ids`, and `labels` (IGNORE_INDEX where a token
            has no target), int64, shape (tokens,); `target_weights`, float32, shape (tokens,), if targets do not all
            count alike. Further arrays of shape (tokens,) are laid out as these are, those whose names begin with
            `document_` stacked.
        loss: (forward, batch, the task's section of the config) -> Outcome. A batch without targets has to go through
            the same layers.
        kind: Which models it trains.
        metrics: Name without prefix -> metric of an evaluation, formed from the sums `loss`, `weight` and its own.
        target: What the examples' weights count, as metrics name it: `supervised_tokens`, `labels`.
        settings: Those settings that not all tasks read, and this one does.
        encoded: Of its own section's settings (`task.NAME`) those that `encode` reads.
        ready: (tokenizer, the task's section of the config) -> None; sets what a tokenizer has to be told.
        settle: (context, data, names of the outputs of the model's own head) -> the context with what only all records
            together tell, such as which labels there are. None if there is nothing of the kind.
        head: (context) -> the head that the model gets; of `kind.headed` alone.
        problems: Those that a model's config may name (`problem_type`) where several tasks share a kind.
        judge: (rows of an evaluation, those of documents in the order of examples, context, the examples) -> the
            quantities that its metrics are formed from, and what is to be shown beside them, in JSON types.
        decision: (context, what `judge` has shown of the last evaluation, if there was one) -> what decides answers
            beside the model, in JSON types: it is kept with the model, for the test set and for predictions.
        asked: Shapes of records without what is to be told of them, as `shapes`, before which they go; `encode` makes
            examples of these too, which `loss` gives rows of.
        answer: (rows as `judge` gets them, context, the examples, their records) -> what is told of each record, by
            its number; of tasks whose predictions come from rows.
        ask: (record, context) -> what a model goes on from; of tasks whose predictions are generated. It raises
            ValueError where it cannot be.
        begin: (model, tokenizer) -> what an encoder-decoder's decoder has read before it writes.
        asks_by: Which of `data.max_length` and `data.on_overflow` are read for either of `ask` and `write`.
        write: (sampling, record, context) -> what is told of a record, in JSON types; of tasks that answer in neither
            of these ways. It raises ValueError where it cannot be.
        views: (example, its number, context) -> how many documents an evaluation makes of it; one each if None.
        sample: (sampling, example, context) -> `prompt`, `reference` and `answer`, to read before and after; None if
            there is nothing to show. It raises ValueError where there is no room for an answer.
    """

    shapes: Mapping[tuple[str, ...], Callable[[Fields, str], Record]]
    encode: Callable[[Any, Context], list[Example | Dropped] | Dropped]
    inputs: Callable[[Example, View, Context], dict[str, np.ndarray]]
    loss: Callable[[Forward, Batch, TaskConfig], Outcome]
    kind: Kind
    metrics: Mapping[str, Metric]
    target: str
    settings: frozenset[str] = frozenset()
    encoded: frozenset[str] = frozenset()
    ready: Callable[[PreTrainedTokenizerBase, TaskConfig], None] | None = None
    settle: Callable[[Context, Prepared, list[str]], Context] | None = None
    head: Callable[[Context], Head] | None = None
    problems: frozenset[str] = frozenset()
    judge: Judge | None = None
    decision: Callable[[Context, Mapping[str, Any]], dict[str, Any]] | None = None
    asked: Mapping[tuple[str, ...], Callable[[Fields, str], Record]] = field(default_factory=dict)
    answer: Callable[[dict[str, np.ndarray], Context, Examples, Records], Answers] | None = None
    ask: Callable[[Any, Context], Prompt] | None = None
    begin: Callable[[Any, Any], list[int]] | None = None
    asks_by: frozenset[str] = frozenset()
    write: Callable[[Sampling, Any, Context], dict[str, Any]] | None = None
    views: Callable[[Example, int, Context], int] | None = None
    sample: Callable[[Sampling, Example, Context], dict[str, str]] | None = None


class Taken(dict[str, Any]):
    """A row's fields, and which of them somebody has asked for.

    Attributes:
        names: Those.
    """

    def __init__(self, fields: Fields) -> None:
        super().__init__(fields)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)


def read(
    shapes: Mapping[tuple[str, ...], Callable[[Fields, str], Record]],
    fields: Fields,
    origin: str,
    ignored: Collection[str] = (),
) -> Record:
    """The record that a row's fields hold, by the first of `shapes` whose fields it has.

    Fields that the shape does not ask for become metadata, which is noted.

    Args:
        shapes: The task's (`Task.shapes`).
        fields: The row's.
        origin: Where it came from.
        ignored: Names of fields that are treated as if they were not there (`data.ignore_fields`), those of the objects
            in a field's list among them, such as a message's.

    Raises:
        BadRecord: No shape fits, or the row is malformed; the message names the field.
    """
    present = {name for name, value in fields.items() if value is not None}
    names = next((names for names in shapes if present.difference(ignored).issuperset(names)), None)
    if names is None:
        raise BadRecord(origin, _unknown_shape(shapes, fields))
    kept, dropped = _without(fields, ignored)
    taken = Taken(kept)
    try:
        for name, value in kept.items():
            _refuse_half_characters(value, name)
        record = shapes[names](taken, origin)
    except ValueError as error:
        raise BadRecord(origin, str(error)) from error
    record.metadata = {name: value for name, value in kept.items() if name not in taken.names and value is not None}
    record.notes |= {f"field `{name}` kept as metadata" for name in record.metadata}
    record.notes |= {left_out(name) for name in dropped}
    return record


def _refuse_half_characters(value: Any, field: str) -> None:
    """Refuse lone surrogates, which no tokenizer takes and no file holds.

    Raises:
        ValueError: There is one; the message names the field.
    """
    if isinstance(value, str) and not value.isascii():
        if found := SURROGATE.search(value):
            raise ValueError(f"field `{field}` holds half a character, the lone surrogate U+{ord(found[0]):04X}")
    elif isinstance(value, dict):
        for key, one in value.items():
            _refuse_half_characters(key, field)
            _refuse_half_characters(one, f"{field}.{key}")
    elif isinstance(value, list):
        for number, one in enumerate(value):
            _refuse_half_characters(one, f"{field}[{number}]")


def _without(fields: Fields, ignored: Collection[str]) -> tuple[Fields, set[str]]:
    """The fields but for those of some names, of the row and of objects in its lists; and which of these there were."""
    if not ignored:
        return fields, set()
    dropped = {name for name in fields if name in ignored}
    kept = {}
    for name, value in fields.items():
        if name in ignored:
            continue
        kept[name] = value
        if isinstance(value, list) and any(isinstance(one, dict) for one in value):
            dropped |= {key for one in value if isinstance(one, dict) for key in one if key in ignored}
            kept[name] = [
                {k: v for k, v in one.items() if k not in ignored} if isinstance(one, dict) else one for one in value
            ]
    return kept, dropped


def reader(task: Task, data: DataConfig) -> Callable[[Fields, str], Record]:
    """What makes a record of fields and their origin, as `read` does."""
    return partial(read, task.shapes, ignored=data.ignore_fields)


def encode(raw: Raw, task: Task, context: Context) -> list[Example | Dropped] | Dropped:
    """What becomes of one row of the data: its examples, or the reason why there are none. It adds to the row's notes.

    Raises:
        BadRecord: It is malformed.
    """
    record = context.prompting.record(raw, reader(task, context.data))
    parts = task.encode(record, context)
    raw.notes |= record.notes
    if isinstance(parts, Dropped):
        return parts
    content = content_key(record.said or record.texts().values())
    group = _field_key(raw, context.data.group_by_field, "data.group_by_field")
    stratum = _field_key(raw, context.data.stratify_by_field, "data.stratify_by_field")
    for part in parts:
        if isinstance(part, Example):
            part.content, part.group, part.stratum = content, group, stratum
    return parts


def content_key(texts: Iterable[str]) -> int:
    """A hash of what a record says, 64 bits: white space, case and the width of characters make no difference."""
    words = (" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts)
    return xxhash.xxh3_64_intdigest("\x1f".join(words).encode()) or 1


def _field_key(raw: Raw, name: str | None, setting: str) -> int:
    """A hash of the value of a row's field, 0 where no field is asked for.

    Args:
        raw: The row.
        name: The field; `a.b` is the field b of the object in the field a, where no field is called `a.b`.
        setting: What asks for it.

    Raises:
        BadRecord: The row has none.
    """
    if name is None:
        return 0
    value: Any = raw.fields
    for key in [name] if name in raw.fields else name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if value is None:
        raise BadRecord(raw.origin, f"field `{name}` is missing, and {setting}={name} needs it")
    return xxhash.xxh3_64_intdigest(json.dumps(value, sort_keys=True).encode()) or 1


def text_of(value: Any, field: str, empty: bool = True) -> str:
    """The text in a field.

    Raises:
        ValueError: It is no text, or blank where it may not be `empty`.
    """
    if not isinstance(value, str):
        raise ValueError(f"field `{field}` is text, but this is {type(value).__name__}")
    if not empty and not value.strip():
        raise ValueError(f"field `{field}` is empty")
    return value


def _unknown_shape(shapes: Mapping[tuple[str, ...], Any], fields: Fields) -> str:
    for names in shapes:
        missing = [name for name in names if fields.get(name) is None]
        if len(missing) < len(names):
            return f"field `{missing[0]}` is missing beside `{next(n for n in names if n not in missing)}`"
    known = ", ".join("+".join(names) for names in shapes)
    return f"fields {', '.join(map(str, fields)) or '(none)'} are none of the known shapes: {known}"
