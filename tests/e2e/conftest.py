"""The tiny model and its data on disk, and a place for each test's processes."""

from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> list[str]:
    """Arguments of a short, exact run: a tiny model in fp32, chats in English and Chinese, packing, accumulation."""
    home = tmp_path_factory.mktemp("base")
    model = tiny.save(home / "model", hidden_size=128, intermediate_size=256)
    train = tiny.write_jsonl(home / "训练.jsonl", tiny.records(120))
    validation = tiny.write_jsonl(home / "验证.jsonl", tiny.records(11, seed=1))
    return [
        f"model.path={model}",
        "data=jsonl",
        f"data.train={train}",
        f"data.validation={validation}",
        f"data.cache_dir={home / 'cache'}",
        "data.max_length=64",
        "precision=fp32",
        "batch.micro_batch_size=2",
        "batch.gradient_accumulation_steps=2",
        "optim.lr=2e-3",
    ]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    """Temporary files and output of a module's processes."""
    return tmp_path_factory.mktemp("scratch")
