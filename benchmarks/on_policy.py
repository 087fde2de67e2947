"""Compare whose prefixes a student learns on (the data's, or its own) and which divergence, from a trained student.

python benchmarks/on_policy.py                 # 36 students, three seeds: an hour; writes benchmarks/on_policy.json
python benchmarks/on_policy.py --only speed    # writing, beside a bare `generate`, and a step on own text: two minutes
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
from accelerate import Accelerator
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from kdkit import DistillConfig, load_config
from kdkit.data import load_rows
from kdkit.models import BodyAndHead, load_tokenizer
from kdkit.on_policy import OwnText
from kdkit.train import train

SETTINGS = {
    "max_length": 128, "max_new_tokens": 64, "batch_size": 8, "max_steps": 200, "learning_rate": 5e-4,
    "max_train_tokens": 160_000, "max_eval_tokens": 10_000, "packing": False, "eval_own_text": True, "eval_steps": None,
    "save_steps": None, "logging_steps": 100, "use_wandb": False,
}  # fmt: skip
DATA, OWN = {"on_policy": 0.0}, {"on_policy": 1.0}
FORWARD, REVERSE = {"divergence": "forward_kl"}, {"divergence": "reverse_kl"}
# from the student of recipes/demo.yaml
WARM = {
    "data, forward KL": DATA | FORWARD, "data, reverse KL": DATA | REVERSE, "own, forward KL": OWN | FORWARD,
    "own, reverse KL": OWN | REVERSE, "half own, JSD": {"on_policy": 0.5, "divergence": "jsd"},
    # fewer learned tokens than 8 rows of own text; 8 rows of the data have more, as prompts are not learned
    "data, forward KL, 4 rows": DATA | FORWARD | {"batch_size": 4},
    "data, reverse KL, 4 rows": DATA | REVERSE | {"batch_size": 4},
    # at least the time of 200 steps on own text
    "data, forward KL, 450 steps": DATA | FORWARD | {"max_steps": 450},
    "data, reverse KL, 450 steps": DATA | REVERSE | {"max_steps": 450},
}  # fmt: skip
# from random weights, at the learning rate of recipes/demo.yaml
COLD = {
    name: fields | {"learning_rate": 2e-3}
    for name, fields in WARM.items()
    if name in ("data, forward KL", "own, forward KL", "own, reverse KL")
}
COLUMNS = {
    "own KL": "eval/own_kl", "own KL, last quarter": "eval/own_kl_late", "held-out CE": "eval/ce_loss",
    "acceptance": "eval/acceptance_rate",
}  # fmt: skip


def run(folder: str, config: list[str] | dict) -> dict:
    """Train without printing, and return the columns of the first and of the last evaluation, and the seconds."""
    with contextlib.redirect_stdout(io.StringIO()):
        if isinstance(config, list):
            config = load_config([*config, f"--output_dir={folder}"])
        else:
            config = DistillConfig(**config, output_dir=folder)
        since = time.perf_counter()
        events = train(config)
    evaluations = [event for event in events if "eval/ce_loss" in event]
    first, last = ({key: round(event[key], 5) for key in COLUMNS.values() if key in event}
                   for event in (evaluations[0], evaluations[-1]))  # fmt: skip
    return {"first": first, "last": last | {"seconds": round(time.perf_counter() - since, 1)}}


def students(seeds: int, path: Path) -> None:
    """Train from each start with each seed, write all evaluations to a file, and print a table."""
    results: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in tqdm(range(seeds), desc="seeds"):
            start = f"{folder}/start_{seed}"
            run(start, ["--config", "recipes/demo.yaml", f"--seed={seed}", "--eval_steps=null", "--save_steps=null"])
            for kind, arms, student in (("", WARM, f"{start}/final"), ("cold: ", COLD, "embedded")):
                for name, fields in tqdm(arms.items(), desc=kind or "warm", leave=False):
                    config = SETTINGS | {"student_model": student, "seed": seed} | fields
                    found = run(f"{folder}/{kind[:4]}{name}_{seed}".replace(" ", "_"), config)
                    if name == "data, forward KL":
                        results.setdefault(f"{kind}start", []).append(found["first"])
                    results.setdefault(kind + name, []).append(found["last"])
                    tqdm.write(f"{seed} {kind}{name}: {found['last']}")
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\n{versions()}; mean ± standard deviation over {seeds} seeds\n")
    table(results)


def versions() -> str:
    return f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads"


def table(results: dict[str, list[dict]]) -> None:
    """Print the mean and the standard deviation over the seeds of each kind of student, as Markdown."""
    print(f"| prefixes, divergence | {' | '.join(COLUMNS)} | seconds, fastest |\n|{'---|' * (len(COLUMNS) + 2)}")
    for name, runs in results.items():
        cells = []
        for title, key in COLUMNS.items():
            values = [each[key] * (100 if title == "acceptance" else 1) for each in runs if key in each]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            mean = statistics.mean(values) if values else float("nan")
            cells.append(f"{mean:.1f} ± {spread:.1f} %" if title == "acceptance" else f"{mean:.3f} ± {spread:.3f}")
        seconds = [each["seconds"] for each in runs if "seconds" in each]
        print(f"| {name} | {' | '.join(cells)} | {f'{min(seconds):.0f}' if seconds else ''} |")


def speed(rounds: int) -> None:
    """Print the time of writing 8 rows of 64 tokens in multiples of a bare `generate` of as many tokens, and the steps
    per second with own text and without."""
    with tempfile.TemporaryDirectory() as folder:
        timed = SETTINGS | {"max_steps": 30, "eval_own_text": False, "max_eval_tokens": 1000, "packing": False}
        rates = {}
        for name, fields in (("data", DATA), ("own", OWN)):
            run(f"{folder}/{name}", timed | fields | {"logging_steps": 30})
            events = [json.loads(line) for line in Path(f"{folder}/{name}/metrics.jsonl").read_text().splitlines()]
            rates[name] = next(event for event in reversed(events) if "train/loss" in event)
        config = DistillConfig(**SETTINGS | OWN, output_dir=f"{folder}/unused")
        tokenizer, accelerator = load_tokenizer(config), Accelerator()
        student = BodyAndHead(AutoModelForCausalLM.from_pretrained(f"{folder}/data/final", dtype=torch.float32))
        rows = [row for row in load_rows(config, tokenizer)[0] if len(row["input_ids"]) == 128][:8]
        never = student.model.config.vocab_size  # no token ends a text: all rows have 64 tokens
        own_text = OwnText(config, tokenizer, never, never, True, None, accelerator)
        prompts = torch.tensor([own_text.prompt(row) for row in rows])  # (8, 64)
        ours, bare, sampled = [], [], []
        for index in range(rounds + 1):
            since = time.perf_counter()
            own_text.rows(student, rows, range(8), index)
            between = time.perf_counter()
            for times, do_sample in ((bare, False), (sampled, True)):
                begin = time.perf_counter()
                with torch.no_grad():
                    student.model.eval().generate(
                        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=64, eos_token_id=never,
                        pad_token_id=0, **({"do_sample": True, "top_k": 0} if do_sample else {"do_sample": False}),
                    )  # fmt: skip
                times.append(time.perf_counter() - begin)
            ours.append(between - since)
    for name, theirs in (("greedy", bare), ("do_sample=True, top_k=0", sampled)):
        ratios = [a / b for a, b in zip(ours[1:], theirs[1:], strict=True)]
        print(f"writing 8 rows of 64 tokens: {statistics.median(ours[1:]):.3f} s, {statistics.median(ratios):.2f} "
              f"({min(ratios):.2f}-{max(ratios):.2f}) x generate ({name}); {versions()}")  # fmt: skip
    for name, event in rates.items():
        writing = event.get("train/writing_time", 0.0)
        print(f"steps on {name} text: {event['train/tokens_per_second']:,.0f} learned tokens per second, "
              f"{writing:.0%} of the time writing")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["students", "speed", "table"], help="table: print that of an earlier run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10, help="of speed")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    torch.set_num_threads(1)  # for models this small, more threads are slower
    if arguments.only == "table":
        table(json.loads(arguments.results.read_text(encoding="utf-8")))
    if arguments.only in (None, "students"):
        students(arguments.seeds, arguments.results)
    if arguments.only in (None, "speed"):
        speed(arguments.rounds)


if __name__ == "__main__":
    main()
