"""Measure speed, memory and precision of the loss, and compare with matrix products alone and with other libraries.

    OMP_NUM_THREADS=1 python benchmarks/loss.py                     # N 2,048, V 32,000, 30% masked, bf16
    OMP_NUM_THREADS=1 python benchmarks/loss.py --vocab 151936 --rounds 3
    OMP_NUM_THREADS=1 python benchmarks/loss.py --masked 0 | --dtype float32 | --only precision
    OMP_NUM_THREADS=1 python benchmarks/loss.py --baseline 1ca873f [--divergence jsd] --only speed memory

Every round runs each loss once and gives ratios of process time within this round, since other programs on the machine
change such ratios least; the table has the median and the range over the rounds. Memory is the growth of the peak
resident size, measured for each loss in its own process after a warm-up on a small problem.

There are two lower bounds of the time: the four products of the valid tokens with all results in the dtype of the
operands (`products`), and with fp32 logits (`products, fp32 logits`), which a precise loss needs on a CPU. A GPU takes
the same time for both.
"""

import argparse
import gc
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import implementations

from kdkit import fused
from kdkit.losses import DIVERGENCES

ALPHA, TEMPERATURE = 0.5, 2.0


def make_inputs(args: argparse.Namespace, tokens: int, vocab: int) -> list[torch.Tensor]:
    """Return random hidden states, heads that give logits of a few nats, and labels, some of them masked."""
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for width in (args.student_hidden, args.teacher_hidden):
        tensors += [torch.randn(tokens, width, generator=generator), torch.randn(vocab, width, generator=generator)]
        tensors[-1] *= 3 / width**0.5
    tensors = [x.to(getattr(torch, args.dtype)) for x in tensors]
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < args.masked / 100] = -100
    return [*tensors, labels]


def forward_and_backward(loss_function, inputs: list[torch.Tensor]) -> None:
    hidden, head, *rest = inputs
    hidden, head = hidden.detach().requires_grad_(), head.detach().requires_grad_()
    loss_function(hidden, head, *rest, ALPHA, TEMPERATURE).backward()


def products(inputs: list[torch.Tensor], fp32_logits: bool):
    """Return a function that computes only the four matrix products: a lower bound of the time of a loss."""
    hidden, head, teacher_hidden, teacher_head, labels = inputs
    hidden, teacher_hidden = hidden[labels != -100], teacher_hidden[labels != -100]
    student = fused._Model(hidden, head, hidden.dtype)
    teacher = fused._Model(teacher_hidden, teacher_head, hidden.dtype)
    rows = torch.arange(len(hidden))
    grad = torch.randn(1, len(head)).to(hidden.dtype).expand(len(hidden), -1).contiguous()
    logits = torch.empty(len(hidden), len(head), dtype=torch.float32 if fp32_logits else hidden.dtype)
    d_hidden, d_head = torch.empty_like(hidden), torch.zeros_like(head)

    def run() -> None:
        for model in (student, teacher):
            fused._logits(model, rows, logits)
        torch.mm(grad, head, out=d_hidden)
        torch.mm(grad.T, hidden, out=d_head)

    return run


def contenders(args: argparse.Namespace) -> dict:
    peers, missing = implementations.peers()
    if multiprocessing.parent_process() is None:
        print(*missing, sep="\n", end="\n" if missing else "")
    everything = {"kdkit fused": implementations.kdkit_fused}
    everything["kdkit fused, compiled"] = partial(implementations.kdkit_fused, compile=True)
    if args.baseline:
        everything[f"kdkit fused, {args.baseline}"] = implementations.kdkit_fused_at(args.baseline)
    if args.divergence != "forward_kl":  # the other libraries have no other divergence of the same name
        return {name: partial(x, divergence=args.divergence) for name, x in everything.items()}
    for size in args.chunk_sizes:
        everything[f"kdkit fused, chunks of {size}"] = partial(implementations.kdkit_fused, chunk_size=size)
    everything |= {"naive": implementations.naive, **peers}
    return {name: x for name, x in everything.items() if not args.of or name in args.of}


def measure_speed(args: argparse.Namespace) -> None:
    inputs = make_inputs(args, args.tokens, args.vocab)
    runs = {"products": products(inputs, False)}
    if inputs[0].dtype != torch.float32:
        runs["products, fp32 logits"] = products(inputs, True)
    for name, function in contenders(args).items():
        runs[name] = partial(forward_and_backward, function, inputs)
    clock = time.perf_counter if args.wall else time.process_time
    seconds = {name: [] for name in runs}
    for number in range(args.rounds + 1):  # the first round is a warm-up, which also compiles
        for name, run in runs.items():
            print(f"\rround {number} of {args.rounds}: {name:30s}", end="", file=sys.stderr, flush=True)
            start = clock()
            run()
            seconds[name].append(clock() - start)
            gc.collect()
    print(file=sys.stderr)

    def ratio(above: str, below: str) -> str:
        if not {above, below} <= seconds.keys():
            return ""
        ratios = [x / y for x, y in zip(seconds[above][1:], seconds[below][1:], strict=True)]
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"

    print("\n| | seconds | x products | x products, fp32 logits | x baseline | naive / this | compiled Liger / this |")
    print("|---|---|---|---|---|---|---|")
    for name in runs:
        baseline = f"kdkit fused, {args.baseline}"
        floors = ratio(name, "products"), ratio(name, "products, fp32 logits"), ratio(name, baseline)
        times = ratio("naive", name), ratio("liger compiled", name)
        print("|", " | ".join([name, f"{statistics.median(seconds[name][1:]):.2f}", *floors, *times]), "|", flush=True)


def resident_mb(field: str) -> float:
    """Return VmRSS, or its peak VmHWM, in MB; on systems without /proc, the peak since the start of the process."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_memory(args: argparse.Namespace, name: str, queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(args.threads)
    function = contenders(args)[name]
    small = make_inputs(args, 64, 640)
    inputs = make_inputs(args, args.tokens, args.vocab)
    for _ in range(2):
        forward_and_backward(function, inputs if "compiled" in name else small)  # so that compiling is not measured
    gc.collect()
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current size
    before = resident_mb("VmRSS")
    forward_and_backward(function, inputs)
    queue.put(resident_mb("VmHWM") - before)


def measure_memory(args: argparse.Namespace) -> None:
    item = getattr(torch, args.dtype).itemsize
    outputs = item * args.student_hidden * (args.vocab + args.tokens) / 2**20
    print(f"\nPeak extra memory, MB (the two gradients alone are {outputs:.0f}):\n\n| | MB |\n|---|---|")
    spawn = multiprocessing.get_context("spawn")  # a new process each: allocators keep freed memory
    for name in contenders(args):
        queue = spawn.Queue()
        process = spawn.Process(target=peak_memory, args=(args, name, queue))
        process.start()
        process.join()
        print(f"| {name} | {queue.get():.0f} |" if process.exitcode == 0 else f"| {name} | failed |", flush=True)


def nearly_equal_pair(kl: float, tokens: int = 256, vocab: int = 8000, hidden: int = 256) -> list[torch.Tensor]:
    """Return bf16 hidden states and heads of a teacher and of a student with noise, at about this KL, and labels."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, hidden, generator=generator)
    head, noise = (torch.randn(vocab, hidden, generator=generator) * (x / hidden) ** 0.5 for x in (16.0, 2.4 * kl))
    labels = torch.randint(vocab, (tokens,), generator=generator)
    return [*(x.bfloat16() for x in (h, head + noise, h, head)), labels]


@torch.no_grad()
def real_pairs(folder: str, layers: list[int], tokens: int = 256) -> list[list[torch.Tensor]]:
    """Return the same for a real teacher and students cut from its layers, in bf16, on the embedded held-out text."""
    from kdkit import DistillConfig
    from kdkit.data import collate, load_rows
    from kdkit.models import BodyAndHead, load_teacher, load_tokenizer, student_from_layers

    config = DistillConfig(teacher_model=folder, max_eval_tokens=tokens, max_length=tokens)
    tokenizer, teacher = load_tokenizer(config), load_teacher(folder)
    batch = collate(load_rows(config, tokenizer)[1][:1], tokenizer.pad_token_id)

    def states(model) -> list[torch.Tensor]:
        return list(BodyAndHead(model)(batch, lambda hidden, head: (hidden[0], head.detach())))

    students = [student_from_layers(teacher, count).bfloat16().eval() for count in layers]
    return [[*states(student), *states(teacher), batch["labels"][0]] for student in students]


def relative_errors(function, inputs: list[torch.Tensor]) -> list[float]:
    """Return the errors of the gradients of hidden states and head at alpha = 0 and T = 1, relative to float64."""

    def gradients(loss_function, tensors):
        hidden, head = (x.detach().requires_grad_() for x in tensors[:2])
        return torch.autograd.grad(loss_function(hidden, head, *tensors[2:], 0.0, 1.0), (hidden, head))

    exact = gradients(implementations.kdkit_dense, [x.double() for x in inputs[:-1]] + inputs[-1:])
    got = gradients(function, inputs)
    return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(got, exact, strict=True)]


def measure_precision(args: argparse.Namespace) -> None:
    print("\nRelative error of the gradients, with bf16 weights and hidden states, compared with float64:\n")
    if args.model:
        print(f"{Path(args.model).name}, and students cut from {args.layers} of its layers\n")
    pairs = real_pairs(args.model, args.layers) if args.model else [nearly_equal_pair(kl) for kl in (4.0, 0.4, 0.04)]
    with torch.no_grad():
        kls = [f"{implementations.kdkit_fused(*pair, 0.0, 1.0).item():.3f}" for pair in pairs]
    heading = ["", *(f"dh, KL {x}" for x in kls), *(f"dW, KL {x}" for x in kls)]
    print("|", " | ".join(heading), "|\n" + "|---" * len(heading) + "|")
    for name, function in {**contenders(args), "kdkit dense": implementations.kdkit_dense}.items():
        errors = torch.tensor([relative_errors(function, pair) for pair in pairs]).T.flatten().tolist()
        print("|", " | ".join([name, *(f"{100 * x:.2f}%" for x in errors)]), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--student-hidden", type=int, default=896)
    parser.add_argument("--teacher-hidden", type=int, default=1536)
    parser.add_argument("--masked", type=int, default=30, help="percent of the tokens")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wall", action="store_true", help="measure wall time: for several threads on an idle machine")
    parser.add_argument("--chunk-sizes", type=int, nargs="*", default=[], help="also measure kdkit with these")
    parser.add_argument("--only", choices=["speed", "memory", "precision"], nargs="*")
    parser.add_argument("--model", help="precision: the folder of a real teacher, instead of synthetic pairs")
    parser.add_argument("--layers", type=int, nargs="+", default=[29, 27, 20], help="with --model: of each student")
    parser.add_argument("--baseline", metavar="COMMIT", help="also measure the fused loss of an earlier commit")
    parser.add_argument("--divergence", default="forward_kl", choices=DIVERGENCES, help="another one: kdkit only")
    parser.add_argument("--of", nargs="*", help="names of the losses to measure; all by default")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    isa = torch.backends.cpu.get_cpu_capability()
    amx = "with AMX" if torch.cpu._is_amx_tile_supported() else "no AMX"
    print(f"{platform.machine()} {isa} {amx}, torch {torch.__version__}, {args.threads} thread(s){load}")
    print(f"N {args.tokens} ({args.masked}% masked), V {args.vocab}, {args.dtype}, alpha {ALPHA}, T {TEMPERATURE}")
    for name in args.only or ("speed", "memory", "precision"):
        {"speed": measure_speed, "memory": measure_memory, "precision": measure_precision}[name](args)


if __name__ == "__main__":
    main()
