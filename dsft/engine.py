"""The one wrapper of a DeepSpeed engine.

It owns what DeepSpeed is particular about: building a model under ZeRO-3, scaling a loss so that its gradient is
exact in every stage, the gradient norm and skipped steps of each optimizer class, gathering partitioned weights.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import deepspeed
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.integrations import HfDeepSpeedConfig

from dsft.config.schema import OptimConfig
from dsft.config.zero import offloads_optimizer, stage
from dsft.errors import UserError
from dsft.metrics import Tally
from dsft.optim import apply, build, parameter_groups
from dsft.runtime.world import World
from dsft.types import Batch

# DeepSpeed calls torch's collectives by names that torch 2.13 warns about, at every step
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")


def _muon() -> type:
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    return MuonWithAuxAdam


NORM_BLOCK = 1 << 16
"""Elements of a block in `norm`."""

DEEPSPEED_CLASSES: dict[str, Callable[[], type]] = {
    "FusedAdam": lambda: deepspeed.ops.adam.FusedAdam,
    "DeepSpeedCPUAdam": lambda: deepspeed.ops.adam.DeepSpeedCPUAdam,
    "FusedLion": lambda: deepspeed.ops.lion.FusedLion,
    "DeepSpeedCPULion": lambda: deepspeed.ops.lion.DeepSpeedCPULion,
    "MuonWithAuxAdam": _muon,
}
"""Optimizers of DeepSpeed by name; looked up on use, since some compile when they are imported."""


@contextmanager
def building(ds_config: dict[str, Any]) -> Iterator[Callable[[list[nn.Parameter]], AbstractContextManager]]:
    """Within it transformers builds models the way this DeepSpeed config needs: partitioned at once under ZeRO-3.

    Yields:
        Makes a context in which parameters of such a model are whole on every rank, to be read.
    """
    # transformers holds only a weak reference: the name keeps it alive
    alive = HfDeepSpeedConfig(ds_config) if stage(ds_config) == 3 else None
    try:
        yield partial(_gathered, stage(ds_config))
    finally:
        del alive


def _gathered(zero_stage: int, parameters: list[nn.Parameter]) -> AbstractContextManager:
    return deepspeed.zero.GatheredParameters(parameters) if zero_stage == 3 else nullcontext()


def norm(tensor: torch.Tensor) -> torch.Tensor:
    """The 2-norm of a tensor, a float64 scalar on its device; summed in float64.

    torch adds squares on a CPU one after the other in fp32: -6e-5 at 3 million elements, -1.5e-3 at 28 million. Asked
    for float64 it first makes such a copy of the whole tensor; a block at a time stays in the processor's cache.
    """
    if tensor.device.type != "cpu":
        return torch.linalg.vector_norm(tensor, dtype=torch.float64)
    blocks = tensor.detach().reshape(-1).split(NORM_BLOCK)
    double = torch.empty(min(NORM_BLOCK, tensor.numel()), dtype=torch.float64)
    squares = []
    for block in blocks:
        part = double[: len(block)].copy_(block)
        squares.append(torch.dot(part, part))
    return torch.stack(squares).sum().sqrt()


def total_norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all tensors together, a float64 scalar on their device; summed in float64."""
    return torch.stack([norm(tensor) for tensor in tensors]).norm()


class _ExactNorms(TorchFunctionMode):
    """Within it 2-norms of tensors on a CPU are summed in float64, which some of DeepSpeed's optimizers do not do."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        keywords = dict(keywords or {})
        if arguments and function in (torch.Tensor.norm, torch.norm, torch.linalg.vector_norm, torch.linalg.norm):
            x, *more = arguments
            if x.device.type == "cpu" and x.is_floating_point() and keywords.get("out") is None:
                dtype = keywords.pop("dtype", None) or x.dtype
                order = more[0] if more else keywords.get("ord", keywords.get("p", 2))
                if order == 2 and len(more) < 2 and keywords.keys() <= {"ord", "p"}:
                    return norm(x).to(dtype)
                return function(x.double(), *more, **keywords).to(dtype)
        return function(*arguments, **keywords)


class Stopwatch:
    """Adds up the time spent inside `with`, on the device's own clock where it has one.

    Args:
        device: CUDA work is timed by events, which nothing has to wait for until the sum is taken.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._spans: list[tuple] = []

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        self._begun = self._now()

    def __exit__(self, *_: object) -> None:
        self._spans.append((self._begun, self._now()))

    def take(self) -> float:
        """Seconds so far; begins anew."""
        spans, self._spans = self._spans, []
        if not self._cuda:
            return sum(end - begin for begin, end in spans)
        if spans:
            spans[-1][1].synchronize()  # the forward passes alone: what follows them may go on
        return sum(begin.elapsed_time(end) for begin, end in spans) / 1000


class Engine:
    """Trains one module with DeepSpeed.

    Args:
        module: Takes a Batch and returns (summed loss, Tally), like `tasks.module.TaskModule`.
        ds_config: What `ds_config.build` returned.
        optim: The optimizer's section of the config.
        world: The ranks.
    """

    def __init__(self, module: nn.Module, ds_config: dict[str, Any], optim: OptimConfig, world: World):
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.world = world
        self.stage = stage(ds_config)
        self._clip = optim.max_grad_norm
        # the object is kept: under ZeRO-3, generation asks transformers whether ranks must stay in step
        self._hf_config = HfDeepSpeedConfig(ds_config) if self.stage == 3 else None
        self._plain = self.stage == 0 and not ds_config["fp16"]["enabled"] and not ds_config["bf16"]["enabled"]
        self._half_stage_0 = self.stage == 0 and ds_config["fp16"]["enabled"]
        if self.stage < 3:
            module.to(world.device)  # optimizers choose their kernel by where the weights are
        optimizer = build(
            parameter_groups(module, optim),
            optim,
            offload=offloads_optimizer(ds_config),
            deepspeed_classes=DEEPSPEED_CLASSES,
        )
        self._engine, self._optimizer, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=ds_config)
        # it would write a script into every checkpoint; `checkpoint.weights` reads them without
        self._engine._copy_recovery_script = lambda directory: None
        if self._plain:
            # `_update_plain` clips, as it has the norm anyway
            self._engine._config.gradient_clipping = 0.0
            # one rank alone has nobody to add its gradient to; DeepSpeed would copy all of it, and back
            self._engine.enable_backward_allreduce = world.size > 1
        self._forwards = Stopwatch(world.device)
        self._norm: torch.Tensor | float = math.nan
        self._norm_scale = 1.0

    @property
    def module(self) -> Any:
        """The module that is trained."""
        return self._engine.module

    @property
    def peak_lr(self) -> float:
        """The largest peak learning rate of all parameter groups."""
        return max(group["initial_lr"] for group in self._optimizer.param_groups)

    @property
    def grad_norm(self) -> float:
        """The last step's 2-norm of the gradient before clipping; waits for the device."""
        return float(self._norm) / self._norm_scale

    def forward_seconds(self) -> float:
        """Seconds of this rank's forward passes since the last call: its own work, before it waits for other ranks.

        Waits for the device.

        Under ZeRO-3 a forward pass gathers weights, so that waiting is part of it.
        """
        return self._forwards.take()

    @property
    def loss_scale(self) -> float | None:
        """The current fp16 loss scale, or None."""
        return float(self._engine.optimizer.loss_scale) if self._engine.fp16_enabled() else None

    def train_step(self, batches: list[Batch], weight: float, lr_multiplier: float) -> tuple[Tally, bool]:
        """One optimizer step.

        The gradient is that of (sum of losses over all ranks and micro-batches) / `weight`: DeepSpeed averages
        over ranks, so each summed loss is multiplied by the number of ranks, and nothing else is averaged.

        Args:
            batches: This rank's micro-batches; as many as `gradient_accumulation_steps`.
            weight: Sum of the weights of all examples of the global step.
            lr_multiplier: Factor on every group's peak learning rate.

        Returns:
            The summed Tally of this rank, and whether weights were updated (False: overflow or NaN, or nothing to learn
            as `weight` is 0; the step is skipped).
        """
        if not weight:
            return self._without_update(batches), False
        self._engine.train()
        apply(self._optimizer.param_groups, lr_multiplier)
        tally = Tally()
        factor = self._unapplied_scale() * self.world.size / weight
        for batch in batches:
            with self._forwards:
                loss, part = self._engine(batch.to(self.world.device))
            tally.add(part)
            self._engine.backward((loss * factor).float(), scale_wrt_gas=False)
            if batch is batches[-1]:
                applied = self._update()
            else:
                self._engine.step()
        return tally, applied

    def _without_update(self, batches: list[Batch]) -> Tally:
        """A step of which no token counts: neither decay nor momentum may move a weight."""
        tally = Tally()
        for batch in batches:
            tally.add(self.evaluate(batch))
        self._norm, self._norm_scale = 0.0, 1.0
        return tally

    def _update(self) -> bool:
        """Take the optimizer step; note the gradient's norm, and whether the step was skipped."""
        if self._plain:
            return self._update_plain()
        self._norm_scale = self._unapplied_scale()
        with _ExactNorms():
            self._engine.step()
        self._norm = self._engine.get_global_grad_norm()
        return self._engine.was_step_applied()

    def _unapplied_scale(self) -> float:
        """fp16 without ZeRO: DeepSpeed 0.19.8 divides the gradient by a loss scale that it never multiplied in."""
        return self.loss_scale or 1.0 if self._half_stage_0 else 1.0

    def _update_plain(self) -> bool:
        """fp32 without ZeRO: DeepSpeed neither tells the norm nor skips a step whose gradient is not finite.

        It takes the place of DeepSpeed's overflow check, and like that it waits for the norm: whether the step counts
        decides the next one's rate.
        """
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = total_norm([p.grad for p in parameters])
        self._norm = float(norm)
        finite = math.isfinite(self._norm)
        if not finite:
            # a step with rate and decay 0 would still spoil the moments: let it find no gradient at all
            self._engine.zero_grad()
        elif self._clip > 0:
            nn.utils.clip_grads_with_norm_(parameters, self._clip, norm)
        self._engine.step()
        return finite

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tally:
        """The Tally of a batch, without dropout, noise or gradient. Every rank must call it equally often."""
        self._engine.eval()
        return self._engine(batch.to(self.world.device))[1]

    @contextmanager
    def inference(self) -> Iterator[Any]:
        """The module in evaluation mode without gradients, for generation and probes on all ranks alike."""
        self._engine.eval()
        with torch.no_grad():
            yield self.module

    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits of a batch of one document in evaluation mode, float32 on the host, shape (1, tokens, vocabulary).

        Every rank must call it. No random number is drawn.
        """
        with self.inference() as module:
            return module.logits(batch.to(self.world.device)).float().cpu()[None]

    def gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager:
        """A context in which these parameters are whole on every rank."""
        return _gathered(self.stage, parameters)

    def close(self) -> None:
        """Take DeepSpeed's hooks and buffers away, so that another engine can follow in this process."""
        self._engine.destroy()
        self._hf_config = None

    def save(self, directory: str, tag: str, frozen: bool) -> None:
        """Write weights and optimizer state of every rank into `directory/tag`; all ranks call it.

        Args:
            directory: Parent directory.
            tag: Name of the subdirectory.
            frozen: Whether weights that are not trained are written too.

        Raises:
            OSError: This rank could not write; raised when every rank has come through.
            RuntimeError: DeepSpeed failed in between, where other ranks may be waiting for this one.
        """
        writer, failures = self._engine.checkpoint_engine, []
        write = writer.save

        def keep_failure(*args: Any, **kwargs: Any) -> Any:
            try:
                return write(*args, **kwargs)
            except (OSError, RuntimeError) as problem:
                failures.append(problem)

        # DeepSpeed has barriers after its writes: a rank that left before them would leave the others waiting there
        writer.save = keep_failure
        try:
            self._engine.save_checkpoint(directory, tag=tag, save_latest=False, exclude_frozen_parameters=not frozen)
        except OSError as problem:
            raise RuntimeError(f"DeepSpeed failed while saving: {problem}") from problem
        finally:
            writer.save = write
        if failures:
            raise OSError(str(failures[0])) from failures[0]

    def load(self, directory: str, tag: str, frozen: bool) -> None:
        """Read back what `save` wrote, into a fresh engine of the same stage and world size.

        Raises:
            UserError: DeepSpeed found nothing that it could load.
        """
        fresh = [{k: v for k, v in group.items() if k != "params"} for group in self._optimizer.param_groups]
        path, _ = self._engine.load_checkpoint(directory, tag=tag, load_module_strict=frozen)
        # the config of today counts, not the learning rate that was saved
        for group, settings in zip(self._optimizer.param_groups, fresh, strict=True):
            group.update(settings)
        if path is None:
            raise UserError(f"DeepSpeed could not load the checkpoint {directory}/{tag}")
