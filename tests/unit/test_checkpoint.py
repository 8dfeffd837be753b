"""A checkpoint on disk: whole or not one, found again, thinned out."""

import json
import shutil
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest

from dsft import checkpoint
from dsft.errors import UserError
from dsft.model.head import SINGLE, Head
from dsft.runtime.world import World


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(checkpoint.os, "fsync", lambda handle: None)


class FakeEngine:
    """Writes one file where DeepSpeed would write many; may be killed, or find the disk full, while it does."""

    stage = 2

    def __init__(self, error: Exception | type[BaseException] | None = None):
        self.error = error

    def save(self, directory: str, tag: str, frozen: bool) -> None:
        target = Path(directory) / tag
        target.mkdir(exist_ok=True)
        (target / "weights.pt").write_bytes(b"half of it")
        if self.error:
            raise self.error
        (target / "weights.pt").write_bytes(b"the whole of it")


class FakeWorld:
    rank, size, is_main = 0, 1, True

    def gather_objects(self, value):
        return [value]

    def all_succeed(self, failure):
        if failure:
            raise UserError(f"rank 0: {failure}")


def publish(run_dir: Path, step: int, error=None, **state) -> Path:
    return checkpoint.save(run_dir, step, FakeEngine(error), FakeWorld(), state, frozen=True)


def names(run_dir: Path) -> list[str]:
    return [path.name for path in checkpoint.checkpoints(run_dir)]


def steps(run_dir: Path) -> list[int]:
    return [int(name.removeprefix("step-")) for name in names(run_dir)]


def remove(file: Path):
    file.unlink()


def cut(file: Path):
    file.write_bytes(file.read_bytes()[:-5])


def empty(file: Path):
    file.write_bytes(b"")


def flip_a_bit(file: Path):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_manifest_names_every_file_with_its_size_and_hash(tmp_path):
    files = json.loads((publish(tmp_path, 20) / "manifest.json").read_text(encoding="utf-8"))["files"]
    assert set(files) == {"deepspeed/weights.pt", "rank-0.pt", "state.json"}
    assert files["deepspeed/weights.pt"] == {"bytes": 15, "sha256": sha256(b"the whole of it").hexdigest()}


def test_ranks_share_the_hashing_and_the_manifest_has_it_all(tmp_path):
    path = publish(tmp_path, 20)
    shutil.copytree(path, tmp_path / "copy")
    (tmp_path / "copy" / "manifest.json").unlink()
    shares = []
    for rank in range(3):
        shares.append(checkpoint._describe_share(tmp_path / "copy", SimpleNamespace(rank=rank, size=3)))
    assert [len(share) for share in shares] == [1, 1, 1]
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    assert {name: about for share in shares for name, about in share.items()} == manifest["files"]


def test_a_whole_checkpoint_has_no_damage(tmp_path):
    assert checkpoint.damage(publish(tmp_path, 20)) is None


@pytest.mark.parametrize("name", ["deepspeed/weights.pt", "rank-0.pt", "state.json"])
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (remove, "is missing"),
        (cut, "bytes instead of"),
        (empty, "has 0 bytes instead of"),
        (flip_a_bit, "has another hash than when it was written"),
    ],
)
def test_any_damage_to_any_file_is_seen_and_named(tmp_path, name, harm, message):
    path = publish(tmp_path, 20)
    harm(path / name)
    found = checkpoint.damage(path)
    assert found.startswith(name) and message in found


@pytest.mark.parametrize("harm", [remove, cut, empty])
def test_without_its_manifest_a_directory_is_no_checkpoint(tmp_path, harm):
    path = publish(tmp_path, 20)
    harm(path / "manifest.json")
    assert checkpoint.damage(path).startswith("no readable manifest.json")
    assert checkpoint.damage(tmp_path / "nothing").startswith("no readable manifest.json")


def test_resume_takes_the_newest_whole_one_and_tells_what_it_passes_over(tmp_path):
    for step in (20, 40, 60):
        publish(tmp_path, step)
    flip_a_bit(tmp_path / "checkpoints/step-000060/rank-0.pt")
    remove(tmp_path / "checkpoints/step-000040/manifest.json")
    notes = []
    assert checkpoint.newest_whole(tmp_path, notes.append) == tmp_path / "checkpoints/step-000020"
    assert len(notes) == 2
    assert "step-000060: rank-0.pt has another hash" in notes[0]
    assert "step-000040: no readable manifest.json" in notes[1]


def test_resume_finds_nothing_where_nothing_is_whole(tmp_path):
    notes = []
    assert checkpoint.newest_whole(tmp_path, notes.append) is None
    assert not notes
    cut(publish(tmp_path, 20) / "rank-0.pt")
    assert checkpoint.newest_whole(tmp_path, notes.append) is None
    assert len(notes) == 1


def test_what_a_kill_left_behind_is_never_taken_for_a_checkpoint_and_goes_away(tmp_path):
    whole = publish(tmp_path, 20)
    shutil.copytree(whole, whole.with_name("step-000040.part"))
    (tmp_path / "checkpoints" / "step-notes").mkdir()
    assert names(tmp_path) == ["step-000020"]
    assert checkpoint.newest_whole(tmp_path, print) == whole
    checkpoint.clean(tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000020", "step-notes"]


def test_a_fresh_run_directory_has_nothing_to_clean_or_thin_out(tmp_path):
    checkpoint.clean(tmp_path)
    checkpoint.retain(tmp_path, 10, 2, None)
    assert names(tmp_path) == []


def test_checkpoints_are_ordered_by_step_and_not_by_name(tmp_path):
    for step in (1_000_000, 999_999, 20):
        publish(tmp_path, step)
    assert steps(tmp_path) == [20, 999_999, 1_000_000]


@pytest.mark.parametrize(
    ("keep_last", "best", "left"),
    [
        (2, None, [40, 50]),
        (2, 10, [10, 40, 50]),  # the best is kept however old it is
        (2, 50, [40, 50]),
        (1, 30, [30, 50]),
        (9, None, [10, 20, 30, 40, 50]),
        (0, None, [10, 20, 30, 40, 50]),  # all
        (1, 35, [50]),  # the best was never saved
    ],
)
def test_the_last_and_the_best_are_kept(tmp_path, keep_last, best, left):
    for step in (10, 20, 30, 40, 50):
        publish(tmp_path, step)
    checkpoint.retain(tmp_path, 50, keep_last, best)
    assert steps(tmp_path) == left


def test_checkpoints_of_a_course_that_was_given_up_do_not_crowd_out_the_new_one(tmp_path):
    for step in (10, 20, 25, 30, 40):
        publish(tmp_path, step)
    checkpoint.retain(tmp_path, 25, 2, 10)
    assert steps(tmp_path) == [10, 20, 25]


def test_a_checkpoint_is_found_by_last_best_or_step(tmp_path):
    for step in (20, 40, 1_000_020):
        publish(tmp_path, step, best_step=40)
    found = {which: checkpoint.find(tmp_path, which).name for which in ("last", "best", "20", "1000020")}
    assert found == {
        "last": "step-1000020",
        "best": "step-000040",
        "20": "step-000020",
        "1000020": "step-1000020",
    }


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    with pytest.raises(UserError, match="checkpoints holds no checkpoint"):
        checkpoint.find(tmp_path, "last")
    for step in (20, 40):
        publish(tmp_path, step, best_step=None)
    for which in ("30", "best", "newest"):
        with pytest.raises(UserError, match=f"no checkpoint '{which}'; it has: step-000020, step-000040"):
            checkpoint.find(tmp_path, which)


@pytest.mark.parametrize(
    ("what", "world_size", "stage"), [("ranks 2, and this run has 4", 4, 1), ("stage 1.*has 3", 2, 3)]
)
def test_another_world_or_stage_is_refused_before_anything_is_loaded(tmp_path, what, world_size, stage):
    path = publish(tmp_path, 20, world_size=2, zero_stage=1)
    engine = SimpleNamespace(stage=stage, load=None)
    with pytest.raises(UserError, match=what):
        checkpoint.load(path, engine, SimpleNamespace(rank=0, size=world_size))


def test_a_checkpoint_of_another_run_is_refused_before_anything_is_loaded(tmp_path):
    """fp32 weights under a bf16 optimizer, or Adam's moments under SGD, must not go on as if nothing had happened."""
    path = publish(tmp_path, 20, identity={"precision": "fp32", "optim.name": "adamw"})
    engine = SimpleNamespace(stage=2, load=None)
    with pytest.raises(UserError, match=r"saved with optim\.name=adamw, and this run has sgd"):
        checkpoint.load(path, engine, FakeWorld(), {"precision": "fp32", "optim.name": "sgd"})


@pytest.mark.parametrize(
    ("setting", "before", "now", "shown"),
    [
        ("train.seed", 0, 1, "train.seed=0, and this run has 1"),
        ("tuning.method", "full", "lora", "tuning.method=full, and this run has lora"),
        ("tuning.use_dora", True, False, "tuning.use_dora=true, and this run has false"),
        ("tuning.last_layers", 2, None, "tuning.last_layers=2, and this run has null"),
        ("tuning.target_modules", ["q", "v"], ["all-linear"], "target_modules=[q,v], and this run has [all-linear]"),
    ],
)
def test_a_difference_is_written_as_on_the_command_line(setting, before, now, shown):
    state = {"world_size": 1, "zero_stage": 2, "identity": {setting: before}}
    with pytest.raises(UserError) as caught:
        checkpoint.compare(Path("step-000020"), state, {setting: now}, 1, 2)
    assert f"saved with {setting}=" in str(caught.value) and shown in str(caught.value)
    assert f"Give {shown.partition(', and')[0].rpartition(' ')[2]}".partition("=")[2] in str(caught.value)


def data(key="a", template="t", **settings) -> dict:
    given = {"data.train": "x.jsonl", "data.max_length": 512, "data.max_records": None, "model.chat_template": None}
    given |= {f"data.{name}": value for name, value in settings.items()}
    return {"key": key, "settings": given, "template": template}


@pytest.mark.parametrize(
    ("now", "parts"),
    [
        (
            data("b", max_length=256),
            ["with data.max_length=512, and this run has data.max_length=256", "Give data.max_l"],
        ),
        (
            data("b", max_records=5, train="y.jsonl"),
            ["with data.train=x.jsonl data.max_records=null, and", "data.train=y.jsonl data.max_records=5"],
        ),
        (data("b", "u"), ["the chat template (model.chat_template, or that of model.path) changed"]),
        (data("b"), ["the content of data.train changed"]),
    ],
)
def test_what_changed_the_data_is_named(now, parts):
    state = {"world_size": 1, "zero_stage": 2, "identity": {checkpoint.DATA: data()}, "loader": {"step_in_epoch": 3}}
    with pytest.raises(UserError) as caught:
        checkpoint.compare(Path("step-000020"), state, {checkpoint.DATA: now}, 1, 2)
    for part in [*parts, "in the middle of an epoch", "choose another run_dir"]:
        assert part in str(caught.value)
    state["loader"]["step_in_epoch"] = 0
    checkpoint.compare(Path("step-000020"), state, {checkpoint.DATA: now}, 1, 2)


def test_a_head_for_other_labels_is_another_run_and_the_labels_are_named():
    identity = {checkpoint.HEAD: Head(("a", "b"), SINGLE, seed=3).identity()}
    state = {"world_size": 1, "zero_stage": 2, "identity": identity, "loader": {"step_in_epoch": 0}}
    checkpoint.compare(Path("step-000020"), state, json.loads(json.dumps(identity)), 1, 2)
    now = {checkpoint.HEAD: Head(("b", "狐狸"), SINGLE, seed=3).identity()}
    with pytest.raises(UserError, match=r"a head of labels \[a,b\], and this run's is of labels \[b,狐狸\]"):
        checkpoint.compare(Path("step-000020"), state, now, 1, 2)


def test_the_same_data_under_another_name_are_the_same():
    state = {"world_size": 1, "zero_stage": 2, "identity": {checkpoint.DATA: data()}, "loader": {"step_in_epoch": 3}}
    checkpoint.compare(Path("step-000020"), state, {checkpoint.DATA: data(train="moved.jsonl")}, 1, 2)


def test_ranks_that_disagree_are_named_with_their_hosts_and_no_digests():
    class Apart(World):
        def gather_objects(self, value):
            return [(value[0], "node-a"), (theirs, "node-b")]

    world = Apart(None, None)
    theirs = "fp32"
    with pytest.raises(
        UserError, match=r"^precision differs .* 0 on node-a and rank 1 on node-b \(bf16 and fp32\)\. Give"
    ):
        world.agree("precision", "bf16")
    theirs = "f" * 64
    with pytest.raises(UserError, match=r"^the model \(model\.path\) differs .* rank 1 on node-b\. Give every rank"):
        world.agree("the model (model.path)", "0" * 64)
    world.agree("the model (model.path)", theirs)


def test_a_checkpoint_is_published_whole_under_its_step(tmp_path):
    path = publish(tmp_path, 20, best_step=7)
    assert path == tmp_path / "checkpoints" / "step-000020"
    assert checkpoint.damage(path) is None
    assert {p.name for p in path.iterdir()} == {"deepspeed", "rank-0.pt", "state.json", "manifest.json"}
    assert checkpoint.read_state(path) == {
        "step": 20,
        "world_size": 1,
        "zero_stage": 2,
        "frozen": True,
        "best_step": 7,
    }


def test_a_step_that_is_saved_again_replaces_what_was_there(tmp_path):
    first = publish(tmp_path, 20)
    (first / "stale").touch()
    assert publish(tmp_path, 20) == first
    assert checkpoint.damage(first) is None and not (first / "stale").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError("PytorchStreamWriter failed")])
def test_a_full_disk_is_said_in_words_and_leaves_the_earlier_checkpoints_whole(tmp_path, error):
    publish(tmp_path, 20)
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*step-000040: .*(No space left|Writer failed)"):
        publish(tmp_path, 40, error)
    assert names(tmp_path) == ["step-000020"]
    assert checkpoint.newest_whole(tmp_path, print).name == "step-000020"


def test_what_fails_between_two_barriers_is_not_shared_by_a_collective(tmp_path):
    """The other ranks wait in DeepSpeed's barrier, and would not be where this one is."""
    with pytest.raises(RuntimeError, match="a bug"):
        publish(tmp_path, 40, RuntimeError("a bug"))


def test_a_kill_in_the_middle_of_writing_leaves_nothing_under_the_final_name(tmp_path):
    publish(tmp_path, 20)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, 40, KeyboardInterrupt)
    assert names(tmp_path) == ["step-000020"]
    publish(tmp_path, 40)  # over what is left of the first attempt
    assert checkpoint.damage(tmp_path / "checkpoints" / "step-000040") is None


@pytest.mark.parametrize("moment", ["manifest.json", "state.json"])
def test_a_kill_just_before_publication_leaves_nothing_under_the_final_name(tmp_path, monkeypatch, moment):
    write_json = checkpoint.write_json

    def killed(path: Path, value):
        if path.name == moment:
            raise KeyboardInterrupt
        write_json(path, value)

    monkeypatch.setattr(checkpoint, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, 40)
    assert names(tmp_path) == []


def test_a_base_model_is_the_same_wherever_it_lies(tmp_path):
    """Named by the files that differ where it is another."""

    def refusal(then, now) -> str | None:
        state = {"world_size": 1, "zero_stage": 2, "loader": {"step_in_epoch": 3}, "identity": {"model.path": then}}
        try:
            checkpoint.compare(tmp_path, state, {"model.path": now}, 1, 2)
        except UserError as error:
            return str(error)
        return None

    then = {"name": "a", "origin": "/a", "fingerprint": "1", "files": {"model.safetensors": "1", "config.json": "1"}}
    assert refusal(then, then | {"name": "b", "origin": "/b"}) is None
    assert refusal(then, then | {"fingerprint": "2"}) is None  # of its README, say
    changed = then | {"name": "b", "fingerprint": "2", "files": then["files"] | {"model.safetensors": "2"}}
    assert "base model a, and this run has another: b, where model.safetensors differ" in refusal(then, changed)
    hub = {"name": "org/a", "origin": "org/a", "fingerprint": "1", "files": {}}
    assert "base model org/a" in refusal(hub, hub | {"fingerprint": "2"})


def test_a_checkpoint_of_an_earlier_version_is_named_as_such():
    state = {"world_size": 1, "zero_stage": 2, "identity": {"model.path": "0f" * 32, "precision": "fp32"}}
    now = {"train.seed": 0, "model.path": {"fingerprint": "1", "files": {}}, "precision": "fp32"}
    with pytest.raises(UserError, match=r"does not say what its run had for train\.seed: an earlier dsft wrote it"):
        checkpoint.compare(Path("step-000020"), state, now, 1, 2)


def test_a_path_that_is_not_gone_on_from_is_said_to_be_passed_over(tmp_path, capsys):
    """The run that began from it was stopped and is begun again, or somebody wants to go back."""
    older, newer = publish(tmp_path / "run", 10), publish(tmp_path / "run", 20)
    for chosen in ("auto", str(newer)):
        assert checkpoint.choose(tmp_path / "run", chosen) == newer
    assert capsys.readouterr().err == ""
    assert checkpoint.choose(tmp_path / "run", str(older)) == newer
    assert f"train.resume={older} is passed over" in capsys.readouterr().err
    assert checkpoint.choose(tmp_path / "new", str(older)) == older
