"""The DeepSpeed dict: what Config owns is always written, and a JSON may hold nothing but its own."""

import ast
import importlib.util
import json
from pathlib import Path

import pytest

from dsft import ds_config
from dsft.config.schema import Fp16Config
from dsft.ds_config import ELSEWHERE, GONE, KNOWN, OWNERS, RENAMED
from dsft.errors import UserError

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))


def build(source, **changes):
    settings = {
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "world_size": 2,
        "precision": "bf16",
        "fp16": Fp16Config(),
        "max_grad_norm": 0.0,
    }
    return ds_config.build(source, **{**settings, **changes})


def refusal(source) -> str:
    with pytest.raises(UserError) as caught:
        build(source)
    return str(caught.value)


def has_auto(value) -> bool:
    return any(map(has_auto, value.values())) if isinstance(value, dict) else value == "auto"


def deepspeed_source(path: str) -> ast.Module:
    """Read, not imported: that would take seconds and a torch build."""
    package = importlib.util.find_spec("deepspeed").submodule_search_locations[0]
    return ast.parse((Path(package) / path).read_text(encoding="utf-8"))


def test_what_config_owns_is_written_in_full():
    assert build({"zero_optimization": {"stage": 2}}) == {
        "zero_optimization": {"stage": 2},
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
        "fp16": {"enabled": False, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000},
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "torch_autocast": {"enabled": False},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def test_every_owned_key_is_written():
    assert set(OWNERS) <= set(build({}))


@pytest.mark.parametrize(
    ("precision", "fp16", "bf16"), [("fp32", False, False), ("bf16", False, True), ("fp16", True, False)]
)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_precision_and_accumulation_type(stage, precision, fp16, bf16):
    ds = build({"zero_optimization": {"stage": stage}}, precision=precision, fp16=Fp16Config(8, 50))
    assert (ds["fp16"]["enabled"], ds["bf16"]["enabled"]) == (fp16, bf16)
    assert (ds["fp16"]["initial_scale_power"], ds["fp16"]["loss_scale_window"]) == (8, 50)
    assert ds["data_types"]["grad_accum_dtype"] == (precision if stage == 0 else "fp32")


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_files_are_whole_and_found_from_anywhere(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ds = build(f"ds_configs/{file.name}")
    content = json.loads(file.read_text(encoding="utf-8"))
    assert ds["zero_optimization"] == content["zero_optimization"]
    assert not has_auto(content)
    assert f"zero{ds_config.stage(ds)}" == file.stem.removesuffix("_offload")
    assert ds_config.offloads_optimizer(ds) == file.stem.endswith("_offload")
    assert ds_config.offloads_parameters(ds) == (file.stem == "zero3_offload")


def test_a_file_in_the_working_directory_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ds_configs").mkdir()
    Path("ds_configs/zero2.json").write_text('{"zero_optimization": {"stage": 1}}', encoding="utf-8")
    assert ds_config.stage(build("ds_configs/zero2.json")) == 1


def test_the_source_is_left_alone():
    source = {"train_batch_size": "auto", "zero_optimization": {"stage": 1}}
    build(source)
    assert source == {"train_batch_size": "auto", "zero_optimization": {"stage": 1}}


def test_auto_is_resolved_where_config_owns_the_key():
    source = dict.fromkeys(OWNERS, "auto") | {"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}
    ds = build(source)
    assert not has_auto(ds)
    assert ds == build({})


@pytest.mark.parametrize("key", OWNERS)
def test_a_key_that_config_owns_is_refused(key):
    message = refusal({key: {"enabled": True} if key in ("fp16", "bf16") else 8})
    assert key in message and OWNERS[key] in message and '"auto"' in message


@pytest.mark.parametrize("key", ELSEWHERE)
@pytest.mark.parametrize("value", ["auto", {"type": "Adam"}])
def test_a_key_that_is_decided_elsewhere_is_refused_whatever_it_says(key, value):
    message = refusal({key: value})
    assert key in message and ELSEWHERE[key] in message


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ({"elasticity": {}}, ["elasticity", "gone", "remove"]),
        ({"zero_optimization": {"mics_shard_size": 2}}, ["zero_optimization.mics_shard_size", "gone"]),
        ({"zero_optimization": {"cpu_offload": True}}, ["cpu_offload", "deprecated", "offload_optimizer"]),
        ({"zero_optimisation": {"stage": 2}}, ["zero_optimisation", "Did you mean zero_optimization?"]),
        ({"gradient_cliping": 1}, ["Did you mean gradient_clipping?"]),
        ({"zero_optimization": {"stag": 2}}, ["zero_optimization.stag", "Did you mean stage?"]),
        ({"zero_optimization": {"offload_param": {"devise": "cpu"}}}, ["offload_param.devise", "device"]),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, ["reduce_bucket_size", '"auto"', "default"]),
        ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage", "4", "0, 1, 2 and 3"]),
        ({"zero_optimization": {"stage": "2"}}, ["zero_optimization.stage", '"2"']),
        ({"zero_optimization": True}, ["zero_optimization", '{"stage": 2}']),
        ({"zero_optimization": {"offload_param": "cpu"}}, ["offload_param", '{"device": "cpu"}']),
        ({"zero_optimization": {"offload_param": {"device": "disk"}}}, ["device", '"disk"', '"nvme"']),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, ["offload_optimizer", "nvme_path"]),
    ],
)
def test_mistakes_name_the_key_and_the_way_out(source, parts):
    message = refusal(source)
    assert all(part in message for part in parts), message


def test_all_mistakes_of_a_file_are_told_with_its_name(tmp_path):
    file = tmp_path / "配置.json"
    file.write_text('{"optimizer": {}, "amp": {}, "bf16": {"enabled": true}}', encoding="utf-8")
    lines = refusal(str(file)).splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"{file}: ") for line in lines)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{\n  "zero_optimization": {\n    "stage" 2\n  }\n}', [":3", "not valid JSON"]),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', ["stage", "twice"]),
        ("[]", ["JSON object"]),
    ],
)
def test_a_file_that_is_no_json_object_is_refused(tmp_path, text, parts):
    file = tmp_path / "ds.json"
    file.write_text(text, encoding="utf-8")
    message = refusal(file)
    assert str(file) in message
    assert all(part in message for part in parts), message


def test_a_missing_file_is_refused_with_those_at_hand():
    message = refusal("ds_configs/zero5.json")
    assert "ds_configs/zero5.json" in message and "zero2_offload|zero3|" in message


def test_known_zero_keys_are_those_of_the_installed_deepspeed():
    classes = {
        node.name: node
        for node in ast.walk(deepspeed_source("runtime/zero/config.py"))
        if isinstance(node, ast.ClassDef)
    }
    theirs = set()
    for line in classes["DeepSpeedZeroConfig"].body:
        if isinstance(line, ast.AnnAssign):
            theirs.add(line.target.id)
            aliases = [word.value.value for word in getattr(line.value, "keywords", []) if word.arg == "alias"]
            theirs.update(aliases)
    refused_on_purpose = {"zenflow", "legacy_stage1", "compute_grad_norm"}
    assert theirs - refused_on_purpose - set(RENAMED) == set(KNOWN["zero_optimization"])


@pytest.mark.parametrize(
    ("block", "name"),
    [
        ("offload_param", "DeepSpeedZeroOffloadParamConfig"),
        ("offload_optimizer", "DeepSpeedZeroOffloadOptimizerConfig"),
    ],
)
def test_known_offload_keys_are_those_of_the_installed_deepspeed(block, name):
    tree = deepspeed_source("runtime/zero/offload_config.py")
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    assert {line.target.id for line in body if isinstance(line, ast.AnnAssign)} == set(
        KNOWN[f"zero_optimization.{block}"]
    )


@pytest.mark.parametrize(
    ("block", "name"), [("", "_REMOVED_TOP_LEVEL_CONFIG_KEYS"), ("zero_optimization", "_REMOVED_ZERO_CONFIG_KEYS")]
)
def test_gone_keys_are_those_of_the_installed_deepspeed(block, name):
    for node in deepspeed_source("runtime/config.py").body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            assert {key.value for key in node.value.keys} == set(GONE[block])
            return
    pytest.fail(f"{name} is not where it was")
