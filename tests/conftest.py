"""Fixtures that every layer of tests shares."""

import gc
import os
import sys
from pathlib import Path

import ops
import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent / "distributed"))
COMPILATION = pytest.StashKey[ops.Compilation]()


def pytest_collection_modifyitems(items):
    """GPU cases skip themselves where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish(session):
    """Begin to compile what tests will want compiled.

    And keep the garbage collector off the million objects that imports have made and no test will ever free.
    """
    wanted = any("compiled_ops" in item.fixturenames for item in session.items)
    if wanted and not session.config.option.collectonly:
        session.config.stash[COMPILATION] = ops.Compilation()
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


def pytest_sessionfinish(session):
    """Leave no process behind."""
    if COMPILATION in session.config.stash:
        session.config.stash[COMPILATION].stop()


@pytest.fixture(scope="session")
def compiled_ops(pytestconfig):
    """DeepSpeed's own Adam and Lion are compiled."""
    pytestconfig.stash[COMPILATION].wait()


@pytest.fixture(scope="session")
def pools():
    """Worlds by number of ranks, started when first asked for, and again after a case that broke one."""
    from pool import Pool

    started: dict[int, Pool] = {}

    def get(size: int) -> Pool:
        if size not in started or not started[size].alive:
            started[size] = Pool(size)
        return started[size]

    yield get
    for pool in started.values():
        pool.close()
