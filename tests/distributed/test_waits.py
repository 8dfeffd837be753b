"""Between two rows of metrics nothing of ours waits for the device."""

from __future__ import annotations

import cases
import pytest
import tiny

UTILS = "deepspeed/runtime/utils.py"
FINITE, MASKS = f"{UTILS}:is_invalid_grad_norm", f"{UTILS}:mask_nan_or_inf_with_val_inplace"
PARTS = "deepspeed/runtime/zero/stage_1_and_2.py:has_overflow"
HALF_0 = {f"{UTILS}:{name}" for name in ("has_overflow", "has_overflow_serial", "get_weight_norm")}
STAGE_3 = {
    FINITE,
    "deepspeed/runtime/zero/stage3.py:get_grad_norm_direct",
    # in its second step ZeRO-3 makes sure that all ranks go through layers in one order
    *(
        f"deepspeed/runtime/zero/utils.py:{name}"
        for name in ("assert_lst_len_same_as_other_ranks", "get_lst_from_rank0")
    ),
    "deepspeed/runtime/zero/utils.py:<listcomp>",
}
OWN = {
    ("zero0", "fp32"): {
        "dsft/engine.py:_update_plain"
    },  # in the place of an overflow check, which DeepSpeed lacks there
    ("zero0", "bf16"): HALF_0,
    ("zero0", "fp16"): HALF_0,
    ("zero1", "fp32"): {FINITE, MASKS},
    ("zero1", "bf16"): {FINITE, MASKS, f"{UTILS}:clip_tensors_by_global_norm"},
    ("zero2", "fp32"): {FINITE, MASKS},
    ("zero2", "bf16"): {FINITE, MASKS, PARTS},
    ("zero2", "fp16"): {FINITE, MASKS, PARTS},
    ("zero3", "fp32"): STAGE_3,
    ("zero3", "bf16"): STAGE_3,
}
"""Where a host has to know whether a step counts before it can begin the next: DeepSpeed's overflow check, by name."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize(
    ("stage", "precision", "method"),
    [(*layout, "full") for layout in OWN]
    + [("zero0", "fp32", "lora"), ("zero2", "bf16", "lora"), ("zero3", "bf16", "lora")],
)
def test_nothing_of_ours_waits_for_the_device(pools, model_dir, stage, precision, method):
    exempt = OWN[stage, precision]
    ranks = pools(2).run(
        cases.waits, model_dir=model_dir, stage=stage, precision=precision, method=method, exempt=exempt
    )
    for found, met in ranks:
        assert not found
        assert met == exempt, "take out of the table what DeepSpeed no longer does"


def test_one_number_that_is_read_is_found_by_its_place(pools, model_dir):
    exempt = OWN["zero2", "fp32"]
    for found, _ in pools(2).run(cases.waits, model_dir=model_dir, stage="zero2", exempt=exempt, planted=True):
        assert len(found) == 8  # four steps of two micro-batches
        assert all("_local_scalar_dense at tests/distributed/cases.py:" in place for place in found)


# made when a document is longer than any before, up to the next power of two: a few times in a run
GROWN = "dsft/model/noise.py:feature_keys"
# transformers' own attention asks in each forward pass whether anything is padded
PADDED, PADDED_CAUSAL = (
    f"transformers/masking_utils.py:_ignore_{kind}_mask_sdpa" for kind in ("bidirectional", "causal")
)
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
LORA = {"neftune_alpha": 5.0, "method": "lora", "lora": {"dropout": 0.1}}


@pytest.mark.parametrize(
    ("task", "family", "packing", "changes", "options", "exempt"),
    [
        ("masked_lm", "bert", "bfd", DROPOUT, {}, {GROWN}),
        ("masked_lm", "bert", "padded", DROPOUT, {}, {GROWN, PADDED}),
        ("masked_lm", "modernbert", "bfd", {"local_attention": 16, "global_attn_every_n_layers": 2}, {}, set()),
        ("causal_lm", "llama", "padded", {}, {"neftune_alpha": 5.0}, {PADDED_CAUSAL}),
        ("causal_lm", "llama", "bfd", {}, LORA, set()),
    ],
)
def test_nor_in_other_tasks_and_layouts_and_with_noise(
    pools, tmp_path, task, family, packing, changes, options, exempt
):
    make = tiny.masked if task == "masked_lm" else tiny.causal
    make(family, "eager", **({"vocab_size": 400} | changes)).save_pretrained(tmp_path)
    exempt = OWN["zero2", "fp32"] | exempt
    for found, _ in pools(2).run(
        cases.waits, model_dir=str(tmp_path), exempt=exempt, task=task, packing=packing, **options
    ):
        assert not found
