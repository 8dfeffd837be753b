"""Every knob of a run: its type, its default and what it does.

The docstring under a knob is its documentation; the table in the README is made from it. YAML files in `conf/`
choose values and never define knobs. OmegaConf reads these classes, so they are not frozen and use `Enum`, not
`Literal`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, get_type_hints

from omegaconf import MISSING


class Source(Enum):
    files = "files"
    pydoc = "pydoc"


class Packing(Enum):
    auto = "auto"
    bfd = "bfd"
    none = "none"
    padded = "padded"


class TrainOn(Enum):
    assistant = "assistant"
    last_assistant = "last_assistant"
    all = "all"


class OnBadRecord(Enum):
    error = "error"
    skip = "skip"


class OnOverflow(Enum):
    truncate = "truncate"
    split = "split"
    drop = "drop"
    error = "error"


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


OF_SOME_TASKS = {"of_some_tasks": True}
"""Metadata of a setting that not every task reads; which ones do, says the task."""


@dataclass
class ModelConfig:
    path: str = MISSING
    """Directory, hub id or GGUF file; `package://NAME/FILE` is a file inside an installed Python package."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    chat_template: str | None = field(default=None, metadata=OF_SOME_TASKS)
    """File with a Jinja chat template that replaces the tokenizer's own."""
    resize_embeddings: bool = False
    """Append rows to the input embedding and the output head where the tokenizer has more tokens than the model has
    embeddings; each is the mean of the rows of its token's pieces under the old vocabulary."""
    attention: Attention = Attention.auto
    """Kernel of document-isolated attention: `flash` (flash-attn), `torch_varlen` (CUDA, half precision) or
    `per_document` (everywhere); `auto` takes the first that works, and `per_document` for a model with dropout of
    attention weights: `flash` draws that by noise of its own, which depends on the split, `torch_varlen` not at all."""
    logits_chunk: int = field(default=1024, metadata=OF_SOME_TASKS)
    """Supervised tokens whose logits exist at once; bounds the memory that the vocabulary takes."""


@dataclass
class DataConfig:
    source: Source = Source.files
    """`files` reads `data.train`; `pydoc` makes records from installed Python documentation."""
    train: str | None = None
    """JSONL, JSON, Parquet, CSV or TSV file, directory or glob of these, or a hub id."""
    validation: str | None = None
    """The same for evaluation; without it `data.validation_share` of the training records is held out."""
    validation_share: float = 0.02
    """Share of the training records held out for evaluation when `data.validation` is not given; 0 for none."""
    split: str = "train"
    """Split to read when `data.train` is a hub id."""
    new_tokens: str | None = None
    """UTF-8 file with tokens to add to the tokenizer, one per line; markers in angle brackets and bars, as ChatML has,
    become special tokens. They take rows that the model has to spare, else `model.resize_embeddings=true` is needed."""
    packages: list[str] = field(default_factory=list)
    """Installed packages whose documentation `data=pydoc` adds to the standard library's."""
    max_records: int | None = None
    """Read at most this many training records, in their order; null for all."""
    max_length: int = 512
    """Tokens of the longest example, and of a packed row."""
    packing: Packing = Packing.auto
    """`bfd` fills rows of `max_length` tokens by best-fit-decreasing; with `none` every example is a row; neither pads,
    and neither lets documents see each other. `padded` is for models that cannot keep the documents of a row apart:
    rows of like length go together and are filled up. `auto` takes `bfd` where the model can, else `padded`."""
    pack_window: int = 4096
    """Shuffled examples that are packed, or sorted by length, together; larger packs tighter and pads less."""
    train_on: TrainOn = field(default=TrainOn.assistant, metadata=OF_SOME_TASKS)
    """Which tokens are supervised: every assistant turn, the last one, or all tokens."""
    on_bad_record: OnBadRecord = OnBadRecord.error
    """Stop at a malformed record, or count it, list it in the audit and go on."""
    on_overflow: OnOverflow = OnOverflow.truncate
    """What happens to an example longer than `max_length`: cut its end, split it into several examples, drop it, or
    stop."""
    cache_dir: str = "~/.cache/dsft"
    """Where tokenised data and converted models are kept, keyed by content."""
    num_workers: int | None = None
    """Tokenising processes, started from 20,000 records on; null for all cores."""


@dataclass
class TaskConfig:
    name: str = MISSING
    """What is learnt, and from which records."""
    mask_share: float = field(default=0.15, metadata=OF_SOME_TASKS)
    """Share of an example's tokens that are to be predicted."""
    whole_words: bool = field(default=False, metadata=OF_SOME_TASKS)
    """Predict whole words, not single tokens."""


@dataclass
class TuningConfig:
    method: Method = Method.full
    """`full` trains every weight, `freeze` a chosen part, `lora` low-rank adapters."""
    trainable: list[str] = field(default_factory=list)
    """`freeze`: regular expressions; parameters whose name one of them finds are trained."""
    last_layers: int | None = None
    """`freeze`: train the last N decoder layers, the final norm and an untied output head."""
    new_tokens: bool = False
    """`freeze`, `lora`: train the rows of new tokens in the embedding and the output head too, and no other rows;
    with `freeze` they may be all that is trained. They are not decayed."""
    rank: int = 16
    """`lora`: rank of the update."""
    alpha: float = 32.0
    """`lora`: scale; the update is multiplied by alpha / rank (by alpha / sqrt(rank) under rsLoRA)."""
    dropout: float = 0.0
    """`lora`: dropout on the adapter's input."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """`lora`: module names that get adapters; `all-linear` is every linear layer but the output head."""
    use_rslora: bool = False
    """`lora`: rank-stabilised scale (arXiv:2312.03732)."""
    use_dora: bool = False
    """`lora`: weight-decomposed update (arXiv:2402.09353)."""
    neftune_alpha: float = 0.0
    """Noise on the input embeddings while training (arXiv:2310.05914); 0 for none."""


@dataclass
class DeepSpeedConfig:
    json: str = MISSING
    """DeepSpeed JSON file; it owns ZeRO, offload and communication, this config owns everything else."""


@dataclass
class Fp16Config:
    initial_scale_power: int = 16
    """fp16: the first loss scale is 2 to this power."""
    loss_scale_window: int = 1000
    """fp16: steps without overflow before the loss scale doubles."""


@dataclass
class BatchConfig:
    micro_batch_size: int | None = None
    """Rows that one rank takes through one forward pass."""
    gradient_accumulation_steps: int | None = None
    """Forward passes of one rank per optimizer step."""
    global_batch_size: int | None = None
    """Rows per optimizer step = micro_batch_size x gradient_accumulation_steps x ranks; any two give the third."""


@dataclass
class OptimConfig:
    name: OptimName = OptimName.adamw
    """`adamw`, `sgd`, `lion` (DeepSpeed's) or `muon` (DeepSpeed's; matrices by Muon, the rest by AdamW)."""
    implementation: Implementation = Implementation.auto
    """AdamW by `torch` or `deepspeed`; `auto` is DeepSpeed's where the optimizer is offloaded, else torch's."""
    lr: float = 1e-4
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW, Lion, and Muon's AdamW: decay of the first and the second moment."""
    eps: float = 1e-8
    """AdamW, and Muon's AdamW: added to the denominator."""
    weight_decay: float = 0.0
    """Weight decay, decoupled except with SGD; never applied to norms, biases and embeddings."""
    momentum: float = 0.9
    """SGD, Muon: momentum."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this global 2-norm; 0 is off."""
    layer_decay: float = 1.0
    """Layer-wise rates: each layer below the top has this times the rate of the one above it."""


@dataclass
class ScheduleConfig:
    name: ScheduleName = ScheduleName.cosine
    """Shape of the learning rate after warm-up, by optimizer step."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly to its peak."""
    warmup_ratio: float = 0.0
    """The same as a share of all steps; give one of the two."""
    min_lr_ratio: float = 0.0
    """Floor of linear, cosine and plateau, as a share of the peak."""
    restarts: int = 0
    """Cosine: how many times it starts again from the peak."""
    step_size: int = 1
    """Step: a decay every this many `schedule.unit`."""
    unit: Unit = Unit.epochs
    """Step, exponential: what a decay is counted in."""
    gamma: float = 0.9
    """Step, exponential, plateau: factor of one decay."""
    metric: str = "eval/loss"
    """Plateau: the evaluation metric that is watched."""
    patience: int = 2
    """Plateau: evaluations without improvement before a decay."""


@dataclass
class TrainConfig:
    max_steps: int | None = None
    """Stop after this many optimizer steps."""
    epochs: int | None = None
    """Stop after this many passes over the data; 1 where neither is given. With both, whichever comes first."""
    seed: int = 0
    """Seed of the data order, the held-out split, adapters, dropout and noise."""
    log_every: int = 1
    """Steps between rows of training metrics."""
    eval_every: int = 50
    """Steps between evaluations; there is always one before the first step and one at the end. 0 for only these."""
    save_every: int = 50
    """Steps between checkpoints; there is always one at the end. 0 for only this."""
    keep_last: int = 2
    """Checkpoints kept, besides the best."""
    resume: str = "auto"
    """`auto` goes on from the newest whole checkpoint of `run_dir`, `never` starts anew, PATH is one checkpoint."""
    best_metric: str = "eval/loss"
    """Metric that picks the best checkpoint."""
    early_stopping_patience: int = 0
    """Stop after this many evaluations without improvement of `best_metric`; 0 is off."""
    early_stopping_min_delta: float = 0.0
    """Smallest change of `best_metric` that counts as an improvement."""
    max_skipped_steps: int = 20
    """Stop with a diagnosis after this many skipped steps (overflow, NaN) in a row; 0 is off."""
    samples: int = field(default=1, metadata=OF_SOME_TASKS)
    """Answers generated for the first validation records, before the first step and at the end."""
    sample_tokens: int = field(default=64, metadata=OF_SOME_TASKS)
    """Longest generated answer, in tokens."""
    export: bool = True
    """Write `run_dir/model/` at the end."""
    deterministic: bool = False
    """Ask torch for deterministic kernels; slower on GPUs."""


@dataclass
class EvalConfig:
    micro_batch_size: int | None = None
    """Documents in one evaluation forward pass; null takes as many as fit in one training micro-batch's tokens.
    Changes speed and memory, never a result."""
    pseudo_perplexity: int | None = field(default=0, metadata=OF_SOME_TASKS)
    """Validation examples over which pseudo-perplexity is formed, each of their tokens predicted with it alone masked
    (arXiv:1910.14659); 0 for none, null for all."""


@dataclass
class TrackingConfig:
    wandb: bool = False
    """Send metrics, samples and the audit to Weights & Biases, from rank 0. `metrics.jsonl` is always written."""
    project: str = "dsft"
    """W&B project."""
    entity: str | None = None
    """W&B entity."""
    tags: list[str] = field(default_factory=list)
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
    """Every knob's dotted name and type, in the schema's order."""
    hints = get_type_hints(section)
    found: dict[str, Any] = {}
    for knob in fields(section):
        hint: Any = hints[knob.name]
        name = prefix + knob.name
        inner: Any = hint
        found |= knobs(inner, name + ".") if is_dataclass(hint) else {name: hint}
    return found


@cache
def of_some_tasks(section: type = Config, prefix: str = "") -> frozenset[str]:
    """Settings that not every task reads."""
    hints = get_type_hints(section)
    found: set[str] = set()
    for knob in fields(section):
        name = prefix + knob.name
        if is_dataclass(hints[knob.name]):
            section_of: Any = hints[knob.name]
            found |= of_some_tasks(section_of, name + ".")
        elif knob.metadata.get("of_some_tasks"):
            found.add(name)
    return frozenset(found)


def is_text(hint: Any) -> bool:
    """Whether a knob of this type holds text."""
    return hint is str or is_text_or_null(hint)


def is_text_or_null(hint: Any) -> bool:
    """Whether a knob of this type holds text or null."""
    return hint == str | None


def is_text_list(hint: Any) -> bool:
    """Whether a knob of this type holds a list of texts."""
    return hint == list[str]
