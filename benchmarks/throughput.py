"""Whole training steps of kdkit, of TRL's GKD trainer and of a plain loop: tokens per second, memory, the loop's share.

    OMP_NUM_THREADS=1 python benchmarks/throughput.py                        # SmolLM2's sizes at full depth
    OMP_NUM_THREADS=1 python benchmarks/throughput.py --student-layers 6 --teacher-layers 6 --rounds 5

All three train the same student from the same teacher on the same batch, step after step: random weights in the shapes
of SmolLM2-135M and SmolLM2-360M (V 49,152), rows of token ids drawn by a power law, whose first part is a prompt and
not in the loss. Same for all: forward KL at T = 1 over the tokens in the loss, an fp32 student under bf16 autocast, a
bf16 teacher, kdkit's AdamW, its schedule, clipping at norm 1, no gradient checkpointing, one micro-batch a step. That
they do the same is checked: the loss of each step is printed for each.

- kdkit is `kdkit.train.train` itself, on rows with a prompt in place of those of a text file.
- TRL's is `trl.experimental.gkd.GKDTrainer` with lmbda = 0 (no text of the student's own) and beta = 0 (forward KL).
- The plain loop holds both models' logits and calls F.kl_div.
- The models alone are both without their heads, and a backward pass: the floor of all three. No optimizer's step.

Each run is a process of its own; a round is one run of each, one after the other. A step is timed from the end of the
step before, in process time, which a busy machine disturbs least; the first step, which fills the optimizer's state,
is left out. Speeds are compared within a round. Memory is the peak of resident size after the first step, over what
is resident at its end: models and AdamW's state, no gradients. What a step adds beyond the loss is the same for all:
the gradients, and the activations that the student keeps for its backward.
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F

import kdkit.train as kdkit_train
from kdkit.config import DistillConfig
from kdkit.losses import IGNORE_INDEX
from kdkit.models import BodyAndHead, load_student, load_teacher

SHAPES = {  # SmolLM2-135M and SmolLM2-360M
    "student": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    "teacher": {"hidden_size": 960, "intermediate_size": 2560, "num_attention_heads": 15, "num_key_value_heads": 5},
}


# --- the same for all ----------------------------------------------------------------------------------------


def make_models(folder: Path, args: argparse.Namespace) -> None:
    """Two model folders with random weights, and a tokenizer of as many words."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(args.vocab)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0")
    torch.manual_seed(0)
    for role, shape in SHAPES.items():
        layers = getattr(args, f"{role}_layers")
        rest = {"tie_word_embeddings": True, "rope_theta": 100000.0, "max_position_embeddings": 8192}
        config = LlamaConfig(vocab_size=args.vocab, num_hidden_layers=layers, **shape, **rest)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)


def make_rows(args: argparse.Namespace) -> list[list[int]]:
    """Token ids as frequent as a power law has it, as words are."""
    generator = torch.Generator().manual_seed(0)
    frequency = 1 / torch.arange(1, args.vocab + 1, dtype=torch.float64)
    size = args.batch_size, args.length
    return torch.multinomial(frequency, size[0] * size[1], True, generator=generator).view(size).tolist()


def prompt_tokens(args: argparse.Namespace) -> int:
    return round(args.length * args.prompt / 100)


def labels_of(ids: list[int], args: argparse.Namespace) -> list[int]:
    """Not shifted: the prompt is -100."""
    prompt = prompt_tokens(args)
    return [IGNORE_INDEX] * prompt + ids[prompt:]


def make_config(folder: Path, args: argparse.Namespace) -> DistillConfig:
    models = {"teacher_model": str(folder / "teacher"), "student_model": str(folder / "student")}
    return DistillConfig(
        **models,
        batch_size=args.batch_size,
        max_length=args.length,
        max_steps=args.steps + 1,
        learning_rate=1e-4,
        output_dir=str(folder / f"run_{os.getpid()}"),
        logging_steps=1,
        eval_steps=None,
        save_steps=None,
        use_wandb=False,
    )


def resident_mb(field: str) -> float:
    """VmRSS, or VmHWM, its peak; 0 on systems without /proc."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field)), 0.0)


class Meter:
    """Process time between the ends of steps, and the peak of memory from the end of the first on."""

    def __init__(self):
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.resident = 0.0
        self.start()

    def start(self) -> None:
        self.since = time.process_time()

    def end_of_step(self) -> None:
        self.seconds.append(time.process_time() - self.since)
        if len(self.seconds) == 1 and Path("/proc/self/clear_refs").exists():
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # or what the first step left behind would be taken for the models
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
            self.resident = resident_mb("VmRSS")
        self.start()

    def result(self, **more) -> dict:
        peak = resident_mb("VmHWM") - self.resident
        return {"seconds": self.seconds[1:], "losses": self.losses, "mb": peak, "resident": self.resident, **more}


# --- the three -----------------------------------------------------------------------------------------------


class _Done(Exception):
    """Leaves the loop before the last checkpoint is written."""


def run_kdkit(folder: Path, args: argparse.Namespace) -> dict:
    """kdkit's own loop. Its parts are timed where the loop calls them; what is left of a step is the loop itself."""
    meter, parts = Meter(), Counter()

    def timed(name: str, function):
        def call(*arguments, **options):
            start = time.process_time()
            result = function(*arguments, **options)
            parts[name] += time.process_time() - start
            return result

        return call

    def rows(*_) -> tuple[list[dict], list[dict]]:
        def row(ids: list[int]) -> dict:
            labels = [*labels_of(ids, args)[1:], IGNORE_INDEX]
            return {"input_ids": ids, "labels": labels, "position_ids": list(range(len(ids)))}

        training = [row(ids) for ids in make_rows(args)]
        return training, [{key: value[-8:] for key, value in training[0].items()}]  # next to nothing to evaluate on

    def watch(event: dict) -> None:
        if "train/loss" not in event:
            parts.clear()
            return meter.start()
        meter.losses.append(event["train/loss"])
        meter.end_of_step()
        if event["train/step"] == 1:
            parts.clear()
        if event["train/step"] == args.steps + 1:
            raise _Done

    def make_optimizer(*arguments):
        optimizer = make(*arguments)
        optimizer.step = timed("AdamW", optimizer.step)
        return optimizer

    make = kdkit_train.make_optimizer
    kdkit_train.load_rows, kdkit_train.make_optimizer = rows, make_optimizer
    kdkit_train.clip_gradients = timed("clipping", kdkit_train.clip_gradients)
    make_loss = kdkit_train.make_loss

    def timed_loss(*arguments):
        loss_function, line = make_loss(*arguments)
        return timed("loss", loss_function), line

    kdkit_train.make_loss = timed_loss
    BodyAndHead.__call__ = timed("models and loss", BodyAndHead.__call__)
    start = kdkit_train.start_accelerator

    def start_accelerator():
        accelerator = start()
        accelerator.backward = timed("models and loss", accelerator.backward)
        return accelerator

    kdkit_train.start_accelerator = start_accelerator
    try:
        kdkit_train.train(make_config(folder, args), watch)
    except _Done:
        return meter.result(parts=dict(parts))


def run_trl(folder: Path, args: argparse.Namespace) -> dict:
    """TRL's trainer, with kdkit's optimizer and schedule."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    config, meter = make_config(folder, args), Meter()
    teacher = load_teacher(config.teacher_model, torch.bfloat16)
    student = load_student(config, teacher)

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    class Watch(TrainerCallback):
        def on_train_begin(self, *_, **__):
            meter.start()

        def on_step_end(self, *_, **__):
            meter.end_of_step()

        def on_log(self, arguments, state, control, logs=None, **_):
            meter.losses += [logs["loss"]] if "loss" in logs else []

    optimizer = kdkit_train.make_optimizer(student, config)
    schedule = partial(kdkit_train.learning_rate, num_steps=config.max_steps, config=config)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step) / config.learning_rate)
    arguments = GKDConfig(
        output_dir=config.output_dir,
        lmbda=0.0,
        beta=0.0,
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=False,  # it is on by default, here and not in the other two
        max_grad_norm=config.max_grad_norm,
        per_device_train_batch_size=args.batch_size,
        max_steps=config.max_steps,
        max_length=args.length,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=arguments,
        data_collator=collate,
        train_dataset=Dataset.from_list([{"input_ids": x, "labels": labels_of(x, args)} for x in make_rows(args)]),
        processing_class=AutoTokenizer.from_pretrained(config.teacher_model),
        optimizers=(optimizer, scheduler),
        callbacks=[Watch()],
    )
    trainer.train()
    return meter.result()


def plain_loss(teacher, student, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            target = teacher(ids, use_cache=False).logits[:, :-1].float()  # in bf16 the KL would be off by 2%
        logits = student(ids, use_cache=False).logits[:, :-1].float()
    log_q, log_p = F.log_softmax(logits, -1), F.log_softmax(target, -1)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return kl[labels != IGNORE_INDEX].mean()


def run_plain(folder: Path, args: argparse.Namespace) -> dict:
    """What is written first."""
    config, meter = make_config(folder, args), Meter()
    teacher = load_teacher(config.teacher_model, torch.bfloat16)
    student = load_student(config, teacher)
    optimizer = kdkit_train.make_optimizer(student, config)
    ids = torch.tensor(make_rows(args))
    labels = torch.tensor([labels_of(row, args) for row in ids.tolist()])[:, 1:]
    meter.start()
    for step in range(config.max_steps):
        loss = plain_loss(teacher, student, ids, labels)  # a function, so that no logits outlive it
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = kdkit_train.learning_rate(step, config.max_steps, config)
        optimizer.step()
        optimizer.zero_grad()
        meter.losses.append(loss.item())
        meter.end_of_step()
    return meter.result()


def run_models(folder: Path, args: argparse.Namespace) -> dict:
    """The floor: both models without their heads, and a backward pass from a gradient that is there already."""
    config, meter = make_config(folder, args), Meter()
    teacher = load_teacher(config.teacher_model, torch.bfloat16)
    student = load_student(config, teacher)
    optimizer = kdkit_train.make_optimizer(student, config)
    teacher, student = BodyAndHead(teacher), BodyAndHead(student)
    ids = torch.tensor(make_rows(args))
    batch = {"input_ids": ids, "position_ids": torch.arange(args.length).expand_as(ids)}
    gradient = torch.randn(*ids.shape, SHAPES["student"]["hidden_size"]) / ids.numel()
    for step in range(config.max_steps):
        meter.start()
        with torch.no_grad():
            teacher(batch, lambda hidden, _: hidden)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = student(batch, lambda hidden, _: hidden)
        hidden.backward(gradient.to(hidden.dtype))
        del hidden
        if step == 0:
            optimizer.step()  # for its state: it is not part of what is timed from here on
        optimizer.zero_grad()
        meter.end_of_step()
    return meter.result()


RUNS = {"kdkit": run_kdkit, "TRL GKD": run_trl, "plain loop": run_plain, "models alone": run_models}


# --- rounds and tables ---------------------------------------------------------------------------------------


def _child(name: str, folder: Path, args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if not args.verbose:
        sys.stderr = sys.stdout
    (folder / "result.json").write_text(json.dumps(RUNS[name](folder, args)))


def in_own_process(name: str, folder: Path, args: argparse.Namespace) -> dict:
    path = folder / "result.json"
    path.unlink(missing_ok=True)
    process = multiprocessing.get_context("spawn").Process(target=_child, args=(name, folder, args))
    process.start()
    process.join()
    if not path.exists():
        sys.exit(f"{name} failed (exit code {process.exitcode}): --verbose shows why")
    return json.loads(path.read_text())


def spread(values: list[float], pattern: str = "{:.2f}") -> str:
    low, middle, high = (pattern.format(f(values)) for f in (min, statistics.median, max))
    return f"{middle} ({low}-{high})"


def report(results: dict[str, list[dict]], args: argparse.Namespace) -> None:
    tokens = args.batch_size * args.length
    seconds = {name: [statistics.median(run["seconds"]) for run in runs] for name, runs in results.items()}
    print("\n| | seconds a step | tokens a second | x kdkit's time | peak over the models, MB | of kdkit's peak |")
    print("|---|---|---|---|---|---|")
    for name, runs in results.items():
        ratios = [x / y for x, y in zip(seconds[name], seconds["kdkit"], strict=True)]
        memory = [run["mb"] for run in runs]
        shares = [x / y["mb"] for x, y in zip(memory, results["kdkit"], strict=True)]
        speeds = [tokens / x for x in seconds[name]]
        cells = spread(seconds[name]), spread(speeds, "{:.0f}"), spread(ratios), spread(memory, "{:.0f}")
        print("|", " | ".join([name, *cells, spread(shares)]), "|")
    print("\nLoss of each step, nats per token:")
    for name, runs in results.items():
        if runs[0]["losses"]:
            print(f"  {name:12s}", "  ".join(f"{loss:.5f}" for loss in runs[0]["losses"]))

    print("\nWhere the process time of kdkit's steps goes:\n\n| | share |\n|---|---|")
    shares = []
    for run in results["kdkit"]:
        parts, whole = Counter(run["parts"]), sum(run["seconds"])
        parts["models"] = parts.pop("models and loss") - parts["loss"]
        parts["the rest of the loop"] = whole - sum(parts.values())
        shares.append({name: 100 * value / whole for name, value in parts.items()})
    for name in ("models", "loss", "AdamW", "clipping", "the rest of the loop"):
        print(f"| {name} | {spread([share[name] for share in shares], '{:.1f}%')} |")
    loop = [100 - share["models"] - share["loss"] for share in shares]
    print(f"| all but models and loss | {spread(loop, '{:.1f}%')} |")
    if "models alone" in results:
        runs = zip(results["kdkit"], results["models alone"], strict=True)
        apart = [100 - 100 * (sum(x["seconds"]) + k["parts"]["loss"]) / sum(k["seconds"]) for k, x in runs]
        print(f"| the same, from the models alone in a process of their own | {spread(apart, '{:.1f}%')} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student-layers", type=int, default=30, help="SmolLM2-135M has 30")
    parser.add_argument("--teacher-layers", type=int, default=32, help="SmolLM2-360M has 32")
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--prompt", type=int, default=30, help="percent of a row that is not in the loss")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a run, after one that is not")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--of", nargs="*", choices=list(RUNS), default=list(RUNS), help="kdkit is always run")
    parser.add_argument("--verbose", action="store_true", help="show what the runs write to stderr")
    args = parser.parse_args()
    names = [name for name in RUNS if name == "kdkit" or name in args.of]
    if "TRL GKD" in names and importlib.util.find_spec("trl") is None:
        names.remove("TRL GKD")
        print("TRL GKD is skipped (trl is not installed); pip install 'kdkit[peers]' has it")

    isa = torch.backends.cpu.get_cpu_capability()
    amx = "with AMX" if torch.cpu._is_amx_tile_supported() else "no AMX"
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    packages = ["torch", "transformers", "accelerate", *(["trl"] if "TRL GKD" in names else [])]
    print(f"{platform.machine()} {isa} {amx}, {args.threads} thread(s){load}")
    print(", ".join(f"{name} {version(name)}" for name in packages))
    total, valid = args.batch_size * args.length, args.batch_size * (args.length - prompt_tokens(args))
    print(
        f"student hidden 576 x {args.student_layers} layers, teacher hidden 960 x {args.teacher_layers} layers,", end=""
    )
    print(f" V {args.vocab}, {args.batch_size} rows x {args.length} tokens, {valid / total:.0%} of them in the loss")

    results = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder, args)
        for number in range(args.rounds):
            for name in names:
                print(f"\rround {number + 1} of {args.rounds}: {name:12s}", end="", file=sys.stderr, flush=True)
                results[name].append(in_own_process(name, folder, args))
    print(file=sys.stderr)
    report(results, args)


if __name__ == "__main__":
    main()
