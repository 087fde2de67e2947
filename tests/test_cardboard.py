"""`train()` on a card made of cardboard: tensors that say cuda:0 and are computed by the CPU, see cardboard/card.py.

What this shows, on a machine without a GPU: in a complete run, no operation has operands on two devices; the operands
of matrix products have types that CUDA's kernels accept; the branches for CUDA run, and give the numbers of a CPU;
checkpoints can be written and read, also by the other kind of device; and how often the host waits for the device,
which leaves a GPU without work.

What this cannot show: that kernels are right, their alignment, speed and memory; races between streams; NCCL, DDP and
FSDP. These need a GPU: tests/test_cuda.py.
"""

import json
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import LIMIT, environment
from safetensors.torch import load_file
from test_devices import assert_same_run

from kdkit import DistillConfig
from kdkit.running.checkpoint import checkpoints
from kdkit.targets import store
from kdkit.train import train

pytestmark = pytest.mark.slow

CARDBOARD = Path(__file__).parent / "cardboard"
MICRO_BATCHES = 5  # of a step: more than the waits of a step at any one place
RUNS = {
    "online": {},
    "offload": {"teacher_placement": "offload"},
    "hidden": {"targets": "hidden"},
    "top_k": {"targets": "top_k"},
    "alpha 1": {"alpha": 1.0},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "one sample per row": {"packing": False},
    "plain loss": {"fused_loss": False},
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The compiled device.cpp."""
    if torch.cuda.is_available() or torch.version.cuda:
        pytest.skip("this torch has CUDA: run tests/test_cuda.py (make test-gpu) on a machine with a GPU")
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    path = tmp_path_factory.mktemp("cardboard") / "device.so"
    root = Path(torch.__file__).parent
    flags = ["-O0", "-std=c++20", "-fPIC", "-shared", f"-I{root / 'include'}", f"-L{root / 'lib'}"]
    command = ["g++", *flags, str(CARDBOARD / "device.cpp"), "-lc10", "-ltorch_cpu", "-o", str(path)]
    compiled = subprocess.run(command, capture_output=True, text=True)
    if compiled.returncode:
        pytest.skip(f"device.cpp could not be compiled: {compiled.stderr[:500]}")
    return str(path)


def python(*arguments: str, precision: str = "bf16") -> list:
    """Run Python in its own process, and return the last line of its output, which is JSON."""
    program = [sys.executable, *arguments]
    run = subprocess.run(
        program, env=environment(ACCELERATE_MIXED_PRECISION=precision), capture_output=True, text=True, timeout=LIMIT
    )
    assert run.returncode == 0, run.stdout[-1000:] + run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def run_on_card(library: str, config: DistillConfig, command: str = "train", **options) -> list:
    """Run `train` or `store` on the card. Returns the waits of the third step: [reason, place, times]."""
    fields = json.dumps(vars(config))
    return python(str(CARDBOARD / "program.py"), library, command, fields, **options)


def make_config(folder: Path, name: str, **fields) -> DistillConfig:
    if fields.get("targets"):
        fields["targets_dir"] = str(folder / f"targets of {name}")
    return DistillConfig(
        max_train_tokens=6000, max_eval_tokens=600, max_length=64, batch_size=1, max_steps=4,
        gradient_accumulation_steps=MICRO_BATCHES, logging_steps=4, eval_steps=None, save_steps=2,
        alpha=fields.pop("alpha", 0.3), temperature=2.0, use_wandb=False, output_dir=str(folder / name), **fields,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(library, tmp_path_factory):
    """Return a function: the configuration of a run on the card and its waits; each is made once."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def finished(name: str) -> tuple[DistillConfig, list]:
        if name not in made:
            config = make_config(folder, name, **RUNS[name])
            if config.targets_dir:
                run_on_card(library, config, "store")
            made[name] = config, run_on_card(library, config)
        return made[name]

    return finished


@pytest.mark.parametrize("name", RUNS)
def test_run_on_the_card_has_the_numbers_of_the_run_on_the_cpu(run, name, tmp_path, monkeypatch):
    config, _ = run(name)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    on_cpu = make_config(tmp_path, name, **{**RUNS[name], "teacher_placement": "auto"})
    if on_cpu.targets_dir:
        store(on_cpu)
    train(on_cpu)
    assert_same_run(config, on_cpu, 0.01)  # autocast rounds to bf16 in other places on CUDA


def test_run_in_fp32_on_the_card_is_the_run_on_the_cpu(library, tmp_path):
    config, on_cpu = (make_config(tmp_path, name) for name in ("card", "cpu"))
    run_on_card(library, config, precision="no")
    train(on_cpu)
    assert_same_run(config, on_cpu, 1e-5)


# --- how often the host waits for the device

LIMITS = {  # waits of a micro-batch and of a step: measured, to be lowered when one is removed
    "online": (0, 1),
    "hidden": (0, 1),
    "top_k": (0, 1),
    "alpha 1": (0, 1),
    "gradient checkpointing": (0, 1),
    "one sample per row": (0, 1),
}


@pytest.mark.parametrize("name", LIMITS)
def test_host_waits_for_the_device_no_more_often_than_before(run, name):
    _, waits = run(name)
    of_a_micro_batch = sum(times // MICRO_BATCHES for _, _, times in waits)
    of_a_step = sum(times % MICRO_BATCHES for _, _, times in waits)
    assert (of_a_micro_batch, of_a_step) == LIMITS[name], waits


def test_offloaded_teacher_waits_only_for_its_weights(run):
    waits = {tuple(wait) for wait in run("offload")[1] if "accelerate/utils/modeling.py" not in wait[1]}
    assert waits == {tuple(wait) for wait in run("online")[1]}


# --- checkpoints


def interrupted(config: DistillConfig, folder: Path) -> DistillConfig:
    """Copy a run as it was when its first checkpoint had been written."""
    copy = replace(config, output_dir=str(folder))
    shutil.copytree(config.output_dir, folder)
    shutil.rmtree(folder / "final")
    shutil.rmtree(checkpoints(folder)[-1])
    return copy


def test_run_that_is_resumed_on_the_card_is_the_run_without_an_interruption(library, run, tmp_path):
    whole, _ = run("online")
    resumed = interrupted(whole, tmp_path / "resumed")
    run_on_card(library, resumed)
    assert_same_run(resumed, whole, 0)


@pytest.fixture(scope="module")
def checkpoint_of_the_card(run):
    return checkpoints(run("online")[0].output_dir)[0]


def test_checkpoint_of_the_card_has_its_random_numbers(checkpoint_of_the_card):
    tensors = {}
    for path in checkpoint_of_the_card.glob("*.safetensors"):
        tensors |= load_file(path)
    assert {"rng.0.cpu", "rng.0.cuda"} <= tensors.keys()


@pytest.mark.parametrize("begins_on", ["card", "cpu"])
def test_run_can_be_resumed_on_the_other_kind_of_device(library, begins_on, tmp_path):
    whole, resumed = make_config(tmp_path, "whole"), None
    run_on = {"card": lambda config: run_on_card(library, config, precision="no"), "cpu": train}
    run_on[begins_on](whole)
    resumed = interrupted(whole, tmp_path / "resumed")
    del run_on[begins_on]
    (resume,) = run_on.values()
    resume(resumed)
    assert_same_run(resumed, whole, 1e-5)


# --- the card itself

REFUSED = {
    "card + torch.ones(3)": "same device",
    "torch.cat([card, torch.ones(3)])": "same device",
    "torch.stack([card.sum(), torch.tensor(1.0)])": "same device",
    "torch.ones(3)[card.long()]": "indices should be",
    "torch.mm(matrix, matrix.bfloat16())": "same dtype",
    "torch.mm(matrix.bfloat16(), matrix, out_dtype=torch.float32)": "same dtype",
    "torch.mm(matrix.bfloat16(), matrix.bfloat16(), out_dtype=torch.float16)": "out_dtype must be",
    "torch.addmm(matrix.double(), matrix.bfloat16(), matrix.bfloat16(), out_dtype=torch.float32)": "self dtype",
}
WAITS = {
    "card.sum().item()": 1,
    "bool(card.sum())": 1,
    "f'{card.sum():.1f}'": 1,
    "card.tolist()": 1,
    "card.nonzero()": 1,
    "card[card > 0]": 1,
    "card[torch.tensor([0])]": 1,
    "card.cpu()": 1,
    "torch.ones(3).copy_(card)": 1,
    "card.copy_(torch.ones(3))": 1,
    "torch.tensor(5, device='cuda')": 1,
    "torch.ones(3).to('cuda')": 1,
    "torch.ones(3).to('cuda', non_blocking=True)": 1,
    "torch.ones(3).pin_memory().to('cuda')": 1,
    "torch.ones(3).pin_memory().to('cuda', non_blocking=True)": 0,
    "torch.full((), 5, device='cuda')": 0,
    "card[torch.zeros(1, dtype=torch.long, device='cuda')]": 0,
    "card.double().mul_(2).sum()": 0,
    "card + torch.tensor(1.0)": 0,
    "torch.mm(matrix.bfloat16(), matrix.bfloat16(), out_dtype=torch.float32)": 0,
}
SCRIPT = """
import json, sys
from program import load_device
load_device(sys.argv[1])
import card as cardboard, torch
results = {}
with cardboard.cardboard():
    card, matrix = torch.ones(3, device="cuda"), torch.ones(2, 2, device="cuda")
    cardboard.WAITS.counting = True
    for expression in json.loads(sys.argv[2]):
        cardboard.WAITS.clear()
        try:
            eval(expression)
            results[expression] = sum(cardboard.WAITS.values())
        except RuntimeError as error:
            results[expression] = str(error)
print(json.dumps(results))
"""


def test_card_refuses_what_cuda_refuses_and_waits_where_cuda_waits(library, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(CARDBOARD)!r})\n{textwrap.dedent(SCRIPT)}")
    results = python(str(script), library, json.dumps([*REFUSED, *WAITS]))
    assert {expression: results[expression] for expression in WAITS} == WAITS
    for expression, message in REFUSED.items():
        assert message in str(results[expression]), expression
