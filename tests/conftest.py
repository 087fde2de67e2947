"""What the tests share: one thread, no network, small runs of the embedded pair."""

import atexit
import os
import resource
import shutil
import tempfile
from contextlib import contextmanager

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="kdkit-test-cache-")  # of this process alone
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: more threads only wait for each other

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from kdkit import DistillConfig

atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """On several workers the tests of a file stay together, since they share what they made. Notebooks share nothing;
    they take longest, and start first."""
    items.sort(key=lambda item: ("05_evaluate" not in item.nodeid, item.path.stem != "test_notebooks"))
    for item in items:
        group = item.nodeid if item.path.stem == "test_notebooks" else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def fresh_accelerator(monkeypatch):
    """accelerate keeps its settings for the life of the process; each test has its own, in fp32 unless it says so."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture
def small(tmp_path):
    """Makes configurations of runs that take a second or two: `small(alpha=0.3, max_steps=4)`."""

    def make(**fields) -> DistillConfig:
        defaults = {
            "max_train_tokens": 3000, "max_eval_tokens": 600, "max_length": 64, "batch_size": 4, "max_steps": 6,
            "logging_steps": 1, "eval_steps": None, "save_steps": None, "use_wandb": False,
            "output_dir": str(tmp_path / "run"),
        }  # fmt: skip
        return DistillConfig(**{**defaults, **fields})

    return make


@pytest.fixture
def no_file_above():
    """`with no_file_above(bytes)`: writing more than that to a file fails, as on a disk that is full."""

    @contextmanager
    def limit(size: int):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit
