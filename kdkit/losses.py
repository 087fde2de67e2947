"""The divergences and the loss of distillation, as pure functions of logits.

Shapes: B batch, S sequence, V vocabulary, N tokens in the loss, K top-k. T is the temperature, p the teacher's
distribution softmax(teacher_logits / T), q the student's, softmax(student_logits / T). Numbers are in nats per token.

A divergence takes logits (..., V), casts them to fp32 (float64 stays), divides them by T and sums over V. It returns
(...), *not* masked and *not* multiplied by T^2. Masking, T^2, the mixture by alpha and the division by the number of
tokens each happen in one place: in `kd_loss` and in `loss_sums`, which it calls.

The gradients below are with respect to the student's logits z, where q = softmax(z / T). They all follow from
dq_v/dz_w = q_v (1[v = w] - q_w) / T: a divergence sum_v f(p_v, q_v) has, with g_v = q_v * df/dq_v,
d/dz_v = (g_v - q_v * sum_w g_w) / T.

`kdkit.fused` applies `loss_sums` to a few tokens at a time, so that the logits of a complete batch never exist.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
MIN_LOG_PROB = -87.0  # stands for log(0): about the logarithm of the smallest number that fp32 holds


class KDLoss(NamedTuple):
    """The value of a distillation loss: `loss == alpha * ce_loss + (1 - alpha) * kl_loss`.

    Each is a sum over the valid tokens given, divided by `num_items`. The values of micro-batches, each computed
    with the `num_items_in_batch` of the complete step, therefore add up to the value of the step.
    """

    loss: Tensor  # (), in nats per token; the only one with a graph
    ce_loss: Tensor  # (), cross-entropy at T = 1
    kl_loss: Tensor  # (), T^2 * divergence, as it enters the loss; 0 at alpha = 1, where it is not computed
    num_items: Tensor  # (), the divisor


class TopK(NamedTuple):
    """The teacher's distribution at T in K + 1 buckets: its K most likely tokens, and the tail, all others together.

    `kd_loss` takes it in place of the teacher's logits. The divergence between two distributions in buckets is a lower
    bound of the full one (they may still differ inside the tail), and equal to it at K = V. Without the tail, with the
    K probabilities scaled to sum to 1, there is no bound: the student learns to put no probability outside the K.
    """

    ids: Tensor  # (..., K), of any integer dtype
    log_probs: Tensor  # (..., K + 1), the tail last


def top_k(teacher_logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """Return the K most likely tokens of logits (..., V) at T, and the tail, in fp32 (or float64)."""
    log_p = _log_softmax(teacher_logits, temperature)
    ids = log_p.topk(k).indices
    return TopK(ids, in_buckets(log_p, ids))


def in_buckets(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Return log_probs (..., V) as the log-probabilities (..., K + 1) of the tokens `ids` (..., K) and of the tail."""
    top = log_probs.gather(-1, ids)
    tail = log_probs.scatter(-1, ids, -1e4).logsumexp(-1, keepdim=True)  # not -inf, since at K = V nothing is left
    return torch.cat([top, tail.clamp(min=MIN_LOG_PROB)], -1)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(_at_least_fp32(logits) / temperature, dim=-1)


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(logits / cap), which lies between -cap and cap (as in Gemma 2); None leaves the logits as they are."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v). The student has to cover every token that the teacher finds likely.

    Range [0, inf); 0 only if p = q. Gradient: (q - p) / T. In PyTorch this is `F.kl_div(log_q, log_p,
    log_target=True)`, whose *first* argument is the student. Hinton et al. 2015 (arXiv:1503.02531), section 2;
    for sequences Kim and Rush 2016 (arXiv:1606.07947), equation 4.

    Args:
        student_logits: (..., V), any floating dtype.
        teacher_logits: (..., V), over the same vocabulary.
        temperature: T, by which both are divided.

    Returns:
        (...), nats per token; not masked, not multiplied by T^2.

    >>> p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    >>> round(forward_kl(q.log(), p.log()).item(), 4)  # 0.5 log 2 + 0 - 0.25 log 2
    0.1733
    """
    log_p, log_q = _log_softmax(teacher_logits, temperature), _log_softmax(student_logits, temperature)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q || p) = sum_v q_v (log q_v - log p_v). The student may concentrate on one of the teacher's modes.

    Range [0, inf); 0 only if p = q. Gradient: q * (log q - log p - KL(q || p)) / T. Gu et al. 2023, MiniLLM
    (arXiv:2306.08543), section 2.1. Args and Returns as in `forward_kl`.
    """
    return forward_kl(teacher_logits, student_logits, temperature)


def jsd(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, *, beta: float = 0.5) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), with m = beta p + (1 - beta) q.

    Range [0, H(beta)], at most log 2 (at beta = 0.5, where it is symmetric); 0 if p = q. Gradient:
    (1 - beta) * q * (log(q / m) - KL(q || m)) / T. Agarwal et al. 2023, GKD (arXiv:2306.13649), section 2.

    The JSD tends to 0 as beta tends to 0 or 1; only its ratio to beta tends to KL(p || q), and its ratio to 1 - beta to
    KL(q || p). Some libraries return those KLs at beta = 0 and 1, which is a jump. Here both ends raise a ValueError.

    Args and Returns as in `forward_kl`; `beta` in (0, 1) is the weight of the teacher in m.
    """
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta is {beta}, expected 0 < beta < 1 (at the ends use forward_kl or reverse_kl)")
    log_p, log_q = _log_softmax(teacher_logits, temperature), _log_softmax(student_logits, temperature)
    p, q = log_p.exp(), log_q.exp()
    log_m = _log_mixture(p, q, beta)
    return beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (q * (log_q - log_m)).sum(-1)


def skew_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, *, skew: float = 0.1) -> Tensor:
    """KL(p || m), with m = skew p + (1 - skew) q: forward KL to a mixture of the student with some of the teacher.

    Range [0, -log skew]; 0 if p = q; equal to forward KL at skew = 0. Gradient, with r = (1 - skew) p q / m:
    (q * sum(r) - r) / T. Ko et al. 2024, DistiLLM (arXiv:2402.03898), equation 4 (their alpha is `skew`).

    Args and Returns as in `forward_kl`; `skew` in [0, 1) is the weight of the teacher in m. At 1 it raises a
    ValueError, since m would not contain the student.
    """
    if not 0.0 <= skew < 1.0:
        raise ValueError(f"skew is {skew}, expected 0 <= skew < 1 (0.1 is usual)")
    log_p, log_q = _log_softmax(teacher_logits, temperature), _log_softmax(student_logits, temperature)
    p = log_p.exp()
    log_m = _log_mixture(p, log_q.exp(), skew) if skew > 0 else log_q
    return (p * (log_p - log_m)).sum(-1)


def skew_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, *, skew: float = 0.1
) -> Tensor:
    """KL(q || m), with m = skew q + (1 - skew) p: reverse KL to a mixture of the teacher with some of the student.

    Range [0, -log skew]; 0 if p = q; equal to reverse KL at skew = 0. Gradient, with d = log(q / m) and
    g = q * (d - skew q / m): (g - q * sum(g)) / T. Ko et al. 2024, DistiLLM (arXiv:2402.03898), section 3.1.
    Arguments as in `skew_kl`; `skew` is the weight of the student in m.
    """
    return skew_kl(teacher_logits, student_logits, temperature, skew=skew)


def total_variation(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """1/2 sum_v |p_v - q_v| = sum_v max(p_v - q_v, 0) = 1 - sum_v min(p_v, q_v): 1 - the acceptance rate of a draft.

    Range [0, 1]; 0 if p = q. Gradient, with s = -1[p > q]: q * (s - sum_v q_v s_v) / T, and 0 if p = q.
    Wen et al. 2023 (arXiv:2307.15190), section 3. Args and Returns as in `forward_kl`.
    """
    log_p, log_q = _log_softmax(teacher_logits, temperature), _log_softmax(student_logits, temperature)
    return F.relu(log_p.exp() - log_q.exp()).sum(-1)


def neg_log_acceptance(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """-log sum_v min(p_v, q_v): minus the logarithm of the acceptance rate of a draft, -log(1 - total variation).

    Range [0, inf); 0 if p = q. Gradient: that of the total variation divided by the acceptance rate, so that it does
    not vanish where the models hardly overlap: with r = 1[q < p] * q / sum_v min(p_v, q_v), it is
    (q * sum(r) - r) / T, and 0 if p = q. For a teacher that is sure of one token it is the cross-entropy. Samarin et
    al. 2026, LK losses (arXiv:2602.23881). Args and Returns as in `forward_kl`.
    """
    log_p, log_q = _log_softmax(teacher_logits, temperature), _log_softmax(student_logits, temperature)
    return -torch.minimum(log_p, log_q).logsumexp(-1)  # finite also if the overlap is below the range of fp32


def _log_mixture(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """log(weight * a + (1 - weight) * b), finite if a and b have underflowed to 0: 0 * -inf would be NaN."""
    return (torch.lerp(b, a, weight) + torch.finfo(a.dtype).tiny).log()


DIVERGENCES = {
    f.__name__: f for f in (forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl, total_variation, neg_log_acceptance)
}


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor | TopK | None, labels: Tensor, *,
    alpha: float, temperature: float, divergence: str = "forward_kl",
    num_items_in_batch: int | Tensor | None = None, **divergence_options: float,
) -> KDLoss:  # fmt: skip
    """alpha * CE + (1 - alpha) * T^2 * D(teacher, student; T), per valid token.

    If the two heads are padded to different widths, both are cut to the narrower one before the softmax: the entries
    beyond it belong to no token.

    Args:
        student_logits: (B, S, V) or (N, V).
        teacher_logits: the same shape except for V, or `TopK` (the divergence is then a lower bound of the full one).
            At alpha = 1 it may be None, and its values are not read.
        labels: (B, S) or (N,), aligned with the logits (already shifted); tokens with label -100 are not in the loss.
        alpha: weight of the cross-entropy: 0 is pure divergence, 1 is pure cross-entropy.
        temperature: T > 0.
        divergence: a key of `DIVERGENCES`.
        num_items_in_batch: the number that the sums are divided by: the valid tokens of the complete step, over
            all micro-batches and ranks. None divides by the valid tokens in `labels`.
        divergence_options: `beta` of jsd, `skew` of the skewed divergences.

    Returns:
        KDLoss. With no valid token all its values are 0, and `loss` keeps its graph.

    Raises:
        ValueError: alpha, temperature or divergence out of range, or shapes that do not match.
    """
    check_loss_arguments(alpha, temperature, divergence)
    if student_logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels are {tuple(labels.shape)}, the logits {tuple(student_logits.shape)}: one per token")
    if teacher_logits is None and alpha < 1:
        raise ValueError(f"teacher_logits is None, which only alpha = 1 allows; alpha is {alpha}")
    valid = labels != IGNORE_INDEX
    labels, student_logits = labels[valid], student_logits[valid]  # (N,), (N, V)
    if isinstance(teacher_logits, TopK):
        teacher_logits = TopK(*(x[valid] for x in teacher_logits))  # (N, K), (N, K + 1)
    elif teacher_logits is not None:
        vocab_size = min(student_logits.shape[-1], teacher_logits.shape[-1])
        student_logits = student_logits[:, :vocab_size]  # (N, V)
        teacher_logits = teacher_logits[valid][:, :vocab_size]  # (N, V)
    function, targets = DIVERGENCES[divergence], None if alpha == 1 else teacher_logits
    ce_sum, kl_sum = loss_sums(student_logits, targets, labels, alpha, temperature, function, **divergence_options)
    num_items = labels.numel() if num_items_in_batch is None else num_items_in_batch
    num_items = torch.as_tensor(num_items, device=labels.device)
    denominator = num_items.clamp(min=1)  # with no valid token the sums are 0: the loss is 0, and differentiable
    ce_loss, kl_loss = ce_sum / denominator, kl_sum / denominator
    return KDLoss(alpha * ce_loss + (1 - alpha) * kl_loss, ce_loss.detach(), kl_loss.detach(), num_items)


def loss_sums(
    student_logits: Tensor, teacher_logits: Tensor | TopK | None, labels: Tensor,
    alpha: float, temperature: float, divergence: Callable[..., Tensor], **divergence_options: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sums of CE and of T^2 * D over the N tokens given, all of them valid.

    CE is at T = 1. T^2 compensates for the gradient of the divergence, which shrinks like 1/T^2 at high T (Hinton et
    al. 2015, section 2.1). A part with weight 0 needs no gradient: at alpha = 0 the CE is detached (it is computed
    since it is logged), and at alpha = 1 the divergence is not computed.

    Args:
        student_logits, labels: (N, V) and (N,).
        teacher_logits: (N, V), or `TopK` of (N, K) and (N, K + 1), or None at alpha = 1.
        divergence: one of the functions above; the other arguments as in `kd_loss`.

    Returns:
        Two scalars, in nats.
    """
    student_logits = _at_least_fp32(student_logits)
    per_token = student_logits.new_zeros(1)
    if isinstance(teacher_logits, TopK):  # log-probabilities are logits, too, and the temperature is already in them
        log_q = in_buckets(_log_softmax(student_logits, temperature), teacher_logits.ids.long())  # (N, K + 1)
        per_token = divergence(log_q, teacher_logits.log_probs, **divergence_options)  # (N,)
    elif teacher_logits is not None:
        per_token = divergence(student_logits, teacher_logits, temperature, **divergence_options)  # (N,)
    kl_sum = temperature**2 * per_token.sum()  # before the CE: in this order torch.compile fuses both into one pass
    ce_logits = student_logits.detach() if alpha == 0 else student_logits
    return F.cross_entropy(ce_logits, labels, reduction="sum"), kl_sum


def check_loss_arguments(alpha: float, temperature: float, divergence: str) -> None:
    """Raise a ValueError if an argument is out of range."""
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}, expected 0 <= alpha <= 1: 0 is pure KL, 1 is pure cross-entropy")
    if not (0.0 < temperature < math.inf):
        raise ValueError(f"temperature is {temperature}, expected a number above 0 (1 leaves the softmax as it is)")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}, expected one of {', '.join(DIVERGENCES)}")


def dense_kd_loss(
    student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor | TopK | None, teacher_head: Tensor | None,
    labels: Tensor, *, vocab_size: int | None = None, student_cap: float | None = None,
    teacher_cap: float | None = None, **settings,
) -> KDLoss:  # fmt: skip
    """`kd_loss` from last hidden states and heads, with all logits in memory: the reference for `kdkit.fused`.

    The arguments are those of `kdkit.fused.fused_kd_loss`; `settings` are the keyword arguments of `kd_loss`.
    """
    if teacher_head is not None:
        vocab_size = min(len(student_head), len(teacher_head), vocab_size or len(student_head))
    student_logits = soft_cap(F.linear(student_hidden, student_head[:vocab_size]), student_cap)  # (..., V)
    teacher_logits = teacher_hidden
    if isinstance(teacher_hidden, Tensor) and teacher_head is not None:
        teacher_logits = soft_cap(F.linear(teacher_hidden, teacher_head[:vocab_size]), teacher_cap)  # (..., V)
    return kd_loss(student_logits, teacher_logits, labels, **settings)
