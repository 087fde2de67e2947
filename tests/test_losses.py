"""Tests of the divergences and of the loss: properties, cases computed by hand, gradients, bugs of other libraries."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from kdkit.data import collate
from kdkit.fused import fused_kd_loss
from kdkit.losses import (
    DIVERGENCES,
    TopK,
    dense_kd_loss,
    forward_kl,
    in_buckets,
    jsd,
    kd_loss,
    neg_log_acceptance,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    top_k,
    total_variation,
)

NAMES = sorted(DIVERGENCES)
TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
P, Q = torch.tensor([0.5, 0.25, 0.25]).double(), torch.tensor([0.25, 0.25, 0.5]).double()  # easy to compute by hand
LOG2 = math.log(2)


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def mixed_kl(a: torch.Tensor, b: torch.Tensor, weight: float) -> float:
    """KL(a || weight a + (1 - weight) b), written out."""
    m = weight * a + (1 - weight) * b
    return sum(x * math.log(x / y) for x, y in zip(a.tolist(), m.tolist(), strict=True))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", NAMES)
def test_divergence_of_identical_models_is_zero_and_has_no_gradient(name, temperature):
    logits = randn(5, 7, scale=3).requires_grad_()
    value = DIVERGENCES[name](logits, logits.detach() + 3.0, temperature)  # the softmax ignores a constant
    value.sum().backward()
    assert value.abs().max() < 1e-14
    # Those of the overlap have a kink at p = q: rounding decides the sign of q - p, and with it the gradient.
    assert name in ("total_variation", "neg_log_acceptance") or logits.grad.abs().max() < 1e-14


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(
    ("name", "largest"),
    [
        ("forward_kl", math.inf),
        ("reverse_kl", math.inf),
        ("jsd", LOG2),
        ("skew_kl", -math.log(0.1)),
        ("skew_reverse_kl", -math.log(0.1)),
        ("total_variation", 1.0),
        ("neg_log_acceptance", math.inf),
    ],
)
def test_divergence_of_different_models_is_positive_and_within_its_range(name, largest, temperature):
    for scale in (0.01, 1.0, 30.0):
        value = DIVERGENCES[name](randn(64, 11, seed=1, scale=scale), randn(64, 11, seed=2, scale=scale), temperature)
        assert value.shape == (64,)
        assert value.min() > 0
        assert value.max() <= largest + 1e-12


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("forward_kl", {}, 0.5 * LOG2 - 0.25 * LOG2),
        ("reverse_kl", {}, -0.25 * LOG2 + 0.5 * LOG2),
        ("total_variation", {}, 0.25),
        ("neg_log_acceptance", {}, -math.log(0.75)),
        ("jsd", {}, 0.5 * (mixed_kl(P, Q, 0.5) + mixed_kl(Q, P, 0.5))),
        ("jsd", {"beta": 0.25}, 0.25 * mixed_kl(P, Q, 0.25) + 0.75 * mixed_kl(Q, P, 0.75)),
        ("skew_kl", {}, mixed_kl(P, Q, 0.1)),
        ("skew_kl", {"skew": 0.0}, 0.25 * LOG2),
        ("skew_reverse_kl", {"skew": 0.3}, mixed_kl(Q, P, 0.3)),
    ],
)
def test_divergence_of_three_tokens_equals_the_value_computed_by_hand(name, options, expected):
    assert DIVERGENCES[name](Q.log(), P.log(), **options).item() == pytest.approx(expected, abs=1e-14)


def test_forward_kl_is_kl_of_teacher_and_student_and_reverse_kl_is_the_opposite():
    """With two tokens, p = (3/4, 1/4) and q = (1/2, 1/2), the two directions differ: swapped arguments would fail."""
    p, q = torch.tensor([0.75, 0.25]).double(), torch.tensor([0.5, 0.5]).double()
    assert forward_kl(q.log(), p.log()).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-14)
    assert reverse_kl(q.log(), p.log()).item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), abs=1e-14)
    assert forward_kl(q.log(), p.log()).item() == pytest.approx(F.kl_div(q.log(), p, reduction="sum").item(), abs=1e-14)


def analytic_gradient(name: str, z: torch.Tensor, t: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the gradient that the docstring of the divergence states, at beta = 0.5 and skew = 0.1."""
    p, q = (t / temperature).softmax(-1), (z / temperature).softmax(-1)

    def total(x):
        return x.sum(-1, keepdim=True)

    if name == "forward_kl":
        return (q - p) / temperature
    if name == "reverse_kl":
        return q * ((q / p).log() - total(q * (q / p).log())) / temperature
    if name == "jsd":
        m = 0.5 * p + 0.5 * q
        return 0.5 * q * ((q / m).log() - total(q * (q / m).log())) / temperature
    if name == "skew_kl":
        r = 0.9 * p * q / (0.1 * p + 0.9 * q)
        return (q * total(r) - r) / temperature
    if name == "skew_reverse_kl":
        m = 0.1 * q + 0.9 * p
        g = q * ((q / m).log() - 0.1 * q / m)
        return (g - q * total(g)) / temperature
    s = (q - p).sign() / 2
    accepted = total(torch.minimum(p, q)) if name == "neg_log_acceptance" else 1
    return q * (s - total(q * s)) / accepted / temperature


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", NAMES)
def test_gradient_equals_the_formula_in_the_docstring_and_passes_gradcheck(name, temperature):
    z, t = randn(3, 6, seed=3).requires_grad_(), randn(3, 6, seed=4)
    DIVERGENCES[name](z, t, temperature).sum().backward()
    torch.testing.assert_close(z.grad, analytic_gradient(name, z.detach(), t, temperature), rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: DIVERGENCES[name](x, t, temperature), z)


def test_jsd_and_skewed_kl_equal_the_kl_in_the_limits_of_beta_and_skew():
    z, t = randn(4, 9, seed=5), randn(4, 9, seed=6)
    torch.testing.assert_close(skew_kl(z, t, skew=0.0), forward_kl(z, t))
    torch.testing.assert_close(skew_reverse_kl(z, t, skew=0.0), reverse_kl(z, t))
    torch.testing.assert_close(jsd(z, t), jsd(t, z))  # symmetric at beta = 0.5
    torch.testing.assert_close(jsd(z, t, beta=1e-7) / 1e-7, forward_kl(z, t), rtol=1e-5, atol=0)
    torch.testing.assert_close(jsd(z, t, beta=1 - 1e-7) / 1e-7, reverse_kl(z, t), rtol=1e-5, atol=0)
    assert jsd(z, t, beta=1e-7).max() < 1e-5  # our convention: the JSD tends to 0 at both ends, without a jump to a KL
    overlap = torch.minimum(z.softmax(-1), t.softmax(-1)).sum(-1)
    torch.testing.assert_close(total_variation(z, t), 1 - overlap)  # one minus the acceptance rate
    torch.testing.assert_close(neg_log_acceptance(z, t), -overlap.log())


def test_neg_log_acceptance_of_models_that_hardly_overlap_is_finite_and_still_pulls():
    """The overlap is e^-200, which is 0 in fp32: the total variation has lost its gradient there."""
    z, t = torch.tensor([200.0, 0.0, -99.0]).requires_grad_(), torch.tensor([0.0, 200.0, -99.0])
    value = neg_log_acceptance(z, t)
    value.backward()
    assert value.item() == pytest.approx(200 - LOG2, rel=1e-6)  # min(p, q) is e^-200 for each of two tokens
    torch.testing.assert_close(z.grad, torch.tensor([0.5, -0.5, 0.0]))
    total_variation(z, t).backward()
    torch.testing.assert_close(z.grad, torch.tensor([0.5, -0.5, 0.0]))  # it adds 0
    label = torch.full((3,), -1e9).index_fill(0, torch.tensor(2), 0.0)  # a sure teacher: the cross-entropy
    torch.testing.assert_close(neg_log_acceptance(randn(3), label.double()), -randn(3).log_softmax(0)[2])


def random_batch(batch: int = 8, seq: int = 6, vocab: int = 13, seed: int = 0):
    """Return student and teacher logits, and labels of rows with different lengths."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocab, (batch, seq), generator=generator)
    for row, length in enumerate(torch.randint(1, seq + 1, (batch,), generator=generator).tolist()):
        labels[row, length:] = -100
    return randn(batch, seq, vocab, seed=seed + 1), randn(batch, seq, vocab, seed=seed + 2), labels


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_loss_is_the_weighted_mean_of_ce_and_kl_over_valid_tokens(alpha, temperature):
    """Compare with a sum over tokens in plain Python. A wrong reduction or mask, or a missing T^2, would fail."""
    z, t, labels = random_batch()
    ce, kl, count = 0.0, 0.0, 0
    for b, s in (labels != -100).nonzero().tolist():
        log_q, log_p = (z[b, s] / temperature).log_softmax(-1), (t[b, s] / temperature).log_softmax(-1)
        ce -= z[b, s].log_softmax(-1)[labels[b, s]].item()
        kl += temperature**2 * (log_p.exp() * (log_p - log_q)).sum().item()
        count += 1
    got = kd_loss(z, t, labels, alpha=alpha, temperature=temperature)
    assert got.num_items == count
    assert got.ce_loss.item() == pytest.approx(ce / count, abs=1e-12)
    assert got.kl_loss.item() == pytest.approx(kl / count if alpha < 1 else 0.0, abs=1e-12)
    assert got.loss.item() == pytest.approx(alpha * got.ce_loss.item() + (1 - alpha) * got.kl_loss.item(), abs=1e-13)


def test_loss_of_flattened_logits_equals_the_loss_of_a_batch():
    z, t, labels = random_batch()
    flat = kd_loss(z.flatten(0, 1), t.flatten(0, 1), labels.flatten(), alpha=0.3, temperature=2.0)
    assert flat.loss == kd_loss(z, t, labels, alpha=0.3, temperature=2.0).loss


@pytest.mark.parametrize("alpha", [0.0, 1.0])  # only the divergence, only the cross-entropy
@pytest.mark.parametrize("size", [1, 2, 4])
def test_losses_of_micro_batches_add_up_to_the_loss_of_the_batch(size, alpha):
    """The mean of the micro-batch means would be wrong, since the rows have different lengths."""
    z, t, labels = random_batch()
    arguments = {"alpha": alpha, "temperature": 2.0, "num_items_in_batch": (labels != -100).sum()}
    whole, parts = z.clone().requires_grad_(), z.clone().requires_grad_()
    expected = kd_loss(whole, t, labels, **arguments)
    expected.loss.backward()
    losses = [kd_loss(*x, **arguments) for x in zip(parts.split(size), t.split(size), labels.split(size), strict=True)]
    total = sum(x.loss for x in losses)
    total.backward()
    torch.testing.assert_close(total, expected.loss, rtol=0, atol=1e-13)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=0, atol=1e-14)
    means = [kd_loss(*x, alpha=alpha, temperature=2.0).loss for x in zip(z, t, labels, strict=True)]
    assert abs(sum(means) / len(means) - expected.loss) > 1e-3


def test_gradient_at_a_high_temperature_keeps_its_size_because_of_t_squared():
    """With the factor T^2 the gradient has about the same norm at T = 8 and T = 64; without it, 1/64 of the norm."""
    z, t, labels = random_batch()
    norms = []
    for temperature in (8.0, 64.0):
        x = z.clone().requires_grad_()
        kd_loss(x, t, labels, alpha=0.0, temperature=temperature).loss.backward()
        norms.append(x.grad.norm())
    assert norms[1] / norms[0] == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_nan_in_masked_tokens_changes_neither_loss_nor_gradient(alpha):
    """NaN * 0 is NaN, so masking by multiplication would fail."""
    z, t, labels = random_batch()
    expected = kd_loss(z, t, labels, alpha=alpha, temperature=2.0).loss
    z, t = z.masked_fill((labels == -100)[..., None], math.nan), t.masked_fill((labels == -100)[..., None], math.nan)
    z.requires_grad_()
    loss = kd_loss(z, t, labels, alpha=alpha, temperature=2.0).loss
    loss.backward()
    assert loss == expected
    assert z.grad[labels == -100].abs().sum() == 0
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("pad_token_id", range(3))
def test_label_equal_to_the_pad_token_is_learned_and_padding_is_not(pad_token_id):
    """Padding is masked by position. With pad == eos, a mask by id would also mask the end of each text."""
    labels = ([0, 2, 1], [1, 0], [2])  # each of the three ids is the last label of one row
    rows = [{"input_ids": [0] * len(x), "labels": x, "position_ids": list(range(len(x)))} for x in labels]
    z, t, _ = random_batch(batch=3, seq=3, vocab=3)
    z.requires_grad_()
    kd_loss(z, t, collate(rows, pad_token_id)["labels"], alpha=1.0, temperature=1.0).loss.backward()
    expected = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()
    assert torch.equal(z.grad.abs().sum(-1) > 0, expected)


def test_loss_without_a_valid_token_is_zero_and_differentiable():
    z, t, labels = random_batch()
    z.requires_grad_()
    for num_items in (None, 0, 7):
        got = kd_loss(z, t, torch.full_like(labels, -100), alpha=0.3, temperature=2.0, num_items_in_batch=num_items)
        assert got.loss == got.ce_loss == got.kl_loss == 0
        got.loss.backward()
        assert z.grad.abs().max() == 0


def test_logits_beyond_the_smaller_vocabulary_change_nothing():
    """Entries that belong to no token are cut off. Padding the smaller vocabulary with zeros would change the loss."""
    z, t, labels = random_batch()
    expected = kd_loss(z, t, labels, alpha=0.3, temperature=2.0)
    wide = torch.cat([t, randn(*t.shape[:-1], 5, seed=9, scale=9)], -1)
    assert kd_loss(z, wide, labels, alpha=0.3, temperature=2.0).loss == expected.loss
    wide = torch.cat([z, randn(*z.shape[:-1], 5, seed=9, scale=9)], -1).requires_grad_()
    got = kd_loss(wide, t, labels, alpha=0.3, temperature=2.0)
    got.loss.backward()
    assert got.loss == expected.loss
    assert wide.grad[..., z.shape[-1] :].abs().max() == 0


def test_alpha_1_with_nan_teacher_logits_gives_the_plain_cross_entropy():
    z, t, labels = random_batch()
    expected = F.cross_entropy(z.flatten(0, 1), labels.flatten())
    for teacher in (None, t * math.nan):
        got = kd_loss(z, teacher, labels, alpha=1.0, temperature=2.0)
        torch.testing.assert_close(got.loss, expected)
        assert got.kl_loss == 0


@pytest.mark.parametrize("loss_function", [dense_kd_loss, fused_kd_loss])
def test_alpha_1_with_a_wider_student_takes_the_cross_entropy_over_the_shared_entries(loss_function):
    hidden, labels = randn(6, 4), torch.tensor([0, 3, -100, 6, 2, 1])
    student_head, teacher_head = randn(12, 4, seed=1).requires_grad_(), randn(7, 4, seed=2)
    got = loss_function(hidden, student_head, hidden, teacher_head, labels, alpha=1.0, temperature=2.0)
    got.loss.backward()
    expected = F.cross_entropy(hidden @ student_head[:7].T, labels)
    torch.testing.assert_close(got.loss, expected)
    torch.testing.assert_close(got.ce_loss, expected.detach())
    assert student_head.grad[7:].abs().max() == 0 < student_head.grad[:7].abs().max()


@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("loss_function", [dense_kd_loss, fused_kd_loss])
def test_loss_of_float64_inputs_inside_autocast_is_computed_in_float64(loss_function, name, alpha):
    """Loss and gradients equal those without autocast to 1e-12, for hidden states and for top-k targets."""
    labels = torch.tensor([0, 3, -100, 6, 2, 1])
    whole = randn(6, 5, seed=3), randn(9, 5, seed=4)
    for teacher in (whole, (top_k(whole[0] @ whole[1].T, 4, 2.0), None)):
        results = []
        for enabled in (False, True):
            hidden, head = randn(6, 4).requires_grad_(), randn(9, 4, seed=1).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                got = loss_function(hidden, head, *teacher, labels, alpha=alpha, temperature=2.0, divergence=name)
            got.loss.backward()
            results.append([got.loss, got.ce_loss, got.kl_loss, hidden.grad, head.grad])
        for value, expected in zip(*results, strict=True):
            assert value.dtype == torch.float64
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_loss_of_bf16_logits_is_computed_in_fp32():
    z, t, labels = (x.bfloat16() if x.is_floating_point() else x for x in random_batch())
    got = kd_loss(z, t, labels, alpha=0.3, temperature=2.0)
    assert got.loss.dtype == torch.float32
    expected = kd_loss(z.double(), t.double(), labels, alpha=0.3, temperature=2.0).loss
    assert got.loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"divergence": "kl"}, "divergence is 'kl'"),
        ({"divergence": "jsd", "beta": 1.0}, "beta is 1.0"),
        ({"divergence": "skew_kl", "skew": 1.0}, "skew is 1.0"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, "one per token"),
        ({"teacher_logits": None}, "teacher_logits is None"),
    ],
)
def test_invalid_argument_raises_an_error_that_names_it(changed, message):
    z, t, labels = random_batch()
    arguments = {"student_logits": z, "teacher_logits": t, "labels": labels, "alpha": 0.5, "temperature": 2.0} | changed
    with pytest.raises(ValueError, match=message):
        kd_loss(**arguments)


# --- the teacher's K most likely tokens and the tail -----------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_divergence_over_buckets_rises_with_k_to_the_full_divergence(name):
    """It is a lower bound for each K, and equal to the full divergence at K = V."""
    student, teacher, labels = randn(9, 13, seed=1, scale=2), randn(9, 13, seed=2, scale=2), torch.zeros(9).long()
    arguments = {"alpha": 0.0, "temperature": 2.0, "divergence": name}
    full = kd_loss(student, teacher, labels, **arguments).kl_loss
    over = [kd_loss(student, top_k(teacher, k, 2.0), labels, **arguments).kl_loss for k in range(1, 14)]
    assert all(a <= b + 1e-14 for a, b in itertools.pairwise(over)) and over[3] < 0.99 * full
    assert over[-1] == pytest.approx(full.item(), abs=1e-12)


def test_buckets_of_four_tokens_equal_those_computed_by_hand():
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3]).double()
    ids, log_probs = top_k(probabilities.log(), 2)
    assert ids.tolist() == [1, 3]
    torch.testing.assert_close(log_probs.exp(), torch.tensor([0.4, 0.3, 0.3]).double())
    torch.testing.assert_close(
        in_buckets(probabilities.log(), torch.tensor([0, 2])).exp(), torch.tensor([0.1, 0.2, 0.7]).double()
    )
    student = torch.tensor([0.25, 0.25, 0.25, 0.25]).double().log()[None]
    got = kd_loss(student, TopK(ids[None], log_probs[None]), torch.tensor([0]), alpha=0.0, temperature=1.0).kl_loss
    assert got == pytest.approx(0.4 * math.log(0.4 / 0.25) + 0.3 * math.log(0.3 / 0.25) + 0.3 * math.log(0.3 / 0.5))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [1, 5, 13])
def test_gradient_of_the_loss_over_buckets_passes_gradcheck(name, k):
    student, buckets = randn(4, 13, seed=1).requires_grad_(), top_k(randn(4, 13, seed=2), k, 2.0)
    labels = torch.tensor([3, -100, 0, 12])
    arguments = {"alpha": 0.3, "temperature": 2.0, "divergence": name}
    assert torch.autograd.gradcheck(lambda x: kd_loss(x, buckets, labels, **arguments).loss, student)


def test_loss_over_buckets_is_zero_if_only_the_distribution_inside_the_tail_differs():
    """Without a tail bucket, with the top K scaled to sum to 1, the loss would push the student's tail to 0."""
    teacher = torch.tensor([0.5, 0.3, 0.15, 0.05]).double().log()[None]
    student = torch.tensor([0.5, 0.3, 0.05, 0.15]).double().log()[None].requires_grad_()
    result = kd_loss(student, top_k(teacher, 2), torch.tensor([0]), alpha=0.0, temperature=1.0)
    result.loss.backward()
    assert abs(result.kl_loss) < 1e-14 and student.grad.abs().max() < 1e-14
    scaled_up = teacher[:, :2] - teacher[:, :2].logsumexp(-1, keepdim=True)
    assert (scaled_up.exp() * (scaled_up - student[:, :2])).sum() > 0.2
