"""Report the memory, the disk and the hours that a run needs, from two config.json, before any weight is downloaded.

    python -m kdkit.plan --config recipes/x.yaml --gpu h100 --gpus 8 --accelerate_config accelerate_configs/fsdp.yaml

`--memory` overrides the GPU's GB, `--mfu` the fraction of its peak that is reached. The real training step runs on
tensors without storage (`FakeTensorMode`): docs/architecture.md describes the parts of the memory and what is assumed.
"""

import argparse
import math
import weakref
from collections import Counter, namedtuple
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import yaml
from accelerate import Accelerator
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from kdkit import fused
from kdkit.command_line import load_config
from kdkit.config import DistillConfig, UsageError
from kdkit.data import Steps
from kdkit.losses import TopK
from kdkit.models import BodyAndHead, teacher_dtype
from kdkit.models.load import from_config, load_pretrained
from kdkit.train import make_loss, train_step

GPUS = {  # dense bf16 TFLOP/s (fp32 sums) and GB: NVIDIA's data sheets, SXM if there is a choice; 4090: Ada white paper
    "a100": (312, 80), "h100": (989, 80), "h200": (989, 141), "b200": (2250, 180), "l40s": (362, 48), "4090": (165, 24),
}  # fmt: skip
GB, CONTEXT, FRAGMENTS = 1e9, 1e9, 0.05  # the allowance is CONTEXT bytes, and this fraction of the tensors
Launch = namedtuple("Launch", "ranks fsdp precision offload", defaults=(1, False, "bf16", False))  # accelerate's file


class LiveTensors(TorchDispatchMode):
    """Adds up the bytes of live tensors by part. A byte counts as `factors[part]`: 1/8 if 8 ranks share it."""

    def __init__(self, factors: dict[str, float]):
        super().__init__()
        self.factors, self.part_of, self.now, self.peak = factors, {}, Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func is torch.ops.aten.index.Tensor and args[1][0].dtype == torch.bool  # tokens with a label: all
        out = args[0].flatten(0, args[1][0].ndim - 1).clone() if by_mask else func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.part_of:
                self.count(tensor, "activations")
        return out

    def count(self, tensor: torch.Tensor, part: str) -> None:
        """Count a tensor's storage as `part` until it is freed, also if it was of another part before."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.part_of:
            self._add(self.part_of[key], -size)
        else:
            weakref.finalize(storage, lambda: self._add(self.part_of.pop(key), -size))
        self.part_of[key] = part
        self._add(part, size)

    def _add(self, part: str, size: int) -> None:
        self.now[part] += size * self.factors.get(part, 1)
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()


def build(role: str, config: DistillConfig, dtype: torch.dtype) -> BodyAndHead:
    """Make the teacher or the student from its config.json, without weights."""
    layers, source = config.student_layers, role if config.student_layers is None else "teacher"
    model_config = load_pretrained(AutoConfig, getattr(config, f"{source}_model"), source, config)
    if role != source:
        model_config.get_text_config().num_hidden_layers = layers if isinstance(layers, int) else len(layers)
    attention = "eager" if config.attn_implementation == "eager" else None  # flash attention needs about that of sdpa
    model = from_config(model_config, source, config, dtype, attention)
    return BodyAndHead(model.train(role == "student").requires_grad_(role == "student"))


def gathered(model: BodyAndHead) -> tuple[int, int]:
    """Return two numbers of bytes: the weights that FSDP gathers at one time, and the weights of the largest layer.

    It gathers all weights outside the layers (embedding, norm, head), the layer that runs, and the next one.
    """
    total, *layers = (sum(weight.nbytes for weight in part.parameters()) for part in (model, *model.layers))
    largest = max(layers, default=0)
    return total - sum(layers) + 2 * largest, largest


def measure(config: DistillConfig, launch: Launch, memory: float = 80 * GB) -> tuple[dict[str, float], str, tuple]:
    """Run a training step. Returns the bytes of each part at the peak, the teacher's placement, and both models."""
    (ranks, fsdp, precision, offload), online = launch, config.targets == "online"
    size, k, accumulated = (config.batch_size, config.max_length), config.top_k, config.gradient_accumulation_steps > 1
    once = replace(config, gradient_accumulation_steps=1 + accumulated, max_steps=1, compile_loss=False)
    row = dict.fromkeys(("input_ids", "labels"), [0] * config.max_length) | {"position_ids": range(config.max_length)}
    steps = Steps([row] * config.batch_size * (1 + accumulated), once, pad_token_id=0)  # a third is like the second
    batches = [{**batch, "valid": batch["valid"][:4096]} for batch in steps[0]]  # all chunks of the loss are alike
    dtype = torch.bfloat16 if fsdp and precision == "bf16" else torch.float32  # FSDP gathers what the layers use
    with FakeTensorMode(allow_non_fake_inputs=True), mock.patch.dict(fused.CHUNK_TOKENS, cpu=fused.CHUNK_TOKENS["gpu"]):
        teacher, student = build("teacher", config, teacher_dtype(config, precision)), build("student", config, dtype)
        if config.gradient_checkpointing:
            student.recompute_activations()
        weights, place = 4 * student.num_parameters, config.teacher_placement if online else "not loaded"
        if place == "auto":  # as in `OnlineTeacher`
            fit = not fsdp and teacher.model.get_memory_footprint() < 0.4 * (memory - CONTEXT - weights * min(ranks, 2))
            place = "replicate" if fit else "shard" if ranks > 1 else "offload"
        share, wide = 0 if offload else 1 / ranks if fsdp else 1, 4 / dtype.itemsize  # a rank's share is fp32
        factors = {"teacher": {"shard": 1 / ranks, "offload": 0}.get(place, 1), "student": share * wide}
        factors["gradients"] = share * wide if fsdp or accumulated or ranks == 1 else 0  # 0: at once in DDP's buckets
        (own, layer), (other, _) = gathered(student), gathered(teacher)
        extra = {"optimizer": 2 * weights * share, "gathered": own * fsdp + other * (place in ("shard", "offload"))}
        extra["buckets"] = wide * layer if fsdp else weights * (ranks > 1)
        live, head = LiveTensors(factors), teacher.model.get_output_embeddings().weight
        for tensor in [*teacher.parameters(), *teacher.buffers()] if online else [head] * (config.targets == "hidden"):
            live.count(tensor, "teacher")
        for parameter in student.parameters():
            live.count(parameter, "student")
            parameter.register_post_accumulate_grad_hook(lambda weight: live.count(weight.grad, "gradients"))
        source = {  # the stored ones as from a `StoredTeacher`
            "online": teacher, "hidden": lambda batch: (torch.zeros(*size, head.shape[1], dtype=head.dtype), head),
            "top_k": lambda batch: (TopK(torch.zeros(*size, k).int(), torch.zeros(*size, k + 1).to(head.dtype)), None),
        }[config.targets] if config.alpha < 1 else None  # fmt: skip
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        loss, _ = make_loss(once, steps, min(teacher.head_rows, student.head_rows), accelerator.device)
        try:
            with live:
                train_step(accelerator.prepare_model(student, False), source, batches, loss, accelerator)
        except RuntimeError as error:
            names = " or ".join(sorted({type(x.model).__name__ for x in (teacher, student)}))
            raise UsageError(f"{names} can be run but not planned ({type(error).__name__}: {error})") from error
    extra["allowance"] = CONTEXT + FRAGMENTS * (live.peak.total() + sum(extra.values()))
    return {**live.peak, **extra}, place, (teacher, student)


def forward_flop(model: BodyAndHead, length: int) -> float:
    """Return the FLOP of a forward pass per token of a row: 2 per weight (all experts counted), and attention's."""
    config, inputs = model.model.config.get_text_config(), model.model.get_input_embeddings().weight
    weights = model.num_parameters - (inputs is not model.model.get_output_embeddings().weight) * inputs.numel()
    return 2 * weights + 4 * config.num_hidden_layers * config.hidden_size * length


def report(config: DistillConfig, launch: Launch, tflops: float, memory: float, mfu: float) -> str:
    """Return the table, for GPUs of `memory` bytes that reach the fraction `mfu` of `tflops`."""
    parts, place, (teacher, student) = measure(config, launch, memory)
    (ranks, fsdp, *_), online, keep = launch, config.targets == "online", config.keep_checkpoints + 1  # and the next
    tokens = config.batch_size * config.gradient_accumulation_steps * ranks * config.max_length
    flop = forward_flop(student, config.max_length) * (3 + config.gradient_checkpointing)  # backward: twice forward
    flop += forward_flop(teacher, config.max_length) * (online and config.alpha < 1)
    seconds = flop * tokens / (ranks * tflops * 1e12 * mfu)
    steps = config.max_steps or math.ceil(config.num_epochs * math.ceil((config.max_train_tokens or 0) / tokens))
    total, rows = steps * seconds, tokens // config.max_length
    time = f"{total / 3600:.1f} hours" if total > 360 else "less than 0.1 hours"
    time += f" for {steps:,} steps of {rows:,} full rows, {steps * tokens / 1e6:,.1f} M tokens"
    need, head, size = sum(parts.values()), teacher.model.get_output_embeddings().weight, student.num_parameters
    stored = {"hidden": head.shape[1] * head.itemsize, "top_k": 6 * config.top_k}.get(config.targets, 0) / 1e3
    changes = {  # those that cost least first, and whether they apply
        "a smaller batch_size, with as many times more gradient_accumulation_steps": config.batch_size > 1,
        "gradient_checkpointing: true (a fourth to a third slower)": not config.gradient_checkpointing,
        "accelerate_configs/fsdp.yaml, which shards both models": ranks > 1 and not fsdp,
        f"teacher_placement: {'shard' if ranks > 1 else 'offload'}": place == "replicate",
        "targets: hidden (the teacher runs once, before the training)": online,
        "a smaller max_length, smaller models, more GPUs with fsdp.yaml, or fsdp_offload.yaml (slow)": True,
    }
    table = "".join(f"         {count / GB:8.2f}  {part}\n" for part, count in parts.items() if count)
    advice = "".join(f"change   {change}\n" for change, applies in changes.items() if applies and need > memory)
    duration = f"{seconds:.2g} s at {mfu:.0%} MFU"
    targets = f"         {stored:8.2f}  GB for the stored targets of a million tokens\n" if stored else ""
    return f"""\
models   teacher {teacher.num_parameters / 1e6:,.1f} M ({place}), student {size / 1e6:,.1f} M parameters
memory   {need / GB:8.2f}  GB of {memory / GB:g} on each GPU: the run {"fits" if need <= memory else "does not fit"}
{table}{advice}disk     {(12 * keep + 4) * size / GB:8.2f}  GB for {keep} checkpoints and final/
{targets}compute  {flop * tokens / 1e12:,.1f} TFLOP for the {tokens:,} tokens of a step: {duration}
time     {time if steps else "unknown hours: the data decides; give max_steps or max_train_tokens"}"""


def main(argv: list[str] | None = None) -> None:
    """Read the arguments that are not fields of a run here, and the others as `python -m kdkit.train` does."""
    own = argparse.ArgumentParser("python -m kdkit.plan", add_help=False, allow_abbrev=False, exit_on_error=False)
    own.add_argument("--gpu", choices=GPUS, default="h100", help="for another one, the nearest, with its --memory")
    own.add_argument("--memory", type=float, help="GB of a GPU, in the place of those of --gpu")
    own.add_argument("--gpus", type=int, help="number of GPUs, in the place of the file's num_processes")
    own.add_argument("--mfu", type=float, default=0.4, help="the fraction of its peak that a GPU reaches (0.4)")
    own.add_argument("--accelerate_config", metavar="FILE", help="one of accelerate_configs/")
    try:
        args, rest = own.parse_known_args(argv)
        if "--help" in rest:
            print(f"{own.format_help()}\nand the fields of a run:\n")
        config = load_config(rest, " ".join(own.format_usage().split()[1:]))
        memory = GPUS[args.gpu][1] if args.memory is None else args.memory
        file = yaml.safe_load(Path(args.accelerate_config).read_bytes()) if args.accelerate_config else {}
        if not isinstance(file, dict):
            raise UsageError(f"--accelerate_config {args.accelerate_config} has no lines of `key: value`")
        fsdp, precision = file.get("distributed_type") == "FSDP", file.get("mixed_precision", "bf16")
        ranks = file.get("num_processes", 1) if args.gpus is None else args.gpus
        if not (memory > 0 and 0 < args.mfu <= 1 and precision in ("bf16", "no") and ranks > fsdp):
            values = f"--memory {memory:g}, --mfu {args.mfu:g}, mixed_precision {precision}, {ranks} ranks"
            raise UsageError(f"{values}: expected memory above 0, mfu in (0, 1], bf16 or no, and two ranks for FSDP")
        options = file.get("fsdp_config") or {}
        config.gradient_checkpointing |= options.get("fsdp_activation_checkpointing", False)
        launch = Launch(ranks, fsdp, precision, options.get("fsdp_offload_params", False))
        print(report(config, launch, GPUS[args.gpu][0], memory * GB, args.mfu))
    except (UsageError, argparse.ArgumentError, OSError, yaml.YAMLError) as error:
        raise SystemExit(f"kdkit: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    main()
