"""Measure what `compile_models` does to a forward and backward pass of a student with packed rows.

    OMP_NUM_THREADS=1 python benchmarks/compile_models.py

The model is a Llama with random weights in fp32. Rounds with and without compilation alternate; the ratio is of their
medians. Batches have several shapes, of which only the first is compiled for.
"""

import argparse
import copy
import platform
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kdkit.data import collate
from kdkit.models import BodyAndHead


def make_batch(seed: int, rows: int, length: int, vocab_size: int) -> dict:
    """Return rows of two documents each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab_size, (rows, length), generator=generator).tolist()
    positions = [*range(length // 3), *range(length - length // 3)]
    return collate([{"input_ids": row, "labels": row, "position_ids": positions} for row in ids], pad_token_id=0)


def forward_and_backward(model: BodyAndHead, batch: dict) -> torch.Tensor:
    """Return the gradient of a weighted sum of the last hidden states for weights of the first layer."""
    model.zero_grad()
    hidden, _ = model(batch)
    (hidden * torch.linspace(-1, 1, hidden.shape[-1])).sum().backward()
    return model.layers[0].mlp.up_proj.weight.grad.clone()


def main() -> None:
    """Print the time of the first call, the difference of the gradients, and the ratio of the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 256), ("layers", 6), ("rows", 4), ("length", 256), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args, vocab_size = parser.parse_args(), 1024
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=args.hidden, intermediate_size=args.hidden * 11 // 4, num_attention_heads=8,
        num_key_value_heads=4, num_hidden_layers=args.layers, tie_word_embeddings=True,
    )  # fmt: skip
    models = {"eager": BodyAndHead(LlamaForCausalLM(config))}
    models["compiled"] = copy.deepcopy(models["eager"])
    models["compiled"].compile_layers()
    start = time.perf_counter()
    forward_and_backward(models["compiled"], make_batch(0, args.rows, args.length, vocab_size))
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} thread(s)")
    print(f"first compiled call: {time.perf_counter() - start:.0f} s")
    times, worst = {name: [] for name in models}, 0.0
    for seed in range(args.rounds):
        batch, gradients = make_batch(seed, args.rows, args.length - 8 * (seed % 3), vocab_size), []
        for name, model in models.items():
            start = time.perf_counter()
            gradients.append(forward_and_backward(model, batch))
            times[name].append(time.perf_counter() - start)
        worst = max(worst, ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item())
    eager, compiled = (statistics.median(times[name]) for name in models)
    print(f"largest relative difference of a gradient: {worst:.1e}")
    print(f"eager {eager * 1e3:.0f} ms, compiled {compiled * 1e3:.0f} ms: {compiled / eager:.2f} of the time")


if __name__ == "__main__":
    main()
