"""Words and a marker that a base model's vocabulary lacks: added, trained alone, saved, exported, loaded elsewhere."""

import json
import re

import helpers
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsft import checkpoint
from dsft.commands.export import export
from dsft.errors import UserError

TOKENS = ["月亮", "春天", "<|tool|>"]


def test_new_tokens_from_file_to_exported_model(base, scratch):
    """The old rows and all other weights come out bit for bit as they went in; the new rows have moved."""
    model_dir, run_dir, file = tiny.save(scratch / "small", vocab_size=370), scratch / "run", scratch / "新词.txt"
    file.write_text("\n".join([*TOKENS, "the", ""]), encoding="utf-8")
    chosen = [f"model.path={model_dir}", f"data.new_tokens={file}", "model.resize_embeddings=true", "tuning=freeze"]
    chosen += ["tuning.new_tokens=true", "train.max_steps=3", "train.sample_tokens=8", f"run_dir={run_dir}"]
    result = helpers.train([*base, *chosen], scratch, ranks=1)
    assert result.code == 0, result.err
    assert "3 added to the tokenizer: '月亮', '春天', '<|tool|>'" in result.err
    assert "1 left out, being tokens already: 'the'" in result.err
    assert "1 of 3 new tokens occur nowhere in the data: '<|tool|>'" in result.err

    old, tokenizer = (AutoTokenizer.from_pretrained(path) for path in (model_dir, run_dir / "model"))
    assert len(old) == 370 and tokenizer.convert_tokens_to_ids(TOKENS) == [370, 371, 372]
    assert tokenizer("在月亮上<|tool|>")["input_ids"][1:-1] != old("在月亮上<|tool|>")["input_ids"][1:-1]
    assert tokenizer("月亮<|tool|>春天")["input_ids"] == [370, 372, 371]
    before, after = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (model_dir, run_dir / "model")
    )
    assert after.config.vocab_size == 373
    rows, start = after.get_input_embeddings().weight, before.get_input_embeddings().weight
    for row, text in enumerate(TOKENS, start=370):
        pieces = old(text, add_special_tokens=False)["input_ids"]
        assert len(pieces) > 1 and not torch.equal(rows[row], start[pieces].mean(0))
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name][: len(tensor)], tensor), name

    file.unlink()  # the checkpoint knows what was added, and of which pieces
    (model_dir / "tokenizer.json").unlink()
    output, report = export(run_dir, output=scratch / "again")
    assert report.relative < 1e-5
    again = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in after.state_dict().items())
    assert AutoTokenizer.from_pretrained(output).get_vocab() == tokenizer.get_vocab()
    state = json.loads((run_dir / "checkpoints" / "step-000003" / "state.json").read_text(encoding="utf-8"))
    # other tokens change the ids of the data too, but are what is named
    others = state["identity"] | {"data.new_tokens": ["月亮", "狐狸"], checkpoint.DATA: "other"}
    message = (
        "3 new tokens, and data.new_tokens gives 2 now: '春天' is missing, '<|tool|>' is missing, '狐狸' was not there"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        checkpoint.compare(run_dir, state, others, 1, 2)
