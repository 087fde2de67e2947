"""Start accelerate on one CPU, one GPU or many processes, and check that it runs what the launcher asked for.

accelerate does the work. This module adds FSDP on CPU processes, so that sharding can be taught and tested on a laptop.
"""

import gc
import os
import warnings

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, GradientAccumulationPlugin

from kdkit.config import UsageError
from kdkit.models import BodyAndHead


def start_accelerator() -> Accelerator:
    """Start accelerate in this process, with bf16 mixed precision unless its configuration says otherwise.

    Raises:
        UsageError: the launcher asked for several processes or for FSDP, but something else is running.
    """
    asked_processes = int(os.environ.get("WORLD_SIZE", "1"))
    asked_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    on_cpu = device is None or device.type == "mps"  # Apple's GPU cannot join a process group
    if on_cpu and asked_processes > 1:
        _start_cpu_processes(asked_fsdp)
    # bf16 is slower than fp32 on a CPU without wide vector instructions
    slow_bf16 = on_cpu and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    accelerator = Accelerator(
        mixed_precision=os.environ.get("ACCELERATE_MIXED_PRECISION", "no" if slow_bf16 else "bf16"),
        # the training loop divides by the tokens of the step: accelerate must not divide again
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    if accelerator.num_processes != asked_processes:
        raise UsageError(
            f"the launcher started {asked_processes} processes, but each runs alone ({accelerator.distributed_type}): "
            "on GPUs, check that each process has one; on CPUs, use accelerate_configs/fsdp_cpu.yaml"
        )
    is_fsdp = accelerator.distributed_type == DistributedType.FSDP
    if asked_fsdp and not is_fsdp:
        raise UsageError(
            f"FSDP was asked for, but {accelerator.distributed_type} on {accelerator.num_processes} process(es) is "
            "running: launch at least two processes (num_processes), or use accelerate_configs/single.yaml"
        )
    plugin = accelerator.state.fsdp_plugin if is_fsdp else None
    if plugin and plugin.fsdp_version != 2:
        raise UsageError(f"fsdp_version is {plugin.fsdp_version}, expected 2: set it in accelerate's configuration")
    if plugin and accelerator.mixed_precision == "bf16":  # by default accelerate sums gradients over ranks in bf16
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    return accelerator


def _start_cpu_processes(fsdp: bool) -> None:
    """Join the CPU processes of the launcher into one gloo group.

    accelerate 1.15 enables FSDP only for GPU-like devices, and with an FSDP configuration it leaves CPU processes
    without a group. We start the group ourselves and report it as MULTI_GPU. `start_accelerator` checks the result.
    """
    os.environ["ACCELERATE_USE_CPU"] = "true"
    state = PartialState(cpu=True)
    if fsdp and state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU
        state.device = torch.device("cpu")


def leave_processes() -> None:
    """Leave the process group at the end of a program.

    A DDP model that is destroyed after its group deadlocks with gloo: the thread of the group waits for the
    interpreter, which waits for the thread. Models without references are therefore collected first.
    """
    gc.collect()
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()


def clip_gradients(model: torch.nn.Module, max_norm: float, accelerator: Accelerator) -> torch.Tensor:
    """Scale the gradients to a norm of `max_norm` if it is larger. Returns the norm before, over all ranks."""
    norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP: a DTensor of partial sums


def place_teacher(teacher: torch.nn.Module, placement: str, accelerator: Accelerator) -> tuple[BodyAndHead, str]:
    """Put the frozen teacher where `placement` says.

    Args:
        teacher: from `load_teacher`, or a `kdkit.targets.StoredTeacher`, for which `placement` means nothing.
        placement: `replicate` (whole on each device), `shard` (a part on each, layer by layer gathered when used),
            `offload` (kept by the CPU, brought layer by layer when used), or `auto`.
        accelerator: the run's. With FSDP, call this after `prepare`.

    Returns:
        The teacher to call, and a line that says what was chosen and why.

    Raises:
        UsageError: `shard` on one process.
    """
    if isinstance(teacher, BodyAndHead):  # what is stored of one
        return teacher.to(accelerator.device), str(teacher)
    several = accelerator.num_processes > 1
    reason = "as asked"
    if placement == "auto":
        placement, reason = _choose(teacher, accelerator)
    if placement == "shard" and not several:
        raise UsageError("teacher_placement is shard, but there is one process: use replicate, offload or auto")
    module = BodyAndHead(teacher)
    if placement == "replicate":
        module.to(accelerator.device)
    elif placement == "shard" or several:
        _shard(module, accelerator, offload=placement == "offload")
    elif accelerator.device.type != "cpu":
        from accelerate import cpu_offload

        cpu_offload(module, accelerator.device)
    names = {"replicate": "whole on each device", "shard": f"sharded over {accelerator.num_processes} ranks"}
    return module, f"{names.get(placement, 'kept by the CPU')} ({placement}, {reason})"


def _choose(teacher: torch.nn.Module, accelerator: Accelerator) -> tuple[str, str]:
    if accelerator.distributed_type == DistributedType.FSDP:
        return "shard", "auto: the student is sharded too"
    if accelerator.device.type != "cuda":
        return "replicate", "auto: one copy a process is fastest"
    need = sum(parameter.numel() * parameter.element_size() for parameter in teacher.parameters()) / 2**30
    free = torch.cuda.mem_get_info(accelerator.device)[0] / 2**30
    if need < 0.4 * free:
        return "replicate", f"auto: its {need:.1f} GiB fit in {free:.1f} GiB free"
    return "shard" if accelerator.num_processes > 1 else "offload", f"auto: {need:.1f} GiB of {free:.1f} GiB free"


def _shard(module: BodyAndHead, accelerator: Accelerator, offload: bool) -> None:
    """FSDP2 over all ranks: each decoder layer a unit, and the rest (embedding, norm, head) the root's.

    With accelerate's fsdp_cpu_ram_efficient_loading the weights are rank 0's, which hands out the parts: transformers
    may have left those of the others empty.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    from_rank_0 = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true"
    weights = module.state_dict() if from_rank_0 and accelerator.is_main_process else {}
    if from_rank_0:
        for part in module.modules():  # parameters alone: buffers that are in no file are right on every rank
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
        module.tie_weights()
    policy = CPUOffloadPolicy(pin_memory=accelerator.device.type == "cuda") if offload else OffloadPolicy()
    layers = set(module._no_split_modules or [])
    for layer in [child for child in module.modules() if type(child).__name__ in layers]:
        fully_shard(layer, offload_policy=policy)
    fully_shard(module, offload_policy=policy)
    if from_rank_0:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=offload)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(_get_pg_default_device|Multiple backends)")
            set_model_state_dict(module, weights, options=options)
        module.tie_weights()
