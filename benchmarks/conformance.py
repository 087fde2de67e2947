"""What a distillation loss can get wrong, asked of kdkit and of every peer that is installed.

    python benchmarks/conformance.py            # a table; the exit code is 1 if kdkit fails one
    python benchmarks/conformance.py --kdkit    # without the peers

A property takes any implementation with the signature of `implementations.py`, measures a number, and says whether it
is as it should be. A peer's deliberate convention is printed as one (c), not as a failure; what cannot be asked of
it is a dash. The loss is alpha * CE + (1 - alpha) * T^2 * KL(teacher || student), per valid token.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import implementations

Implementation = Callable[..., torch.Tensor]


def problem(tokens: int = 12, vocab: int = 11, seed: int = 0) -> list[torch.Tensor]:
    """fp32 hidden states and heads of a student (H = 6) and a teacher (H = 8), and labels of which some are masked."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(tokens, 6), (vocab, 6), (tokens, 8), (vocab, 8)]
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[::4] = -100
    return [*(torch.randn(*size, generator=generator) for size in sizes), labels]


def reference(inputs: list[torch.Tensor], alpha: float, temperature: float) -> torch.Tensor:
    """The definition, token by token, in float64."""
    h, w, th, tw, labels = (x.double() if x.is_floating_point() else x for x in inputs)
    terms = []
    for z, t, label in zip(h @ w.T, th @ tw.T, labels.tolist(), strict=True):
        if label != -100:
            log_q, log_p = (z / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
            kl = (log_p.exp() * (log_p - log_q)).sum()
            terms.append(-alpha * z.log_softmax(-1)[label] + (1 - alpha) * temperature**2 * kl)
    return torch.stack(terms).mean()


def gradients(loss_function: Callable, inputs: list[torch.Tensor], *arguments, **options) -> list[torch.Tensor]:
    hidden, head = (x.detach().clone().requires_grad_() for x in inputs[:2])
    loss = loss_function(hidden, head, *inputs[2:], *arguments, **options)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, head))]


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)).item()


def worst(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(difference(x, y) for x, y in zip(got, expected, strict=True))


# Each property returns the number measured and the largest that is right.


def direction(loss: Implementation) -> tuple[float, float]:
    """KL(teacher || student), not the other way round: p = (3/4, 1/4), q = (1/2, 1/2)."""
    student, teacher = torch.zeros(2, 1), torch.tensor([[math.log(3)], [0.0]])
    got = loss(torch.ones(1, 1), student, torch.ones(1, 1), teacher, torch.tensor([0]), 0.0, 1.0)
    return abs(got.item() - (0.75 * math.log(1.5) + 0.25 * math.log(0.5))), 1e-6


def reduction(loss: Implementation) -> tuple[float, float]:
    """Summed over the vocabulary, averaged over the valid tokens."""
    return difference(loss(*problem(), 0.0, 1.0), reference(problem(), 0.0, 1.0)), 1e-5


def cross_entropy(loss: Implementation) -> tuple[float, float]:
    """At T = 1, whatever T is, and over the same tokens."""
    return difference(loss(*problem(), 1.0, 4.0), reference(problem(), 1.0, 4.0)), 1e-5


def gradient(loss: Implementation) -> tuple[float, float]:
    """Of hidden states and head, for a mixture of both parts at T = 2."""

    def exact(h, w, th, tw, labels, alpha, temperature):
        return reference([h, w, th, tw, labels], alpha, temperature)

    return worst(gradients(loss, problem(), 0.3, 2.0), gradients(exact, problem(), 0.3, 2.0)), 1e-5


def temperature_squared(loss: Implementation) -> tuple[float, float]:
    """The gradient at T = 64 is as large as at T = 8, not 64 times smaller."""
    sizes = [gradients(loss, problem(), 0.0, temperature)[1].norm().item() for temperature in (8.0, 64.0)]
    return abs(math.log(sizes[1] / sizes[0])), 0.5


def shift(loss: Implementation) -> tuple[float, float]:
    """Labels are taken as they are aligned: the gradient of a row is zero exactly where its own label is -100."""
    inputs = problem()
    rows = gradients(loss, inputs, 0.0, 1.0)[1].abs().sum(-1) > 0
    return (rows != (inputs[-1] != -100)).sum().item(), 0


def masked_nan(loss: Implementation) -> tuple[float, float]:
    """A masked position that holds NaN changes nothing: it is left out, not multiplied by 0."""
    inputs = problem()
    expected = gradients(loss, inputs, 0.0, 1.0)
    for x in (inputs[0], inputs[2]):
        x[inputs[-1] == -100] = math.nan
    got = worst(gradients(loss, inputs, 0.0, 1.0), expected)
    return (got if got == got else math.inf), 1e-6


def nothing_valid(loss: Implementation) -> tuple[float, float]:
    """No valid token: a zero that has a graph, and gradients of zero."""
    inputs = problem()
    inputs[-1] = torch.full_like(inputs[-1], -100)
    total = sum(x.abs().sum().item() for x in gradients(loss, inputs, 0.0, 1.0))
    return (total if total == total else math.inf), 0


def accumulation(loss: Implementation) -> tuple[float, float]:
    """Micro-batches of 1, 4 and 7 tokens, divided by the step's count, add up to the whole: value and gradients."""
    inputs = problem()
    count = (inputs[-1] != -100).sum()
    whole = gradients(loss, inputs, 0.0, 2.0, num_items_in_batch=count)
    pieces = [x.split([1, 4, 7]) for x in (inputs[0], inputs[2], inputs[4])]
    parts = [
        gradients(loss, [h, inputs[1], th, inputs[3], labels], 0.0, 2.0, num_items_in_batch=count)
        for h, th, labels in zip(*pieces, strict=True)
    ]
    joined = [sum(x[0] for x in parts), torch.cat([x[1] for x in parts]), sum(x[2] for x in parts)]
    return worst(joined, whole), 1e-5


def padded_vocabulary(loss: Implementation) -> tuple[float, float]:
    """A teacher's head with more rows than the tokenizer has entries changes nothing."""
    inputs = problem()
    expected = loss(*inputs, 0.0, 1.0)
    inputs[3] = torch.cat([inputs[3], 5 * torch.randn(5, 8, generator=torch.Generator().manual_seed(1))])
    return difference(loss(*inputs, 0.0, 1.0), expected), 1e-6


def zero_at_equality(loss: Implementation) -> tuple[float, float]:
    """Student and teacher are one: the divergence is 0, and not the teacher's entropy."""
    h, w, _, _, labels = problem()
    return abs(loss(h, w, h, w, labels, 0.0, 2.0).item()), 1e-5


def alpha_one(loss: Implementation) -> tuple[float, float]:
    """At alpha = 1 the teacher's values are not read: NaN there changes nothing."""
    h, w, th, tw, labels = problem()
    got = difference(loss(h, w, th * math.nan, tw, labels, 1.0, 2.0), reference([h, w, th, tw, labels], 1.0, 2.0))
    return (got if got == got else math.inf), 1e-5


def precision(loss: Implementation) -> tuple[float, float]:
    """bf16 weights and hidden states, KL 0.04: the gradient of the hidden states against float64."""
    import loss as benchmark

    return benchmark.relative_errors(loss, benchmark.nearly_equal_pair(0.04))[0], 0.005


PROPERTIES = {
    "direction": direction,
    "reduction": reduction,
    "cross-entropy": cross_entropy,
    "gradient": gradient,
    "T squared": temperature_squared,
    "shift": shift,
    "NaN under the mask": masked_nan,
    "no valid token": nothing_valid,
    "accumulation": accumulation,
    "padded vocabulary": padded_vocabulary,
    "zero at equality": zero_at_equality,
    "alpha = 1": alpha_one,
    "precision": precision,
}
# `kd_loss` is given logits, which the model made in its own dtype: their rounding is not the loss's.
NOT_ASKED = {("kdkit dense", "precision")}
CONVENTIONS = {
    ("liger", "T squared"): "T^2 is left to the caller (put back here)",
    ("liger", "accumulation"): "always divides by the tokens of the call",
    ("trl gkd", "T squared"): "T^2 is left to the caller (put back here)",
    ("trl chunked", "T squared"): "T^2 is left to the caller (put back here)",
    ("trl chunked", "cross-entropy"): "a divergence only",
    ("trl chunked", "gradient"): "a divergence only",
    ("trl chunked", "alpha = 1"): "a divergence only",
}


def check(name: str, loss: Implementation, title: str) -> tuple[str, bool]:
    """A cell of the table, and whether it counts as a failure."""
    if (name, title) in NOT_ASKED:
        return "-", False
    try:
        value, limit = PROPERTIES[title](loss)
        passed, text = value <= limit, f"{value:.1e}" if isinstance(value, float) else str(value)
    except Exception as error:  # a peer may refuse in any way it likes
        passed, text = False, type(error).__name__
    if (name, title) in CONVENTIONS:
        return f"c ({text})", False
    return f"{'yes' if passed else 'NO'} ({text})", not passed


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the number of properties that kdkit fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kdkit", action="store_true", help="leave out the peers")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found, missing = ({}, []) if args.kdkit else implementations.peers()
    found.pop("liger compiled", None)  # the same arithmetic
    losses = {"kdkit dense": implementations.kdkit_dense, "kdkit fused": implementations.kdkit_fused, **found}
    print("\n".join(missing))
    print("| |", " | ".join(losses), "|\n" + "|---" * (len(losses) + 1) + "|")
    failures = 0
    for title in PROPERTIES:
        cells = [check(name, loss, title) for name, loss in losses.items()]
        failures += sum(failed for _, failed in cells[:2])
        print("|", " | ".join([title, *(text for text, _ in cells)]), "|", flush=True)
    print("\nyes, NO: passed or not (what was measured). c: a convention of that library. -: not asked.")
    for (name, title), reason in CONVENTIONS.items():
        if name in losses:
            print(f"c: {name}, {title}: {reason}")
    return failures


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
