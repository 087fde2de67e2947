"""Report the memory, the disk and the hours that a run needs, from two config.json, before any weight is downloaded.

    python -m kdkit.plan --config recipes/x.yaml --gpu h100 --gpus 8 --accelerate_config accelerate_configs/fsdp.yaml

`--memory` overrides the GPU's GB, `--mfu 0.4` is the fraction of its peak that is reached; `--field value` as usual.

The real training step runs on tensors that have a shape but no storage (`FakeTensorMode`), and `LiveTensors` adds up
those alive at the peak. For P parameters of the student (FSDP divides the first three by the ranks):

    student      4 P bytes: the fp32 weights that AdamW changes
    optimizer    8 P: AdamW's two moments of each weight
    gradients    4 P at the end of a backward pass, in micro-batches before the last one already at its start
    copies       2 P: the bf16 weights that autocast makes for the matrix products
    activations  what the backward pass needs of each layer: grows with batch_size * max_length
    loss         both models' logits of a chunk of tokens; the gradients of the hidden states and of the head
    gathered     with FSDP the weights in use, and their gradients on the way to other ranks: embedding and head, the
                 layer that runs, and the next one
    allowance    not measured: CUDA's context, cuBLAS, NCCL (1 GB), and the allocator's fragmentation (5 %)

FLOP per token: 2 per weight in a forward pass (without the input embedding; all experts counted), and for attention
4 * layers * heads * head_dim * max_length; in a backward pass twice that. Recomputing activations is a forward pass.
"""

import argparse
import copy
import math
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import yaml
from accelerate import Accelerator
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdkit import fused
from kdkit.config import DistillConfig, UsageError, load_config
from kdkit.data import Steps
from kdkit.losses import TopK
from kdkit.models import BodyAndHead, teacher_dtype
from kdkit.models.load import load_pretrained
from kdkit.running.devices import clip_gradients
from kdkit.train import make_loss, make_optimizer, train_step

GPUS = {  # dense bf16 TFLOP/s (fp32 sums) and GB: NVIDIA's data sheets, SXM if there is a choice; 4090: Ada white paper
    "a100": (312, 80), "h100": (989, 80), "h200": (989, 141), "b200": (2250, 180), "l40s": (362, 48), "4090": (165, 24),
}  # fmt: skip
GB, CONTEXT, FRAGMENTS = 1e9, 1e9, 0.05  # the allowance is CONTEXT bytes, and this fraction of the tensors


class Launch(NamedTuple):
    """What accelerate's YAML file says."""

    ranks: int = 1
    fsdp: bool = False
    precision: str = "bf16"
    offload: bool = False  # FSDP keeps weights, gradients and moments in CPU memory
    on_cpu: bool = False


class LiveTensors(TorchDispatchMode):
    """Adds up the bytes of live tensors by part. A byte counts as `factors[part]`: 1/8 if 8 ranks share it."""

    def __init__(self, factors: dict[str, float]):
        super().__init__()
        self.factors, self.part, self.owners, self.now, self.peak = factors, "activations", {}, Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        part, aten = self.part, torch.ops.aten
        if func is aten.index.Tensor and args[1][0].dtype == torch.bool:  # which tokens have a label? all
            out = args[0].flatten(0, args[1][0].ndim - 1).clone()
        else:
            out = func(*args, **(kwargs or {}))
        if func is aten._to_copy.default and self.owners.get(args[0].untyped_storage()._cdata) == "student":
            part = "copies"
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.owners:
                self.count(tensor, part)
        return out

    def count(self, tensor: Tensor, part: str) -> None:
        """Count a tensor's storage as `part` until it is freed, also if it was of another part before."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.owners:
            self._add(self.owners[key], -size)
        else:
            weakref.finalize(storage, lambda: self._add(self.owners.pop(key), -size))
        self.owners[key] = part
        self._add(part, size)

    def _add(self, part: str, size: int) -> None:
        self.now[part] += size * self.factors.get(part, 1)
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()


def build(config: DistillConfig, launch: Launch) -> list[BodyAndHead]:
    """Make teacher and student from their config.json, as `kdkit.models.load` does with weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    layers, roles = config.student_layers, ("teacher", "student")
    roles = roles if layers is None else roles[:1]
    configs = [load_pretrained(AutoConfig, getattr(config, f"{role}_model"), role, config) for role in roles]
    if layers is not None:
        configs.append(copy.deepcopy(configs[0]))
        configs[1].num_hidden_layers = layers if isinstance(layers, int) else len(layers)
    halves = launch.fsdp and launch.precision == "bf16"  # FSDP gathers bf16 weights: autocast has nothing to copy
    dtypes = teacher_dtype(config, launch.precision), torch.bfloat16 if halves else torch.float32
    attention = "eager" if config.attn_implementation == "eager" else None  # flash attention needs about that of sdpa
    options = {"attn_implementation": attention, "trust_remote_code": config.trust_remote_code}
    both = [AutoModelForCausalLM.from_config(x, dtype=y, **options) for x, y in zip(configs, dtypes, strict=True)]
    teacher, student = BodyAndHead(both[0].requires_grad_(False).eval()), BodyAndHead(both[1].train())
    if config.gradient_checkpointing:
        student.recompute_activations()
    return [teacher, student]


def shares(config: DistillConfig, launch: Launch, teacher, student, memory: float) -> tuple[str, dict, float]:
    """Return the teacher's placement, the factors of `LiveTensors`, and the bytes of gathered weights."""

    def sizes(model: BodyAndHead) -> tuple[int, int, int]:  # bytes: of all, outside the layers, of the largest layer
        size, names = lambda module: sum(x.nbytes for x in module.parameters()), model._no_split_modules or []
        layers = [size(module) for module in model.modules() if type(module).__name__ in names]
        return size(model), size(model) - sum(layers), max(layers, default=0)

    (whole, rest, layer), (_, own_rest, own_layer) = sizes(teacher), sizes(student)
    place = config.teacher_placement if config.targets == "online" else "replicate"
    if place == "auto":  # as in `OnlineTeacher`
        fits = not launch.fsdp and (launch.on_cpu or whole < 0.4 * (memory - CONTEXT - 4 * student.num_parameters))
        place = "replicate" if fits else "shard" if launch.ranks > 1 else "offload"
    factors, gathered = {"teacher": {"replicate": 1, "shard": 1 / launch.ranks, "offload": 0}[place]}, 0
    if launch.fsdp:
        wide = 4 / next(student.parameters()).itemsize  # a rank's part is fp32, whatever the layers compute with
        factors |= dict.fromkeys(("student", "optimizer", "gradients"), 0 if launch.offload else wide / launch.ranks)
        gathered += own_rest + (2 + wide) * own_layer
    if place != "replicate":
        gathered += rest + 2 * layer
    return place, factors, gathered


def measure(config: DistillConfig, launch: Launch, memory: float = 80 * GB) -> tuple[dict[str, float], str, tuple]:
    """Run an optimizer step. Returns the bytes of each part at the peak, the teacher's placement, and both models."""
    on_gpu, operands = [], fused._model
    if not launch.on_cpu:  # the tensors are the CPU's: let the loss use chunks, and copies of the heads, as on a GPU
        sizes = fused.CHUNK_TOKENS, fused.BLOCK_ELEMENTS
        on_gpu = [mock.patch.dict(size, cpu=size["gpu"]) for size in sizes]
        cast = lambda *x: (model := operands(*x))._replace(head=model.head.to(model.dtype))  # noqa: E731
        on_gpu.append(mock.patch.object(fused, "_model", cast))
    length, micro_batches = config.max_length, min(config.gradient_accumulation_steps, 2)  # a third is like them
    row = {"input_ids": [0] * length, "labels": [0] * length, "position_ids": list(range(length))}
    once, fake = replace(config, max_steps=1, compile_loss=False), FakeTensorMode()
    steps = Steps([row] * config.batch_size * micro_batches, once, pad_token_id=0)
    batches = [{k: fake.from_tensor(v) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in steps[0]]
    with ExitStack() as stack:
        for context in (fake, *on_gpu):
            stack.enter_context(context)
        teacher, student = build(config, launch)
        place, factors, gathered = shares(config, launch, teacher, student, memory)
        accelerator, live = Accelerator(cpu=True, mixed_precision=launch.precision), LiveTensors(factors)
        head, online = teacher.model.get_output_embeddings().weight, config.targets == "online"
        kept = [*teacher.parameters(), *teacher.buffers()] if online else [head] * (config.targets == "hidden")
        for part, tensors in (("teacher", kept), ("student", [*student.parameters(), *student.buffers()])):
            for tensor in tensors:
                live.count(tensor, part)

        def stored(batch: dict) -> tuple:  # like a `StoredTeacher`
            def empty(width: int, dtype: torch.dtype) -> Tensor:
                return torch.empty(*batch["labels"].shape, width, dtype=dtype)

            if config.targets == "hidden":
                return empty(head.shape[1], head.dtype), head
            return TopK(empty(config.top_k, torch.int32), empty(config.top_k + 1, head.dtype)), None

        loss_function, _ = make_loss(once, steps, min(teacher.head_rows, student.head_rows), accelerator.device)

        def counted_loss(*arguments):
            live.part = "loss"
            loss = loss_function(*arguments)
            live.part = "activations"
            return loss

        with live:
            optimizer = make_optimizer(student, config)
            model, optimizer = accelerator.prepare(student, optimizer, device_placement=[False, False])
            for parameter in student.parameters():
                parameter.grad = torch.empty_like(parameter)
                # a complete gradient was one of the activations, or of the loss
                parameter.register_post_accumulate_grad_hook(lambda weight: live.count(weight.grad, "gradients"))
            live.part = "optimizer"
            optimizer.step()  # makes the moments
            optimizer.zero_grad()
            live.part, live.peak = "activations", live.now.copy()
            targets = (teacher if online else stored) if config.alpha < 1 else None
            train_step(model, targets, batches, counted_loss, accelerator)
            clip_gradients(model, config.max_grad_norm, accelerator)
            optimizer.step()
    parts = {**live.peak, "gathered": gathered}
    return {**parts, "allowance": CONTEXT + FRAGMENTS * sum(parts.values())}, place, (teacher, student)


def count_steps(config: DistillConfig, launch: Launch) -> tuple[int, int | None]:
    """Return the rows of a step, and the number of steps if all rows are full: None if only the data can say it."""
    rows, steps = config.batch_size * config.gradient_accumulation_steps * launch.ranks, config.max_steps
    if not steps and config.max_train_tokens:
        steps = math.ceil(config.num_epochs * math.ceil(config.max_train_tokens / (config.max_length * rows)))
    return rows, steps


def remedies(config: DistillConfig, launch: Launch) -> list[str]:
    """Return what reduces the memory of a rank, the cheapest first."""
    changes = {
        "gradient_checkpointing: true (one more forward pass of the student)": not config.gradient_checkpointing,
        "a smaller batch_size, with as many times more gradient_accumulation_steps": config.batch_size > 1,
        "accelerate_configs/fsdp.yaml: both models sharded": launch.ranks > 1 and not launch.fsdp,
        "teacher_placement: offload (the teacher in CPU memory)": config.targets == "online",
        "targets: hidden (the teacher runs once, before the training)": config.targets == "online",
        "accelerate_configs/fsdp_offload.yaml: weights and optimizer in CPU memory": launch.fsdp and not launch.offload,
        "more GPUs, a smaller max_length, or smaller models": True,
    }
    return [change for change, applies in changes.items() if applies]


def forward_flop(model: BodyAndHead, length: int) -> float:
    """Return the FLOP of a forward pass per token of a row of `length` tokens."""
    config, inputs = model.model.config.get_text_config(), model.model.get_input_embeddings().weight
    weights = model.num_parameters - (inputs is not model.model.get_output_embeddings().weight) * inputs.numel()
    heads = getattr(config, "num_attention_heads", None) or 1
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 2 * weights + 4 * config.num_hidden_layers * width * length


def report(config: DistillConfig, launch: Launch, tflops: float, memory: float, mfu: float) -> Iterator[str]:
    """Yield the lines of the table, for GPUs of `memory` bytes that reach the fraction `mfu` of `tflops`."""
    parts, place, (teacher, student) = measure(config, launch, memory)
    (rows, steps), size, need = count_steps(config, launch), student.num_parameters, sum(parts.values())
    tokens, online = rows * config.max_length, config.targets == "online"
    flop = forward_flop(student, config.max_length) * (4 if config.gradient_checkpointing else 3)
    flop += forward_flop(teacher, config.max_length) * (online and config.alpha < 1)
    seconds = flop * tokens / (launch.ranks * tflops * 1e12 * mfu)
    name = config.student_model if config.student_layers is None else "from layers of the teacher"
    where = place if online else f"not loaded: targets {config.targets}"
    yield f"teacher  {config.teacher_model}: {teacher.num_parameters / 1e6:,.1f} M parameters, {where}"
    yield f"student  {name}: {size / 1e6:,.1f} M parameters{', sharded' if launch.fsdp else ''}"
    yield f"step     {rows} rows of {config.max_length:,} = {tokens:,} tokens, {launch.ranks} ranks, {launch.precision}"
    yield "memory   GB of a rank, at the peak of a step"
    yield from (f"         {count / GB:8.2f}  {part}" for part, count in parts.items() if count)
    yield f"         {need / GB:8.2f}  needed"
    yield f"         {memory / GB:8.2f}  available: the run {'fits' if need <= memory else 'does not fit'}"
    if need > memory:
        yield from (f"change   {change}" for change in remedies(config, launch))
    keep = config.keep_checkpoints + 1  # a new checkpoint is complete before the oldest is removed
    yield f"disk     {(12 * keep + 4) * size / GB:8.2f}  GB for {keep} checkpoints and final/"
    if not online:
        head = teacher.model.get_output_embeddings().weight
        width = head.shape[1] * head.itemsize if config.targets == "hidden" else 6 * config.top_k
        yield f"         {width / 1e3:8.2f}  GB for the targets of a million tokens"
    yield f"compute  {flop * tokens / 1e12:8.1f}  TFLOP per step"
    yield f"time     {seconds:8.2f}  s per step, at {mfu:.0%} of {tflops} TFLOP/s"
    if steps:
        yield f"         {steps * seconds / 3600:8.2f}  hours for {steps:,} steps, {steps * tokens / 1e6:,.1f} M tokens"
    else:
        yield "          unknown  hours: the data decides the number of steps; give max_steps or max_train_tokens"


def read_launch(path: str | None, gpus: int | None) -> Launch:
    """Read accelerate's YAML file; `gpus` overrides its num_processes, as --num_processes does."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) if path else {}
        fsdp = values.get("fsdp_config", {})
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise UsageError(f"--accelerate_config {path} is not a file of accelerate: {type(error).__name__}") from error
    ranks, is_fsdp = gpus or values.get("num_processes", 1), values.get("distributed_type") == "FSDP"
    precision, on_cpu = values.get("mixed_precision", "bf16"), values.get("use_cpu", False)
    if precision not in ("bf16", "no") or ranks < 1 + is_fsdp:
        raise UsageError(f"mixed_precision {precision} on {ranks} ranks: expected bf16 or no, and two ranks for FSDP")
    return Launch(ranks, is_fsdp, precision, fsdp.get("fsdp_offload_params", False), on_cpu)


def main(argv: list[str] | None = None) -> None:
    """Read the arguments that are not fields of a run here, and the others as `python -m kdkit.train` does."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    defaults = {"gpu": "h100", "memory": 0.0, "gpus": 0, "mfu": 0.4, "accelerate_config": ""}
    for name, default in defaults.items():
        first.add_argument(f"--{name}", type=type(default), default=default)
    flags = " ".join(f"[--{name} {value or '...'}]" for name, value in defaults.items())
    try:
        given, rest = first.parse_known_args(sys.argv[1:] if argv is None else argv)
        config = load_config(rest, f"python -m kdkit.plan {flags}")
        launch = read_launch(given.accelerate_config, given.gpus)
        if given.gpu not in GPUS:
            raise UsageError(f"--gpu is {given.gpu}, expected one of {', '.join(GPUS)}; --memory overrides its GB")
        if not (0 < given.mfu <= 1 and given.memory >= 0):
            raise UsageError(f"--mfu is {given.mfu} and --memory {given.memory}, expected 0 < mfu <= 1, and GB")
        tflops, memory = GPUS[given.gpu]
        for line in report(config, launch, tflops, (given.memory or memory) * GB, given.mfu):
            print(line, flush=True)
    except (UsageError, argparse.ArgumentError) as error:
        sys.exit(f"kdkit: {error}")


if __name__ == "__main__":
    main()
