"""From a name to a tokenizer and a model: directories, hub ids, GGUF files, files inside installed packages."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from jinja2 import TemplateSyntaxError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.utils import logging as transformers_logging
from transformers.utils.chat_template_utils import _compile_jinja_template
from transformers.utils.hub import cached_file, extract_commit_hash
from transformers.utils.quantization_config import GgufConfig

from dsft.config.schema import ActivationCheckpointing
from dsft.errors import UserError
from dsft.model import directory as directories
from dsft.model import head as heads
from dsft.model.kind import CAUSAL, Inseparable, Kind
from dsft.runtime.content import disguise

CONVERSION = 1
"""Version of what a converted GGUF directory holds; a new number makes old caches unused."""

BYTE_ORDER_MARK = "\ufeff"

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json")
"""How files end that hold a directory's weights, or say where they are."""

FORMS = "Give a directory, a hub id (`org/name`), a `.gguf` file or `package://NAME/FILE`."


@dataclass(frozen=True)
class ModelSource:
    """A model that is known to be there.

    Attributes:
        path: Directory, or hub id; what `from_pretrained` takes.
        revision: Commit of a hub id, None for a directory.
        fingerprint: Hex digest of the model's content, the same wherever its files lie.
        name: What the person asked for, for messages.
        origin: The same for whoever asks from another working directory.
        files: Name to hex digest of each file that decides the weights; empty for a hub id, whose commit says it all.
        kind: What is made of it.
        head: The head that it gets, where its kind has one.
        allow_missing: Regular expressions of parameters that its files may lack (`model.allow_missing`).
    """

    path: str
    revision: str | None
    fingerprint: str
    name: str
    origin: str = ""
    files: dict[str, str] = field(default_factory=dict, compare=False)
    kind: Kind = CAUSAL
    head: heads.Head | None = None
    allow_missing: tuple[str, ...] = ()


def resolve(
    path: str, revision: str | None = None, cache_dir: str = "~/.cache/dsft", kind: Kind = CAUSAL
) -> ModelSource:
    """Find the model that `path` names; a GGUF file is converted to a plain directory first, once per machine.

    Processes may call this at the same time: one converts, the others wait for it.

    Args:
        path: Directory, hub id, `.gguf` file, or `package://NAME/FILE` for a file or directory of these kinds inside
            an installed Python package (which is not imported).
        revision: Branch, tag or commit of a hub id.
        cache_dir: Converted models go to `models/` in it.
        kind: What the task makes of it.

    Raises:
        UserError: There is no such model; the message names what was tried.
    """
    local = local_path(path)
    if local.is_symlink() and not local.exists():
        raise UserError(f"model.path={path} is {disguise(local)}.")
    if local.is_file() and local.suffix == ".gguf":
        directory, digest, content = _converted(local, Path(cache_dir).expanduser())
        return ModelSource(str(directory), None, digest, path, _anywhere(path, local), {local.name: content}, kind)
    if local.is_dir():
        directories.check_directory(path, local, kind)
        files = _file_digests(local)
        fingerprint = _digest_of(files)
        return ModelSource(
            str(local.resolve()), None, fingerprint, path, _anywhere(path, local), _decisive(files), kind
        )
    if local.is_file():
        raise UserError(f"model.path={path}: a file, but not a .gguf file. {FORMS}")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) or path.endswith(".gguf"):
        raise UserError(f"model.path={path}: no file or directory at {local.absolute()}. {FORMS}")
    return _on_hub(path, revision, kind)


def local_path(path: str) -> Path:
    """Where `path` is on this machine, if it is no hub id; what is inside of a package is not imported.

    Raises:
        UserError: The package has no such file.
    """
    return _inside_package(path) if path.startswith("package://") else Path(path).expanduser()


def fingerprint(directory: Path) -> str:
    """Hex digest of a directory's files."""
    return _digest_of(_file_digests(directory))


def on_hub(path: str) -> bool:
    """Whether `resolve` would ask the hub for `path`: nothing of this name lies here."""
    return not path.startswith("package://") and not os.path.lexists(Path(path).expanduser())


def _anywhere(path: str, local: Path) -> str:
    return path if path.startswith("package://") else str(local.absolute())


def _decisive(files: dict[str, str]) -> dict[str, str]:
    """Those of a model directory's files that decide what its weights are."""
    return {name: digest for name, digest in files.items() if name.endswith(WEIGHTS) or name == "config.json"}


def _inside_package(path: str) -> Path:
    """The file that `package://NAME/FILE` names, without importing the package."""
    package, _, inner = path.removeprefix("package://").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
        raise UserError(
            f"model.path={path}: no Python package {package!r} is installed here. "
            f"Install it: pip install {package.replace('_', '-')}"
        )
    roots = spec.submodule_search_locations or [str(Path(spec.origin or "").parent)]
    candidates = [Path(root) / inner for root in roots]
    for candidate in candidates:
        if inner and candidate.exists():
            return candidate
    models = sorted(str(p.relative_to(root)) for root in roots for p in Path(root).rglob("*.gguf"))
    held = f"It holds {', '.join(models)}." if models else "It holds no .gguf file."
    raise UserError(f"model.path={path}: the package {package!r} has no file {inner!r}. {held}")


def _on_hub(path: str, revision: str | None, kind: Kind) -> ModelSource:
    """A hub id, pinned to the commit that `revision` means now, so that every rank loads the same."""
    try:
        config_file = cached_file(path, "config.json", revision=revision)
    except OSError as error:
        if about := _adapters_on_hub(path, revision):
            raise UserError(f"model.path={path}: {directories.adapters(about)}") from error
        at = f" at revision {revision!r}" if revision else ""
        raise UserError(
            f"model.path={path}: no directory {Path(path).absolute()}, and the hub gave no config.json of "
            f"{path!r}{at}: {_first_line(error)}. {FORMS}"
        ) from error
    commit = extract_commit_hash(config_file, None) or revision
    return ModelSource(path, commit, _digest(path, commit), path, path, kind=kind)


def _adapters_on_hub(path: str, revision: str | None) -> dict[str, Any] | None:
    try:
        return directories.read_json(Path(cached_file(path, "adapter_config.json", revision=revision)))
    except OSError:
        return None


def _converted(file: Path, cache_dir: Path) -> tuple[Path, str, str]:
    """Directory that holds the GGUF file's model in Hugging Face's layout, its digest, and that of the GGUF file."""
    if problem := disguise(file):
        raise UserError(f"{file} is {problem}.")
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(f"{file} is no GGUF file, whatever its name says: download or copy it again.")
        stream.seek(0)
        content = hashlib.file_digest(stream, "sha256").hexdigest()
    digest = _digest(content, CONVERSION, transformers.__version__)
    target = cache_dir / "models" / f"{file.stem}-{digest[:16]}"
    if target.is_dir():
        return target, digest, content
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.is_dir():
                partial = target.with_name(f".{target.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                print(
                    f"Converting {file.name} to {target} (once; some seconds per 100 MB)", file=sys.stderr, flush=True
                )
                _convert_gguf(file, partial)
                partial.rename(target)
    return target, digest, content


def _convert_gguf(file: Path, directory: Path) -> None:
    """Write the unpacked model, its tokenizer and chat template to `directory`.

    The values are kept in fp32: a block's `scale * q + offset` (fp16 factors) does not fit bf16 or fp16, and a
    run in fp32 should start from what the file says. A bf16 run rounds once, on loading.
    """
    try:
        with plain_loading():
            model = CAUSAL.auto.from_pretrained(
                str(file.parent),
                gguf_file=file.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except Exception as error:  # a damaged binary file can fail in any way
        raise UserError(f"{file}: transformers cannot read this GGUF file: {_first_line(error)}") from error
    # The weights are plain now; what is left of the quantisation would make save_pretrained refuse.
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    vars(model.config).pop("_model_name_or_path", None)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    even_modes(directory)


def load_config(source: ModelSource) -> PreTrainedConfig:
    """The model's configuration.

    Raises:
        UserError: It cannot be read, or transformers does not know the architecture.
    """
    with _loading(source, "config.json"):
        config = AutoConfig.from_pretrained(source.path, revision=source.revision, trust_remote_code=False)
    directories.check_config(source.name, config.to_dict(), source.kind)
    if source.head is not None:
        heads.configure(config, source.head, source.kind)
    return config


def own_labels(source: ModelSource) -> list[str]:
    """Names of the outputs of the head that the model's files hold, in order; none where they hold none of its kind."""
    with _loading(source, "config.json"):
        config = AutoConfig.from_pretrained(source.path, revision=source.revision, trust_remote_code=False)
    named = source.kind.families.get(config.model_type, ())
    own = {named} if isinstance(named, str) else {*named}
    if not own.intersection(config.architectures or []):
        return []
    return [str(config.id2label[number]) for number in sorted(config.id2label)]


def load_generation_config(source: ModelSource) -> bytes | None:
    """The model's `generation_config.json` byte for byte; None if it has none."""
    try:
        return Path(cached_file(source.path, "generation_config.json", revision=source.revision)).read_bytes()
    except OSError:
        return None


def load_tokenizer(source: ModelSource, chat_template_file: str | None = None) -> PreTrainedTokenizerFast:
    """The model's tokenizer, with a padding token.

    Args:
        source: Where the model is.
        chat_template_file: Jinja template that replaces the tokenizer's own.

    Raises:
        UserError: No tokenizer, a slow one (without character offsets) where those are needed, or an unreadable
            template file.
    """
    if source.revision is None:
        directories.check_tokenizer(source.name, Path(source.path))
    with _loading(source, "tokenizer", Exception):  # its files can be broken in any way
        tokenizer = AutoTokenizer.from_pretrained(source.path, revision=source.revision, trust_remote_code=False)
    # a text that is written from another needs no places of characters, and some of such models have only a slow one
    if not tokenizer.is_fast and not source.kind.two_sided:
        raise UserError(
            f"model.path={source.name}: its tokenizer ({type(tokenizer).__name__}) has no fast version. "
            "Save it with a tokenizer.json beside the model."
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"model.path={source.name}: its tokenizer names neither a padding nor an end token.")
        tokenizer.pad_token = tokenizer.eos_token
    if chat_template_file is not None:
        tokenizer.chat_template = _read_template(Path(chat_template_file).expanduser())
    elif isinstance(tokenizer.chat_template, dict):
        named = {name: text.removeprefix(BYTE_ORDER_MARK) for name, text in tokenizer.chat_template.items()}
        tokenizer.chat_template = named
    elif tokenizer.chat_template is not None:
        tokenizer.chat_template = tokenizer.chat_template.removeprefix(BYTE_ORDER_MARK)
    return tokenizer


def _read_template(file: Path) -> str:
    """The Jinja template in a file of UTF-8 text, without a byte-order mark, which would be part of every answer.

    Raises:
        UserError: There is no such file, it holds something else, or no valid template.
    """
    where = f"model.chat_template={file}"
    try:
        problem = disguise(file, text=True)
        text = "" if problem else file.read_text(encoding="utf-8").removeprefix(BYTE_ORDER_MARK)
        _compile_jinja_template(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}: save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}.") from error
    except TemplateSyntaxError as error:
        raise UserError(f"{where}:{error.lineno}: no valid Jinja template: {error.message}.") from error
    if problem or not text.strip():
        raise UserError(f"{where} is {problem or 'empty: give a file with a Jinja template'}.")
    return text


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Hex digest of all that decides how text becomes ids: the tokenizer, its special tokens, its chat template."""
    if not tokenizer.is_fast:
        with tempfile.TemporaryDirectory() as scratch:
            files = [Path(file) for file in sorted(tokenizer.save_pretrained(scratch)) if Path(file).is_file()]
            return _digest(*(part for file in files for part in (file.name, file.read_bytes())))
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left over from whoever called the tokenizer last; no part of what it is.
    backend.pop("truncation", None)
    backend.pop("padding", None)
    return _digest(json.dumps(backend), json.dumps(tokenizer.special_tokens_map), json.dumps(tokenizer.chat_template))


def load_model(
    source: ModelSource, dtype: torch.dtype, attn_implementation: str, device: str | None = None
) -> PreTrainedModel:
    """The model with all of its weights in `dtype`, in training shape (no key-value cache).

    Under ZeRO-3 it comes partitioned, if the engine keeps an `HfDeepSpeedConfig` alive.

    Args:
        source: Where the model is.
        dtype: Type of the weights; the files' own is never used unasked.
        attn_implementation: Attention name that transformers knows.
        device: Where its weights are loaded to; `meta` for their shapes alone. The host if not given.

    Raises:
        Inseparable: It takes no attention from outside.
        UserError: It cannot be read, or lacks weights; they are listed.
    """
    given: dict[str, Any] = {}
    if source.head is not None:
        given = {"config": load_config(source), "ignore_mismatched_sizes": True}
    try:
        with _loading(source, "model"), _without_report(source):
            model, info = source.kind.auto.from_pretrained(
                source.path,
                revision=source.revision,
                dtype=dtype,
                attn_implementation=attn_implementation,
                device_map=device,
                trust_remote_code=False,
                output_loading_info=True,
                **given,
            )
    except KeyError as error:  # an architecture with a table of attentions of its own
        if error.args != (attn_implementation,):
            raise
        raise Inseparable(
            f"model.path={source.name}: this architecture takes no attention but its own, which would let the "
            "documents of a row see each other. Use data.packing=padded, or another model."
        ) from error
    _refuse_missing(source, model, info)
    if hasattr(model.config.get_text_config(), "use_cache"):
        model.config.get_text_config().use_cache = False
    return model


def _refuse_missing(source: ModelSource, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Refuse weights that the files lack and nobody gives values to; a head that is new gets its first ones here."""
    missing = sorted(info["missing_keys"])
    if source.head is not None:
        heads.check_dropout(model, source.head)
        other = own_labels(source) != list(source.head.labels)
        # a head for other labels is none for these, though it may have as many outputs
        wanted = heads.outputs(model) if other else []
        mismatched = [name for name, *_ in info["mismatched_keys"]]
        new = {*missing, *mismatched, *wanted}
        missing = list(heads.fresh(model, source.head, new, source.allow_missing))
        model.new_parameters = sorted(new)
        heads.rescale(model, source.head, new)
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise UserError(
            f"model.path={source.name}: its files lack {len(missing)} weights of {type(model).__name__}: "
            f"{', '.join(missing[:8])}{more}. They would be random numbers. Give a directory with the whole model."
        )


def rotation_switch(config: PreTrainedConfig) -> int | None:
    """Tokens of a row's longest document beyond which a model rotates all of the row in another way (LongRoPE,
    arXiv:2402.13753, as transformers has it); None for the others.

    Args:
        config: The text model's.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]  # some have one for each kind of layer
    found = [kind.get("original_max_position_embeddings") for kind in kinds if kind.get("rope_type") == "longrope"]
    return min(filter(None, found), default=None)


def activation_checkpointing(
    model: PreTrainedModel, mode: ActivationCheckpointing, contexts: Callable[[], tuple[Any, Any]]
) -> None:
    """Make each decoder layer recompute its activations in the backward pass.

    Args:
        model: Plain, or with its adapters already (peft, given a checkpointing model, would undo part of this).
        mode: `none` changes nothing; `offload` also keeps each layer's input in host memory.
        contexts: `model.noise.Noise.checkpointing`, so that the second pass draws what the first one drew.

    Raises:
        UserError: The architecture does not support it.
    """
    if mode is ActivationCheckpointing.none:
        return
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"activation_checkpointing={mode.value}: {model.config.model_type} models do not support it. "
            "Use activation_checkpointing=none."
        )
    # Without an accelerator the activations are on the host already, and pinning them needs one.
    offload = mode is ActivationCheckpointing.offload and torch.accelerator.is_available()
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": contexts}, offload=offload)
    # Transformers makes the embeddings' output require a gradient, which only reentrant checkpointing needs; here it
    # would only send the backward pass through frozen layers.
    model.disable_input_require_grads()


@contextlib.contextmanager
def plain_loading() -> Iterator[None]:
    """Inside, `from_pretrained` builds whole models even while a ZeRO-3 config is alive."""
    alive = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = alive


def even_modes(directory: Path) -> None:
    """Let whoever may read the tokenizer read the weights too; safetensors keeps them to their owner."""
    for file in directory.glob("*.safetensors"):
        shutil.copymode(directory / "tokenizer_config.json", file)


@contextlib.contextmanager
def _without_report(source: ModelSource) -> Iterator[None]:
    """Inside, transformers does not list what the files lack of a model that gets a new head: that is said here."""
    before = transformers_logging.get_verbosity()
    if source.head is not None:
        transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


@contextlib.contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Inside, a failure to write (a full disk, no permission) is a UserError that names `directory`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"Cannot write the model to {directory}: {_first_line(error)}") from error


@contextlib.contextmanager
def _loading(source: ModelSource, what: str, *broken: type[Exception]) -> Iterator[None]:
    """Inside, what transformers says of unreadable files, and an exception that is `broken`, is a UserError that names
    them."""
    said: tuple[type[Exception], ...] = (OSError, ValueError, ImportError, SafetensorError)
    try:
        yield
    except (*said, *broken) as error:
        at = f" at revision {source.revision}" if source.revision else ""
        kind = "" if isinstance(error, said) else f"{type(error).__name__}: "
        raise UserError(
            f"model.path={source.name}: cannot load the {what} from {source.path}{at}: {kind}{_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    """What an error says, without the advice that follows."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _digest(*parts: object) -> str:
    """Hex digest of the parts in order."""
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8")).hexdigest()


def _digest_of(files: dict[str, str]) -> str:
    return _digest(*(part for item in files.items() for part in item))


def _file_digests(directory: Path, edge: int = 1 << 20) -> dict[str, str]:
    """Name to hex digest of each file in a model directory: its size, and its first and last MiB.

    Weights that differ do so everywhere; reading all of a 100 GB model on every rank would take minutes.
    """
    found = {}
    for file in sorted(p for p in directory.iterdir() if p.is_file()):
        size = file.stat().st_size
        state = hashlib.sha256(str(size).encode())
        with file.open("rb") as stream:
            state.update(stream.read(edge))
            stream.seek(max(edge, size - edge))
            state.update(stream.read(edge))
        found[file.name] = state.hexdigest()
    return found
