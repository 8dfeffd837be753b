"""A run that was stopped, in any way and at any time, ends as the one that was not: same numbers, same bytes."""

import json
import shutil
import signal
from pathlib import Path

import helpers
import pytest

# Nothing falls together: rows every 2 steps, evaluations every 7, checkpoints every 5, epochs of some 11. The noise
# makes each rank's random state count.
STEPS = [
    "train.max_steps=24",
    "train.log_every=2",
    "train.eval_every=7",
    "train.save_every=5",
    "train.keep_last=3",
    "tuning.neftune_alpha=5",
    "train.sample_tokens=8",
    "data.test_share=0.1",
]


@pytest.fixture(scope="module")
def straight(base, scratch, tmp_path_factory) -> Path:
    """The run directory of a run that nobody stopped, in interpreters whose hashes are seeded otherwise."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    result = helpers.train([f"run_dir={run_dir}", *base, *STEPS], scratch, fresh=True)
    assert result.code == 0, result.err
    tested = [row["step"] for row in helpers.rows(run_dir) if "test/loss" in row]
    assert tested == [24], "the test set is evaluated once, at the end"
    return run_dir


def state(run_dir: Path) -> dict:
    """The plain state of the newest checkpoint."""
    newest = max((run_dir / "checkpoints").glob("step-??????"))
    return json.loads((newest / "state.json").read_text(encoding="utf-8"))


def tensors(run_dir: Path) -> dict[str, bytes]:
    """The exported weights, and all that the last checkpoint holds of tensors and random states."""
    last = run_dir / "checkpoints/step-000024"
    files = [run_dir / "model/model.safetensors", *sorted(last.rglob("*.pt"))]
    return {path.name: path.read_bytes() for path in files}


def assert_same(run_dir: Path, straight: Path) -> None:
    """Same rows in the same order, same bytes of weights, optimizer and random states, same samples."""
    assert helpers.numbers(run_dir) == helpers.numbers(straight)
    assert len(tensors(straight)) == 6  # weights; model; an optimizer and a random state for each of two ranks
    for name, content in tensors(straight).items():
        assert tensors(run_dir)[name] == content, f"{name} differs"
    assert (run_dir / "samples.json").read_bytes() == (straight / "samples.json").read_bytes()


def test_killed_in_an_epoch_between_two_rows(base, straight, scratch, tmp_path):
    arguments = [f"run_dir={tmp_path / 'run'}", *base, *STEPS]
    with helpers.start(arguments, scratch) as running:
        running.until(helpers.reached(tmp_path / "run", 16))
        running.kill()
    stood = state(tmp_path / "run")
    assert stood["loader"]["step_in_epoch"] > 0
    assert stood["intervals"][0]["steps"] == 1  # the next row covers a step before the stop and one after it
    result = helpers.train(arguments, scratch)
    assert result.code == 0, result.err
    assert "resuming from" in result.err and "at step 15; 1 later row(s)" in result.err
    assert_same(tmp_path / "run", straight)


def kill_while_saving(arguments: list[str], run_dir: Path, scratch: Path) -> None:
    """Go on with a run and kill it while it writes a checkpoint, not its first; again if the moment was missed."""

    def unfinished() -> bool:
        return any(not part.name.startswith("step-000005") for part in run_dir.glob("checkpoints/*.part"))

    for _ in range(4):
        with helpers.start(arguments, scratch) as running:
            if run_dir.exists():
                running.until(lambda: "resuming from" in running.err)  # the last kill's leavings are gone
            running.until(unfinished)
            running.kill()
        if unfinished():
            return
    raise AssertionError("no checkpoint was caught while it was written")


def test_killed_while_a_checkpoint_is_written_and_once_more(base, straight, scratch, tmp_path):
    run_dir = tmp_path / "run"
    arguments = [f"run_dir={run_dir}", *base, *STEPS]
    kill_while_saving(arguments, run_dir, scratch)
    kill_while_saving(arguments, run_dir, scratch)
    result = helpers.train(arguments, scratch)
    assert result.code == 0, result.err
    assert not list(run_dir.glob("checkpoints/*.part"))
    assert_same(run_dir, straight)


def test_a_stop_signal_to_one_rank_saves_and_the_run_goes_on(base, straight, scratch, tmp_path):
    run_dir = tmp_path / "run"
    arguments = [f"run_dir={run_dir}", *base, *STEPS]
    with helpers.start(arguments, scratch) as running:
        running.until(helpers.reached(run_dir, 8))
        running.ranks()[1].send_signal(signal.SIGTERM)
        result = running.wait()
    assert result.code == 85, result.err
    assert "the same command goes on from the checkpoint" in result.err and "Traceback" not in result.err
    stopped = state(run_dir)["step"]
    assert 8 <= stopped < 24
    result = helpers.train(arguments, scratch)
    assert result.code == 0, result.err
    assert f"at step {stopped}" in result.err
    assert_same(run_dir, straight)


def test_damaged_checkpoints_are_passed_over(base, straight, scratch, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    newest, second, third = sorted((run_dir / "checkpoints").iterdir(), reverse=True)[:3]
    weights = newest / "deepspeed/mp_rank_00_model_states.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    short = second / "rank-1.pt"
    short.write_bytes(short.read_bytes()[:-100])
    result = helpers.train([f"run_dir={run_dir}", *base, *STEPS], scratch)
    assert result.code == 0, result.err
    assert f"passing over {newest}: deepspeed/mp_rank_00_model_states.pt has another hash" in result.err
    assert f"passing over {second}: rank-1.pt has" in result.err
    assert f"resuming from {third}" in result.err
    assert_same(run_dir, straight)


def test_an_early_stop_is_final_and_the_best_checkpoint_stays(base, scratch, tmp_path):
    run_dir = tmp_path / "run"
    steps = [
        "train.max_steps=100",
        "train.eval_every=2",
        "train.save_every=2",
        "train.keep_last=1",
        "train.early_stopping_patience=2",
        "train.sample_tokens=8",
        "optim.lr=0.05",
    ]
    result = helpers.train([f"run_dir={run_dir}", *base, *steps], scratch, ranks=1)
    assert result.code == 0, result.err
    losses = {row["step"]: row["eval/loss"] for row in helpers.rows(run_dir) if row["step"] and "eval/loss" in row}
    best, last = min(losses, key=losses.get), max(losses)
    assert last == best + 4 < 100
    assert "early stop" in result.err
    names = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert names == {f"step-{best:06d}", f"step-{last:06d}"}
    again = helpers.train([f"run_dir={run_dir}", *base, *steps], scratch, ranks=1)
    assert again.code == 0 and "this run is finished (early stop)" in again.err
    assert max(row["step"] for row in helpers.rows(run_dir)) == last


@pytest.fixture(scope="module")
def longer(base, scratch, tmp_path_factory):
    """A run made at once, and one that was finished and then made longer, under W&B; with the second one's result."""
    home = tmp_path_factory.mktemp("longer")
    constant = [*base, "schedule=constant", "train.eval_every=6", "train.save_every=5", "train.log_every=2"]
    constant += ["train.sample_tokens=8"]
    for name, steps, tracking in (("at_once", 12, "jsonl"), ("longer", 6, "wandb"), ("longer", 12, "wandb")):
        arguments = [f"run_dir={home / name}", *constant, f"train.max_steps={steps}", f"tracking={tracking}"]
        result = helpers.train(arguments, scratch, ranks=1)
        assert result.code == 0, result.err
        assert "warning: W&B" not in result.err
    return home / "at_once", home / "longer", result


def test_a_finished_run_goes_on_when_it_is_made_longer(longer):
    at_once, run_dir, result = longer
    assert "train.max_steps: 6 -> 12" in result.err and "resuming from" in result.err
    assert helpers.numbers(run_dir) == helpers.numbers(at_once)
    weights = [(run / "model/model.safetensors").read_bytes() for run in (at_once, run_dir)]
    assert weights[0] == weights[1]


def test_wandb_keeps_its_id(longer):
    _, run_dir, _ = longer
    offline = [path.name for path in (run_dir / "wandb").iterdir() if path.name.startswith("offline-run-")]
    assert len(offline) == 2
    assert len({name.rpartition("-")[2] for name in offline}) == 1
