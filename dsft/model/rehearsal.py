"""The export at the end of a run, played through before its first step: everything but the values of the weights.

What transformers, peft and the tokenizer would refuse when the training is over is refused now. The model is built
from its files' shapes alone, so that this takes no memory and about a second.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from dsft.config.schema import TuningConfig
from dsft.errors import UserError
from dsft.model import export, rows, tuning
from dsft.model import head as heads
from dsft.model.load import ModelSource, load_model, plain_loading
from dsft.model.vocabulary import Vocabulary

TEXTS = ("def add(a, b):\n    return a + b  # $3.14\n", " 敏捷的棕色狐狸。 naïve café 🦊", "\t  two  spaces\r\n\n")
"""Texts whose ids the written tokenizer has to give as the one that is trained with does."""


def rehearse(
    source: ModelSource,
    tokenizer: Tokenizer,
    words: Vocabulary,
    companions: dict[str, bytes],
    chosen: TuningConfig,
    dtype: torch.dtype,
    destination: Path,
) -> None:
    """Play the export through, whole and, with adapters, of these alone.

    Args:
        source: The base model.
        tokenizer: What is trained with.
        words: What is new in it.
        companions: `export.companion_files`.
        chosen: What is trained.
        dtype: Type of the written weights.
        destination: Where the model is to be written.

    Raises:
        UserError: What would fail, and why.
    """
    export.check_replaceable(destination)
    with plain_loading():
        model = load_model(source, dtype, "eager", device="meta")
        rows.grow(model, words, lambda parameters: nullcontext())
        model = tuning.apply(model, chosen, 0, words, source.kind)
        alone = isinstance(model, PeftModel) and not words.pieces
        for adapters in (False, True) if alone else (False,):
            with tempfile.TemporaryDirectory() as scratch, _refusing(source, adapters):
                export.write_companions(companions, Path(scratch))
                tensors = _written(model, source, adapters, dtype, Path(scratch))
                if adapters:
                    continue
                _check_whole(model, tensors, Path(scratch))
                _compare_tokenizers(tokenizer, Path(scratch))
                if export.GENERATION_CONFIG in companions:
                    GenerationConfig.from_pretrained(scratch)
                _check_room(destination, sum(tensor.nbytes for tensor in tensors.values()))


def _written(
    model: PreTrainedModel | PeftModel, source: ModelSource, adapters: bool, dtype: torch.dtype, directory: Path
) -> dict[str, torch.Tensor]:
    """The tensors that would be written, beside the configs; adapters are checked."""
    export.write_configs(model, directory, adapters, dtype, source.kind)
    tensors: dict[str, torch.Tensor] = {}
    for part in export.stream(model, adapters, lambda parameters: nullcontext(), True, dtype, source.kind):
        tensors |= part
    if adapters:
        assert isinstance(model, PeftModel), "only such a model has adapters"
        head = heads.parameters(model.get_base_model()) if source.kind.headed else {}
        own = {f"base_model.model.{name}" for name in head}
        _check_adapters(model, {name: tensor for name, tensor in tensors.items() if name not in own})
    return tensors


@contextmanager
def _refusing(source: ModelSource, adapters: bool) -> Iterator[None]:
    """Inside, whatever fails is a UserError that says that no model could be written."""
    try:
        yield
    except UserError:
        raise
    except Exception as problem:  # transformers, peft and tokenizers may refuse in any way
        what = "its adapters" if adapters else "the trained model"
        raise UserError(
            f"model.path={source.name}: {what} could not be written at the end of the run: "
            f"{type(problem).__name__}: {problem}. Choose another model or tuning; or give train.export=false to train "
            "all the same, and have checkpoints alone."
        ) from problem


def _compare_tokenizers(tokenizer: Tokenizer, directory: Path) -> None:
    """Raise ValueError unless the written tokenizer does what the one that is trained with does."""
    written = AutoTokenizer.from_pretrained(directory)
    ids = [[list(one(text)["input_ids"]) for text in (*TEXTS, *one.all_special_tokens)] for one in (tokenizer, written)]
    for what, now, then in (
        ("ids of text", *ids),
        ("vocabulary", tokenizer.get_vocab(), written.get_vocab()),
        ("chat template", tokenizer.chat_template, written.chat_template),
        ("special tokens", tokenizer.special_tokens_map, written.special_tokens_map),
    ):
        if now != then:
            raise ValueError(f"the written tokenizer comes back with another {what}")


def _check_whole(model: PreTrainedModel | PeftModel, tensors: dict[str, torch.Tensor], directory: Path) -> None:
    """Raise ValueError unless these are the tensors that `from_pretrained` looks for, going by the config written."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    _, info = type(base).from_pretrained(
        None,
        config=AutoConfig.from_pretrained(directory),
        state_dict=tensors,
        device_map="meta",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    for what in ("missing", "unexpected", "mismatched"):
        if names := sorted(map(str, info[f"{what}_keys"])):
            raise ValueError(f"its files would have {len(names)} {what} tensors, {names[0]} among them")


def _check_adapters(model: PeftModel, tensors: dict[str, torch.Tensor]) -> None:
    """Raise ValueError unless these are the adapters' tensors by peft's own account of them."""
    peft_own = get_peft_model_state_dict(model, save_embedding_layers=False)
    expected, found = ({name: t.shape for name, t in which.items()} for which in (peft_own, tensors))
    different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if different:
        raise ValueError(f"{len(different)} tensors of its adapters would be wrong, {different[0]} among them")


def _check_room(destination: Path, needed: int) -> None:
    place = next(path for path in destination.absolute().parents if path.is_dir())
    disk = shutil.disk_usage(place)
    if disk.total and disk.free < needed:  # some network file systems tell of nothing
        raise UserError(
            f"{destination}: the model takes {needed / 2**30:.2f} GiB, and {disk.free / 2**30:.2f} GiB are free there. "
            "Make room, choose another run_dir, or give train.export=false."
        )
