"""Measure the speed of tokenising conversations: `datasets.map` with the chat template, and kdkit.

    python benchmarks/tokenization.py --model models/smollm2-135m-instruct [--conversations 20000] [--num_proc 1 2]

The conversations have one to three turns with words of the embedded text, and are the same in each run. A tokenizer
uses one thread in each process. The time of kdkit includes labels, packing and writing the cache; `datasets.map` gives
only token ids.
"""

import argparse
import json
import os
import platform
import random
import tempfile
import time
from pathlib import Path

import datasets
from transformers import AutoTokenizer

from kdkit.config import DistillConfig
from kdkit.data import load_rows, row_lengths
from kdkit.data.sources import EMBEDDED


def write_conversations(path: Path, count: int) -> None:
    """Write a JSON Lines file of conversations with about 370 tokens each on average."""
    texts = datasets.Dataset.from_parquet(str(EMBEDDED / "train.parquet"))["text"]
    words = [word for text in texts for word in text.split()]
    generator = random.Random(0)

    def message(role: str, fewest: int, most: int) -> dict:
        length = generator.randint(fewest, most)
        start = generator.randrange(len(words) - length)
        return {"role": role, "content": " ".join(words[start : start + length])}

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            turns = range(generator.randint(1, 3))
            messages = [message(*kind) for _ in turns for kind in (("user", 5, 60), ("assistant", 10, 120))]
            file.write(json.dumps({"messages": messages}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/smollm2-135m-instruct", help="the model whose tokenizer is used")
    parser.add_argument("--conversations", type=int, default=20000)
    parser.add_argument("--num_proc", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory(prefix="kdkit-tokenization-") as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder)
        measure(arguments, Path(folder))


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Print the speed of `datasets.map` and of kdkit."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    file = folder / "conversations.jsonl"
    write_conversations(file, arguments.conversations)
    samples = datasets.load_dataset("json", data_files=str(file), split="train")
    print(f"{arguments.conversations:,} conversations, {os.cpu_count()} cores, Python {platform.python_version()}")

    def clock() -> tuple[float, float]:
        times = os.times()
        return time.perf_counter(), times.user + times.system + times.children_user + times.children_system

    def report(name: str, start: tuple[float, float], tokens: int) -> None:
        seconds, cpu_seconds = (end - begin for end, begin in zip(clock(), start, strict=True))
        print(f"{name:20} {tokens / seconds:>10,.0f} tokens/s, {tokens / cpu_seconds:>10,.0f} per CPU second")

    def apply(sample: dict) -> dict:
        return {"input_ids": tokenizer.apply_chat_template(sample["messages"])["input_ids"]}

    start = clock()
    mapped = samples.map(apply, remove_columns=samples.column_names)
    report("datasets.map", start, sum(map(len, mapped["input_ids"])))

    for num_proc in arguments.num_proc:
        # this max_train_tokens is never reached; it differs, so that no run reads the cache of another
        config = DistillConfig(
            dataset=str(file), eval_dataset="embedded", max_eval_tokens=1, max_length=8192, num_proc=num_proc,
            max_train_tokens=10**12 + num_proc,
        )  # fmt: skip
        start = clock()
        rows, _ = load_rows(config, tokenizer)
        report(f"kdkit, {num_proc} processes", start, int(row_lengths(rows).sum()))


if __name__ == "__main__":
    main()
