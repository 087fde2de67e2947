"""Compare students trained with and without the embedded teacher, over three seeds and three amounts of text.

python benchmarks/seeds.py            # half an hour on two cores; prints a Markdown table
python benchmarks/seeds.py --quick    # only the amount of text of the demo: five minutes
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

from kdkit import load_config
from kdkit.train import train

# amount -> tokens of text, optimizer steps of 1,024 tokens
AMOUNTS = {"40 thousand": (40_000, 500), "160 thousand": (160_000, 1000), "all of it (830 thousand)": (None, 2000)}
STUDENTS = {"CE only": 1.0, "distilled": 0.0}
COLUMNS = ("eval/ce_loss", "eval/kl_t1", "eval/top1_agreement", "eval/acceptance_rate")


def run(alpha: float, seed: int, tokens: int | None, steps: int) -> dict:
    """Train a student with the recipe of the demo, and return its last evaluation."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = load_config(
            ["--config", "recipes/demo.yaml", f"--alpha={alpha}", f"--seed={seed}", f"--max_steps={steps}",
             f"--max_train_tokens={'null' if tokens is None else tokens}", "--max_eval_tokens=null",
             "--eval_steps=null", "--save_steps=null", f"--output_dir={folder}/run"]
        )  # fmt: skip
        return train(config)[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="only the amount of text of the demo")
    arguments = parser.parse_args()
    amounts = dict(list(AMOUNTS.items())[:1]) if arguments.quick else AMOUNTS
    jobs = [(text, name, seed) for text in amounts for name in STUDENTS for seed in range(arguments.seeds)]
    results: dict = {}
    for text, name, seed in tqdm(jobs, desc="runs"):
        results.setdefault((text, name), []).append(run(STUDENTS[name], seed, *amounts[text]))

    versions = f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads"
    print(f"{time.strftime('%Y-%m-%d')}, {versions}; mean ± standard deviation over {arguments.seeds} seeds\n")
    print("| text, tokens | steps | student | held-out CE | KL to the teacher | top-1 agreement | acceptance |")
    print("|---|---|---|---|---|---|---|")
    for (text, name), runs in results.items():
        cells = []
        for key in COLUMNS:
            values = [100 * r[key] if key in COLUMNS[2:] else r[key] for r in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.1f} ± {spread:.1f} %" if key in COLUMNS[2:]
                         else f"{statistics.mean(values):.3f} ± {spread:.3f}")  # fmt: skip
        print(f"| {text} | {amounts[text][1]:,} | {name} | {' | '.join(cells)} |")
    teacher = results[next(iter(results))][0]["eval/teacher_ce_loss"]
    print(f"\nThe teacher's held-out CE: {teacher:.3f}")


if __name__ == "__main__":
    main()
