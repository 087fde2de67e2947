"""Measure training steps of kdkit on one GPU, part by part, and its loss alone, beside the losses of other libraries.

    python benchmarks/gpu.py                                        # Qwen2.5 1.5B to 0.5B, random weights, and the loss
    python benchmarks/gpu.py --rows 8 --length 4096 --document 1024 --gradient_checkpointing
    python benchmarks/gpu.py --teacher big/config.json --student small/config.json --only steps
    python benchmarks/gpu.py --only loss --tokens 8192 --vocab 128256
    python benchmarks/gpu.py --device cpu --tiny                    # a trial of this script, in seconds

Steps are `kdkit.train.train_step` with random weights and rows full of random token ids, all of them in the loss. The
teacher is kept on the device (`online`), in CPU memory (`offload`), or replaced by stored hidden states (`stored`).
With `online`, the losses of other libraries take the place of kdkit's. All compute the same loss, up to the rounding of
logits to bf16 in some of them; that of the last step is printed. Parts are timed with CUDA events, which do not make
the host wait; on a CPU with wall time. The first steps (`--warmup`) are left out: they compile the loss, and create the
state of the optimizer.

The share of the peak compares the operations of the matrix products (2 per weight and token in a forward pass, 4 in a
backward pass; attention, elementwise work and recomputed activations are not counted) with what one large bf16 product
reaches on the same device.
"""

import argparse
import gc
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import implementations

from kdkit.config import DistillConfig
from kdkit.data import Steps, collate
from kdkit.data.batches import Rows
from kdkit.losses import KDLoss
from kdkit.models import BodyAndHead, examine
from kdkit.running.devices import clip_gradients, start_accelerator
from kdkit.teachers import OnlineTeacher
from kdkit.teachers.stored import SplitFiles, StoredTeacher
from kdkit.train import make_loss, make_optimizer, train_step

ALPHA, TEMPERATURE = 0.5, 2.0
PARTS = ("teacher forward", "student forward", "loss", "backward", "clip, optimizer")
QWEN = {"vocab_size": 151936, "num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 32768}
SHAPES = {  # Qwen2.5-1.5B and Qwen2.5-0.5B
    "teacher": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, **QWEN
    },
    "student": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, **QWEN
    },
}  # fmt: skip
TINY = {"vocab_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TINY_SHAPES = {role: {**SHAPES[role], **TINY, "hidden_size": size} for role, size in (("teacher", 32), ("student", 16))}
TINY_ARGUMENTS = {
    "rows": 2, "length": 64, "document": 16, "warmup": 1, "rounds": 2,
    "tokens": 64, "vocab": 512, "student_hidden": 16, "teacher_hidden": 32, "peak_size": 128,
}  # fmt: skip


# --- measuring


class Clock:
    """Measures the time of named parts: between CUDA events on a GPU, otherwise wall time."""

    def __init__(self, device: torch.device):
        self.device, self.marks = device, []  # (name, start, end)

    def now(self) -> torch.cuda.Event | float:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = self.now()
        yield
        self.marks.append((name, start, self.now()))

    def timed(self, name: str, function: Callable) -> Callable:
        """Return the function as a part."""

        def run(*arguments, **options):
            with self.part(name):
                return function(*arguments, **options)

        return run

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part since the last call. Waits for the device."""
        total = defaultdict(float)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        for name, start, end in self.marks:
            total[name] += start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start
        self.marks.clear()
        return total


def reset_memory(device: torch.device) -> int:
    """Free what is not used, start to measure the peak, and return the bytes that are in use now."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_gb(device: torch.device, before: int = 0) -> str:
    return f"{(torch.cuda.max_memory_allocated() - before) / 1e9:.1f}" if device.type == "cuda" else "not measured"


def measure_peak(args: argparse.Namespace, device: torch.device) -> float:
    """Return the operations per second of a large bf16 product, the best of some."""
    a, b = (torch.randn(args.peak_size, args.peak_size, device=device, dtype=torch.bfloat16) for _ in range(2))
    clock, best = Clock(device), 0.0
    for _ in range(args.rounds + 2):
        with clock.part("product"):
            a @ b
        best = max(best, 2 * args.peak_size**3 / clock.seconds()["product"])
    return best


# --- the steps


def make_model(role: str, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """Return a model with random weights, the same ones each time: a bf16 teacher, or an fp32 student."""
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

    path = getattr(args, role)
    config = AutoConfig.from_pretrained(path) if path else Qwen2Config(**(TINY_SHAPES if args.tiny else SHAPES)[role])
    dtype = torch.bfloat16 if role == "teacher" else torch.float32
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=args.attn_implementation)


def make_rows(args: argparse.Namespace, vocab_size: int) -> Rows:
    """Return rows for all steps: packed documents of random tokens, all of them in the loss."""
    generator = torch.Generator().manual_seed(0)
    positions = (torch.arange(args.length) % args.document).tolist()
    rows = []
    for _ in range(args.rows * (args.warmup + args.rounds)):
        ids = torch.randint(vocab_size, (args.length + 1,), generator=generator).tolist()
        rows.append({"input_ids": ids[:-1], "labels": ids[1:], "position_ids": positions})
    return Rows.of(rows)


class StoredHidden(StoredTeacher):
    """A teacher that reads its hidden states from files, without the checks of a run."""

    def __init__(self, files: SplitFiles, head: Tensor):
        self.train, self.head = files, head


@torch.no_grad()
def store_hidden(teacher: OnlineTeacher, steps: Steps, folder: Path, device: torch.device) -> StoredHidden:
    """Write the teacher's hidden states for all rows to files, one for each row, as `kdkit.targets` does for a run."""
    for number, row in enumerate(steps.rows):
        hidden, head = teacher(send_to_device(collate([row], 0), device))
        save_file({"hidden": hidden[0].cpu()}, folder / f"train-{number:06d}.safetensors")
    layout = {"rows_per_file": 1, "tensors": {"hidden": (hidden.shape[-1], "bfloat16")}}
    return StoredHidden(SplitFiles(folder, "train", steps.rows, layout), head.detach().clone())


def peer_loss(function: Callable) -> Callable:
    """Return the loss of another library as a step calls it: with bf16 hidden states and heads, one row per token."""

    def loss_function(hidden: Tensor, head: Tensor, targets: tuple, batch: dict, num_items: Tensor) -> KDLoss:
        teacher_hidden, teacher_head = targets
        states = [x.flatten(0, 1).bfloat16() for x in (hidden, teacher_hidden)]
        heads = [x.bfloat16() for x in (head, teacher_head)]
        labels = batch["labels"].flatten()
        with torch.autocast(labels.device.type, enabled=False):
            loss = function(states[0], heads[0], states[1], heads[1], labels, ALPHA, TEMPERATURE).float()
        return KDLoss(loss, loss.detach(), loss.detach(), num_items)

    return loss_function


def operations_per_token(model: BodyAndHead) -> int:
    """Return the operations of the matrix products of a forward pass: 2 per weight. A lookup of embeddings has none."""
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim >= 2)
    embedding, head = model.model.get_input_embeddings().weight, model.model.get_output_embeddings().weight
    return 2 * (weights if embedding is head else weights - embedding.numel())


def measure_steps(args: argparse.Namespace, device: torch.device, peak: float) -> None:
    print(f"\nSteps of {args.rows} x {args.length:,} tokens in documents of {args.document:,}:\n")
    columns = ["", "tokens/s", "share of peak", "peak memory, GB", *(f"{part}, ms" for part in PARTS), "last loss"]
    print("|", " | ".join(columns), "|\n" + "|---" * len(columns) + "|")
    for name in ("online", "offload", "stored"):
        run_steps(name, name, None, args, device, peak)
    for name, function in implementations.peers()[0].items():
        if name != "trl chunked":  # it has no cross-entropy
            run_steps(f"online, {name}", "online", peer_loss(function), args, device, peak)


def run_steps(title: str, targets: str, loss_function: Callable | None, args, device, peak: float) -> None:
    """Measure the steps of one kind and print a row of the table."""
    reset_memory(device)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        try:
            row = timed_steps(targets, loss_function, args, device, peak, Path(folder))
        except torch.OutOfMemoryError:
            row = ["out of memory", *[""] * 8]
    print("|", " | ".join([title, *row]), "|", flush=True)


def timed_steps(targets: str, loss_function: Callable | None, args, device, peak: float, folder: Path) -> list[str]:
    """Return the cells of a row: medians over the measured steps."""
    accelerator = start_accelerator()
    student, optimizer, teacher, steps, made_loss, operations = prepare(targets, args, accelerator, folder)
    clock, started = Clock(device), []
    timed_teacher = clock.timed("teacher forward", teacher)
    timed_loss = clock.timed("loss", loss_function or made_loss)
    accelerator.backward = clock.timed("backward", accelerator.backward)
    student.register_forward_pre_hook(lambda *_: started.append(clock.now()))
    student.register_forward_hook(lambda *_: clock.marks.append(("student and loss", started.pop(), clock.now())))
    rounds = []
    for number, micro_batches in enumerate(steps.prefetched(0)):
        if number == args.warmup:
            reset_memory(device)
        with clock.part("step"):
            losses, _ = train_step(student, timed_teacher, micro_batches, timed_loss, accelerator)
            with clock.part("clip, optimizer"):
                clip_gradients(student, 1.0, accelerator)
                optimizer.step()
                optimizer.zero_grad()
        seconds = clock.seconds()
        seconds["student forward"] = seconds["student and loss"] - seconds["loss"]
        rounds.append(seconds)
    median = {name: statistics.median(seconds[name] for seconds in rounds[args.warmup :]) for name in (*PARTS, "step")}
    tokens = args.rows * args.length
    speed, share = tokens / median["step"], tokens * operations / median["step"] / peak
    parts = [f"{1000 * median[part]:.1f}" for part in PARTS]
    return [f"{speed:,.0f}", f"{share:.0%}", peak_gb(device), *parts, f"{losses[0].item():.4f}"]


def prepare(targets: str, args: argparse.Namespace, accelerator: Accelerator, folder: Path) -> tuple:
    """Return student, optimizer, teacher, steps and loss as `kdkit.train.train` has them; and operations per token."""
    device, on_gpu = accelerator.device, accelerator.device.type == "cuda"
    config = DistillConfig(
        alpha=ALPHA, temperature=TEMPERATURE, batch_size=args.rows, max_length=args.length, learning_rate=1e-5,
        max_steps=args.warmup + args.rounds, compile_loss=on_gpu and not args.no_compile,
    )  # fmt: skip
    teacher = OnlineTeacher(make_model("teacher", args, device))
    student = BodyAndHead(make_model("student", args, device)).train()
    if args.gradient_checkpointing:
        student.recompute_activations()
    vocab_size = min(teacher.head_rows, student.head_rows)
    steps = Steps(make_rows(args, vocab_size), config, pad_token_id=0, on_gpu=on_gpu)
    optimizer = make_optimizer(student, config)
    student, optimizer = accelerator.prepare(student, optimizer)
    examine(teacher, "teacher", steps.rows, device)
    examine(student, "student", steps.rows, device)
    caps = {"student_cap": student.soft_cap, "teacher_cap": teacher.soft_cap}
    loss_function, _ = make_loss(config, steps, vocab_size, device, **caps)
    operations = operations_per_token(teacher)
    if targets == "stored":
        teacher = store_hidden(teacher, steps, folder, device)
        operations = 2 * teacher.head.numel()
    elif targets == "offload":
        teacher.cpu()
        teacher.place(accelerator, "offload")
    return student, optimizer, teacher, steps, loss_function, operations + 3 * operations_per_token(student)


# --- the loss alone


def make_inputs(args: argparse.Namespace, device: torch.device) -> list[Tensor]:
    """Return bf16 hidden states and heads, which give logits of a few nats, and labels."""
    torch.manual_seed(0)
    options, tensors = {"device": device, "dtype": torch.bfloat16}, []
    for width in (args.student_hidden, args.teacher_hidden):
        tensors.append(torch.randn(args.tokens, width, **options))
        tensors.append(torch.randn(args.vocab, width, **options) * (3 / width**0.5))
    labels = torch.randint(args.vocab, (args.tokens,), device=device)
    return [*tensors, labels]


def measure_loss(args: argparse.Namespace, device: torch.device, peak: float) -> None:
    sizes = f"N {args.tokens:,}, V {args.vocab:,}, H {args.student_hidden:,} and {args.teacher_hidden:,}, bf16"
    print(f"\nThe loss alone, {sizes}:\n")
    functions = {"kdkit": implementations.kdkit_fused}
    if not args.no_compile:
        functions["kdkit, compiled"] = partial(implementations.kdkit_fused, compile=True)
    peers, missing = implementations.peers()
    columns = ["", "forward, ms", "backward, ms", "share of peak", "peak memory, GB", "loss"]
    print("|", " | ".join(columns), "|\n" + "|---" * len(columns) + "|")
    inputs = make_inputs(args, device)
    for name, function in {**functions, **peers, "naive": implementations.naive}.items():
        try:
            row = timed_loss(function, inputs, args, device, peak)
        except torch.OutOfMemoryError:
            row = ["out of memory", *[""] * 4]
        print("|", " | ".join([name, *row]), "|", flush=True)
    print(*missing, sep="\n")


def timed_loss(function: Callable, inputs: list[Tensor], args, device, peak: float) -> list[str]:
    """Return the cells of one loss. The peak of memory includes both gradients, but not the inputs."""
    clock, rounds = Clock(device), []
    for number in range(args.warmup + args.rounds):
        if number == args.warmup:
            before = reset_memory(device)
        hidden, head = (x.detach().requires_grad_() for x in inputs[:2])
        with clock.part("forward"):
            loss = function(hidden, head, *inputs[2:], ALPHA, TEMPERATURE)
        with clock.part("backward"):
            loss.backward()
        rounds.append(clock.seconds())
    forward, backward = (
        statistics.median(seconds[part] for seconds in rounds[args.warmup :]) for part in ("forward", "backward")
    )
    operations = 2 * args.tokens * args.vocab * (3 * args.student_hidden + args.teacher_hidden)
    share = operations / (forward + backward) / peak
    memory = peak_gb(device, before)
    return [f"{1000 * forward:.1f}", f"{1000 * backward:.1f}", f"{share:.0%}", memory, f"{loss.item():.4f}"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="the config.json, or its folder, of the teacher; by default Qwen2.5-1.5B")
    parser.add_argument("--student", help="the config.json, or its folder, of the student; by default Qwen2.5-0.5B")
    parser.add_argument("--attn_implementation", help="sdpa, flash_attention_2, ...")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--no_compile", action="store_true", help="do not compile kdkit's loss")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--document", type=int, default=512, help="tokens of a document in the rows")
    parser.add_argument("--tokens", type=int, default=8192, help="of the loss alone, as the next three")
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--student_hidden", type=int, default=2048)
    parser.add_argument("--teacher_hidden", type=int, default=4096)
    parser.add_argument("--warmup", type=int, default=3, help="steps before those that are measured")
    parser.add_argument("--rounds", type=int, default=10, help="steps that are measured; the table has medians")
    parser.add_argument("--peak_size", type=int, default=8192, help="of the square matrices of the peak")
    parser.add_argument("--folder", help="where stored targets are written; by default where temporary files are")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models and shapes: to try this script")
    parser.add_argument("--only", choices=["steps", "loss"])
    args = parser.parse_args(argv)
    if args.tiny:
        vars(args).update(TINY_ARGUMENTS, no_compile=True)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU: --device cpu --tiny tries this script without one")
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    peak = measure_peak(args, device)
    print(f"{name}, torch {torch.__version__}; a bf16 product reaches {peak / 1e12:,.1f} TFLOP/s")
    if args.only != "loss":
        measure_steps(args, device, peak)
    if args.only != "steps":
        measure_loss(args, device, peak)


if __name__ == "__main__":
    main()
