"""Runs on a GPU: `make test-gpu`, some minutes. Everywhere else these tests are skipped.

tests/test_cardboard.py rehearses the same without a GPU, except for what only a GPU has: its kernels.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from helpers import environment, run_processes
from test_cardboard import RUNS, interrupted, make_config
from test_devices import arguments, assert_same_run

from kdkit.fused import fused_kd_loss, should_compile
from kdkit.losses import DIVERGENCES, dense_kd_loss
from kdkit.running.checkpoint import checkpoints
from kdkit.running.tracking import read_metrics
from kdkit.targets import store
from kdkit.train import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or not started by make test-gpu")


# --- the loss

CAN_COMPILE, WHY = should_compile(True, 0, torch.device("cuda"))
N, V, H = 3000, 5003, 256  # several chunks; a vocabulary that is no multiple of 8


@pytest.fixture
def inputs():
    """Hidden states and head of student and teacher, whose numbers bf16 can represent, and labels."""
    torch.manual_seed(0)
    tensors = [torch.randn(rows, H, device="cuda").bfloat16() for rows in (N, V, N, V)]
    tensors[1], tensors[3] = tensors[1] * 0.125, tensors[3] * 0.125
    labels = torch.randint(V, (N,), device="cuda")
    labels[::3] = -100
    return [*tensors, labels]


def loss_and_gradients(function, inputs, **options) -> list[torch.Tensor]:
    hidden, head, *rest = inputs
    hidden, head = hidden.detach().requires_grad_(), head.detach().requires_grad_()
    loss = function(hidden, head, *rest, alpha=0.3, temperature=2.0, **options).loss
    return [x.double() for x in (loss.detach(), *torch.autograd.grad(loss, (hidden, head)))]


def assert_near(values, expected, tolerance: float) -> None:
    for value, other in zip(values, expected, strict=True):
        assert (value - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("master", [torch.float32, torch.bfloat16], ids=["fp32 student, autocast", "bf16 student"])
def test_loss_and_gradients_are_those_in_float64(inputs, master):
    exact = loss_and_gradients(dense_kd_loss, [*(x.double() for x in inputs[:-1]), inputs[-1]])
    student = [x.to(master) for x in inputs[:2]]
    with torch.autocast("cuda", torch.bfloat16, enabled=master == torch.float32):
        ours = loss_and_gradients(fused_kd_loss, [*student, *inputs[2:]])
    assert_near(ours, exact, 0.01)
    assert_near(ours[:1], exact[:1], 1e-4)


@pytest.mark.skipif(not CAN_COMPILE, reason=WHY)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_compiled_loss_is_the_eager_one(inputs, divergence):
    eager, compiled = (
        loss_and_gradients(fused_kd_loss, inputs, divergence=divergence, compile=choice) for choice in (False, True)
    )
    assert_near(compiled, eager, 1e-3)
    assert_near(compiled[:1], eager[:1], 1e-5)


# --- complete runs


def train_on_cpu(config, precision: str = "no") -> None:
    """Train in another process, which sees no GPU."""
    command = [sys.executable, "-m", "kdkit.train", *arguments(config)]
    run = run_processes(command, env=environment(CUDA_VISIBLE_DEVICES="", ACCELERATE_MIXED_PRECISION=precision))
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """Return a function: a finished run on the CPU in fp32 with alpha, made once for each value."""
    folder, made = tmp_path_factory.mktemp("on_cpu"), {}

    def finished(alpha: float):
        if alpha not in made:
            made[alpha] = make_config(folder, f"alpha {alpha}", alpha=alpha)
            train_on_cpu(made[alpha])
        return made[alpha]

    return finished


@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("top_k", "one sample per row")])
def test_run_on_the_gpu_is_the_run_on_the_cpu(on_cpu, name, tmp_path):
    """In fp32, with the teacher, its hidden states, and at alpha = 1."""
    config = make_config(tmp_path, name, **RUNS[name])
    if config.targets_dir:
        store(config)
    train(config)
    assert_same_run(config, on_cpu(config.alpha), 2e-3)


def test_run_with_top_k_targets_learns(tmp_path):
    config = make_config(tmp_path, "top_k", targets="top_k")
    store(config)
    before, after = (event for event in train(config) if "eval/kl_t1" in event)
    assert after["eval/kl_t1"] < before["eval/kl_t1"]


def held_out(config) -> list[float]:
    events = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    return [event["eval/kl_t1"] for event in events if "eval/kl_t1" in event]


@pytest.mark.parametrize("fields", [{}, {"compile_loss": True}, {"attn_implementation": "flash_attention_2"}], ids=str)
def test_run_in_bf16_is_near_the_run_in_fp32_on_the_cpu(on_cpu, fields, tmp_path, monkeypatch):
    if "attn_implementation" in fields and not importlib.util.find_spec("flash_attn"):
        pytest.skip("flash-attn is not installed")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    config = make_config(tmp_path, "bf16", **fields)
    train(config)
    assert held_out(config) == pytest.approx(held_out(on_cpu(config.alpha)), rel=0.02)


# --- checkpoints


@pytest.mark.parametrize("begins_on", ["gpu", "cpu"])
def test_run_can_be_resumed_on_the_other_kind_of_device(on_cpu, begins_on, tmp_path):
    whole = on_cpu(0.3)
    if begins_on == "gpu":
        whole = make_config(tmp_path, "whole")
        train(whole)
    resumed = interrupted(whole, tmp_path / "resumed")
    assert len(checkpoints(resumed.output_dir)) == 1
    (train if begins_on == "cpu" else train_on_cpu)(resumed)
    assert_same_run(resumed, whole, 2e-3)
