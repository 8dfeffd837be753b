"""Dropout and embedding noise that are the same however the work is split.

Every draw is a function of seed, step, example, position in the example, place in the model and feature, and of
nothing else: no generator has a state. So ranks, accumulation, packing, neighbours in a row, recomputed activations
and a resumed run draw the same.

A draw is 16 bits of a hash of two keys: one of the token (seed, step, example, position), one of the feature (place,
number). The keys come from splitmix64 (Steele, Lea, Flood 2014), their combination is a multiply-and-add mixer of
32 bits, as cheap as a few passes over the tensor.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn

from dsft.errors import UserError
from dsft.model.random_calls import RandomCalls
from dsft.types import Batch

LEVELS = 1 << 16
"""Values that a draw can take; a dropout rate is rounded to a multiple of 1 / LEVELS, and what is kept is scaled by
exactly that."""

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_GOLDEN = 0x9E3779B97F4A7C15
MANY = 8
"""Experts that share a token at most, so that more rows than this times the tokens do not come from a batch."""

MULTIPLIERS = (0x7FEB352D, 0x846CA68B - (1 << 32))
"""Of the mixer, as signed 32-bit numbers."""


def _mix(value: np.ndarray | np.uint64) -> Any:
    """splitmix64's finaliser: well-mixed uint64 from counters."""
    with np.errstate(over="ignore"):
        mixed: Any = np.asarray(value, dtype=np.uint64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def _chain(*numbers: int) -> np.uint64:
    """One key of several numbers, their order included."""
    key = np.uint64(0)
    for number in numbers:
        key = _mix(np.uint64((int(key) + _GOLDEN + number) % (1 << 64)))
    return np.uint64(key)


def _counted(key: np.uint64, count: int) -> np.ndarray:
    """The 32-bit keys number 0 to `count` - 1 below `key`, int32, shape (count,)."""
    with np.errstate(over="ignore"):
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        return (_mix(steps + key) >> np.uint64(32)).astype(np.uint32).view(np.int32)


def _number(place: str) -> int:
    """A place of the model as a 64-bit number."""
    return int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest(), "little")


def token_keys(
    seed: int, step: tuple[int, int], lengths: list[int], numbers: list[int], width: int | None = None
) -> torch.Tensor:
    """The key of every token of a batch.

    Args:
        seed: The run's.
        step: Epoch, and number of the optimizer step in it.
        lengths: Tokens of each document.
        numbers: Which example of the data set each document is.
        width: Tokens of a row, where each document has one of its own; what fills it up has keys as well.

    Returns:
        int32, shape (tokens,), or (documents, width), on the CPU.
    """
    sizes = lengths if width is None else [width] * len(lengths)
    documents = [_counted(_chain(seed, *step, number), size) for number, size in zip(numbers, sizes, strict=True)]
    return torch.from_numpy(np.concatenate(documents) if width is None else np.stack(documents))


def feature_keys(place: str, count: int) -> torch.Tensor:
    """The keys of `count` pairs of features at a place of the model: int32, shape (count,), on the CPU."""
    return torch.from_numpy(_counted(_chain(_number(place)), count))


def draw(tokens: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """16 random bits for each token and feature.

    Args:
        tokens: int32 keys, shape (..., tokens, 1).
        features: int32 keys of pairs of features, broadcastable to (..., tokens, pairs).

    Returns:
        int16, shape (..., tokens, 2 * pairs), uniform over all its values.
    """
    bits = tokens ^ features
    bits.mul_(MULTIPLIERS[0])
    bits.add_(bits >> 15)
    bits.mul_(MULTIPLIERS[1])
    bits.add_(bits >> 16)
    return bits.view(torch.int16)


class _Drop(torch.autograd.Function):
    """`where(keep, x, 0) * scale`; keeps one byte per element for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, keep: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return torch.where(keep, x, 0).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (keep,) = ctx.saved_tensors
        return torch.where(keep, gradient, 0).mul_(ctx.scale), None, None


class Noise:
    """All random numbers that a model draws while it trains.

    Dropout modules and the attention that `dsft` gives to models draw from it at once. Dropout that a model calls as
    a function, and single numbers that it draws (which layer to skip), are met inside `drawing()`. Whether there are
    any is found out by `rehearse`, which refuses what could not be the same for every split.

    Args:
        model: The model, with its adapters.
        seed: The run's.
        neftune_alpha: Strength of uniform noise on the input embeddings (arXiv:2310.05914); 0 for none.
    """

    def __init__(self, model: Any, seed: int, neftune_alpha: float = 0.0) -> None:
        self._seed = seed
        self._alpha = neftune_alpha
        self._names = {module: name for name, module in model.named_modules()}
        self._features: dict[str, torch.Tensor] = {}
        self._calls: Counter = Counter()
        self._functional = self._global = False
        self._met: dict[str, list[tuple[int, ...]]] | None = None
        self._tables: dict[str, tuple[int, ...]] = {}
        for module in model.modules():
            # a subclass with a forward of its own is met at the function that it calls
            if isinstance(module, nn.Dropout) and type(module).forward is nn.Dropout.forward:
                setattr(module, "forward", self._forward_of(module))  # noqa: B010
        if neftune_alpha:
            model.get_input_embeddings().register_forward_hook(self._neftune)

    def begin(self, batch: Batch) -> None:
        """Say which batch comes next; before every training forward pass.

        Args:
            batch: On the device; `noise` among its tensors is what `token_keys` gives, `lengths` the documents'.
        """
        self._step, self._lengths = batch.step, batch.tensors["lengths"]
        self._tokens = batch.tensors["noise"]
        # an encoder-decoder has rows of two widths; what stands at one place of either shares a key
        found = (batch.tensors[name].shape[1] for name in ("input_ids", "decoder_labels") if name in batch.tensors)
        widths = dict.fromkeys(found) if batch.padded else {}
        self._sides = [self._tokens[:, :width] for width in widths] or [self._tokens]
        self._calls.clear()
        if self._global:
            key = int(_chain(self._seed, *batch.step, 1))
            random.seed(key)
            np.random.seed(key % 2**32)

    def drawing(self) -> AbstractContextManager:
        """A context for forward passes of training."""
        return RandomCalls(self) if self._functional else nullcontext()

    def checkpointing(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Contexts of a layer's forward pass and of its repetition in the backward pass (torch's `context_fn`).

        Layers are repeated from the last to the first, so each goes on from what had been drawn when it began: several
        may share a module.
        """
        return nullcontext(), self._recomputing(Counter(self._calls), _host_states() if self._global else None)

    @contextmanager
    def _recomputing(self, calls: Counter, host: tuple | None) -> Iterator[None]:
        now, self._calls = self._calls, calls
        after = _host_states() if host else None
        try:
            if host:
                _set_host_states(host)
            with self.drawing():
                yield
        finally:
            self._calls = now
            if after:
                _set_host_states(after)

    def rehearse(self, *forwards: Callable[[], object], exempt: bool = False) -> None:
        """Run training forward passes to see what the model draws; random states are put back.

        Args:
            forwards: The passes, each of a batch of another size, with its `begin`. What has the same shape in all of
                them, and is not laid out as the tokens are, does not depend on the batch.
            exempt: Whether torch's own generator may move: a fused attention kernel draws its dropout inside.

        Raises:
            UserError: The model draws numbers that depend on how the batch is laid out.
        """
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            host, device = _host_states(), _device_states()
            watch = RandomCalls(self)
            self._met = {}
            with watch:
                for forward in forwards:
                    forward()
            self._functional = watch.seen
            met, self._met = self._met, None
            for place, shapes in met.items():
                # more rows than experts together get of the tokens
                large = shapes[0][0] > MANY * self._tokens.numel()
                if len(forwards) < 2 or shapes != [shapes[0]] * len(forwards) or not large:
                    raise UserError(self._out_of_order(place, shapes[0]))
                self._tables[place] = shapes[0]
            self._global = host != _host_states()
            if device != _device_states() and not exempt:
                raise UserError(
                    f"{type(next(iter(self._names))).__name__} draws random numbers while it trains in a way that "
                    "would depend on ranks and batch size. Set its dropout and noise settings to 0 in the model's "
                    "config.json; where it has none for this, use another model."
                )
        if self._global:
            _set_host_states(host)

    def dropout(self, module: nn.Module, x: torch.Tensor, p: float) -> torch.Tensor:
        """Dropout of activations; the module's next call in this pass draws anew.

        Args:
            module: Where it happens.
            x: Shape (1, tokens, ...) or (tokens, ...), the tokens of the batch that `begin` was given; of padded ones
                (documents, width, ...) or (documents * width, ...), or attention weights, shape
                (documents, heads, queries, keys); or (documents, features), which draws by the first tokens' keys.
            p: Share of elements set to 0, of all values scaled so that the expectation stays.

        Raises:
            UserError: `x` does not hold the batch's tokens in their order, as inside experts, but depends on it.
        """
        padded, widths = self._tokens.dim() == 2, {side.shape[-1] for side in self._sides}
        if padded and x.dim() == 4 and len(x) == len(self._tokens) and widths.issuperset(x.shape[2:]):
            return self._padded_attention_dropout(module, x, p)
        of, table = self._laid_out(x), self._tables.get(self._place(module)) == x.shape
        if x.dim() == 2 and len(x) == len(self._lengths) and not table:
            of = self._tokens[:, 0] if padded else self._tokens[self._lengths.cumsum(0) - self._lengths]
        elif table or of is None:
            return self._table_dropout(module, x, p)
        features = x.numel() // of.numel()
        keys = self._keys(self._place(module), 1, (features + 1) // 2, x.device)
        self._calls[module] += 1
        dropped = round(p * LEVELS)
        if x.is_cuda and _HAS_TRITON and 0 < dropped < LEVELS:
            from dsft.model.noise_kernel import FusedDrop  # where triton is: with torch for CUDA

            return FusedDrop.apply(x, of.flatten(), keys[0], dropped)
        return _dropped(x, draw(of.reshape(-1, 1), keys)[:, :features].reshape(x.shape), dropped)

    def _laid_out(self, x: torch.Tensor) -> torch.Tensor | None:
        """Keys of the tokens that `x` is of, as they lie in it; None where it is of no side's tokens."""
        rows = (side for side in self._sides if x.shape[:2] == (1, *side.shape)[-2:])
        # a side of one token has as many as a tensor of one row
        fits = itertools.chain(rows, (side for side in self._sides if len(x) == side.numel()))
        return next(fits, None)

    def _table_dropout(self, module: nn.Module, x: torch.Tensor, p: float) -> torch.Tensor:
        """Dropout of a tensor that has nothing to do with the batch, such as a table of relative positions.

        It is the same for all batches of an optimizer step. Which tensors are such, `rehearse` finds out.
        """
        place, shape = self._place(module), tuple(x.shape)
        self._calls[module] += 1
        if self._met is not None:
            self._met.setdefault(place, []).append(shape)
            return x
        if self._tables.get(place) != shape:
            raise UserError(self._out_of_order(place, shape))
        features = x.numel() // len(x)
        of_step = int(_chain(self._seed, *self._step, 2) >> np.uint64(32)) - (1 << 31)
        rows = self._keys(f"rows of {place}", 1, len(x), x.device)[0] ^ of_step
        keys = self._keys(place, 1, (features + 1) // 2, x.device)
        return _dropped(x, draw(rows.unsqueeze(1), keys)[:, :features].reshape(x.shape), round(p * LEVELS))

    def _out_of_order(self, place: str, shape: tuple[int, ...]) -> str:
        return (
            f"{place.partition('#')[0]} draws dropout on a tensor of shape {shape}, which is not the batch's "
            f"{self._tokens.numel()} tokens in order, so that its noise would depend on the split of the work. Set "
            "tuning.dropout=0, or leave such modules out of tuning.target_modules; for a dropout of the model's "
            "own set it to 0 in its config.json."
        )

    def attention_dropout(self, module: nn.Module, weights: torch.Tensor, begin: int, p: float) -> torch.Tensor:
        """Dropout of one document's attention weights.

        Args:
            module: The attention layer; one call of it covers all documents of the row.
            weights: Shape (heads, queries, keys), square.
            begin: Where the document begins in the row.
            p: Share of weights set to 0.
        """
        heads, length, _ = weights.shape
        keys = self._keys(self._place(module), heads, (length + 1) // 2, weights.device)
        bits = draw(self._tokens[begin : begin + length, None], keys.unsqueeze(1))[..., :length]
        return _dropped(weights, bits, round(p * LEVELS))

    def _padded_attention_dropout(self, module: nn.Module, weights: torch.Tensor, p: float) -> torch.Tensor:
        """The same of all documents, (documents, heads, queries, keys): each draws what it draws in a flat row."""
        _, heads, queries, width = weights.shape
        keys = self._keys(self._place(module), heads, (width + 1) // 2, weights.device)
        self._calls[module] += 1
        bits = draw(self._tokens[:, None, :queries, None], keys.unsqueeze(1))[..., :width]
        return _dropped(weights, bits, round(p * LEVELS))

    def attended(self, module: nn.Module) -> None:
        """Tell that a call of an attention layer is over: the next one draws anew."""
        self._calls[module] += 1

    def _keys(self, place: str, rows: int, size: int, device: torch.device) -> torch.Tensor:
        """Feature keys of a place, shape (rows, size); kept, in the largest size that was asked for so far."""
        kept = self._features.get(place)
        if kept is None or kept.shape[1] < size:
            room = 1 << (size - 1).bit_length()
            # numbered down the rows first: a larger size renumbers nothing
            kept = feature_keys(place, rows * room).view(room, rows).T.contiguous().to(device)
            self._features[place] = kept
        return kept[:, :size]

    def _place(self, module: nn.Module) -> str:
        return f"{self._names[module]}#{self._calls[module]}"

    def _forward_of(self, module: nn.Dropout) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            return self.dropout(module, x, module.p) if module.training and module.p else x

        return forward

    def single(self, module: nn.Module) -> float:
        """A number in [0, 1) that is the same for all batches of an optimizer step, as for skipping layers."""
        place = _number(self._place(module))
        self._calls[module] += 1
        return int(_chain(self._seed, *self._step, place) >> np.uint64(11)) / 2**53

    def owner(self) -> nn.Module:
        """The innermost module of the model whose code is being run."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and module in self._names:
                return module
            frame = frame.f_back
        raise UserError("random numbers are drawn outside of the model's modules")

    def name(self, module: nn.Module) -> str:
        """The module's dotted name and class."""
        return f"{self._names[module] or 'the model'} ({type(module).__name__})"

    def _neftune(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        """Forward hook of the embedding, whose output has shape (1, tokens, d), or padded (documents, width, d).

        A document of L tokens gets noise from U(-1, 1) * alpha / sqrt(L * d), as if it were alone in its batch.
        """
        if not module.training:
            return output
        width = output.shape[-1]
        scale = (self._alpha / (self._lengths * width).sqrt()) / (LEVELS // 2)
        if self._tokens.dim() == 1:
            # its size is given, or the device would be asked for it
            scale = scale.repeat_interleave(self._lengths, output_size=len(self._tokens))
        keys = self._keys(f"neftune {self._names[module]}", 1, (width + 1) // 2, output.device)
        bits = draw(self._tokens.view(-1, 1), keys)[:, :width].view(*self._tokens.shape, width)
        noise = (bits.float() + 0.5) * scale.view(-1, *(1,) * (bits.dim() - 1))
        return output + noise.to(output.dtype)


def _dropped(x: torch.Tensor, bits: torch.Tensor, dropped: int) -> torch.Tensor:
    if dropped == 0:
        return x
    if dropped == LEVELS:
        return x * 0
    return _Drop.apply(x, bits >= dropped - LEVELS // 2, LEVELS / (LEVELS - dropped))


def _host_states() -> tuple:
    state: Any = np.random.get_state()
    _, keys, *rest = state
    return random.getstate(), keys.tobytes(), tuple(rest)


def _set_host_states(states: tuple) -> None:
    random.setstate(states[0])
    np.random.set_state(("MT19937", np.frombuffer(states[1], np.uint32), *states[2]))


def _device_states() -> list[bytes]:
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]
    return [state.numpy().tobytes() for state in states]
