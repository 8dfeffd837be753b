"""What ranks do in the distributed tests: each function runs on every rank of a pool."""

from __future__ import annotations

import gc
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import tiny
import torch
import yaml
from tiny import collate

from dsft.config.schema import Fp16Config, Method, OptimConfig, OptimName, Packing, TrainConfig, TuningConfig
from dsft.data.loader import Loader, Step
from dsft.data.pack import Planner
from dsft.ds_config import build as build_ds_config
from dsft.engine import Engine, building
from dsft.evaluate import Evaluator
from dsft.metrics import Tally, declare
from dsft.model import attention, layout, rows, tuning
from dsft.model.load import ModelSource, activation_checkpointing, load_config, load_model
from dsft.model.vocabulary import Vocabulary
from dsft.tasks import TASKS
from dsft.tasks.collate import Collator

NOISE_SEED = 11
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

SCHEDULE = (0.5, 1.0, 0.8, 0.6, 0.4, 0.2)
"""Multipliers of the first steps' learning rates: any that change from step to step."""


class Examples(list):
    """A data set of examples with the arrays that the loader wants."""

    def __init__(self, examples):
        super().__init__(replace(example, number=number) for number, example in enumerate(examples))
        self.lengths = np.array([e.tokens for e in examples], dtype=np.int32)
        self.weights = np.array([e.weight for e in examples])


def examples_of(task: str, count: int, vocabulary: int = 400, weighed: bool = False) -> Examples:
    """A data set of a task; `weighed` as `tiny.weighed_examples` makes them."""
    if weighed:
        return Examples(tiny.weighed_examples(count))
    if task == "seq2seq":
        return Examples(tiny.written_examples(count))
    if task == "tag":
        return Examples(tiny.tagged_examples(count))
    if task == "extract":
        return Examples(tiny.asked_examples(count))
    if task == "regress":
        return Examples(tiny.rated_examples(count))
    if task == "classify":
        return Examples(tiny.labelled_examples(count))
    if TASKS[task].kind.encoder:
        return Examples(tiny.masked_examples(count))
    return Examples(tiny.examples(count, vocabulary=vocabulary))


def planner(examples: Examples, packing: str, global_batch_size: int) -> Planner:
    """Rows of at most 48 tokens, packed within windows of 16 examples."""
    return Planner(examples.lengths, Packing[packing], 48, 16, seed=3, global_batch_size=global_batch_size)


def tuning_config(method: str, **changes) -> TuningConfig:
    return TuningConfig(method=Method[method], rank=4, alpha=8.0, **changes)


@contextmanager
def engine(
    world,
    model_dir: str,
    *,
    stage: str = "zero2",
    precision: str = "fp32",
    micro_batch_size: int = 2,
    accumulation: int = 1,
    method: str = "full",
    optim: OptimConfig | None = None,
    chunk: int = 7,
    fp16: Fp16Config | None = None,
    neftune_alpha: float = 0.0,
    checkpointing=None,
    lora: dict[str, Any] | None = None,
    words: Vocabulary | None = None,
    task: str = "causal_lm",
    padded: bool = False,
    settings: dict[str, Any] | None = None,
):
    """An engine around the tiny model, taken apart again afterwards."""
    optim = optim or OptimConfig(lr=1e-3, weight_decay=0.1, max_grad_norm=1.0)
    ds = build_ds_config(
        f"ds_configs/{stage}.json",
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=accumulation,
        world_size=world.size,
        precision=precision,
        fp16=fp16 or Fp16Config(),
        max_grad_norm=optim.max_grad_norm,
    )
    dtype = DTYPES[precision]
    kind = TASKS[task].kind
    source = ModelSource(model_dir, None, "", model_dir, kind=kind)
    implementation = layout.implementation(kind, load_config(source), padded)
    with building(ds) as gather:
        model = load_model(source, dtype, implementation)
        rows.grow(model, words or Vocabulary(0), gather)
        model = tuning.apply(model, tuning_config(method, **(lora or {})), seed=5, vocabulary=words, kind=kind)
    module = tiny.task(model, chunk, name=task, seed=NOISE_SEED, alpha=neftune_alpha, padded=padded, **(settings or {}))
    if checkpointing is not None:
        activation_checkpointing(model, checkpointing, module.noise.checkpointing)
    made = Engine(module, ds, optim, world)
    try:
        yield made
    finally:
        made.close()
        del made, model, module
        gc.collect()


def weights(made: Engine) -> dict[str, torch.Tensor]:
    """Whole weights by name, on the CPU."""
    found = {}
    for name, parameter in made.module.model.named_parameters():
        with made.gathered([parameter]):
            found[name] = parameter.detach().float().cpu().clone()
    return found


def whole_weights(made: Engine) -> dict[str, torch.Tensor]:
    """Whole weights by name, tied ones once, on the CPU, with the rows of new tokens in their places."""
    found, seen = {}, set()
    for prefix, module in made.module.model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        with made.gathered(list(own.values())):
            for name in own.keys() - set(rows.NEW):
                if id(own[name]) not in seen:
                    found[f"{prefix}.{name}"] = rows.whole(module, name).detach().float().cpu().clone()
        seen.update(map(id, own.values()))
    return found


def loader(
    world,
    examples: Examples,
    packing: str,
    micro_batch_size: int,
    accumulation: int,
    task: str = "causal_lm",
    **settings,
) -> Loader:
    plan = planner(examples, packing, micro_batch_size * accumulation * world.size)
    return Loader(
        examples,
        examples.lengths,
        examples.weights,
        plan,
        world.rank,
        world.size,
        micro_batch_size,
        accumulation,
        tiny.collator(task, packing == "padded", seed=NOISE_SEED, **settings).train,
    )


def train(
    world,
    *,
    model_dir: str,
    steps: int,
    packing: str,
    micro_batch_size: int,
    accumulation: int,
    examples: int,
    vocabulary: int = 400,
    task: str = "causal_lm",
    weighed: bool = False,
    **options,
) -> dict[str, Any]:
    """Take `steps` optimizer steps; returns loss and gradient norm of each, and the weights at the end."""
    data = examples_of(task, examples, vocabulary, weighed)
    losses, norms, applied = [], [], []
    options |= {"micro_batch_size": micro_batch_size, "accumulation": accumulation, "task": task}
    with engine(world, model_dir, padded=packing == "padded", **options) as made:
        settings = options.get("settings") or {}
        source = iter(loader(world, data, packing, micro_batch_size, accumulation, task, **settings))
        for number in range(steps):
            step = next(source)
            tally, done = made.train_step(step.batches, step.weight, SCHEDULE[number % len(SCHEDULE)])
            sums = np.array(world.gather([float(tally.sums["loss"]), float(tally.sums["weight"])])).sum(0)
            assert abs(sums[1] - step.weight) <= 1e-12 * step.weight, (
                "tokens counted in the plan and by the task differ"
            )
            losses.append(sums[0] / sums[1])
            norms.append(made.grad_norm)
            applied.append(done)
        return {"loss": losses, "grad_norm": norms, "applied": applied, "weights": whole_weights(made)}


class Known(torch.nn.Module):
    """One weight of a given size, whose gradient is known: the loss is its product with fixed numbers."""

    def __init__(self, elements: int, dtype: torch.dtype):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(elements // 1000, 1000, dtype=dtype))
        numbers = torch.randn(self.weight.shape, generator=torch.Generator().manual_seed(1))
        self.register_buffer("numbers", (numbers * 1e-2).to(dtype), persistent=False)

    def forward(self, batch):
        loss = (self.weight * self.numbers).sum(dtype=torch.float32)
        return loss, Tally({"loss": loss.detach().double()})


def norm(world, *, elements: int, stage: str, precision: str, max_grad_norm: float) -> dict[str, float]:
    """A step of SGD with a rate of 1 on `Known`: the norm that is told, the right one, and how far the weights went."""
    optim = OptimConfig(name=OptimName.sgd, lr=1.0, momentum=0.0, max_grad_norm=max_grad_norm)
    ds = build_ds_config(
        f"ds_configs/{stage}.json",
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        world_size=world.size,
        precision=precision,
        fp16=Fp16Config(initial_scale_power=4),
        max_grad_norm=max_grad_norm,
    )
    module = Known(elements, DTYPES[precision])
    right = float(module.numbers.double().square().sum().sqrt()) * world.size
    made = Engine(module, ds, optim, world)
    try:
        made.train_step([collate([])], weight=1, lr_multiplier=1.0)
        with made.gathered([made.module.weight]):
            moved = float(made.module.weight.detach().double().square().sum().sqrt())
        return {"found": made.grad_norm, "right": right, "moved": moved}
    finally:
        made.close()
        del made, module
        gc.collect()


def evaluate(
    world, *, model_dir: str, micro_batch_size: int | None, examples: int, task: str = "causal_lm", **options
) -> dict[str, float]:
    """Evaluation metrics of the untrained model."""
    from dsft.tracking import NullTracker

    metrics = declare(TASKS[task].metrics, TASKS[task].target)
    collator = tiny.collator(task, options.get("padded", False), **(options.get("settings") or {}))
    with engine(world, model_dir, task=task, **options) as made:
        evaluator = Evaluator(examples_of(task, examples), collator, world, metrics, micro_batch_size, 96)
        return evaluator.metrics(made, NullTracker().bar)


def save(
    world, *, model_dir: str, run_dir: str, examples: int = 40, steps: int = 3, vocabulary: int = 400, **options
) -> dict[str, Any]:
    """Straight: 2 x `steps`. Then save in the middle, a fresh engine, and on to the same place."""
    from dsft import checkpoint
    from dsft.runtime.seeds import seed_everything

    data = Examples(tiny.examples(examples, vocabulary=vocabulary))
    micro, accumulation = 2, 3

    def go(made, source, first):
        rows = []
        for number in range(first, first + steps):
            step = next(source)
            tally, _ = made.train_step(step.batches, step.weight, SCHEDULE[number])
            rows.append((float(tally.sums["loss"]), made.grad_norm))
        return rows

    seed_everything(1)
    with engine(world, model_dir, micro_batch_size=micro, accumulation=accumulation, **options) as made:
        cursor = loader(world, data, "bfd", micro, accumulation)
        source = iter(cursor)
        go(made, source, 0)
        state = {"loader": cursor.state_dict()}
        path = checkpoint.save(Path(run_dir), steps, made, world, state, options.get("method", "full") == "full")
        saved = weights(made)
        straight = go(made, source, steps), weights(made)
    seed_everything(2)
    with engine(world, model_dir, micro_batch_size=micro, accumulation=accumulation, **options) as made:
        cursor = loader(world, data, "bfd", micro, accumulation)
        state = checkpoint.load(path, made, world)
        cursor.load_state_dict(state["loader"])
        resumed = go(made, iter(cursor), steps), weights(made)
    return {"saved": saved, "straight": straight, "resumed": resumed}


class Keep:
    """A tokenizer that shows tokens as they are."""

    pad_token_id = 0

    def decode(self, ids, **_):
        return list(ids)


def sampling(count: int, tokens: int) -> Collator:
    """What gives `count` samples of at most so many tokens, as ids."""
    made = tiny.collator()
    train = TrainConfig(samples=count, sample_tokens=tokens)
    return replace(made, context=replace(made.context, tokenizer=Keep(), train=train))


def _prompts(prompts: list[list[int]]) -> Examples:

    return Examples([tiny.example(np.array([*p, 1], np.int32), np.array([*[False] * len(p), True])) for p in prompts])


def generate(
    world, *, model_dir: str, prompts: list[list[int]], stop: tuple[int, ...] = (), **options
) -> list[list[int]]:
    """Greedy answers of 8 tokens."""
    with engine(world, model_dir, **options) as made:
        evaluator = Evaluator(_prompts(prompts), sampling(len(prompts), 8), world, tiny.METRICS, None, 96, stop)
        answers, problems = evaluator.answers(made)
        assert not problems, problems
        return [sample["answer"] for sample in answers]


def failing_samples(world, *, model_dir: str, failing: list[int], where: str, **options) -> Any:
    """What becomes of two samples whose first fails on some ranks, `before` or `inside` its second forward pass.

    Returns the answers, the problems, and the loss of a training step after them; or the error that ended it.
    """
    from dsft import evaluate

    evaluate.PATIENCE = 2.5
    data = Examples(tiny.examples(8))
    with engine(world, model_dir, micro_batch_size=4, **options) as made:
        evaluator = Evaluator(_prompts([[5, 6, 7], [8, 9]]), sampling(2, 4), world, tiny.METRICS, None, 96)
        model, calls = made.module.model, []

        def fail(*_):
            calls.append(1)
            if len(calls) == 2 and world.rank in failing:
                raise RuntimeError("the device is out of memory")

        at = model if where == "before" else model.model.layers[1]
        hook = at.register_forward_pre_hook(fail)
        try:
            answers, problems = evaluator.answers(made)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        hook.remove()
        step = next(iter(loader(world, data, "none", 4, 1)))
        tally, _ = made.train_step(step.batches, step.weight, 1.0)
        return [sample["answer"] for sample in answers], problems, float(tally.sums["loss"])


def load_error(world, *, model_dir: str, path: str, **options) -> str:
    """The message with which a checkpoint is refused."""
    from dsft import checkpoint
    from dsft.errors import UserError

    with engine(world, model_dir, **options) as made:
        try:
            checkpoint.load(Path(path), made, world)
        except UserError as error:
            return str(error)
    return "it was loaded"


def nan_step(world, *, model_dir: str, **options) -> tuple[float, float, bool, float]:
    """A step whose loss is NaN on one rank only; returns a digest of the weights before and after."""
    data = Examples(tiny.examples(8))
    with engine(world, model_dir, micro_batch_size=4, **options) as made:
        step = next(iter(loader(world, data, "none", 4, 1)))
        before = sum(float(w.double().abs().sum()) for w in weights(made).values())
        supervised = float("nan") if world.rank == world.size - 1 else step.weight
        _, applied = made.train_step(step.batches, supervised, 1.0)
        after = sum(float(w.double().abs().sum()) for w in weights(made).values())
        return before, after, applied, made.grad_norm


def weightless_step(world, *, model_dir: str, **options) -> tuple[float, float, bool, dict[str, float]]:
    """A step of which no token counts, after one that gave the optimizer moments; a digest of the weights around it."""
    data = examples_of("causal_lm", 12)
    with engine(world, model_dir, micro_batch_size=3, accumulation=2, **options) as made:
        source = iter(loader(world, data, "none", 3, 2))
        step = next(source)
        made.train_step(step.batches, step.weight, 1.0)
        before = weights(made)
        nothing = [replace(batch, weight=0.0, even=False) for batch in next(source).batches]
        for batch in nothing:
            batch.tensors["target_weights"] = torch.zeros(len(batch.tensors["target_at"]))
            batch.tensors["weight"] = torch.zeros((), dtype=torch.float64)
        tally, applied = made.train_step(nothing, 0.0, 1.0)
        after = weights(made)
        moved = max(float((after[name] - weight).abs().max()) for name, weight in before.items())
        return moved, made.grad_norm, applied, tally.read()


def save_error(world, *, model_dir: str, run_dir: str, failing_rank: int, **options) -> str:
    """The message of a checkpoint that one rank cannot write."""
    from dsft import checkpoint
    from dsft.errors import UserError

    def refuse(*_, **__):
        raise OSError(28, "no space is left on this device")

    with engine(world, model_dir, **options) as made:
        if world.rank == failing_rank:
            made._engine.checkpoint_engine.save = refuse
        try:
            checkpoint.save(Path(run_dir), 1, made, world, {}, True)
        except UserError as error:
            return str(error)
    return "it was saved"


def slow_rank(world, *, model_dir: str, **options) -> float:
    """Own seconds of a step in which the last rank's forward pass sleeps."""
    import time

    data = Examples(tiny.examples(8))
    with engine(world, model_dir, micro_batch_size=4, **options) as made:
        if world.rank == world.size - 1:
            made.module.register_forward_pre_hook(lambda *_: time.sleep(0.5))
        step = next(iter(loader(world, data, "none", 4, 1)))
        made.train_step(step.batches, step.weight, 1.0)
        return made.forward_seconds()


class Locked(Exception):
    """An exception that does not pickle."""

    def __init__(self, message: str):
        super().__init__(message)
        self.lock = threading.Lock()


def from_main_fails(world, error: type[Exception]) -> tuple[str, str]:
    """What each rank gets of an exception that rank 0 raises for all."""

    def make():
        raise error("out of luck")

    return _raised(lambda: world.from_main(make))


def all_succeed_but(world, rank: int) -> tuple[str, str]:
    """What each rank gets of the failure of one."""
    return _raised(lambda: world.all_succeed(Locked("held") if world.rank == rank else None))


def _raised(call) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def digest(directory: str) -> dict[str, str]:
    """Every directory and file below, hidden ones too, with a hash of its content."""
    import hashlib

    found = {}
    for path in sorted(Path(directory).rglob("*")):
        name = str(path.relative_to(directory))
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
    return found


def runs(world, *, settings: list[dict], watched: str) -> list[tuple[Any, bool]]:
    """`dsft.commands.train.run` with each of these configs, one after the other, in this world.

    Returns:
        For each, its exit code or the message with which it was refused, and whether anything in the directory
        `watched` is other than before it.
    """
    from dsft import assemble
    from dsft.commands import train as command
    from dsft.config import load
    from dsft.errors import UserError

    outcomes, made = [], []

    class Kept(Engine):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    command.join, command.leave, assemble.Engine = (lambda place: world), (lambda: None), Kept
    for config in settings:
        before = digest(watched)
        world.exchange("")  # nobody writes before all have looked
        try:
            outcome = command.run(load.parse_yaml(yaml.safe_dump(config), "settings"), world.place)
        except UserError as error:
            outcome = str(error)
        world.exchange("")
        outcomes.append((outcome, digest(watched) != before))
        while made:
            made.pop().close()
        gc.collect()
    return outcomes


def leaking_run(world, *, settings: dict) -> str:
    """How a run is refused whose attention sees across documents."""
    kept = attention._per_document

    def leaking(query, key, value, lengths, scale, window, causal):
        return kept(query, key, value, [sum(lengths)], scale, window, causal)

    attention._per_document = leaking
    try:
        ((outcome, _),) = runs(world, settings=[settings], watched=settings["data"]["cache_dir"])
    finally:
        attention._per_document = kept
    return str(outcome)


def waits(
    world,
    *,
    model_dir: str,
    exempt: set[str],
    task: str = "causal_lm",
    packing: str = "bfd",
    planted: bool = False,
    **options,
) -> tuple[list[str], set[str]]:
    """What waits for the device in the loop's steps 2 to 5 of 6, of which the last makes the first row.

    Returns:
        What was found, and which exempt functions were met.
    """
    from watch import Watch

    from dsft.config.schema import ScheduleConfig
    from dsft.loop import Loop
    from dsft.optim import Schedule
    from dsft.tracking import NullTracker

    watch, data, written = Watch(exempt), examples_of(task, 40), []
    options |= {"task": task, "padded": packing == "padded", "accumulation": 2}
    with engine(world, model_dir, **options) as made:
        source = loader(world, data, packing, 2, 2, task)
        steps_ahead = source.ahead

        def ahead(count, device):
            for number, step in enumerate(steps_ahead(count, device), 1):
                if number == 2:
                    watch.__enter__()
                yield step
                if number == 5:
                    watch.__exit__(None, None, None)

        source.ahead = ahead
        tracker = NullTracker()
        tracker.write = written.append
        if planted:
            made.module.register_forward_hook(lambda module, inputs, output: output[0].item() and None)
        the_loop = Loop(
            engine=made,
            loader=source,
            evaluator=None,
            metrics=declare(TASKS[task].metrics, TASKS[task].target),
            schedule=Schedule(ScheduleConfig(), 6),
            tracker=tracker,
            world=world,
            stop=SimpleNamespace(received=None),
            train=TrainConfig(log_every=6, eval_every=1, save_every=0),
            total_steps=6,
            peak_lr=1e-3,
            run_dir=Path(),
            save_frozen=True,
            extra_state=dict,
        )
        the_loop.save = lambda: None
        assert the_loop.run() is None
    assert [row["step"] for row in written] == [6]
    return watch.found, watch.met


class Exchanging:
    """An engine whose steps are nothing but the sum over ranks that no rank gets past alone."""

    grad_norm, loss_scale = 1.0, None

    def __init__(self, world, at):
        self._world, self._at, self._steps = world, at, 0

    def forward_seconds(self):
        return 0.0

    def train_step(self, batches, weight, multiplier):
        self._steps += 1
        self._at(self._steps, "before")
        self._world.gather([0.0])
        self._at(self._steps, "after")
        return Tally({name: torch.ones((), dtype=torch.float64) for name in ("loss", "weight")}), True


def stops(world, *, asked: list[tuple[int, int, str, str]], total: int = 9, eval_every: int = 0) -> tuple:
    """How a loop ends in which ranks are asked to stop.

    Args:
        asked: Rank, step, moment (`before` or `after` the sum over ranks, or in the `evaluation`), signal; before 0 is
            before the first step.

    Returns:
        The signal's name, the step it ended at, and the one that was saved last.
    """
    import time

    from dsft.config.schema import ScheduleConfig
    from dsft.loop import Loop
    from dsft.optim import Schedule
    from dsft.tracking import NullTracker

    request, random = SimpleNamespace(received=None), np.random.default_rng(world.rank)

    def at(step: int, moment: str) -> None:
        time.sleep(float(random.uniform(0, 0.01)))
        for rank, when, where, name in asked:
            if (rank, when, where) == (world.rank, step, moment):
                request.received = name

    class Evaluating:
        about: ClassVar[dict] = {}

        def metrics(self, *_):
            at(the_loop.counters.step, "evaluation")
            return {"eval/loss": 1.0}

    class Steps:
        epochs = 0

        def ahead(self, count, device):
            return (Step([], 1, 1.0, 0) for _ in range(count))

        def progress(self):
            return 0.0

    the_loop = Loop(
        engine=Exchanging(world, at),
        loader=Steps(),
        evaluator=Evaluating(),
        metrics=tiny.METRICS,
        schedule=Schedule(ScheduleConfig(), total),
        tracker=NullTracker(),
        world=world,
        stop=request,
        train=TrainConfig(log_every=4, eval_every=eval_every, save_every=0, samples=0),
        total_steps=total,
        peak_lr=1.0,
        run_dir=Path(),
        save_frozen=True,
        extra_state=dict,
    )
    saved = []
    the_loop.save = lambda: saved.append(the_loop.counters.step)
    at(0, "before")
    return the_loop.run(), the_loop.counters.step, saved[-1]
