"""Settings and fixtures of all tests: one thread, no network, no GPU, small runs with the embedded models."""

import atexit
import os
import resource
import shutil
import tempfile
from contextlib import contextmanager

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="kdkit-test-cache-")  # not shared with other processes
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: with more threads a test is slower

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from kdkit import DistillConfig

atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="let the tests see the GPUs: for tests/test_cuda.py")


def pytest_configure(config):
    """Hide GPUs: accelerate would choose them, and most tests compare numbers of a CPU."""
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    """Run the tests of one file on one worker, since they share fixtures. Each notebook is a group of its own, and
    notebooks start first, since they take longest."""
    items.sort(key=lambda item: ("05_evaluate" not in item.nodeid, item.path.stem != "test_notebooks"))
    for item in items:
        group = item.nodeid if item.path.stem == "test_notebooks" else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def fresh_accelerator(monkeypatch):
    """Reset the state of accelerate, which is global to the process, and select fp32 for each test."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture
def small(tmp_path):
    """Return a function that makes configurations of short runs (1 to 2 s): `small(alpha=0.3, max_steps=4)`."""

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
    """Return a context manager that limits the size of files in bytes: larger writes fail, as on a full disk."""

    @contextmanager
    def limit(size: int):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit
