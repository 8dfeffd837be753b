"""Every setting of a run: its type, its default, its range, when it acts and what it does.

The docstring under a setting is its documentation; docs/SETTINGS.md is made from this file. YAML files in `conf/`
choose values and never define settings. OmegaConf reads these classes, so they are not frozen and use `Enum`, not
`Literal`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cache
from math import isfinite
from typing import Any, NamedTuple, get_type_hints

from omegaconf import MISSING


class Source(Enum):
    files = "files"
    pydoc = "pydoc"
    pydoc_kinds = "pydoc_kinds"
    pydoc_code = "pydoc_code"


class Packing(Enum):
    auto = "auto"
    bfd = "bfd"
    none = "none"
    padded = "padded"


class TrainOn(Enum):
    assistant = "assistant"
    last_assistant = "last_assistant"
    weights = "weights"
    all = "all"


class OnRewrittenHistory(Enum):
    split = "split"
    last = "last"
    error = "error"


class Reasoning(Enum):
    learn = "learn"
    mask = "mask"
    strip = "strip"


class Resampling(Enum):
    none = "none"
    oversample = "oversample"
    undersample = "undersample"


class OnBadRecord(Enum):
    error = "error"
    skip = "skip"


class OnOverflow(Enum):
    auto = "auto"
    truncate = "truncate"
    split = "split"
    drop = "drop"
    error = "error"


class RegressionLoss(Enum):
    mse = "mse"
    mae = "mae"
    huber = "huber"


class HeadInit(Enum):
    normal = "normal"
    xavier = "xavier"


class Pool(Enum):
    cls = "cls"
    mean = "mean"
    last = "last"


class ChunkPool(Enum):
    mean = "mean"
    max = "max"
    first = "first"
    vote = "vote"


class Thresholds(Enum):
    tuned = "tuned"
    half = "half"


class Balance(Enum):
    none = "none"
    balanced = "balanced"
    effective_number = "effective_number"


class Precision(Enum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class ActivationCheckpointing(Enum):
    none = "none"
    full = "full"
    offload = "offload"


class Method(Enum):
    full = "full"
    freeze = "freeze"
    lora = "lora"


class OptimName(Enum):
    adamw = "adamw"
    sgd = "sgd"
    lion = "lion"
    muon = "muon"


class Implementation(Enum):
    auto = "auto"
    torch = "torch"
    deepspeed = "deepspeed"


class ScheduleName(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    step = "step"
    exponential = "exponential"
    plateau = "plateau"


class Unit(Enum):
    steps = "steps"
    epochs = "epochs"


class Attention(Enum):
    auto = "auto"
    flash = "flash"
    torch_varlen = "torch_varlen"
    per_document = "per_document"


class Range(NamedTuple):
    """Which numbers a setting may hold; null passes.

    Attributes:
        words: In words.
        holds: Whether a number is one of them.
    """

    words: str
    holds: Callable[[float], bool]


AT_LEAST_1 = Range("at least 1", lambda value: value >= 1)
AT_LEAST_2 = Range("at least 2", lambda value: value >= 2)
NOT_NEGATIVE = Range("0 or more", lambda value: value >= 0)
POSITIVE = Range("more than 0", lambda value: value > 0)
SHARE = Range("more than 0 and at most 1", lambda value: 0 < value <= 1)
FINITE = Range("finite", isfinite)
BELOW_1 = Range("at least 0 and less than 1", lambda value: 0 <= value < 1)


class When:
    """A setting acts only where another one has one of some values.

    Args:
        selector: The other one's dotted name.
        values: Its values.
        choose: How the command line chooses one of them.
    """

    def __init__(self, selector: str, *values: Any, choose: str) -> None:
        self.selector, self.values, self.choose = selector, frozenset(values), choose


def setting(
    default: Any,
    *,
    range: Range | None = None,
    acts: When | None = None,
    evaluated: bool = False,
    off_at_0: bool = False,
    by_group: bool = False,
    of_some_tasks: bool = False,
) -> Any:
    """A setting with what is known of it beside its type.

    Args:
        default: Its value where none is given.
        range: Numbers that it may hold.
        acts: When it acts; always, if not given.
        evaluated: Whether it does nothing where no record is held out (of the schedules only plateau does).
        off_at_0: Whether it is off at 0, though that is not its default: nothing is missed where it does nothing.
        by_group: Whether the choice of its group gives it: `schedule=plateau` is `schedule.name=plateau`.
        of_some_tasks: Whether not every task reads it; which ones do, says the task.
    """
    known = {"range": range, "acts": acts, "evaluated": evaluated, "off_at_0": off_at_0}
    metadata = known | {"by_group": by_group, "of_some_tasks": of_some_tasks}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    path: str = setting(MISSING, by_group=True)
    """Directory, hub id or GGUF file; `package://NAME/FILE` is a file inside an installed Python package."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    chat_template: str | None = setting(None, of_some_tasks=True)
    """File with a Jinja chat template that replaces the tokenizer's own."""
    resize_embeddings: bool = False
    """Append rows to the input embedding and the output head where the tokenizer has more tokens than the model has
    embeddings; each is the mean of the rows of its token's pieces under the old vocabulary."""
    attention: Attention = Attention.auto
    """Kernel of document-isolated attention: `flash` (flash-attn), `torch_varlen` (CUDA, half precision) or
    `per_document` (everywhere); `auto` takes the first that works, and `per_document` for a model with dropout of
    attention weights: `flash` draws that by noise of its own, which depends on the split, `torch_varlen` not at all."""
    logits_chunk: int = setting(1024, range=AT_LEAST_1, of_some_tasks=True)
    """Supervised tokens whose logits exist at once; bounds the memory that the vocabulary takes."""
    allow_missing: list[str] = setting([], of_some_tasks=True)
    """Regular expressions; parameters whose name one of them finds, and that the model's files lack, get new first
    values as a head does. A head itself needs no mention."""


@dataclass
class FewShotConfig:
    path: str | None = setting(None, of_some_tasks=True)
    """Records that stand before each record as examples, and are not learnt; anything that `data.train` may be."""
    count: int = setting(3, range=AT_LEAST_1, of_some_tasks=True)
    """How many of them, chosen by `train.seed` and the record's content; never a duplicate of the record."""


@dataclass
class DataConfig:
    source: Source = setting(Source.files, by_group=True)
    """`files` reads `data.train`; `pydoc` makes chats of installed Python documentation, `pydoc_kinds` texts with
    the kind of thing that each documents as their label, and `pydoc_code` tagged words of installed Python code."""
    train: str | None = setting(None, acts=When("data.source", Source.files, choose="data=jsonl"))
    """A file of any format in docs/DATA.md, a directory or glob of these, or a hub id."""
    validation: str | None = None
    """The same for evaluation; without it `data.validation_share` of the training records is held out."""
    validation_share: float = setting(0.02, range=BELOW_1, off_at_0=True)
    """Share of the training records held out for evaluation when `data.validation` is not given; 0 for none."""
    split: str = "train"
    """Split to read of `data.train`, where that is a hub id or a directory with several."""
    validation_split: str = "validation"
    """The same of `data.validation`."""
    test_split: str = "test"
    """The same of `data.test`."""
    subset: str | None = None
    """Subset (config) of a data set on the hub, of a clone of one, or a subdirectory; of `data.validation` too, where
    that is the same place as `data.train`."""
    header: list[str] = setting([])
    """Names of the fields, in order, of CSV and TSV files that have no first line with them."""
    test: str | None = None
    """The same as `data.validation` for a test set, which nothing is chosen by: it is evaluated once, at the end."""
    test_share: float = setting(0.0, range=BELOW_1)
    """Share of the training records held out for that test when `data.test` is not given."""
    group_by_field: str | None = None
    """Field of a record by which records are held out together or not at all; `a.b` is a field inside of a field."""
    stratify_by_field: str | None = None
    """Field of a record of whose every value the same share is held out."""
    columns: dict[str, str] = setting({})
    """Name of a field that is known -> the record's own name for it, as in `{prompt: q, completion: a}`; dots go into
    objects and lists (`answers.text.0`). On the command line it adds to what a recipe names."""
    prompt_template: str | None = setting(None, of_some_tasks=True)
    """Jinja template that writes the field `prompt` of a record's other fields, as text or a file; of a directory's
    files each record takes one, by `train.seed` and its content."""
    few_shot: FewShotConfig = field(default_factory=FewShotConfig)
    new_tokens: str | None = None
    """UTF-8 file with tokens to add to the tokenizer, one per line; markers in angle brackets and bars, as ChatML has,
    become special tokens. They take rows that the model has to spare, else `model.resize_embeddings=true` is needed."""
    packages: list[str] = setting(
        [],
        acts=When(
            "data.source",
            Source.pydoc,
            Source.pydoc_kinds,
            Source.pydoc_code,
            choose="data=pydoc|pydoc_kinds|pydoc_code",
        ),
    )
    """Installed packages whose documentation, or code, these add to the standard library's."""
    max_records: int | None = setting(None, range=AT_LEAST_1)
    """Read at most this many training records, in their order; null for all."""
    max_length: int = setting(512, range=AT_LEAST_2)
    """Tokens of the longest example, and of a packed row; of an encoder-decoder, those of the longest source text."""
    max_target_length: int = setting(128, range=AT_LEAST_2, of_some_tasks=True)
    """Tokens of the longest target text of an encoder-decoder."""
    packing: Packing = Packing.auto
    """`bfd` fills rows of `max_length` tokens by best-fit-decreasing; with `none` every example is a row; neither pads,
    and neither lets documents see each other. `padded` is for models that cannot keep the documents of a row apart:
    rows of like length go together and are filled up. `auto` takes `bfd` where the model can, else `padded`."""
    pack_window: int = setting(
        4096,
        range=AT_LEAST_1,
        acts=When("data.packing", Packing.auto, Packing.bfd, Packing.padded, choose="data.packing=auto|bfd|padded"),
    )
    """Shuffled examples that are packed, or sorted by length, together; larger packs tighter and pads less."""
    train_on: TrainOn = setting(TrainOn.assistant, of_some_tasks=True)
    """Which tokens are supervised: every assistant turn, the last one, all assistant turns and any message that carries
    a weight, or all tokens. A message's `weight` (0, 1 or a fraction) is what its tokens count, as is a record's."""
    on_rewritten_history: OnRewrittenHistory = setting(OnRewrittenHistory.split, of_some_tasks=True)
    """What happens to a conversation of which the chat template writes earlier turns in another way than the model saw
    them when it wrote them, as by leaving their reasoning out: `split` makes an example of each different beginning,
    `last` learns only the turns that stand as they were written, `error` makes it a malformed record."""
    reasoning: Reasoning = setting(Reasoning.learn, of_some_tasks=True)
    """What happens to reasoning, in fields of its own and between think tags: it is learnt, read but not learnt, or
    taken out."""
    ignore_fields: list[str] = setting([])
    """Names of fields, of a record or of its messages, that are treated as if they were not there."""
    balance: Resampling = setting(Resampling.none, of_some_tasks=True)
    """Take training records of rare labels several times, as often as those of the most frequent one are taken, or
    leave out those of frequent ones, down to the rarest; drawn by `train.seed`, the same for every epoch."""
    on_bad_record: OnBadRecord = OnBadRecord.error
    """Stop at a malformed record, or count it, list it in the audit and go on."""
    on_overflow: OnOverflow = OnOverflow.auto
    """What happens to an example longer than `max_length`: cut its end, split it into several examples (a chat between
    turns, where it can be), drop it, or stop; `auto` splits plain text, whose tokens are each learnt once, and cuts the
    end of a chat."""
    cache_dir: str = "~/.cache/dsft"
    """Where tokenised data and converted models are kept, keyed by content."""
    num_workers: int | None = setting(None, range=AT_LEAST_1)
    """Tokenising processes, started from 20,000 records on; null for all cores."""


@dataclass
class ChunkConfig:
    length: int | None = setting(None, range=AT_LEAST_2, of_some_tasks=True)
    """Tokens of the overlapping chunks that longer texts are read in, special tokens among them; of a pair the longer
    text is cut, beside the whole other one. Null reads no chunks."""
    stride: int | None = setting(None, range=AT_LEAST_1, of_some_tasks=True)
    """Tokens from the beginning of one chunk to that of the next; null for half of what a chunk holds."""
    pool: ChunkPool = setting(ChunkPool.mean, of_some_tasks=True)
    """What a text is said to be by its chunks' outputs: their mean, the largest of each, those of the first chunk (the
    others are not learnt either), or what most chunks say."""


@dataclass
class TaskConfig:
    name: str = MISSING
    """What is learnt, and from which records."""
    mask_share: float = setting(0.15, range=SHARE, of_some_tasks=True)
    """Share of an example's tokens that are to be predicted."""
    whole_words: bool = setting(False, of_some_tasks=True)
    """Predict whole words, not single tokens."""
    labels: list[str] = setting([], of_some_tasks=True)
    """All labels, in the order of the model's outputs; without it those of the training data, numbers by their size and
    names by the alphabet."""
    multi_label: bool = setting(False, of_some_tasks=True)
    """Whether a record may have several labels at once, or none; each is then decided by itself."""
    thresholds: Thresholds = setting(
        Thresholds.tuned, of_some_tasks=True, acts=When("task.multi_label", True, choose="task.multi_label=true")
    )
    """How probable a label has to be so that predictions give it, with `task.multi_label`: `tuned` is what makes its F1
    best on the validation set (one half where there was none), `half` is one half."""
    balance: Balance = setting(Balance.none, of_some_tasks=True)
    """What a record counts in the loss of training by how frequent its label is: `balanced` as n / (labels x n of the
    label), `effective_number` by (1 - beta) / (1 - beta^n) (arXiv:1901.05555); both are 1 in the mean over records."""
    effective_beta: float = setting(
        0.999,
        range=BELOW_1,
        of_some_tasks=True,
        acts=When("task.balance", Balance.effective_number, choose="task.balance=effective_number"),
    )
    """The beta of that."""
    label_weights: list[float] = setting([], of_some_tasks=True)
    """What a record of each label counts in the loss of training, in the order of `task.labels`."""
    focal_gamma: float = setting(0.0, range=NOT_NEGATIVE, of_some_tasks=True)
    """Focal loss of training (arXiv:1708.02002): what is predicted well with probability p counts (1 - p)^gamma."""
    label_smoothing: float = setting(0.0, range=BELOW_1, of_some_tasks=True)
    """Share of the target that is spread over all labels, or over the vocabulary, in the loss of training
    (arXiv:1512.00567)."""
    source_prefix: str | None = setting(None, of_some_tasks=True)
    """What stands before every source text, word for word, such as `translate English to German: ` for a T5."""
    source_language: str | None = setting(None, of_some_tasks=True)
    """Language of the source texts: the tokenizer's own code for it (`eng_Latn` for NLLB), and the key of a record's
    `translation`."""
    target_language: str | None = setting(None, of_some_tasks=True)
    """The same of the target texts."""
    chunk: ChunkConfig = field(default_factory=ChunkConfig)
    overlap: int = setting(64, range=NOT_NEGATIVE, of_some_tasks=True)
    """Tokens that neighbouring windows of a text longer than `data.max_length` have in common. A word's tag is learnt
    and told in the one where it stands farthest from a cut; beside a long question windows overlap by half of their
    room at most."""
    max_answer_tokens: int = setting(30, range=AT_LEAST_1, of_some_tasks=True)
    """Tokens of the longest answer that an evaluation takes out of a text."""
    no_answer_threshold: float | None = setting(None, range=FINITE, of_some_tasks=True)
    """By how much the logits of no answer have to exceed those of the best answer so that a question is said to have
    none; null is 0 where training records have questions without an answer, else none is said to have none."""
    regression_loss: RegressionLoss = setting(RegressionLoss.mse, of_some_tasks=True)
    """Of an error in standard deviations: its square, its size, or Huber's of both."""
    huber_delta: float = setting(
        1.0,
        range=POSITIVE,
        of_some_tasks=True,
        acts=When("task.regression_loss", RegressionLoss.huber, choose="task.regression_loss=huber"),
    )
    """Where Huber's loss goes over from the square to the size, in standard deviations."""
    standardise: bool = setting(True, of_some_tasks=True)
    """Learn numbers with mean 0 and standard deviation 1 over the training data; metrics and the exported model give
    them as the records have them."""
    head_init: HeadInit = setting(HeadInit.normal, of_some_tasks=True)
    """First values of a new head's matrices, by `train.seed`: `normal` with the standard deviation of the model's
    config, or `xavier` (uniform)."""
    head_dropout: float | None = setting(None, range=BELOW_1, of_some_tasks=True)
    """Dropout before the head; null keeps the model's own."""
    pool: Pool | None = setting(None, of_some_tasks=True)
    """What the head is given of a text: its first token, the mean of all, or the last; null keeps the model's own. What
    the architecture cannot do is refused, as the exported model has to do the same."""


@dataclass
class TuningConfig:
    method: Method = setting(Method.full, by_group=True)
    """`full` trains every weight, `freeze` a chosen part, `lora` low-rank adapters."""
    trainable: list[str] = setting([], acts=When("tuning.method", Method.freeze, choose="tuning=freeze"))
    """Regular expressions; parameters whose name one of them finds are trained."""
    last_layers: int | None = setting(
        None, range=AT_LEAST_1, acts=When("tuning.method", Method.freeze, choose="tuning=freeze")
    )
    """Train the last N decoder layers, the final norm and an untied output head."""
    new_tokens: bool = setting(
        False, acts=When("tuning.method", Method.freeze, Method.lora, choose="tuning=freeze|lora")
    )
    """Train the rows of new tokens in the embedding and the output head too, and no other rows;
    with `freeze` they may be all that is trained. They are not decayed."""
    rank: int = setting(16, range=AT_LEAST_1, acts=When("tuning.method", Method.lora, choose="tuning=lora"))
    """Rank of the update."""
    alpha: float = setting(32.0, range=POSITIVE, acts=When("tuning.method", Method.lora, choose="tuning=lora"))
    """Scale; the update is multiplied by alpha / rank (by alpha / sqrt(rank) under rsLoRA)."""
    dropout: float = setting(0.0, range=BELOW_1, acts=When("tuning.method", Method.lora, choose="tuning=lora"))
    """Dropout on the adapter's input."""
    target_modules: list[str] = setting(["all-linear"], acts=When("tuning.method", Method.lora, choose="tuning=lora"))
    """Module names that get adapters; `all-linear` is every linear layer but the output head."""
    use_rslora: bool = setting(False, acts=When("tuning.method", Method.lora, choose="tuning=lora"))
    """Rank-stabilised scale (arXiv:2312.03732)."""
    use_dora: bool = setting(False, acts=When("tuning.method", Method.lora, choose="tuning=lora"))
    """Weight-decomposed update (arXiv:2402.09353)."""
    neftune_alpha: float = setting(0.0, range=NOT_NEGATIVE)
    """Noise on the input embeddings while training (arXiv:2310.05914); 0 for none."""


@dataclass
class DeepSpeedConfig:
    json: str = setting(MISSING, by_group=True)
    """DeepSpeed JSON file; it owns ZeRO, offload and communication, this config owns everything else."""


@dataclass
class Fp16Config:
    initial_scale_power: int = setting(
        16, range=NOT_NEGATIVE, acts=When("precision", Precision.fp16, choose="precision=fp16")
    )
    """The first loss scale is 2 to this power."""
    loss_scale_window: int = setting(
        1000, range=AT_LEAST_1, acts=When("precision", Precision.fp16, choose="precision=fp16")
    )
    """Steps without overflow before the loss scale doubles."""


@dataclass
class BatchConfig:
    micro_batch_size: int | None = None
    """Rows that one rank takes through one forward pass."""
    gradient_accumulation_steps: int | None = None
    """Forward passes of one rank per optimizer step."""
    global_batch_size: int | None = None
    """Rows per optimizer step = micro_batch_size x gradient_accumulation_steps x ranks; any two give the third."""


@dataclass
class ParameterGroup:
    """Parameters with a rate or a decay of their own."""

    match: str = ""
    """Regular expression that their names are searched for."""
    lr: float | None = None
    """Their peak learning rate; null leaves `optim.lr` and `optim.layer_decay` to say it."""
    weight_decay: float | None = None
    """Weight decay of those that are decayed at all; null leaves it to `optim.weight_decay`."""


@dataclass
class OptimConfig:
    name: OptimName = setting(OptimName.adamw, by_group=True)
    """`adamw`, `sgd`, `lion` (DeepSpeed's) or `muon` (DeepSpeed's; matrices by Muon, the rest by AdamW)."""
    implementation: Implementation = setting(
        Implementation.auto, acts=When("optim.name", OptimName.adamw, choose="optim=adamw")
    )
    """AdamW by `torch` or `deepspeed`; `auto` is DeepSpeed's where the optimizer is offloaded, else torch's."""
    lr: float = setting(1e-4, range=POSITIVE)
    """Peak learning rate."""
    betas: list[float] = setting(
        [0.9, 0.999],
        acts=When("optim.name", OptimName.adamw, OptimName.lion, OptimName.muon, choose="optim=adamw|lion|muon"),
    )
    """Decay of the first and the second moment."""
    eps: float = setting(
        1e-8, range=POSITIVE, acts=When("optim.name", OptimName.adamw, OptimName.muon, choose="optim=adamw|muon")
    )
    """Added to the denominator."""
    weight_decay: float = setting(0.0, range=NOT_NEGATIVE)
    """Weight decay, decoupled except with SGD; never applied to norms, biases and embeddings."""
    momentum: float = setting(
        0.9, range=BELOW_1, acts=When("optim.name", OptimName.sgd, OptimName.muon, choose="optim=sgd|muon")
    )
    """Momentum."""
    max_grad_norm: float = setting(1.0, range=NOT_NEGATIVE)
    """Clip the gradient to this global 2-norm; 0 is off."""
    groups: list[ParameterGroup] = setting([])
    """Parameters with a rate or decay of their own, as in `[{match: classifier, lr: 1e-4, weight_decay: 0.1}]`; of
    several whose regular expression finds a name the first counts. A rate given here is not scaled by `layer_decay`."""
    layer_decay: float = setting(1.0, range=SHARE)
    """Layer-wise rates: each layer below the top has this times the rate of the one above it."""


@dataclass
class ScheduleConfig:
    name: ScheduleName = setting(ScheduleName.cosine, evaluated=True, by_group=True)
    """Shape of the learning rate after warm-up, by optimizer step."""
    warmup_steps: int = setting(0, range=NOT_NEGATIVE)
    """Steps over which the rate rises linearly to its peak."""
    warmup_ratio: float = setting(0.0, range=BELOW_1)
    """The same as a share of all steps; give one of the two."""
    min_lr_ratio: float = setting(
        0.0,
        range=BELOW_1,
        acts=When(
            "schedule.name",
            ScheduleName.linear,
            ScheduleName.cosine,
            ScheduleName.plateau,
            choose="schedule=linear|cosine|plateau",
        ),
    )
    """Floor of linear, cosine and plateau, as a share of the peak."""
    restarts: int = setting(
        0, range=NOT_NEGATIVE, acts=When("schedule.name", ScheduleName.cosine, choose="schedule=cosine")
    )
    """How many times it starts again from the peak."""
    step_size: int = setting(1, range=AT_LEAST_1, acts=When("schedule.name", ScheduleName.step, choose="schedule=step"))
    """A decay every this many `schedule.unit`."""
    unit: Unit = setting(
        Unit.epochs,
        acts=When("schedule.name", ScheduleName.step, ScheduleName.exponential, choose="schedule=step|exponential"),
    )
    """What a decay is counted in."""
    gamma: float = setting(
        0.9,
        range=SHARE,
        acts=When(
            "schedule.name",
            ScheduleName.step,
            ScheduleName.exponential,
            ScheduleName.plateau,
            choose="schedule=step|exponential|plateau",
        ),
    )
    """Factor of one decay."""
    metric: str = setting(
        "eval/loss", acts=When("schedule.name", ScheduleName.plateau, choose="schedule=plateau"), evaluated=True
    )
    """The evaluation metric that is watched."""
    patience: int = setting(
        2,
        range=NOT_NEGATIVE,
        acts=When("schedule.name", ScheduleName.plateau, choose="schedule=plateau"),
        evaluated=True,
    )
    """Evaluations without improvement before a decay."""


@dataclass
class TrainConfig:
    max_steps: int | None = setting(None, range=AT_LEAST_1)
    """Stop after this many optimizer steps."""
    epochs: int | None = setting(None, range=AT_LEAST_1)
    """Stop after this many passes over the data; 1 where neither is given. With both, whichever comes first."""
    seed: int = setting(0, range=NOT_NEGATIVE)
    """Seed of the data order, the held-out split, adapters, dropout and noise."""
    log_every: int = setting(1, range=AT_LEAST_1)
    """Steps between rows of training metrics."""
    eval_every: int = setting(50, range=NOT_NEGATIVE, evaluated=True, off_at_0=True)
    """Steps between evaluations; there is always one before the first step and one at the end. 0 for only these."""
    save_every: int = setting(50, range=NOT_NEGATIVE)
    """Steps between checkpoints; there is always one at the end. 0 for only this."""
    keep_last: int = setting(2, range=AT_LEAST_1)
    """Checkpoints kept, besides the best."""
    resume: str = "auto"
    """`auto` goes on from the newest whole checkpoint of `run_dir`, `never` starts anew, PATH is one checkpoint."""
    best_metric: str = setting("eval/loss", evaluated=True)
    """Metric that picks the best checkpoint."""
    early_stopping_patience: int = setting(0, range=NOT_NEGATIVE, evaluated=True)
    """Stop after this many evaluations without improvement of `best_metric`; 0 is off."""
    early_stopping_min_delta: float = setting(0.0, range=NOT_NEGATIVE, evaluated=True)
    """Smallest change of `best_metric` that counts as an improvement."""
    max_skipped_steps: int = setting(20, range=NOT_NEGATIVE)
    """Stop with a diagnosis after this many skipped steps (overflow, NaN) in a row; 0 is off."""
    samples: int = setting(1, range=NOT_NEGATIVE, evaluated=True, off_at_0=True, of_some_tasks=True)
    """Answers generated for the first validation records, before the first step and at the end."""
    sample_tokens: int = setting(64, range=AT_LEAST_1, evaluated=True, of_some_tasks=True)
    """Longest generated answer, in tokens."""
    export: bool = True
    """Write `run_dir/model/` at the end."""
    deterministic: bool = False
    """Ask torch for deterministic kernels; slower on GPUs."""


@dataclass
class EvalConfig:
    micro_batch_size: int | None = setting(None, range=AT_LEAST_1, evaluated=True)
    """Documents in one evaluation forward pass; null takes as many as fit in one training micro-batch's tokens.
    Changes speed and memory, never a result."""
    pseudo_perplexity: int | None = setting(0, range=NOT_NEGATIVE, of_some_tasks=True)
    """Validation examples over which pseudo-perplexity is formed, each of their tokens predicted with it alone masked
    (arXiv:1910.14659); 0 for none, null for all."""


@dataclass
class TrackingConfig:
    wandb: bool = setting(False, by_group=True)
    """Send metrics, samples and the audit to Weights & Biases, from rank 0. `metrics.jsonl` is always written."""
    project: str = setting("dsft", acts=When("tracking.wandb", True, choose="tracking=wandb"))
    """W&B project."""
    entity: str | None = setting(None, acts=When("tracking.wandb", True, choose="tracking=wandb"))
    """W&B entity."""
    tags: list[str] = setting([], acts=When("tracking.wandb", True, choose="tracking=wandb"))
    """W&B tags."""
    progress: bool = True
    """Show a progress bar on rank 0."""


@dataclass
class Config:
    """A whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    fp16: Fp16Config = field(default_factory=Fp16Config)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    precision: Precision = Precision.auto
    """Type of weights and activations; `auto` is bf16 where the hardware computes in it, else fp32."""
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    """`full` recomputes each layer's activations in the backward pass, `offload` also keeps its input on the host."""
    name: str = "run"
    """Name of the run."""
    run_dir: str = "runs/${name}"
    """Directory that receives everything the run leaves behind."""


@cache
def knobs(section: type = Config, prefix: str = "") -> dict[str, Any]:
    """Every setting's dotted name and type, in the schema's order."""
    hints = get_type_hints(section)
    found: dict[str, Any] = {}
    for one in fields(section):
        hint: Any = hints[one.name]
        inside = isinstance(hint, type) and is_dataclass(hint)
        found |= knobs(hint, f"{prefix}{one.name}.") if inside else {prefix + one.name: hint}
    return found


@cache
def known(what: str, section: type = Config, prefix: str = "") -> dict[str, Any]:
    """What `setting` was told of each setting, by its dotted name; those of which it was not are left out.

    Args:
        what: A keyword of `setting`.
        section: Where to look.
        prefix: Its dotted name and a dot.
    """
    hints: dict[str, Any] = get_type_hints(section)
    found: dict[str, Any] = {}
    for one in fields(section):
        inner = hints[one.name]
        if isinstance(inner, type) and is_dataclass(inner):
            found |= known(what, inner, f"{prefix}{one.name}.")
        elif one.metadata.get(what):
            found[prefix + one.name] = one.metadata[what]
    return found


def is_text(hint: Any) -> bool:
    """Whether a setting of this type holds text."""
    return hint is str or is_text_or_null(hint)


def is_text_or_null(hint: Any) -> bool:
    """Whether a setting of this type holds text or null."""
    return hint == str | None


def is_text_list(hint: Any) -> bool:
    """Whether a setting of this type holds a list of texts."""
    return hint == list[str]


def is_text_map(hint: Any) -> bool:
    """Whether a setting of this type holds texts by names."""
    return hint == dict[str, str]
