"""What a directory given as `model.path` is, looked at before anything of it is loaded."""

from __future__ import annotations

import json
import re
import shlex
from codecs import BOM_UTF8
from pathlib import Path
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from dsft.errors import UserError
from dsft.model.kind import Kind
from dsft.runtime.content import disguise, unsound_weights

INDEX = ".index.json"
WEIGHTS = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")
"""Files of weights, or an index of several, in the order in which transformers looks for them."""

TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json", "*.model", "*.tiktoken")
"""Files of which any tokenizer has one, as patterns."""

TEXTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
         "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt")  # fmt: skip
FOREIGN = {
    "*.h5": "TensorFlow",
    "*.msgpack": "Flax",
    "*.onnx": "ONNX",
    "consolidated.*": "the original publisher's layout",
    "params.json": "the original publisher's layout",
}
OTHER_HEAD = re.compile(r"For(Sequence|Token)Classification|ForQuestionAnswering|ForMultipleChoice|RewardModel")
SHOWN = 5
"""Names that a message lists at most."""


def check_directory(path: str, directory: Path, wanted: Kind) -> None:
    """Refuse a directory that holds no whole model, for what it is.

    Args:
        path: What was given as `model.path`.
        directory: That directory.
        wanted: What the task trains.

    Raises:
        UserError: It holds adapters, a run, a checkpoint or other models; files that are pointers, web pages, empty,
            cut off or missing. The message says which, and what to give or do instead.
    """
    if (directory / "adapter_config.json").is_file():
        raise UserError(f"model.path={path}: {adapters(read_json(directory / 'adapter_config.json'))}")
    if not (directory / "config.json").is_file() and not (directory / "config.json").is_symlink():
        raise UserError(f"model.path={path}: {_without_config(path, directory)}")
    for name in TEXTS:
        file = directory / name
        if (file.is_symlink() or file.is_file()) and (problem := disguise(file, text=True) or _spoilt(file)):
            raise UserError(f"{file} is {problem}.")
    if problem := _weights(directory):
        raise UserError(f"model.path={path}: {problem}")
    check_config(path, read_json(directory / "config.json"), wanted)


def adapters(about: dict[str, Any]) -> str:
    """What to do with adapters, whose `adapter_config.json` is `about`, where a model is wanted."""
    base = about.get("base_model_name_or_path")
    return (
        f"it holds adapters (adapter_config.json), not a model. Give the model that they were trained on, "
        f"{f'model.path={base}' if base else 'which they do not name'}; or write a whole model first, for adapters of "
        "dsft by `python launch/export.py run_dir=R output=DIR`, for others by peft's merge_and_unload, and give "
        "model.path=DIR."
    )


def check_config(path: str, about: dict[str, Any], wanted: Kind) -> None:
    """Refuse a model that cannot be trained here, by the content of its `config.json`.

    Raises:
        UserError: Its weights are quantised, it needs code of its own, or it is of another kind than the
            task trains.
    """
    kind = about.get("model_type")
    problem = _quantised(about) or _own_code(about, kind) or _of_another_kind(about, wanted)
    if problem:
        raise UserError(f"model.path={path}: {problem}")


def _quantised(about: dict[str, Any]) -> str | None:
    quantization = about.get("quantization_config") or about.get("compression_config")
    if not quantization:
        return None
    method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
    return (
        f"its weights are quantised (quantization_config: {method}), and training needs plain ones. Give the model "
        "that it was made from, or the same model as a .gguf file, which is unpacked."
    )


def _own_code(about: dict[str, Any], kind: Any) -> str | None:
    if not about.get("auto_map") or kind in CONFIG_MAPPING_NAMES:
        return None
    return (
        f"the architecture {kind!r} comes with code of its own (auto_map in config.json), which is never run here, and "
        "transformers does not know it. Give another model, or install a transformers that knows it."
    )


def _of_another_kind(about: dict[str, Any], wanted: Kind) -> str | None:
    names, what = about.get("architectures") or [], wanted.lacks(about)
    if what is None and not wanted.headed and names and all(OTHER_HEAD.search(name) for name in names):
        what = "a model with another head, which would be left out,"
    if what is None:
        return None
    name = f"{', '.join(names or [str(about.get('model_type'))])} ({about.get('model_type')})"
    return f"{name} is {what}, not {wanted.noun}, as this task wants it. Give one, such as {wanted.such_as}."


def _without_config(path: str, directory: Path) -> str:
    """What a directory without a config.json is, and what to give instead."""
    inside = sorted(directory.iterdir())
    names = {entry.name for entry in inside}
    if {"manifest.json", "state.json"} <= names:
        run = shlex.quote(f"run_dir={directory.resolve().parents[1]}")
        step = directory.name.removeprefix("step-").lstrip("0") or "0"
        return (
            "this is a checkpoint of a run, to resume from. Write its model first: python launch/export.py "
            f"{run} checkpoint={step} output=DIR; and give model.path=DIR."
        )
    if "config.yaml" in names and {"checkpoints", "metrics.jsonl", "model"} & names:
        if (directory / "model" / "config.json").is_file():
            return f"this is the directory of a run, and its model is model.path={_below(path, 'model')}."
        return (
            "this is the directory of a run, which has written no model: python launch/export.py "
            f"{shlex.quote(f'run_dir={path}')} writes one, to be given as model.path={_below(path, 'model')}."
        )
    found = _models_below(directory)
    if found:
        listed = " or ".join(f"model.path={_below(path, name)}" for name in found[:SHOWN])
        more = f", or {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        return f"no config.json stands in it, but in directories below: give {listed}{more}."
    foreign = next((what for pattern, what in FOREIGN.items() if any(directory.glob(pattern))), None)
    if foreign:
        return f"it holds weights in {foreign}'s format, and no config.json: give the model in Hugging Face's format."
    holds = ", ".join(entry.name for entry in inside[:SHOWN]) or "nothing"
    return (
        f"the directory {directory.resolve()} holds no config.json (it holds {holds}). Give a directory with a whole "
        "model, a hub id (`org/name`), a `.gguf` file or `package://NAME/FILE`."
    )


def _models_below(directory: Path) -> list[str]:
    """Directories up to three levels below that hold a config.json, and .gguf files right here; by relative name."""
    found = [file.name for file in sorted(directory.glob("*.gguf"))]
    for depth in ("*", "*/*", "*/*/*"):
        found += [str(file.parent.relative_to(directory)) for file in sorted(directory.glob(f"{depth}/config.json"))]
        if found:
            return found
    return found


def _weights(directory: Path) -> str | None:
    """What is wrong with the weights, which are one file or an index and its parts."""
    named = read_json(directory / "config.json").get("transformers_weights")
    names = [name for name in ([named] if named else WEIGHTS) if _there(directory / name)]
    # transformers passes over links to what is not there
    name = next((name for name in names if (directory / name).is_file()), names[0] if names else None)
    if name is None:
        return _without_weights(directory)
    if not name.endswith(INDEX):
        return _first_unsound(directory, [name])
    if problem := disguise(directory / name, text=True):
        return f"{name} is {problem}."
    index = read_json(directory / name)
    files = index.get("weight_map")
    if not isinstance(files, dict) or {*map(type, files.values())} != {str} or "metadata" not in index:
        return f"{name} is no index of weights (metadata, weight_map): download or copy it again."
    parts = sorted({*files.values()})
    missing = [part for part in parts if not _there(directory / part)]
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        return (
            f"{name} names {len(parts)} files of weights, and {len(missing)} of them are not there: "
            f"{', '.join(missing[:SHOWN])}{more}. Download or copy them."
        )
    return _first_unsound(directory, parts)


def _without_weights(directory: Path) -> str:
    others = sorted(file.name for pattern in ("*.safetensors", "*.bin", "*.gguf") for file in directory.glob(pattern))
    foreign = sorted({what for pattern, what in FOREIGN.items() if any(directory.glob(pattern))})
    held = f"It holds {', '.join(others[:SHOWN])}." if others else f"It holds some of {foreign[0]}." if foreign else ""
    single = " or ".join(name for name in WEIGHTS if not name.endswith(INDEX))
    return (
        f"{directory} holds a config.json but no weights ({single}, or an index of several files). Download or copy "
        f"them. {held}".rstrip()
    )


def _first_unsound(directory: Path, names: list[str]) -> str | None:
    for name in names:
        if problem := unsound_weights(directory / name):
            return f"{name} is {problem}."
    return None


def check_tokenizer(path: str, directory: Path) -> None:
    """Refuse a directory without a tokenizer.

    Raises:
        UserError: None of its files is a tokenizer's.
    """
    if not any(file.is_file() for pattern in TOKENIZERS for file in directory.glob(pattern)):
        raise UserError(
            f"model.path={path}: {directory} holds no tokenizer (tokenizer.json). Copy the files of the tokenizer into "
            "it, from the model that it was made from."
        )


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a model's.

    Raises:
        UserError: There is none.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} is not valid JSON: {error}. Download or copy it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object. Download or copy it again.")
    return content


def _there(file: Path) -> bool:
    return file.is_file() or file.is_symlink()


def _spoilt(file: Path) -> str | None:
    with file.open("rb") as stream:
        head = stream.read(len(BOM_UTF8))
    if not head:
        return "empty: download or copy it again"
    if head == BOM_UTF8 and file.suffix == ".json":
        return "JSON with a byte-order mark, which no reader of it takes: save it as UTF-8 without one"
    return None


def _below(path: str, name: str) -> str:
    return f"{path.rstrip('/')}/{name}"
