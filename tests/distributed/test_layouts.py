"""The first promise for encoders, for heads on whole texts, and for models that are trained padded, against plain loops
over single examples."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import cases
import numpy as np
import pairwise
import pytest
import tiny
import torch
import torch.nn.functional as F
from test_exactness import clip, deviation
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from dsft.config.schema import RegressionLoss
from dsft.model.noise import Noise
from dsft.tasks import labels as naming
from dsft.tasks.masked_lm import inputs
from dsft.tasks.task import View

ROOT = Path(__file__).parents[2]
STEPS = 4
EXAMPLES = 50
GLOBAL_BATCH = 12
LIMIT = 1e-5
NOTHING = 1e-6
"""Norm of a gradient that is 0 but for rounding, by whose size Adam divides it, where all gradients have the norm 1 or
less: of a bias of keys, or of whatever shifts the logits of all tokens alike where the softmax is over tokens."""
TABLE: dict[tuple, dict[str, float]] = {}


@dataclass(frozen=True)
class Way:
    """A model and a layout."""

    title: str
    family: str
    packing: str
    task: str = "masked_lm"
    model: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)


DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
MODERN = {"local_attention": 16, "global_attn_every_n_layers": 2, "attention_dropout": 0.0}
# of its table of positions it drops the same for a whole step, which a loop over single examples does not know
DEBERTA = {"relative_attention": True} | dict.fromkeys(
    ("hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_dropout"), 0.0
)
HUBER = {"regression_loss": RegressionLoss.huber, "huber_delta": 0.5}
BART = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.1)
SMOOTHED = {"label_smoothing": 0.1}
LFM = {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2}
WAYS = {
    "bert": Way("BERT with dropout, flat rows", "bert", "bfd", model=DROPOUT),
    "bert padded": Way("BERT with dropout, padded", "bert", "padded", model=DROPOUT),
    "modernbert": Way("ModernBERT, flat rows", "modernbert", "bfd", model=MODERN),
    "modernbert padded": Way("ModernBERT, padded", "modernbert", "padded", model=MODERN),
    "mamba": Way("Mamba (recurrent), padded", "mamba", "padded", "causal_lm", {"state_size": 4}),
    "classify bert": Way("Labels: BERT with dropout, flat rows", "bert", "bfd", "classify", DROPOUT),
    "classify bert padded": Way("Labels: BERT with dropout, padded", "bert", "padded", "classify", DROPOUT),
    "classify llama": Way("Labels, focal and smoothed: Llama", "llama", "bfd", "classify", {}, tiny.CLASSIFYING),
    "classify deberta": Way("Labels: DeBERTa, padded", "deberta-v2", "padded", "classify", DEBERTA),
    "regress bert": Way("Numbers: BERT with dropout, flat rows", "bert", "bfd", "regress", DROPOUT),
    "regress llama": Way("Numbers, Huber's loss: Llama, padded", "llama", "padded", "regress", {}, HUBER),
    "tag bert": Way("Tags: BERT with dropout, flat rows", "bert", "bfd", "tag", DROPOUT),
    "tag llama": Way("Tags: Llama, padded", "llama", "padded", "tag"),
    "extract bert": Way("Answers: BERT with dropout, flat rows", "bert", "bfd", "extract", DROPOUT),
    "extract modernbert": Way("Answers: ModernBERT, padded", "modernbert", "padded", "extract", MODERN),
    "t5": Way("Texts from texts: T5 with dropout", "t5", "padded", "seq2seq", {"dropout_rate": 0.1}),
    "bart": Way("Texts from texts, smoothed: BART with dropout", "bart", "padded", "seq2seq", BART, SMOOTHED),
    "lfm2": Way("LFM2 (convolutions and attention), padded", "lfm2", "padded", "causal_lm", LFM),
}
RANKS, ACCUMULATION, STAGES = (1, 2), (1, 3), ("zero0", "zero2", "zero3")
WHOLE = list(itertools.product(RANKS, ACCUMULATION, STAGES, WAYS))


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory):
    """Directory of each way's model."""
    made = {}
    for name, way in WAYS.items():
        made[name] = str(tmp_path_factory.mktemp(way.family))
        makes = {"masked_lm": tiny.masked, "causal_lm": tiny.causal, "seq2seq": tiny.two_sided}
        make = makes.get(way.task, tiny.classifier)
        names = {"regress": ("a", "b"), "tag": tiny.TAGS, "extract": tiny.ENDS}.get(way.task)
        make = partial(make, names=names) if names else make
        make(way.family, "eager", **({"vocab_size": 400} | way.model)).save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def reference(model_dirs):
    """The plain loop of each way, run when first asked for."""
    done = {}

    def get(name: str):
        if name not in done:
            done[name] = plain_loop(model_dirs[name], WAYS[name])
        return done[name]

    return get


def written_out(noise: Noise):
    """Attention over one example as a formula, both ways, with the weights that its noise drops."""

    def attention(module, query, key, value, mask, scaling=None, dropout=0.0, sliding_window=None, **_):
        scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
        if sliding_window is not None:
            places = torch.arange(query.shape[2])
            far = (places[:, None] - places).abs() >= sliding_window
            scores = scores.masked_fill(far, -torch.inf)
        weights = scores.softmax(-1)
        if dropout:
            weights = noise.attention_dropout(module, weights[0], 0, dropout)[None]
            noise.attended(module)
        return (weights @ value).transpose(1, 2), None

    return attention


def target_loss(model, way: Way, example, epoch: int) -> torch.Tensor:
    """The summed loss of one example alone."""
    if way.task == "masked_lm":
        made = inputs(example, View(epoch), tiny.collator("masked_lm", seed=cases.NOISE_SEED).context)
        ids, labels = (torch.from_numpy(made[key])[None] for key in ("input_ids", "labels"))
        logits = model(input_ids=ids).logits[0]
        return F.cross_entropy(logits, labels[0], ignore_index=-100, reduction="sum")
    ids = torch.from_numpy(example.ids.astype(np.int64))[None]
    if way.task == "seq2seq":
        return written_loss(model, way, example, ids)
    if way.task == "extract":
        return asked_loss(model, way, example, ids)
    if way.task == "tag":
        return tagged_loss(model, example, ids)
    if way.task == "regress":
        return rated_loss(model, way, example, ids)
    if way.task == "classify":
        return labelled_loss(model, way, example, ids)
    targets = torch.where(torch.from_numpy(example.columns["weights"] > 0), ids[0], -100)
    logits = model(input_ids=ids, use_cache=False).logits[0]
    return F.cross_entropy(logits[:-1], targets[1:], ignore_index=-100, reduction="sum")


def labelled_loss(model, way: Way, example, ids: torch.Tensor) -> torch.Tensor:
    """The loss of one text's label, by its formula: smoothed over labels, focal, times what record and label count."""
    (label,) = tiny.labels_of(example)
    typed = {"token_type_ids": torch.from_numpy(example.columns["token_types"].astype(np.int64))[None]}
    logs = model(input_ids=ids, **(typed if way.family == "bert" else {})).logits[0].log_softmax(-1)
    smoothing, gamma = way.settings.get("label_smoothing", 0.0), way.settings.get("focal_gamma", 0.0)
    target = torch.full_like(logs, smoothing / len(logs))
    target[label] += 1 - smoothing
    counts = example.weight * tiny.LABEL_WEIGHTS[label]
    return -(target * logs).sum() * (1 - logs[label].exp()) ** gamma * counts


def tagged_loss(model, example, ids: torch.Tensor) -> torch.Tensor:
    """The loss of one window's words."""
    (at,) = np.nonzero(example.columns["words"] >= 0)
    logits = model(input_ids=ids).logits[0, at]
    known = {naming.key(name): number for number, name in enumerate(tiny.TAGS)}
    targets = torch.tensor([known[int(one)] for one in example.columns["labels"]])
    return F.cross_entropy(logits, targets, reduction="sum") * example.weight / len(at)


def written_loss(model, way: Way, example, ids: torch.Tensor) -> torch.Tensor:
    """The loss of one text's target, smoothed over the vocabulary by its formula, times what its record counts."""
    target = torch.from_numpy(example.columns["target_ids"].astype(np.int64))[None]
    logs = model(input_ids=ids, labels=target, use_cache=False).logits[0].log_softmax(-1)
    smoothing = way.settings.get("label_smoothing", 0.0)
    right = logs.gather(1, target[0, :, None])[:, 0]
    each = -(1 - smoothing) * right - smoothing * logs.mean(-1)
    return (each * torch.from_numpy(example.columns["counts"])).sum()


def asked_loss(model, way: Way, example, ids: torch.Tensor) -> torch.Tensor:
    """The loss of one window, as transformers itself forms it, times what its record counts."""
    typed = {"token_type_ids": torch.from_numpy(example.columns["token_types"].astype(np.int64))[None]}
    start, end = torch.from_numpy(example.columns["target"].astype(np.int64))
    given = {"start_positions": start[None], "end_positions": end[None]}
    return model(input_ids=ids, **given, **(typed if way.family == "bert" else {})).loss * example.weight


def rated_loss(model, way: Way, example, ids: torch.Tensor) -> torch.Tensor:
    """The loss of one text's two numbers, by its formula: in standard deviations, squared or Huber's."""
    typed = {"token_type_ids": torch.from_numpy(example.columns["token_types"].astype(np.int64))[None]}
    found = model(input_ids=ids, **(typed if way.family == "bert" else {})).logits[0]
    scale = torch.tensor(tiny.collator("regress").context.labels.scale)
    error = (found - torch.from_numpy(example.columns["numbers"]).float()) / scale
    if not way.settings:
        return error.square().mean() * example.weight
    delta = way.settings["huber_delta"]
    inner, outer = error.square() / 2, delta * (error.abs() - delta / 2)
    return torch.where(error.abs() <= delta, inner, outer).mean() * example.weight


def alone(noise: Noise, model, way: Way, example, step: tuple[int, int]) -> torch.Tensor:
    """The summed loss of one example alone, with its noise."""
    if way.task != "seq2seq":
        tiny.begin(noise, step, [example.tokens], [example.number])
        return target_loss(model, way, example, step[0])
    width, written = len(example.ids), len(example.columns["target_ids"])
    tiny.begin(noise, step, [width], [example.number], width, written=written)
    with noise.drawing():
        return target_loss(model, way, example, step[0])


def plain_loop(model_dir: str, way: Way):
    autos = {"masked_lm": AutoModelForMaskedLM, "causal_lm": AutoModelForCausalLM}
    autos |= {"seq2seq": AutoModelForSeq2SeqLM}
    autos |= {"tag": AutoModelForTokenClassification, "extract": AutoModelForQuestionAnswering}
    auto = autos.get(way.task, AutoModelForSequenceClassification)
    model = auto.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    noise = Noise(model, cases.NOISE_SEED)
    if way.task == "masked_lm" or (way.family == "bert"):
        AttentionInterface.register("written_out_both", written_out(noise))
        AttentionMaskInterface.register("written_out_both", lambda *_, **__: None)
        model.set_attn_implementation("written_out_both")
    model.train()
    data = cases.examples_of(way.task, EXAMPLES)
    if way.task == "seq2seq":
        # its attention is transformers' own, whose dropout is met in it
        noise.rehearse(partial(alone, noise, model, way, data[0], (0, 0)))
    trained = list(model.named_parameters())
    undecayed = [p for n, p in trained if p.dim() < 2 or re.search("norm|Norm|embed|shared|relative_attention_bias", n)]
    decayed = [p for _, p in trained if all(p is not u for u in undecayed)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": undecayed, "weight_decay": 0.0}], lr=1e-3, foreach=False
    )
    plan = cases.planner(data, way.packing, GLOBAL_BATCH)
    losses, norms, moved, epoch, place = [], [], set[str](), 0, 0
    for number in range(STEPS):
        if place == plan.steps(epoch):
            epoch, place = epoch + 1, 0
        batch = [data[int(i)] for row in plan.step_rows(epoch, place) for i in row]
        weight = sum(example.weight for example in batch)
        optimizer.zero_grad()
        total = 0.0
        for example in batch:
            loss = alone(noise, model, way, example, (epoch, place)) / weight
            loss.backward()
            total += float(loss.detach())
        norms.append(clip([p.grad for _, p in trained if p.grad is not None], 1.0))
        moved |= {n for n, p in trained if p.grad is None or p.grad.norm() > NOTHING}
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * cases.SCHEDULE[number]
        optimizer.step()
        losses.append(total)
        place += 1
    weights = {n: p.detach().clone() for n, p in trained if n in moved}
    return {"loss": losses, "grad_norm": norms, "weights": weights}


@pytest.mark.parametrize(("ranks", "accumulation", "stage", "name"), pairwise.cases(RANKS, ACCUMULATION, STAGES, WAYS))
def test_same_as_a_plain_loop_over_single_examples(pools, reference, model_dirs, ranks, accumulation, stage, name):
    way = WAYS[name]
    results = pools(ranks).run(
        cases.train,
        model_dir=model_dirs[name],
        steps=STEPS,
        packing=way.packing,
        micro_batch_size=GLOBAL_BATCH // ranks // accumulation,
        accumulation=accumulation,
        stage=stage,
        examples=EXAMPLES,
        task=way.task,
        settings=way.settings,
    )
    found = [deviation(result, reference(name)) for result in results]
    TABLE[ranks, accumulation, stage, name] = {k: max(f[k] for f in found) for k in found[0]}
    assert all(value <= LIMIT for f in found for value in f.values()), found


def table() -> str:
    """The whole matrix as Markdown: a row per ranks, accumulation and stage, a column per way."""
    lines = [f"| ranks | accumulation | ZeRO | {' | '.join(way.title for way in WAYS.values())} |"]
    lines.append("|---|---|---|" + "---|" * len(WAYS))
    for ranks, accumulation, stage in itertools.product(RANKS, ACCUMULATION, STAGES):
        cells = [TABLE[ranks, accumulation, stage, name] for name in WAYS]
        numbers = " | ".join(f"{c['loss']:.1e} / {c['grad_norm']:.1e} / {c['weights']:.1e}" for c in cells)
        lines.append(f"| {ranks} | {accumulation} | {stage[-1]} | {numbers} |")
    worst = {key: max(cell[key] for cell in TABLE.values()) for key in ("loss", "grad_norm", "weights")}
    lines += ["", "Largest of all: " + ", ".join(f"{key} {value:.1e}" for key, value in worst.items()) + "."]
    return "\n".join(lines)


def test_the_whole_matrix_of_layouts_is_published():
    """docs/EXACTNESS.md shows the matrix; DSFT_PUBLISH=1 tries all of it and writes this run's figures."""
    file = ROOT / "docs" / "EXACTNESS.md"
    before, rest = file.read_text(encoding="utf-8").split("<!-- layouts -->\n")[:2]
    shown, after = rest.split("<!-- /layouts -->")
    if pairwise.PUBLISH and set(TABLE) == set(WHOLE):
        shown = table() + "\n"
        file.write_text(f"{before}<!-- layouts -->\n{shown}<!-- /layouts -->{after}", encoding="utf-8")
    published = [float(number) for number in re.findall(r"\d\.\de-\d\d", shown.split("Largest of all")[0])]
    assert len(published) == 3 * len(WHOLE)
    assert max(published) <= LIMIT
