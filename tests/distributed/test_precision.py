"""Half precision, skipped steps, clipping, offload, optimizers and the other knobs that go through DeepSpeed."""

from __future__ import annotations

import cases
import numpy as np
import pairwise
import pytest
import tiny

from dsft.config.schema import ActivationCheckpointing, Fp16Config, Implementation, OptimConfig, OptimName


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> str:
    return str(tiny.save(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def run(pools, model_dir):
    """Train as options say; what several tests want is trained once."""
    done = {}

    def go(ranks: int = 2, **options):
        settings = {
            "model_dir": model_dir,
            "steps": 4,
            "packing": "bfd",
            "micro_batch_size": 3,
            "accumulation": 2,
            "examples": 60,
        }
        settings |= options
        key = repr((ranks, sorted(settings.items())))
        if key not in done:
            done[key] = pools(ranks).run(cases.train, **settings)[0]
        return done[key]

    return go


@pytest.fixture(scope="module")
def plain(run):
    """fp32, ZeRO-2: proven exact by test_exactness."""
    return run()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
def test_half_precision_follows_fp32(run, plain, stage, precision):
    """The loss is normalised alike in every precision and stage; only rounding differs."""
    found = run(stage=stage, precision=precision, fp16=Fp16Config(initial_scale_power=8))
    assert all(found["applied"])
    assert found["loss"] == pytest.approx(plain["loss"], rel=0.02)
    assert found["grad_norm"] == pytest.approx(plain["grad_norm"], rel=0.05)


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
def test_fp16_overflow_is_skipped_and_counted(run, stage):
    """A loss scale far too large: steps are skipped until it has come down, and said to be."""
    found = run(stage=stage, precision="fp16", fp16=Fp16Config(initial_scale_power=30), steps=3)
    assert found["applied"][0] is False


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
def test_a_nan_gradient_leaves_the_weights_alone(pools, model_dir, stage, precision):
    """DeepSpeed#8035: NaN steps are skipped; here they are also reported, fp32 without ZeRO included."""
    before, after, applied, norm = pools(2).run(cases.nan_step, model_dir=model_dir, stage=stage, precision=precision)[
        0
    ]
    assert applied is False and not np.isfinite(norm)
    assert before == after


@pytest.mark.parametrize(("stage", "precision"), [("zero0", "fp32"), ("zero2", "bf16"), ("zero3", "fp32")])
def test_a_step_of_which_no_token_counts_moves_nothing(pools, model_dir, stage, precision):
    """Neither weight decay nor the moments of the step before; it is counted as skipped."""
    for moved, norm, applied, sums in pools(2).run(
        cases.weightless_step, model_dir=model_dir, stage=stage, precision=precision
    ):
        assert (moved, norm, applied) == (0, 0, False)
        assert set(sums.values()) == {0}


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
def test_clipping(run, stage):
    """The same norms are reported with and without clipping, and a small clip moves SGD's weights less."""
    free = run(stage=stage, steps=1, optim=OptimConfig(name=OptimName.sgd, lr=0.1, max_grad_norm=0.0))
    clipped = run(stage=stage, steps=1, optim=OptimConfig(name=OptimName.sgd, lr=0.1, max_grad_norm=0.01))
    none = run(stage=stage, steps=1, optim=OptimConfig(name=OptimName.sgd, lr=1e-30, max_grad_norm=0.0))
    assert free["grad_norm"] == pytest.approx(clipped["grad_norm"], rel=1e-6)

    def moved(result):
        return np.sqrt(sum(float((w - none["weights"][n]).double().norm()) ** 2 for n, w in result["weights"].items()))

    lr = 0.1 * cases.SCHEDULE[0]
    assert moved(free) == pytest.approx(lr * free["grad_norm"][0], rel=1e-3)
    assert moved(clipped) == pytest.approx(lr * 0.01, rel=1e-2)


@pytest.mark.parametrize("stage", ["zero2_offload", "zero3_offload"])
def test_offload_changes_nothing(run, plain, stage):
    optim = OptimConfig(lr=1e-3, weight_decay=0.1, implementation=Implementation.torch)
    found = run(stage=stage, optim=optim)
    assert found["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("stage", "mode", "method"), pairwise.cases(("zero2", "zero3"), ("full", "offload"), ("full", "lora"))
)
def test_activation_checkpointing_changes_nothing(run, mode, stage, method):
    """PEFT + ZeRO-3 + non-reentrant checkpointing crashed (transformers#47254)."""
    found = run(stage=stage, checkpointing=ActivationCheckpointing[mode], method=method)
    expected = run(method=method)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


@pytest.mark.usefixtures("compiled_ops")
@pytest.mark.parametrize(
    ("name", "stage"),
    [
        *((name, stage) for name in ("sgd", "lion") for stage in ("zero0", "zero2", "zero3")),
        ("muon", "zero0"),
        ("muon", "zero2"),
    ],
)
def test_other_optimizers_learn(run, name, stage):
    """Each takes steps that are the same on any stage; Muon clips after orthogonalising, so its clipping is off."""
    optim = OptimConfig(name=OptimName[name], lr=1e-2, max_grad_norm=0.0 if name == "muon" else 1.0)
    found = run(stage=stage, optim=optim)
    assert all(found["applied"])
    assert len(set(found["loss"])) == len(found["loss"]) and np.isfinite(found["loss"]).all()
    reference = run(stage="zero0", optim=optim)
    assert found["loss"] == pytest.approx(reference["loss"], rel=1e-3)


@pytest.mark.usefixtures("compiled_ops")
def test_deepspeed_adam_matches_torch(run, plain):
    """DeepSpeed's own Adam, offloaded, against torch's."""
    optim = OptimConfig(lr=1e-3, weight_decay=0.1, implementation=Implementation.deepspeed)
    found = run(stage="zero2_offload", optim=optim)
    assert found["loss"] == pytest.approx(plain["loss"], rel=1e-4)


def test_dora_and_neftune_train(run):
    """DoRA under ZeRO-3; noise changes the training loss and nothing else about the step."""
    assert all(run(stage="zero3", method="lora", lora={"use_dora": True})["applied"])
    noisy, quiet = run(neftune_alpha=5.0, steps=1), run(steps=1)
    assert noisy["loss"] != quiet["loss"]


def test_a_ragged_epoch_end(run):
    """7 rows over 2 ranks x 3 micro-batches: some are empty, and the answer is that of one rank with room for all."""
    few = {"examples": 7, "packing": "none", "steps": 3}
    split = run(ranks=2, micro_batch_size=2, accumulation=3, **few)
    whole = run(ranks=1, micro_batch_size=12, accumulation=1, **few)
    assert split["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert split["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-6)


def test_packing_alone_changes_nothing(run):
    """Where both put the same examples into a step, packed and unpacked training are the same."""
    everything = {"examples": 30, "steps": 3, "accumulation": 1}
    packed = run(packing="bfd", micro_batch_size=15, **everything)
    unpacked = run(packing="none", micro_batch_size=15, **everything)
    assert packed["loss"] == pytest.approx(unpacked["loss"], rel=1e-6)
    assert packed["grad_norm"] == pytest.approx(unpacked["grad_norm"], rel=1e-6)


def test_a_straggler_shows(pools, model_dir):
    """Ranks wait for each other inside a step, so only a rank's own time tells who is slow."""
    fast, slow = pools(2).run(cases.slow_rank, model_dir=model_dir)
    assert slow > 0.5 > fast
