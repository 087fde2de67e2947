"""The divergences and the hybrid loss of distillation: pure functions of logits, the readable truth.

Shapes: B batch, S sequence, V vocabulary, N tokens in the loss. T is the temperature, p the teacher's distribution
softmax(teacher_logits / T), q the student's softmax(student_logits / T). All numbers are in nats per token.

A divergence takes logits of (..., V), casts them to fp32 (float64 stays), divides by T, and sums over V: it returns
(...), *not* masked and *not* multiplied by T^2. Masking, T^2, mixing by alpha and the one division by the number of
tokens each happen once, in `kd_loss`.

The gradients below are with respect to the student's logits z, with q = softmax(z / T). They all follow from
dq_v/dz_w = q_v (1[v = w] - q_w) / T: a divergence sum_v f(p_v, q_v) has, with g_v = q_v * df/dq_v,
d/dz_v = (g_v - q_v * sum_w g_w) / T.

`kdkit.fused` computes the same loss from hidden states without ever holding the logits, and is checked against
this page.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
LOG_NOTHING = -87.0  # the logarithm of what counts as no probability at all: about the least that fp32 holds


class KDLoss(NamedTuple):
    """What a distillation loss returns. Only `loss` carries the graph.

    `loss == alpha * ce_loss + (1 - alpha) * kl_loss`. Each is a sum over the valid tokens given, divided by
    `num_items`; so parts of one step, given the whole step's `num_items_in_batch`, simply add up.
    """

    loss: Tensor  # (), in nats per token, with its graph
    ce_loss: Tensor  # (), cross-entropy at T = 1, detached
    kl_loss: Tensor  # (), T^2 * divergence, as it enters the loss, detached; 0, and not computed, at alpha = 1
    num_items: Tensor  # (), what was divided by


class TopK(NamedTuple):
    """The teacher's distribution at T in K + 1 buckets: its K likeliest tokens, and all others together, the tail.

    It stands for the teacher's logits in `kd_loss`. A divergence of two distributions in buckets is a lower bound of
    that of the whole ones (they may still differ inside the tail) and equal to it at K = V. Leaving the tail out and
    scaling the K up to 1, as is often done, gives no bound: its student is taught to put nothing outside of the K.
    """

    ids: Tensor  # (..., K), of any integer type
    log_probs: Tensor  # (..., K + 1), the tail's last


def top_k(teacher_logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The K likeliest tokens of logits (..., V) at T, and the tail; fp32 (float64 stays)."""
    log_p = _log_softmax(teacher_logits, temperature)
    ids = log_p.topk(k).indices
    return TopK(ids, in_buckets(log_p, ids))


def in_buckets(log_probs: Tensor, ids: Tensor) -> Tensor:
    """log_probs of all tokens (..., V) as those of the tokens `ids` (..., K) and of the tail: (..., K + 1)."""
    top = log_probs.gather(-1, ids)
    tail = log_probs.scatter(-1, ids, -1e4).logsumexp(-1, keepdim=True)  # finite: at K = V nothing is left
    return torch.cat([top, tail.clamp(min=LOG_NOTHING)], -1)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.log_softmax(logits / temperature, dim=-1)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v): the student has to cover all that the teacher finds likely.

    Range [0, inf), 0 exactly when p = q. Gradient: (q - p) / T. In PyTorch this is `F.kl_div(log_q, log_p,
    log_target=True)`, whose *first* argument is the student. Hinton et al. 2015 (arXiv:1503.02531), section 2;
    for sequences Kim and Rush 2016 (arXiv:1606.07947), equation 4.

    Args:
        student_logits: (..., V), any floating dtype.
        teacher_logits: (..., V), over the same vocabulary.
        temperature: T, divides both.

    Returns:
        (...), nats per token; not masked, not times T^2.

    >>> p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    >>> round(forward_kl(q.log(), p.log()).item(), 4)  # 0.5 log 2 + 0 - 0.25 log 2
    0.1733
    """
    log_p, log_q = _log_softmax(teacher_logits, temperature), _log_softmax(student_logits, temperature)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q || p) = sum_v q_v (log q_v - log p_v): the student may keep to one of the teacher's modes.

    Range [0, inf), 0 exactly when p = q. Gradient: q * (log q - log p - KL(q || p)) / T. Gu et al. 2023, MiniLLM
    (arXiv:2306.08543), section 2.1. Args and Returns as in `forward_kl`.
    """
    return forward_kl(teacher_logits, student_logits, temperature)


def jsd(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, *, beta: float = 0.5) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), with m = beta p + (1 - beta) q.

    Range [0, H(beta)], at most log 2 (at beta = 0.5, where it is symmetric); 0 when p = q. Gradient:
    (1 - beta) * q * (log(q / m) - KL(q || m)) / T. Agarwal et al. 2023, GKD (arXiv:2306.13649), section 2.

    The ends: it tends to 0 as beta goes to 0 or 1, and only its *ratio* to beta tends to KL(p || q), to 1 - beta to
    KL(q || p). Some libraries return those KLs at beta = 0 and 1, a jump; here beta lies strictly between.

    Args:
        student_logits, teacher_logits, temperature: as in `forward_kl`.
        beta: weight of the teacher in m, in (0, 1).

    Returns:
        (...), nats per token; not masked, not times T^2.

    Raises:
        ValueError: beta outside (0, 1); use forward_kl or reverse_kl there.
    """
    if not 0.0 < beta < 1.0:
        raise ValueError(
            f"beta is {beta}, expected 0 < beta < 1: the JSD is 0 at both ends; use forward_kl or reverse_kl"
        )
    log_p, log_q = _log_softmax(teacher_logits, temperature), _log_softmax(student_logits, temperature)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return (beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)).sum(-1)


def skew_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, *, skew: float = 0.1) -> Tensor:
    """KL(p || m), with m = skew p + (1 - skew) q: forward KL against a student that is given some of the teacher.

    Range [0, -log skew]; 0 when p = q; forward KL at skew = 0. Gradient, with r = (1 - skew) p q / m:
    (q * sum(r) - r) / T. Ko et al. 2024, DistiLLM (arXiv:2402.03898), equation 4 (their alpha is `skew`).

    Args:
        student_logits, teacher_logits, temperature: as in `forward_kl`.
        skew: in [0, 1).

    Returns:
        (...), nats per token; not masked, not times T^2.

    Raises:
        ValueError: skew outside [0, 1); at 1 the student is not in it.
    """
    _check_skew(skew)
    log_p, log_q = _log_softmax(teacher_logits, temperature), _log_softmax(student_logits, temperature)
    return (log_p.exp() * (log_p - _log_mix(log_p, log_q, skew))).sum(-1)


def skew_reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, *, skew: float = 0.1
) -> Tensor:
    """KL(q || m), with m = skew q + (1 - skew) p: reverse KL against a teacher that is given some of the student.

    Range [0, -log skew]; 0 when p = q; reverse KL at skew = 0. Gradient, with d = log(q / m) and
    g = q * (d - skew q / m): (g - q * sum(g)) / T. Ko et al. 2024, DistiLLM (arXiv:2402.03898), section 3.1.
    Args, Returns and Raises as in `skew_kl`.
    """
    _check_skew(skew)
    log_p, log_q = _log_softmax(teacher_logits, temperature), _log_softmax(student_logits, temperature)
    return (log_q.exp() * (log_q - _log_mix(log_q, log_p, skew))).sum(-1)


def total_variation(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """1/2 sum_v |p_v - q_v|, which is 1 - sum_v min(p_v, q_v): one minus the acceptance rate of a draft model.

    Range [0, 1], 0 when p = q. Gradient, with s = sign(q - p) / 2: q * (s - sum_v q_v s_v) / T, and 0 where p = q.
    Wen et al. 2023 (arXiv:2307.15190), section 3. Args and Returns as in `forward_kl`.
    """
    log_p, log_q = _log_softmax(teacher_logits, temperature), _log_softmax(student_logits, temperature)
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def _check_skew(skew: float) -> None:
    if not 0.0 <= skew < 1.0:
        raise ValueError(f"skew is {skew}, expected 0 <= skew < 1 (0.1 is usual)")


def _log_mix(log_a: Tensor, log_b: Tensor, skew: float) -> Tensor:
    """log(skew a + (1 - skew) b)."""
    return log_b if skew == 0 else torch.logaddexp(log_a + math.log(skew), log_b + math.log1p(-skew))


DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
}


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | TopK | None,
    labels: Tensor,
    *,
    alpha: float,
    temperature: float,
    divergence: str = "forward_kl",
    num_items_in_batch: int | Tensor | None = None,
    **divergence_options: float,
) -> KDLoss:
    """alpha * CE + (1 - alpha) * T^2 * D(teacher, student; T), per valid token.

    CE is at T = 1. T^2 is there since the divergence's gradient shrinks like 1/T^2 at high T (Hinton et al. 2015,
    section 2.1). Where the vocabularies are padded to different widths, both are cut to the narrower before the
    softmax: the entries beyond belong to no token.

    Args:
        student_logits: (B, S, V) or (N, V).
        teacher_logits: the same but for V; at alpha = 1 it may be None, and no value of it is read. Or `TopK`, of
            which the divergence is a lower bound.
        labels: (B, S) or (N,), aligned with the logits (already shifted); -100 is not in the loss.
        alpha: weight of the cross-entropy: 0 is pure divergence, 1 is pure cross-entropy.
        temperature: T > 0.
        divergence: a key of `DIVERGENCES`.
        num_items_in_batch: what the sums are divided by: the valid tokens of the whole optimizer step, over all
            micro-batches and ranks. None divides by those in `labels`.
        divergence_options: `beta` of jsd, `skew` of the skewed ones.

    Returns:
        KDLoss. With no valid token, zeros that keep their graph.

    Raises:
        ValueError: alpha, temperature or divergence out of range, or shapes that do not fit.
    """
    check_loss_arguments(alpha, temperature, divergence)
    if student_logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels are {tuple(labels.shape)}, the logits {tuple(student_logits.shape)}: one per token")
    valid = labels != IGNORE_INDEX
    labels, student_logits = labels[valid], student_logits[valid]  # (N,), (N, V)
    student_logits = student_logits if student_logits.dtype == torch.float64 else student_logits.float()
    divergence_sum = student_logits.new_zeros(())
    if isinstance(teacher_logits, Tensor):
        vocab_size = min(student_logits.shape[-1], teacher_logits.shape[-1])
        student_logits = student_logits[:, :vocab_size]  # (N, V)
    if alpha < 1:
        if teacher_logits is None:
            raise ValueError(f"teacher_logits is None, which only alpha = 1 allows; alpha is {alpha}")
        if isinstance(teacher_logits, TopK):
            ids, log_p = teacher_logits.ids[valid].long(), teacher_logits.log_probs[valid]  # (N, K), (N, K + 1)
            log_q = in_buckets(_log_softmax(student_logits, temperature), ids)
            per_token = DIVERGENCES[divergence](log_q, log_p, **divergence_options)  # log-probabilities are logits
        else:
            teacher_logits = teacher_logits[valid][:, :vocab_size]  # (N, V)
            per_token = DIVERGENCES[divergence](student_logits, teacher_logits, temperature, **divergence_options)
        divergence_sum = temperature**2 * per_token.sum()
    ce_sum = F.cross_entropy(student_logits, labels, reduction="sum")

    num_items = labels.numel() if num_items_in_batch is None else num_items_in_batch
    num_items = torch.as_tensor(num_items, device=labels.device)
    denominator = num_items.clamp(min=1)  # no valid token: the sums are 0, and so is the loss, graph and all
    ce_loss, kl_loss = ce_sum / denominator, divergence_sum / denominator
    loss = alpha * ce_loss + (1 - alpha) * kl_loss
    return KDLoss(loss, ce_loss.detach(), kl_loss.detach(), num_items)


def check_loss_arguments(alpha: float, temperature: float, divergence: str) -> None:
    """Raise a ValueError that names the value, what was expected and what to do."""
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}, expected 0 <= alpha <= 1: 0 is pure KL, 1 is pure cross-entropy")
    if not (0.0 < temperature < math.inf):
        raise ValueError(f"temperature is {temperature}, expected a number above 0 (1 leaves the softmax as it is)")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}, expected one of {', '.join(DIVERGENCES)}")


def dense_kd_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | TopK | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    *,
    vocab_size: int | None = None,
    **settings,
) -> KDLoss:
    """`kd_loss` from last hidden states and heads, by way of all the logits: the reference for `kdkit.fused`.

    Args:
        student_hidden, teacher_hidden: (..., Hs), (..., Ht); the teacher's may be None at alpha = 1, or `TopK`.
        student_head, teacher_head: (V, Hs), (V, Ht).
        labels: (...), aligned; -100 is not in the loss.
        vocab_size: use the first so many rows of both heads; None keeps those of the narrower head.
        settings: the keyword arguments of `kd_loss`.
    """
    if teacher_head is not None:
        vocab_size = min(len(student_head), len(teacher_head), vocab_size or len(student_head))
    student_logits = F.linear(student_hidden, student_head[:vocab_size])  # (..., V)
    teacher_logits = teacher_hidden if isinstance(teacher_hidden, TopK) else None
    if settings["alpha"] < 1 and isinstance(teacher_hidden, Tensor):
        teacher_logits = F.linear(teacher_hidden, teacher_head[:vocab_size])  # (..., V)
    return kd_loss(student_logits, teacher_logits, labels, **settings)
