"""Start accelerate, also with FSDP on CPU processes, and check that it runs what the launcher asked for."""

import gc
import os

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradientAccumulationPlugin
from accelerate.utils import parse_flag_from_env as flag
from torch.distributed.fsdp import MixedPrecisionPolicy

from kdkit.config import UsageError


def start_accelerator() -> Accelerator:
    """Start accelerate as the launcher asked for it, with bf16 mixed precision by default; or raise a UsageError."""
    if flag("ACCELERATE_USE_CPU") and not torch.cuda.is_initialized():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or FSDP and NCCL would still choose the GPU
    asked_processes, asked_fsdp = int(os.environ.get("WORLD_SIZE", "1")), flag("ACCELERATE_USE_FSDP")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    on_cpu = device is None or device.type == "mps"  # Apple's GPU cannot join a process group
    # bf16 is slower than fp32 on a CPU without wide vector instructions
    slow_bf16 = on_cpu and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no" if slow_bf16 else "bf16")
    if precision not in ("bf16", "no"):  # with fp16, gradients are multiplied by a factor before they are clipped
        raise UsageError(f"mixed_precision is {precision}, expected bf16 or no: set it in accelerate's configuration")
    if flag("ACCELERATE_USE_DEEPSPEED") or flag("ACCELERATE_USE_MEGATRON_LM"):
        raise UsageError("DEEPSPEED and MEGATRON_LM are not supported: launch with a file of accelerate_configs/")
    if on_cpu and asked_processes > 1:
        # accelerate tells only single processes that its file has `use_cpu`
        if not flag("ACCELERATE_USE_CPU") and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
            raise UsageError(
                f"the launcher asked for {asked_processes} processes, but no GPU is found. If they are to run on the "
                "CPU, use accelerate_configs/fsdp_cpu.yaml, or set CUDA_VISIBLE_DEVICES=-1"
            )
        _start_cpu_processes(asked_fsdp)
    accelerator = Accelerator(
        mixed_precision=precision,
        # the training loop divides by the tokens of the step: accelerate must not divide again
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # without it, DDP keeps a second copy of the gradients
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    is_fsdp = accelerator.distributed_type == DistributedType.FSDP
    if accelerator.num_processes != asked_processes or (asked_fsdp and not is_fsdp):
        asked = f"{asked_processes} process(es){' with FSDP' if asked_fsdp else ''}"
        running = f"{accelerator.distributed_type} with {accelerator.num_processes} is running"
        remedy = "each process needs a GPU, and FSDP two of them; on CPUs, use accelerate_configs/fsdp_cpu.yaml"
        raise UsageError(f"the launcher asked for {asked}, but {running}: {remedy}")
    plugin = accelerator.state.fsdp_plugin if is_fsdp else None
    if plugin and plugin.fsdp_version != 2:
        raise UsageError(f"fsdp_version is {plugin.fsdp_version}, expected 2: set it in accelerate's configuration")
    if plugin and precision == "bf16":
        # By default accelerate sums gradients over ranks in bf16, and rounds the student's arguments to bf16, among
        # which are the teacher's targets.
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        plugin.mixed_precision_policy = policy
    return accelerator


def _start_cpu_processes(fsdp: bool) -> None:
    """Start a group of CPU processes, reported as GPUs for FSDP: accelerate 1.15 does neither."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    state = PartialState(cpu=True)
    if fsdp and state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type, state.device = DistributedType.MULTI_GPU, torch.device("cpu")


def leave_processes() -> None:
    """Leave the process group at the end of a program."""
    gc.collect()  # with gloo, a DDP model that is destroyed after its group waits forever
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()


def clip_gradients(model: torch.nn.Module, max_norm: float, accelerator: Accelerator) -> torch.Tensor:
    """Scale the gradients to a norm of `max_norm` if it is larger. Returns the norm before, over all ranks."""
    norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP: a DTensor of partial sums
