"""What a run runs on: one CPU, one GPU or many processes.

accelerate does the work. What is here makes sure that what was asked for is what is running, adds FSDP on CPU
processes (so that sharding can be taught and tested on a laptop).
"""

import gc
import os

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from kdkit.config import UsageError


def start_accelerator() -> Accelerator:
    """The accelerator of this process, in bf16 unless accelerate's configuration says otherwise.

    Raises:
        UsageError: the launcher asked for several processes or for FSDP, and that is not what is running.
    """
    asked_processes = int(os.environ.get("WORLD_SIZE", "1"))
    asked_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    on_cpu = not torch.cuda.is_available() and not _other_accelerator()
    if on_cpu and asked_processes > 1:
        _start_cpu_processes(asked_fsdp)
    # a CPU without wide vector units is slower in bf16 than in fp32
    slow_bf16 = on_cpu and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    accelerator = Accelerator(
        mixed_precision=os.environ.get("ACCELERATE_MIXED_PRECISION", "no" if slow_bf16 else "bf16"),
        # the loop accumulates by itself, and divides once: accelerate must not divide again
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    if accelerator.num_processes != asked_processes:
        raise UsageError(
            f"the launcher started {asked_processes} processes, but each runs alone ({accelerator.distributed_type}): "
            "on GPUs, check that there is one for each process; on CPUs, use accelerate_configs/fsdp_cpu.yaml"
        )
    if asked_fsdp and accelerator.distributed_type != DistributedType.FSDP:
        raise UsageError(
            f"FSDP was asked for, but {accelerator.distributed_type} on {accelerator.num_processes} process(es) is "
            "running: launch at least two processes (num_processes), or use accelerate_configs/single.yaml"
        )
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
    if plugin is not None:
        if plugin.fsdp_version != 2:
            raise UsageError(f"fsdp_version is {plugin.fsdp_version}, expected 2: set it in accelerate's configuration")
        if accelerator.mixed_precision == "bf16":  # accelerate would sum gradients over the ranks in bf16
            plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    return accelerator


def leave_processes() -> None:
    """Leave the group of processes, at the end of a program, once the models of the run are no longer referred to.

    A DDP model that outlives its group takes the group with it when it goes, and on gloo the two then wait for each
    other: the group's thread for the interpreter, the interpreter for the thread. Hence the collection first.
    """
    gc.collect()
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()


def _other_accelerator() -> bool:
    """Whether there is an accelerator other than CUDA's that can take part in a group (Apple's cannot)."""
    return torch.accelerator.is_available() and torch.accelerator.current_accelerator().type != "mps"


def _start_cpu_processes(fsdp: bool) -> None:
    """Join the launcher's CPU processes into one gloo group, which accelerate leaves apart.

    With accelerate 1.15 an FSDP configuration on CPUs gives as many lone processes, and, told to use CPUs, plain DDP:
    FSDP is switched on only for a list of kinds of devices that CPUs are not on. So the group is started here, and
    for FSDP passes for the kind it is told from. `start_accelerator` checks what came of it.
    """
    os.environ["ACCELERATE_USE_CPU"] = "true"
    state = PartialState(cpu=True)
    if fsdp and state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU
        state.device = torch.device("cpu")


@torch.no_grad()
def clip_gradients(model: torch.nn.Module, max_norm: float, accelerator: Accelerator) -> torch.Tensor:
    """Scale the gradients down to a norm of `max_norm` where they exceed it; returns the norm before, over all ranks.

    The squares are summed in float64, see `_sum_of_squares`: in fp32, as torch and accelerate do it, the norm of half a
    million numbers is off by 4e-6, and by something else on one rank than on shards of two.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    sharded = isinstance(gradients[0], DTensor)
    exact = torch.float32 if accelerator.device.type == "mps" else torch.float64
    local = [gradient.to_local() if sharded else gradient for gradient in gradients]
    squares = sum(_sum_of_squares(gradient, exact) for gradient in local)
    norm = (accelerator.reduce(squares, "sum") if sharded else squares).sqrt()
    torch._foreach_mul_(local, (max_norm / (norm + 1e-6)).clamp(max=1.0).float())
    return norm


def _sum_of_squares(tensor: torch.Tensor, exact: torch.dtype) -> torch.Tensor:
    """In `exact`, but for runs of 4,096 numbers: the same to eight digits, in a quarter of the time on a CPU."""
    flat = tensor.flatten()
    whole = flat.numel() // 4096 * 4096
    runs = torch.linalg.vector_norm(flat[:whole].view(-1, 4096), dim=1)
    return runs.to(exact).square().sum() + torch.linalg.vector_norm(flat[whole:], dtype=exact) ** 2
