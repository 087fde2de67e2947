"""Tests of benchmarks/conformance.py: kdkit has every property, and a loss with a known bug fails the check."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
spec = importlib.util.spec_from_file_location("conformance", BENCHMARKS / "conformance.py")
conformance = importlib.util.module_from_spec(spec)
sys.modules["conformance"] = conformance
spec.loader.exec_module(conformance)


def test_kdkit_has_every_property(capsys):
    assert conformance.main(["--kdkit"]) == 0
    table = capsys.readouterr().out
    assert table.count("yes (") == 2 * len(conformance.PROPERTIES) - len(conformance.NOT_ASKED)


def variant(kl, count=lambda labels: (labels != -100).sum(), ce=True, power=2):
    """Return a loss over logits; arguments other than the defaults put a known bug into it."""

    def loss(h, w, th, tw, labels, alpha, temperature, num_items_in_batch=None):
        valid = labels != -100
        z, t = (h @ w.T)[valid].float(), (th @ tw.T)[valid].float()
        t = t[:, : z.shape[1]] if kl != "padded" else t
        z = torch.nn.functional.pad(z, (0, t.shape[1] - z.shape[1]))
        log_q, log_p = (z / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
        terms = {
            "right": log_p.exp() * (log_p - log_q),
            "padded": log_p.exp() * (log_p - log_q),
            "swapped": log_q.exp() * (log_q - log_p),
            "soft CE": -log_p.exp() * log_q,
        }[kl]
        total = (1 - alpha) * temperature**power * terms.sum()
        if ce:
            total = total + alpha * torch.nn.functional.cross_entropy(z, labels[valid], reduction="sum")
        return total / (count(labels) if num_items_in_batch is None else num_items_in_batch)

    return loss


BUGS = {
    "direction": variant("swapped"),
    "reduction": variant("right", count=len),
    "cross-entropy": variant("right", ce=False),
    "gradient": variant("right", power=1),
    "T squared": variant("right", power=0),
    "shift": lambda h, w, th, tw, labels, *rest: variant("right")(h, w, th, tw, labels.roll(-1), *rest),
    "NaN under the mask": lambda h, *rest: variant("right")(h, *rest) + 0 * h.sum(),
    "no valid token": variant("right"),
    "accumulation": lambda *inputs, num_items_in_batch: variant("right")(*inputs),
    "padded vocabulary": variant("padded"),
    "zero at equality": variant("soft CE"),
    "alpha = 1": variant("right"),
    "precision": variant("right"),
}


@pytest.mark.parametrize("title", list(conformance.PROPERTIES))
def test_property_check_fails_for_a_loss_with_that_bug(title):
    """Some of the losses have a single bug: 0 * NaN at alpha = 1, 0 / 0 without a valid token, logits in bf16."""
    assert conformance.check("a bug", BUGS[title], title)[1]


def test_correct_plain_loss_passes_the_basic_property_checks():
    for title in ("direction", "reduction", "cross-entropy", "gradient", "T squared", "shift", "accumulation"):
        text, failed = conformance.check("right", variant("right"), title)
        assert not failed, f"{title}: {text}"
