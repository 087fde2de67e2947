"""Compare stored targets with the online teacher: the error of top-k, the trained students, and the time saved.

python benchmarks/targets.py error                           # error of the loss and its gradient, embedded pair
python benchmarks/targets.py error --model FOLDER --student_layers 25     # a real teacher, and a student cut from it
python benchmarks/targets.py students --seeds 3              # metrics of students of recipes/demo.yaml: ten minutes
python benchmarks/targets.py cost                            # time and memory of three epochs, sizes of SmolLM2
"""

import argparse
import contextlib
import io
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

from kdkit import DistillConfig, load_config
from kdkit.data import collate, load_rows
from kdkit.losses import IGNORE_INDEX, forward_kl, in_buckets, top_k
from kdkit.models import load_student, load_teacher, load_tokenizer
from kdkit.targets import store
from kdkit.train import train

KS = (8, 16, 32, 64, 128, 256, 512)


def versions() -> str:
    return (
        f"{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} CPU threads"
    )


def table(header: list[str], rows: list[list[str]]) -> None:
    for row in [header, ["---"] * len(header), *rows]:
        print(f"| {' | '.join(row)} |")


# --- error ---------------------------------------------------------------------------------------------------


def quiet_train(config: DistillConfig) -> list[dict]:
    with contextlib.redirect_stdout(io.StringIO()):
        return train(config)


def make_pair(args: argparse.Namespace, folder: str):
    """Return a teacher and a student: cut from the layers of a real teacher, or the embedded student after training."""
    fields = dict(max_length=256, max_eval_tokens=args.tokens, use_wandb=False, output_dir=f"{folder}/run")
    if args.model:
        config = DistillConfig(teacher_model=args.model, student_layers=args.student_layers, **fields)
        teacher = load_teacher(args.model, torch.float32)
        return config, teacher, load_student(config, teacher).eval()
    config = DistillConfig(max_train_tokens=40_000, batch_size=4, max_steps=args.steps, eval_steps=None, **fields)
    quiet_train(config)
    return config, load_teacher(dtype=torch.float32), AutoModelForCausalLM.from_pretrained(f"{folder}/run/final").eval()


def error(args: argparse.Namespace) -> None:
    """Print, over held-out tokens, the KL over K + 1 buckets as a fraction of the full KL, and the relative error of
    the gradient, with a tail bucket and without (with the K probabilities scaled to sum to 1)."""
    with tempfile.TemporaryDirectory() as folder:
        config, teacher, student = make_pair(args, folder)
        tokenizer = load_tokenizer(config)
        rows = load_rows(config, tokenizer)[1]
        kl = dict.fromkeys((0, *KS), 0.0)
        squares = {name: dict.fromkeys((0, *KS), 0.0) for name in ("tail", "no tail")}
        mass, num_tokens = dict.fromkeys(KS, 0.0), 0
        for row in tqdm(rows, desc="rows"):
            batch = collate([row], tokenizer.pad_token_id)
            inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
            valid = batch["labels"] != IGNORE_INDEX
            with torch.no_grad():
                t, z = (model(**inputs, use_cache=False).logits[valid].double() for model in (teacher, student))
            p, q = t.softmax(-1), z.softmax(-1)
            num_tokens += len(t)
            kl[0] += forward_kl(z, t).sum().item()
            squares["tail"][0] += (q - p).square().sum().item()  # the gradient of the full KL
            for k in KS:
                ids, log_p = top_k(t, k)
                log_q = in_buckets(z.log_softmax(-1), ids)
                kl[k] += (log_p.exp() * (log_p - log_q)).sum().item()
                mass[k] += log_p[:, :-1].exp().sum().item()
                # the gradient of the tail bucket is distributed over its tokens in proportion to q
                ratio = (log_p[:, -1:] - log_q[:, -1:]).exp()
                estimate = q * (1 - ratio)
                estimate.scatter_(-1, ids, q.gather(-1, ids) - log_p[:, :-1].exp())
                squares["tail"][k] += (estimate - (q - p)).square().sum().item()
                scaled_up = torch.zeros_like(p).scatter_(-1, ids, log_p[:, :-1].softmax(-1))
                squares["no tail"][k] += (p - scaled_up).square().sum().item()
    print(f"\n{(args.model and Path(args.model).name) or 'embedded pair'}, {num_tokens:,} held-out tokens, full KL "
          f"{kl[0] / num_tokens:.3f} nats per token; {versions()}\n")  # fmt: skip
    full = squares["tail"][0]
    table(
        ["K", "teacher's mass in the K", "KL over buckets / full KL", "gradient error", "gradient error, no tail"],
        [
            [f"{k}", f"{mass[k] / num_tokens:.2%}", f"{kl[k] / kl[0]:.3f}", f"{(squares['tail'][k] / full) ** 0.5:.2%}",
             f"{(squares['no tail'][k] / full) ** 0.5:.2%}"]
            for k in KS
        ],
    )  # fmt: skip


# --- students ------------------------------------------------------------------------------------------------


def students(args: argparse.Namespace) -> None:
    """Train recipes/demo.yaml with targets of several kinds, and print the metrics on all held-out text."""
    kinds = {"top 8": ("top_k", 8), "top 64": ("top_k", 64), "hidden states": ("hidden", 64), "online": ("online", 64)}
    results: dict[str, list[dict]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory() as folder:
        for name, seed in tqdm([(name, seed) for name in kinds for seed in range(args.seeds)], desc="runs"):
            kind, k = kinds[name]
            config = load_config(
                ["--config", "recipes/demo.yaml", f"--seed={seed}", f"--max_steps={args.steps}", f"--targets={kind}",
                 f"--top_k={k}", f"--targets_dir={folder}/{name}", "--max_eval_tokens=null", "--eval_steps=null",
                 "--save_steps=null", f"--output_dir={folder}/run_{name}_{seed}"]
            )  # fmt: skip
            if kind != "online" and seed == 0:
                with contextlib.redirect_stdout(io.StringIO()):
                    store(config)
            results[name].append(quiet_train(config)[-1])
    print(f"\n{versions()}; {args.steps} steps; mean ± standard deviation over {args.seeds} seeds\n")
    keys = ("eval/ce_loss", "eval/kl_t1", "eval/top1_agreement", "eval/acceptance_rate")
    rows = []
    for name, runs in results.items():
        values = [[run[key] for run in runs] for key in keys]
        spread = [statistics.stdev(x) if len(x) > 1 else 0.0 for x in values]
        rows.append([name, *(f"{statistics.mean(x):.3f} ± {s:.3f}" for x, s in zip(values, spread, strict=True))])
    table(["targets", "held-out CE", "KL to the teacher", "top-1 agreement", "acceptance"], rows)


# --- cost ----------------------------------------------------------------------------------------------------


def make_models(folder: Path, student_layers: int) -> None:
    """Write a teacher of the size of SmolLM2-135M and a student config with fewer layers. Weights are random: only the
    time is measured."""
    tokenizer = load_tokenizer(DistillConfig())
    for name, layers in (("teacher", 30), ("student", student_layers)):
        config = LlamaConfig(
            vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=8192,
        )  # fmt: skip
        if name == "teacher":
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / name)
        else:
            config.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def cost_fields(folder: Path, targets: str, args: argparse.Namespace) -> DistillConfig:
    return DistillConfig(
        teacher_model=str(folder / "teacher"), student_model=str(folder / "student"), student_random_init=True,
        max_train_tokens=args.tokens, max_eval_tokens=256, max_length=256, batch_size=4, num_epochs=args.epochs,
        learning_rate=1e-4, logging_steps=1000, eval_steps=None, save_steps=None, use_wandb=False, targets=targets,
        targets_dir=str(folder / targets), output_dir=str(folder / f"run_{targets}"), resume="never",
    )  # fmt: skip


def cost_child(folder: Path, targets: str, what: str, args: argparse.Namespace) -> None:
    config = cost_fields(folder, targets, args)
    since, wall = time.process_time(), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        (store if what == "store" else train)(config)
    print(json.dumps({
        "cpu": time.process_time() - since, "wall": time.perf_counter() - wall,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }))  # fmt: skip


def cost(args: argparse.Namespace) -> None:
    """Measure storing and training, each in its own process. Ratios are of CPU time, within one round."""
    print(f"\nTeacher of 30 layers, {args.tokens:,} tokens, {args.epochs} epochs; {versions()}")
    for layers in args.layers:
        results: dict = {}
        for _ in tqdm(range(args.rounds), desc=f"student of {layers} layers"):
            with tempfile.TemporaryDirectory() as folder:
                make_models(Path(folder), layers)
                for targets, what in (("online", "train"), ("hidden", "store"), ("hidden", "train"),
                                      ("top_k", "store"), ("top_k", "train")):  # fmt: skip
                    command = [sys.executable, __file__, "cost", "--child", folder, targets, what,
                               f"--tokens={args.tokens}", f"--epochs={args.epochs}"]  # fmt: skip
                    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                    results.setdefault((targets, what), []).append(json.loads(output.splitlines()[-1]))
                layouts = {kind: json.loads((Path(folder) / kind / "targets.json").read_text())["layout"]["train"]
                           for kind in ("hidden", "top_k")}  # fmt: skip

        def seconds(*key, results=results):
            return [result["cpu"] for result in results[key]]

        print(f"\nStudent of {layers} layers:\n")
        rows = []
        for targets in ("online", "hidden", "top_k"):
            stored, trained = (
                seconds(targets, "store") if targets != "online" else [0.0] * args.rounds,
                seconds(targets, "train"),
            )
            both = [online / (a + b) for online, a, b in zip(seconds("online", "train"), stored, trained, strict=True)]
            later = [online / b for online, b in zip(seconds("online", "train"), trained, strict=True)]
            size = 0 if targets == "online" else sum(
                width * getattr(torch, dtype).itemsize for width, dtype in layouts[targets]["tensors"].values()
            )  # fmt: skip
            peak = max(result["peak_mib"] for result in results[targets, "train"])
            rows.append([targets, f"{statistics.median(stored):.0f} + {statistics.median(trained):.0f}",
                         f"{statistics.median(both):.2f} ({min(both):.2f}-{max(both):.2f})",
                         f"{statistics.median(later):.2f}", f"{size:,}", f"{peak:,.0f}"])  # fmt: skip
        table(["targets", "seconds, storing + training", "online / this, with storing", "online / this, next student",
               "bytes per token", "peak memory of training, MiB"], rows)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["error", "students", "cost"])
    parser.add_argument("--model", help="error: the folder of a teacher; default: the embedded one")
    parser.add_argument("--student_layers", type=int, default=25, help="error: number of layers of the student")
    parser.add_argument("--steps", type=int, default=500, help="error, students: training steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8192, help="error: held-out tokens; cost: tokens of an epoch")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--layers", type=int, nargs="+", default=[30, 10], help="cost: layers of the students")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        folder, targets, what = args.child
        cost_child(Path(folder), targets, what, args)
    else:
        {"error": error, "students": students, "cost": cost}[args.what](args)


if __name__ == "__main__":
    main()
