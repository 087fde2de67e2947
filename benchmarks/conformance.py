"""Check the properties that a distillation loss should have, for kdkit and for the other libraries that are installed.

    python benchmarks/conformance.py            # prints a table; the exit code is 1 if kdkit fails a property
    python benchmarks/conformance.py --kdkit    # without the other libraries

A property is a function that takes any implementation with the signature of `implementations.py`, and returns an error
and its limit. A deliberate convention of another library is printed as "c", not as a failure, and a property that does
not apply as "-". The loss is alpha * CE + (1 - alpha) * T^2 * KL(teacher || student), per valid token.
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
    """Return fp32 hidden states and heads of a student (H = 6) and a teacher (H = 8), and labels, some masked."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(tokens, 6), (vocab, 6), (tokens, 8), (vocab, 8)]
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[::4] = -100
    return [*(torch.randn(*size, generator=generator) for size in sizes), labels]


def reference(inputs: list[torch.Tensor], alpha: float, temperature: float) -> torch.Tensor:
    """Compute the loss by its definition, token by token, in float64."""
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


# Each property returns the measured error and the largest error that is accepted.


def direction(loss: Implementation) -> tuple[float, float]:
    """The divergence is KL(teacher || student), not KL(student || teacher): p = (3/4, 1/4), q = (1/2, 1/2)."""
    student, teacher = torch.zeros(2, 1), torch.tensor([[math.log(3)], [0.0]])
    got = loss(torch.ones(1, 1), student, torch.ones(1, 1), teacher, torch.tensor([0]), 0.0, 1.0)
    return abs(got.item() - (0.75 * math.log(1.5) + 0.25 * math.log(0.5))), 1e-6


def reduction(loss: Implementation) -> tuple[float, float]:
    """The divergence is summed over the vocabulary and averaged over the valid tokens."""
    return difference(loss(*problem(), 0.0, 1.0), reference(problem(), 0.0, 1.0)), 1e-5


def cross_entropy(loss: Implementation) -> tuple[float, float]:
    """The cross-entropy does not depend on T, and is averaged over the same tokens."""
    return difference(loss(*problem(), 1.0, 4.0), reference(problem(), 1.0, 4.0)), 1e-5


def gradient(loss: Implementation) -> tuple[float, float]:
    """The gradients of hidden states and head are exact, for alpha = 0.3 and T = 2."""

    def exact(h, w, th, tw, labels, alpha, temperature):
        return reference([h, w, th, tw, labels], alpha, temperature)

    return worst(gradients(loss, problem(), 0.3, 2.0), gradients(exact, problem(), 0.3, 2.0)), 1e-5


def temperature_squared(loss: Implementation) -> tuple[float, float]:
    """The gradient has about the same norm at T = 8 and T = 64, not 1/64 of it."""
    sizes = [gradients(loss, problem(), 0.0, temperature)[1].norm().item() for temperature in (8.0, 64.0)]
    return abs(math.log(sizes[1] / sizes[0])), 0.5


def shift(loss: Implementation) -> tuple[float, float]:
    """Labels are not shifted: the gradient of a token is zero exactly if its own label is -100."""
    inputs = problem()
    rows = gradients(loss, inputs, 0.0, 1.0)[1].abs().sum(-1) > 0
    return (rows != (inputs[-1] != -100)).sum().item(), 0


def masked_nan(loss: Implementation) -> tuple[float, float]:
    """NaN in a masked position changes nothing: masked positions are left out, not multiplied by 0."""
    inputs = problem()
    expected = gradients(loss, inputs, 0.0, 1.0)
    for x in (inputs[0], inputs[2]):
        x[inputs[-1] == -100] = math.nan
    got = worst(gradients(loss, inputs, 0.0, 1.0), expected)
    return (got if got == got else math.inf), 1e-6


def nothing_valid(loss: Implementation) -> tuple[float, float]:
    """Without a valid token the loss is 0 and differentiable, and the gradients are 0."""
    inputs = problem()
    inputs[-1] = torch.full_like(inputs[-1], -100)
    total = sum(x.abs().sum().item() for x in gradients(loss, inputs, 0.0, 1.0))
    return (total if total == total else math.inf), 0


def accumulation(loss: Implementation) -> tuple[float, float]:
    """Micro-batches of 1, 4 and 7 tokens, divided by the tokens of the step, add up to its loss and gradients."""
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
    """More rows in the teacher's head than the tokenizer has entries do not change the loss."""
    inputs = problem()
    expected = loss(*inputs, 0.0, 1.0)
    inputs[3] = torch.cat([inputs[3], 5 * torch.randn(5, 8, generator=torch.Generator().manual_seed(1))])
    return difference(loss(*inputs, 0.0, 1.0), expected), 1e-6


def zero_at_equality(loss: Implementation) -> tuple[float, float]:
    """With the teacher as the student, the divergence is 0, and not the entropy of the teacher."""
    h, w, _, _, labels = problem()
    return abs(loss(h, w, h, w, labels, 0.0, 2.0).item()), 1e-5


def alpha_one(loss: Implementation) -> tuple[float, float]:
    """At alpha = 1 the values of the teacher are not read: NaN in them changes nothing."""
    h, w, th, tw, labels = problem()
    got = difference(loss(h, w, th * math.nan, tw, labels, 1.0, 2.0), reference([h, w, th, tw, labels], 1.0, 2.0))
    return (got if got == got else math.inf), 1e-5


def precision(loss: Implementation) -> tuple[float, float]:
    """At a KL of 0.04, with bf16 inputs, the gradient of the hidden states is close to float64."""
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
# `kd_loss` gets logits that a model has rounded to its dtype: this error is not one of the loss.
NOT_ASKED = {("kdkit dense", "precision")}
CONVENTIONS = {
    ("liger", "T squared"): "T^2 is left to the caller (the benchmark multiplies by it)",
    ("liger", "accumulation"): "always divides by the number of tokens of the call",
    ("trl gkd", "T squared"): "T^2 is left to the caller (the benchmark multiplies by it)",
    ("trl chunked", "T squared"): "T^2 is left to the caller (the benchmark multiplies by it)",
    ("trl chunked", "cross-entropy"): "a divergence only",
    ("trl chunked", "gradient"): "a divergence only",
    ("trl chunked", "alpha = 1"): "a divergence only",
}


def check(name: str, loss: Implementation, title: str) -> tuple[str, bool]:
    """Return a cell of the table, and whether it counts as a failure."""
    if (name, title) in NOT_ASKED:
        return "-", False
    try:
        value, limit = PROPERTIES[title](loss)
        passed, text = value <= limit, f"{value:.1e}" if isinstance(value, float) else str(value)
    except Exception as error:  # other libraries raise errors of any type
        passed, text = False, type(error).__name__
    if (name, title) in CONVENTIONS:
        return f"c ({text})", False
    return f"{'yes' if passed else 'NO'} ({text})", not passed


def main(arguments: list[str] | None = None) -> int:
    """Print the table, and return the number of properties that kdkit fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kdkit", action="store_true", help="leave out the other libraries")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found, missing = ({}, []) if args.kdkit else implementations.peers()
    found.pop("liger compiled", None)  # computes the same as "liger"
    losses = {"kdkit dense": implementations.kdkit_dense, "kdkit fused": implementations.kdkit_fused, **found}
    print("\n".join(missing))
    print("| |", " | ".join(losses), "|\n" + "|---" * (len(losses) + 1) + "|")
    failures = 0
    for title in PROPERTIES:
        cells = [check(name, loss, title) for name, loss in losses.items()]
        failures += sum(failed for _, failed in cells[:2])
        print("|", " | ".join([title, *(text for text, _ in cells)]), "|", flush=True)
    print("\nyes, NO: passed or not (the measured error). c: a convention of that library. -: does not apply.")
    for (name, title), reason in CONVENTIONS.items():
        if name in losses:
            print(f"c: {name}, {title}: {reason}")
    return failures


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
