"""Compare students of the demo that minimise different divergences, and different mixtures with the cross-entropy.

python benchmarks/divergences.py                # 27 students, three seeds: half an hour; writes divergences.json
python benchmarks/divergences.py --only table   # print the table of an earlier run

Each student is measured by every number, not only by the one that it minimises. A difference from the forward KL is
taken seed by seed. It is called noise if its mean is less than the 95 % quantile of Student's t times its standard
error away from 0. A call that is repeated after an interruption trains only the students that are missing.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import platform
import statistics
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from kdkit import DistillConfig, load_config
from kdkit.data import load_rows
from kdkit.evaluate import evaluate
from kdkit.losses import DIVERGENCES
from kdkit.models import BodyAndHead, load_teacher, load_tokenizer
from kdkit.on_policy import OwnText, own_text_metrics
from kdkit.train import train

BASE = "forward_kl"
ARMS = {name: {"divergence": name} for name in DIVERGENCES} | {"half CE": {"alpha": 0.5}, "CE only": {"alpha": 1.0}}
# held-out text for all but the last, which is measured on the student's own text: up to 64 tokens after a prompt
COLUMNS = {
    "held-out CE": "eval/ce_loss", "KL(teacher \\|\\| student)": "eval/kl_t1",
    "KL(student \\|\\| teacher)": "eval/reverse_kl", "top-1 agreement": "eval/top1_agreement",
    "acceptance": "eval/acceptance_rate", "own KL": "eval/own_kl",
}  # fmt: skip
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}  # seeds -> two-sided 95 % quantile of Student's t


def train_quietly(folder: str, **fields) -> DistillConfig:
    """Train with recipes/demo.yaml, apart from `fields`, without printing. The student stays in folder/final."""
    quiet = {"eval_steps": None, "save_steps": None, "logging_steps": 1000, "max_eval_tokens": 1000}
    changes = quiet | {"output_dir": folder} | fields
    values = [f"--{name}={'null' if value is None else value}" for name, value in changes.items()]
    with contextlib.redirect_stdout(io.StringIO()):
        config = load_config(["--config", "recipes/demo.yaml", *values])
        train(config)
    return config


@cache
def loaded(teacher_model: str, eval_tokens: int):
    """Return a teacher, the tokenizer, the configuration and the held-out rows to measure on, one document per row."""
    config = DistillConfig(teacher_model=teacher_model, max_eval_tokens=eval_tokens, packing=False,
                           eval_own_text=True, max_new_tokens=64)  # fmt: skip
    tokenizer = load_tokenizer(config)
    return load_teacher(teacher_model, torch.float32), tokenizer, config, load_rows(config, tokenizer)[1]


def measure(folder: str, teacher_model: str, eval_tokens: int, own: bool = True) -> dict[str, float]:
    """Measure a student in fp32 on held-out text (KL in both directions, at T = 1); if `own`, on its own text, too."""
    teacher, tokenizer, config, rows = loaded(teacher_model, eval_tokens)
    student = BodyAndHead(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    reverse = dataclasses.replace(config, divergence="reverse_kl")
    with contextlib.redirect_stdout(io.StringIO()):
        metrics = evaluate(student, teacher, rows, reverse, pad_token_id=tokenizer.pad_token_id)
        if own:
            eos, entries = student.model.config.eos_token_id, student.model.config.vocab_size
            own_text = OwnText(config, tokenizer, eos, entries, True, None, Accelerator())
            metrics |= own_text_metrics(own_text, student, BodyAndHead(teacher), rows)
    metrics["eval/reverse_kl"] = metrics["eval/kl_loss"]
    names = (*COLUMNS.values(), "eval/teacher_ce_loss")
    return {name: round(metrics[name], 5) for name in names if name in metrics}


def complete(path: Path, settings: dict, jobs: list[tuple[str, int]], run) -> dict[str, dict[str, dict]]:
    """Return arm -> seed -> what `run(arm, seed)` returns, and write each into a file, which is read at the start."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"settings": settings, "runs": {}}
    if stored["settings"] != settings:
        sys.exit(f"{path} has results of other settings, {stored['settings']}: move it away, or choose another file")
    for arm, seed in tqdm(jobs, desc="students"):
        runs = stored["runs"].setdefault(arm, {})
        if str(seed) not in runs:
            since = time.perf_counter()
            runs[str(seed)] = run(arm, seed) | {"seconds": round(time.perf_counter() - since, 1)}
            stored["made"] = versions()
            path.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
            tqdm.write(f"{arm}, seed {seed}: {runs[str(seed)]}")
    return stored["runs"]


def versions() -> str:
    threads = f"{torch.get_num_threads()} CPU thread(s) of {platform.machine()}"
    return f"{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, torch {torch.__version__}, {threads}"


def paired(runs: dict[str, dict], base: dict[str, dict], key: str) -> tuple[float, float, bool]:
    """Return the mean of the differences from `base`, seed by seed, its standard error, and whether it is noise."""
    differences = [runs[seed][key] - base[seed][key] for seed in runs if seed in base]
    mean, n = statistics.mean(differences), len(differences)
    error = statistics.stdev(differences) / n**0.5 if n > 1 else float("inf")
    return mean, error, abs(mean) <= T95.get(n, 2.57) * error


def means(results: dict[str, dict[str, dict]], columns: dict[str, str]) -> None:
    """Print the mean and the standard deviation over the seeds, as a Markdown table."""
    _head("mean ± standard deviation", columns)
    for name, runs in results.items():
        values = [[run[key] for run in runs.values()] for key in columns.values()]
        cells = [f"{statistics.mean(x):.3f} ± {statistics.stdev(x) if len(x) > 1 else 0:.3f}" for x in values]
        print(f"| {name} | {' | '.join(cells)} |")


def differences(results: dict[str, dict[str, dict]], columns: dict[str, str], base: str) -> None:
    """Print the paired differences from an arm, as a Markdown table."""
    _head(f"minus {base}, seed by seed: mean ± standard error", columns)
    for name in results:
        if name != base:
            found = [paired(results[name], results[base], key) for key in columns.values()]
            cells = [f"{mean:+.3f} ± {error:.3f}{' noise' if noise else ''}" for mean, error, noise in found]
            print(f"| {name} | {' | '.join(cells)} |")


def _head(first: str, columns: dict[str, str]) -> None:
    print(f"\n| {first} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["table"], help="table: print that of an earlier run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max_steps", type=int, default=500, help="fewer, to try it out (with other --results)")
    parser.add_argument("--eval_tokens", type=int, default=20_000)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # for models this small, more threads are slower
    settings = {"max_steps": arguments.max_steps, "eval_tokens": arguments.eval_tokens}

    def run(arm: str, seed: int) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            config = train_quietly(folder, seed=seed, max_steps=arguments.max_steps, **ARMS[arm])
            return measure(f"{folder}/final", config.teacher_model, arguments.eval_tokens)

    jobs = [] if arguments.only else [(arm, seed) for seed in range(arguments.seeds) for arm in ARMS]
    if arguments.only:
        settings = json.loads(arguments.results.read_text(encoding="utf-8"))["settings"]
    results = complete(arguments.results, settings, jobs, run)
    print(json.loads(arguments.results.read_text(encoding="utf-8"))["made"])
    means(results, COLUMNS)
    differences(results, COLUMNS, BASE)


if __name__ == "__main__":
    main()
