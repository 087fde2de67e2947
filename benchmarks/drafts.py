"""Compare students as drafts of the embedded teacher in speculative decoding, by what they were trained with.

python benchmarks/drafts.py                 # 18 students, three seeds: half an hour; writes benchmarks/drafts.json
python benchmarks/drafts.py --only real     # what drafting costs with models/smollm2-135m-instruct: half an hour
python benchmarks/drafts.py --only table    # print the table of an earlier run
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from on_policy import versions
from tqdm import tqdm

from kdkit import load_config
from kdkit.drafts import load_pair, measure, rate_for, report
from kdkit.train import train

ARMS = {  # each with the fields and the steps of recipes/demo.yaml
    "untrained": ["--max_steps=1", "--learning_rate=1e-12"],
    "cross-entropy only": ["--alpha=1"],
    "forward_kl": ["--divergence=forward_kl"],
    "total_variation": ["--divergence=total_variation"],
    "neg_log_acceptance": ["--divergence=neg_log_acceptance"],
    "forward_kl, half of the steps on own text": ["--divergence=forward_kl", "--on_policy=0.5"],
}
COMMON = ["--eval_steps=null", "--save_steps=null", "--packing=false", "--max_new_tokens=64"]
REAL = [
    "--teacher_model=models/smollm2-135m-instruct", "--dataset=embedded", "--max_train_tokens=40000",
    "--max_eval_tokens=400", "--max_length=128", "--batch_size=2", "--max_steps=40", "--use_wandb=false",
    "--packing=false", "--eval_steps=null", "--save_steps=null",
]  # fmt: skip
LAYERS, GAMMA = (6, 12), 4
COLUMNS = {"tau": ("{:.3f}", 1), "rate": ("{:.1f} %", 100)}


def trained(arguments: list[str], folder: str) -> dict:
    """Train without printing, and return the last evaluation."""
    with contextlib.redirect_stdout(io.StringIO()):
        events = train(load_config([*arguments, f"--output_dir={folder}"]))
    return next(event for event in reversed(events) if "eval/acceptance_rate" in event)


def students(seeds: int, path: Path) -> None:
    results: dict[str, list[dict]] = {name: [] for name in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in tqdm(range(seeds), desc="seeds"):
            for index, (name, fields) in enumerate(ARMS.items()):
                run, since = f"{folder}/{seed}_{index}", time.perf_counter()
                last = trained(["--config", "recipes/demo.yaml", *COMMON, f"--seed={seed}", *fields], run)
                found = {"seconds": time.perf_counter() - since, "predicted": last["eval/acceptance_rate"]}
                *pair, prompts = load_pair(run)
                for kind in ("greedy", "sampled"):
                    found[kind] = measure(*pair, prompts, sampled=kind == "sampled", gamma=GAMMA)
                results[name].append(found)
                tqdm.write(f"{seed} {name}: {json.dumps(found)}")
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\n{versions()}\n")
    table(results)


def table(results: dict[str, list[dict]]) -> None:
    """Print the mean and the standard deviation over the seeds of each kind of student, as Markdown."""
    titles = [f"{kind}: {name}" for kind in ("T 1", "greedy") for name in ("tokens per pass", "acceptance")]
    titles = ["held-out acceptance", *titles, "seconds, fastest"]
    print(f"| trained with | {' | '.join(titles)} |\n|{'---|' * (len(titles) + 1)}")
    for name, runs in results.items():
        cells = [spread([100 * run["predicted"] for run in runs], "{:.1f} %")]
        for kind in ("sampled", "greedy"):
            for key, (form, factor) in COLUMNS.items():
                cells.append(spread([factor * run[kind][key] for run in runs], form))
        print(f"| {name} | {' | '.join(cells)} | {min(run['seconds'] for run in runs):.0f} |")
    measured = [run[kind] for runs in results.values() for run in runs for kind in ("greedy", "sampled")]
    c, v = (statistics.median(each[key] for each in measured) for key in ("c", "v"))
    k = c + (v - 1) / GAMMA
    print(f"\ngamma {GAMMA}; over all, median c {c:.2f} and v {v:.2f}: the break-even acceptance is "
          f"{rate_for(1 + GAMMA * k, GAMMA):.0%}, with gamma 1 {k:.0%}")  # fmt: skip
    for kind in ("greedy", "sampled"):
        tau = {name: statistics.mean(run[kind]["tau"] for run in runs) for name, runs in results.items()}
        best = max(tau, key=tau.get)
        print(f"most tokens per pass, {kind}: {best}; speed-up {tau[best] / (1 + GAMMA * k):.2f} x")
    print(f"greedy texts that are not the teacher's: {sum(each['different'] for each in measured)}")


def spread(values: list[float], form: str) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    number, unit = [*form.split(" "), ""][:2]
    return f"{number.format(statistics.mean(values))} ± {number.format(deviation)} {unit}".strip()


def real() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for layers in LAYERS:
            trained([*REAL, f"--student_layers={layers}"], f"{folder}/{layers}_layers")
        print(f"{versions()}\n\n{report([f'{folder}/{layers}_layers' for layers in LAYERS])}".replace(f"{folder}/", ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["students", "real", "table"], default="students")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    torch.set_num_threads(1)  # for models this small, more threads are slower
    if arguments.only == "table":
        table(json.loads(arguments.results.read_text(encoding="utf-8")))
    else:
        real() if arguments.only == "real" else students(arguments.seeds, arguments.results)


if __name__ == "__main__":
    main()
