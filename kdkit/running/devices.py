"""What a run runs on: one CPU, one GPU or many processes; and where the teacher's weights are kept.

accelerate does the work. What is here makes sure that what was asked for is what is running, adds FSDP on CPU
processes (so that sharding can be taught and tested on a laptop), and shards the teacher, which accelerate does not.
"""

import gc
import os
import warnings

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from kdkit.config import UsageError
from kdkit.models import BodyAndHead


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
