"""The loss of `kdkit.losses` from hidden states and heads, without ever holding the logits.

Shapes: H hidden size, V vocabulary, N tokens in the loss, C tokens of a chunk, R tokens of a block. T is the
temperature; z are the student's logits, hidden @ head.T; p and q the teacher's and the student's softmax at T.

Logits are the largest thing in distillation: those of 4,096 tokens over 151,936 entries, in fp32 and for two models,
are 5 GB, and a plain loss holds several tensors of that size. Here they exist for C tokens at a time:

1. tokens whose label is -100 are left out first, so a masked token costs nothing;
2. one matrix product a model fills a buffer, used again and again, with the chunk's logits;
3. in blocks of R tokens that stay in the cache, cross-entropy, divergence and d loss / d z are computed in place;
   the gradient is known in closed form (see `kdkit.losses`), so nothing is kept for a backward pass;
4. two products turn d loss / d z into the gradients of the hidden states and of the head.

So the forward does all the work, and the backward only scales. Checkpointing, the other way to save the memory,
would compute both models' logits twice.

Precision: the gradient of forward KL, q - p, is a small difference of nearly equal numbers. Logits are therefore
fp32 even where hidden states and heads are bf16; rounded to bf16 they cost some 10% of the gradient at a KL of 0.04.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdkit.losses import DIVERGENCES, IGNORE_INDEX, LOG_NOTHING, KDLoss, TopK, check_loss_arguments

CHUNK_TOKENS = {"cpu": 144, "gpu": 1024}  # C, at the least: each chunk reads both heads, and fills two (C, V) buffers
CHUNK_ELEMENTS = 2**22  # C * V, at the least: where the vocabulary is small, C is larger
BLOCK_ELEMENTS = {"cpu": 2**17, "gpu": 2**23}  # R * V: five fp32 tensors of this size should stay in the L2 cache
HEAD_ROWS = 512  # rows of a head that are converted at a time


class Head(NamedTuple):
    """A head that is more than a matrix: softcap * tanh(y / softcap), with y = scale * (hidden @ weight.T + bias).

    Gemma 2 caps its logits, Cohere and Granite scale them. Where nothing of this is there, give the weight alone.
    """

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None


class _Model(NamedTuple):
    """One model's side of the loss."""

    hidden: Tensor  # (tokens, H)
    head: Head  # cut to the vocabulary that both share
    dtype: torch.dtype  # in which it multiplies


class _Task(NamedTuple):
    """All that the loss depends on, checked."""

    student: _Model
    teacher: _Model | TopK | None  # None at alpha = 1
    rows: Tensor  # (N,), the tokens that are in the loss
    labels: Tensor  # (N,)
    num_items: Tensor  # (), at least 1
    alpha: float
    temperature: float
    divergence: Callable
    chunk_size: int
    precise: bool


def fused_kd_loss(
    student_hidden: Tensor,
    student_head: Tensor | Head,
    teacher_hidden: Tensor | TopK | None,
    teacher_head: Tensor | Head | None,
    labels: Tensor,
    *,
    alpha: float,
    temperature: float,
    divergence: str = "forward_kl",
    num_items_in_batch: int | Tensor | None = None,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    precise: bool = True,
    **divergence_options: float,
) -> KDLoss:
    """`kd_loss(student_hidden @ student_head.T, teacher_hidden @ teacher_head.T, labels, ...)`, a chunk at a time.

    The products run in the hidden states' dtype, inside `torch.autocast` in autocast's; logits are fp32, or float64.
    Gradients have the dtype of what they belong to, and the head's is summed over the chunks in it: in fp32 for the
    master weights of mixed precision. Only what requires a gradient gets one, and the teacher never does.

    Args:
        student_hidden: (..., H), what the model applies its head to.
        student_head: (V, H), or a `Head` if it has a bias, a scale or a soft cap.
        teacher_hidden, teacher_head: the teacher's, of any H; at alpha = 1 they may be None, and no value is read.
            Or its `TopK`, and None: then only the student's logits are computed.
        labels: (...), already shifted; -100 is not in the loss.
        alpha, temperature, divergence, num_items_in_batch, divergence_options: as in `kdkit.losses.kd_loss`.
        vocab_size: entries to keep of both vocabularies; None keeps those of the narrower head.
        chunk_size: tokens whose logits exist at one time; None is `CHUNK_TOKENS`, or more for a small vocabulary.
        precise: False lets logits be rounded to the dtype of the products: faster on a CPU, no faster on a GPU.

    Returns:
        KDLoss. Its loss can be differentiated once.

    Raises:
        ValueError: an argument out of range, or shapes that do not fit.
    """
    check_loss_arguments(alpha, temperature, divergence)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1 token, or None for the default")
    student_head, teacher_head = (Head(x) if isinstance(x, Tensor) else x for x in (student_head, teacher_head))
    widths = [len(head.weight) for head in (student_head, teacher_head) if head is not None]
    vocab_size = min(*widths, vocab_size or widths[0])
    student = _model("student", student_hidden, student_head, labels, vocab_size, precise)
    teacher = None
    if alpha < 1:
        if isinstance(teacher_hidden, TopK):
            teacher = _top_k(teacher_hidden, labels)
        elif teacher_hidden is None or teacher_head is None:
            raise ValueError(f"teacher_hidden or teacher_head is None, which only alpha = 1 allows; alpha is {alpha}")
        else:
            teacher = _model("teacher", teacher_hidden, teacher_head, labels, vocab_size, precise)
        DIVERGENCES[divergence](torch.zeros(1), torch.zeros(1), **divergence_options)  # refuses what it does not know

    rows = (labels != IGNORE_INDEX).flatten().nonzero().squeeze(1)  # (N,); the one wait for the GPU
    num_items = torch.as_tensor(len(rows) if num_items_in_batch is None else num_items_in_batch, device=labels.device)
    task = _Task(
        student,
        teacher,
        rows,
        labels.flatten()[rows],
        num_items.clamp(min=1),
        alpha,
        temperature,
        partial(_GRADIENTS[divergence], **divergence_options),
        max(1, min(chunk_size or max(_by_device(CHUNK_TOKENS, rows), CHUNK_ELEMENTS // vocab_size), len(rows))),
        precise,
    )
    inputs = student_hidden, student_head.weight, student_head.bias
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return KDLoss(*_FusedKDLoss.apply(*inputs, task), num_items)
    return KDLoss(*_loss_and_gradients(task, None, None, None)[:3], num_items)


def _model(name: str, hidden: Tensor, head: Head, labels: Tensor, vocab_size: int, precise: bool) -> _Model:
    weight = head.weight[:vocab_size].detach()
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(f"labels are {tuple(labels.shape)}, {name}_hidden {tuple(hidden.shape)}: one label per token")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"{name}_hidden has H = {hidden.shape[-1]}, {name}_head {weight.shape[1]}: expected the same")
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    if device != "cpu" or not precise:
        weight = weight.to(dtype)  # for precise logits, a CPU converts a few rows at a time
    bias = None if head.bias is None else head.bias[:vocab_size].detach()
    return _Model(hidden.detach().reshape(labels.numel(), -1), head._replace(weight=weight, bias=bias), dtype)


def _top_k(teacher: TopK, labels: Tensor) -> TopK:
    """One row a token."""
    ids, log_probs = teacher
    if ids.shape[:-1] != labels.shape or log_probs.shape != (*labels.shape, ids.shape[-1] + 1):
        raise ValueError(
            f"ids are {tuple(ids.shape)} and log_probs {tuple(log_probs.shape)}, expected (*labels.shape, K) and "
            f"(*labels.shape, K + 1), with labels {tuple(labels.shape)}"
        )
    return TopK(ids.reshape(labels.numel(), -1), log_probs.reshape(labels.numel(), -1))


def _by_device(sizes: dict[str, int], tensor: Tensor) -> int:
    return sizes["cpu" if tensor.device.type == "cpu" else "gpu"]


class _FusedKDLoss(torch.autograd.Function):
    """Gives the graph the gradients that the forward has already computed."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, task: _Task) -> tuple[Tensor, ...]:
        inputs = zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        gradients = [x.new_zeros(x.shape) if needed else None for x, needed in inputs]
        *losses, factor = _loss_and_gradients(task, *gradients)
        ctx.save_for_backward(*gradients, factor)
        ctx.mark_non_differentiable(*losses[1:])
        return tuple(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, factor = ctx.saved_tensors
        # In place, or the head's gradient would be held twice; but not where the graph is kept for another backward.
        multiply = torch.mul if torch._C._autograd._get_current_graph_task_keep_graph() else Tensor.mul_
        return *(None if x is None else multiply(x, factor * grad_loss) for x in gradients), None


def _loss_and_gradients(
    task: _Task, d_hidden: Tensor | None, d_weight: Tensor | None, d_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, its two parts, and a factor that the gradients, which are added to the zeros given, still lack."""
    student, device = task.student, task.rows.device
    models = [x for x in (task.student, task.teacher) if isinstance(x, _Model)]
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    empty = partial(torch.empty, dtype=dtype, device=device)
    vocab_size = len(student.head.weight)
    buffers = [empty(task.chunk_size, vocab_size) for _ in models]  # (C, V) each
    scratch = empty(3, max(1, min(_by_device(BLOCK_ELEMENTS, task.rows) // vocab_size, task.chunk_size)), vocab_size)
    sums = torch.zeros(2, dtype=dtype, device=device)  # of cross-entropy and divergence
    # Master weights of fp32 and hidden states of bf16: a CPU need not convert either, see `_operands_as`.
    grad_dtype = dtype if device.type == "cpu" and student.head.weight.dtype == dtype else student.dtype
    weight = student.head.weight.to(grad_dtype)
    # 1 / n = 2^-exponent / mantissa. The power of two, exact in every dtype, is the backward's: with all of 1 / n here
    # a gradient of fp16 would underflow.
    mantissa, exponent = torch.frexp(task.num_items.to(dtype))
    weights = None  # of the cross-entropy's and of the divergence's T * d / d z, where these are wanted
    if not (d_hidden is d_weight is d_bias is None):
        weights = task.alpha / mantissa, (1 - task.alpha) * task.temperature / mantissa  # T^2 / T

    with torch.autocast(device.type, enabled=False):
        for first in range(0, len(task.rows), task.chunk_size):
            chunk = slice(first, min(first + task.chunk_size, len(task.rows)))
            rows, labels = task.rows[chunk], task.labels[chunk, None]  # (C,), (C, 1)
            pairs = zip(models, buffers, strict=True)
            logits = [_logits_(model, rows, task.precise, buffer[: len(rows)]) for model, buffer in pairs]
            # d loss / d z takes the place of z. Where its dtype is smaller, a row of it ends before that row of z.
            grad = buffers[0].view(grad_dtype).view(-1, vocab_size)[: len(rows)]  # (C, V)
            stored = ()
            if isinstance(task.teacher, TopK):
                stored = task.teacher.ids[rows].long(), task.teacher.log_probs[rows].to(dtype)  # (C, K), (C, K + 1)
            blocks = (x.split(scratch.shape[1]) for x in (labels, grad, *logits, *stored))
            nats = [_block_(task, weights, scratch, *block) for block in zip(*blocks, strict=True)]
            sums += torch.stack([torch.cat(x).sum() for x in zip(*nats, strict=True)])
            with _operands_as(student.dtype):
                if d_hidden is not None:
                    d_hidden.view(-1, d_hidden.shape[-1])[rows] = torch.mm(grad, weight).to(d_hidden.dtype)
                if d_weight is not None:
                    _add_product_(d_weight[:vocab_size], grad.T, student.hidden[rows].to(grad_dtype))
            if d_bias is not None:
                d_bias[:vocab_size] += grad.sum(0, dtype=d_bias.dtype)
    ce_loss, kl_loss = sums / task.num_items
    kl_loss = task.temperature**2 * kl_loss
    loss = task.alpha * ce_loss + (1 - task.alpha) * kl_loss
    return loss, ce_loss, kl_loss, torch.ldexp(torch.ones_like(mantissa), -exponent)


def precise_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden (N, H) @ weight (V, H).T in fp32 (float64 stays), as exact as that, from operands of bf16 too: (N, V)."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    out = torch.empty(len(hidden), len(weight), dtype=dtype, device=hidden.device)
    return _logits_(_Model(hidden, Head(weight), hidden.dtype), slice(None), True, out)


def _logits_(model: _Model, rows: Tensor | slice, precise: bool, out: Tensor) -> Tensor:
    """out = hidden[rows] @ weight.T, as exact as out's dtype from operands of the model's dtype."""
    hidden, weight = model.hidden[rows].to(model.dtype), model.head.weight  # (C, H), (V, H)
    if weight.dtype == hidden.dtype == out.dtype:
        return torch.mm(hidden, weight.T, out=out)  # (C, V)
    if not precise:
        return out.copy_(torch.mm(hidden, weight.T))
    if out.device.type == "cuda":
        return torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    hidden = hidden.to(out.dtype)
    with _operands_as(model.dtype):
        for i in range(0, len(weight), HEAD_ROWS):
            torch.mm(hidden, weight[i : i + HEAD_ROWS].to(out.dtype).T, out=out[:, i : i + HEAD_ROWS])
    return out


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where a is a transposed matrix and may be of a lower dtype."""
    on_cpu = a.device.type == "cpu"
    if total.dtype == torch.float32 != a.dtype and not on_cpu:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif total.dtype == a.dtype and not (on_cpu and a.dtype == torch.bfloat16):
        total.addmm_(a, b)
    else:
        for part, rows in zip(total.split(4096), a.split(4096), strict=True):
            part.addmm_(rows.to(part.dtype).contiguous(), b.to(part.dtype))  # transposed, bf16 is slow on a CPU


@contextmanager
def _operands_as(dtype: torch.dtype) -> Iterator[None]:
    """fp32 products on a CPU may round their operands to bf16: exact where these are bf16 already, and faster."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # from torch 2.9 on
    if dtype != torch.bfloat16 or matmul is None:
        yield
        return
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _block_(
    task: _Task,
    weights: tuple[Tensor, Tensor] | None,
    scratch: Tensor,
    labels: Tensor,
    grad: Tensor,
    z: Tensor,
    *teacher: Tensor,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy (R, 1) and divergence (R,) of labels (R, 1), logits z (R, V), and the teacher's logits (R, V), or
    ids (R, K) and log-probabilities (R, K + 1), or nothing at alpha = 1; d loss / d z goes to grad (R, V).

    The logits are overwritten. weights, None where no gradient is wanted, are those of the two gradients.
    """
    d_z, q, p = scratch[:, : len(labels)]  # (R, V) each
    slope = _finish_(z, task.student.head)
    largest = z.amax(-1, keepdim=True)  # (R, 1)
    total = torch.sub(z, largest, out=d_z).exp_().sum(-1, keepdim=True)  # (R, 1): d_z / total is softmax(z)
    ce, divergence = largest + total.log() - z.gather(-1, labels), torch.zeros_like(total[:, 0])
    if weights:
        d_z.mul_(weights[0] / total).scatter_add_(-1, labels, -weights[0].expand_as(labels))
    if teacher:
        if isinstance(task.teacher, TopK):
            divergence, g = _from_top_k_(task, z, largest, *teacher, q)
        else:
            divergence, g = _from_logits_(task, z, largest, *teacher, q, p)
        if weights:
            d_z.addcmul_(g, weights[1])
    if weights:
        grad.copy_(d_z if slope is None else d_z.mul_(slope))
    return ce, divergence


def _from_logits_(task: _Task, z: Tensor, largest: Tensor, t: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence (R,) of logits z and t (R, V), and T * d divergence / d z (R, V), in one of the arguments."""
    _finish_(t, task.teacher.head)
    _softmax_(z, largest, task.temperature, q)  # z becomes log q
    _softmax_(t, t.amax(-1, keepdim=True), task.temperature, p)  # t becomes log p
    divergence, g = task.divergence(z, q, t, p)
    return divergence, g.addcmul_(q, g.sum(-1, keepdim=True), value=-1)


def _from_top_k_(
    task: _Task, z: Tensor, largest: Tensor, ids: Tensor, log_p: Tensor, q: Tensor
) -> tuple[Tensor, Tensor]:
    """The same over the K + 1 buckets of log_p (R, K + 1). A tail token has its share, q_v / q_tail, of g_tail."""
    torch.add(largest / -task.temperature, z, alpha=1 / task.temperature, out=q).exp_()  # (R, V), not normalised yet
    top = q.gather(-1, ids)  # (R, K)
    tail = q.scatter_(-1, ids, 0).sum(-1, keepdim=True)  # (R, 1), not 1 - sum(top), whose digits cancel
    total = top.sum(-1, keepdim=True) + tail
    log_q = (torch.cat([top, tail], -1) / total).log_().clamp_(min=LOG_NOTHING)  # (R, K + 1)
    in_top, in_tail = log_q.exp(), log_p.log_softmax(-1)
    divergence, g = task.divergence(log_q, in_top.clone(), in_tail, in_tail.exp())
    sum_g = g.sum(-1, keepdim=True)
    per_tail = torch.where(tail > 0, g[:, -1:] / in_top[:, -1:], 0) - sum_g
    q.mul_(per_tail / total).scatter_(-1, ids, g[:, :-1] - in_top[:, :-1] * sum_g)
    return divergence, q


def _finish_(z: Tensor, head: Head) -> Tensor | None:
    """Turns hidden @ weight.T into logits, in place; with the derivative of that, None if it is 1."""
    if head.bias is not None:
        z += head.bias
    if head.scale != 1:
        z *= head.scale
    if head.softcap is None:
        return None if head.scale == 1 else z.new_tensor(head.scale)
    slope = head.scale * (1 - z.div_(head.softcap).tanh_() ** 2)
    z *= head.softcap
    return slope


def _softmax_(x: Tensor, largest: Tensor, temperature: float, out: Tensor) -> None:
    """out becomes softmax(x / T), and x its logarithm; largest is the maximum of x, (R, 1)."""
    torch.add(largest / -temperature, x, alpha=1 / temperature, out=x)
    total = torch.exp(x, out=out).sum(-1, keepdim=True)
    x -= total.log()
    out *= total.reciprocal_()


# The divergences of `kdkit.losses`, from log q, q, log p, p of (R, V), which they overwrite: nats per token, (R,), and
# g_v = q_v * d divergence / d q_v, (R, V), of which T * d divergence / d z is g - q * sum(g).


def _forward_kl(log_q: Tensor, q: Tensor, log_p: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    return log_p.sub_(log_q).mul_(p).sum(-1), p.neg_()


def _reverse_kl(log_q: Tensor, q: Tensor, log_p: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    g = log_q.sub_(log_p).mul_(q)
    return g.sum(-1), g


def _jsd(log_q: Tensor, q: Tensor, log_p: Tensor, p: Tensor, *, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    log_m = _log_mix(p, q, beta)
    from_p = log_p.sub_(log_m).mul_(p).mul_(beta)
    g = log_q.sub_(log_m).mul_(q).mul_(1 - beta)
    return from_p.add_(g).sum(-1), g


def _skew_kl(log_q: Tensor, q: Tensor, log_p: Tensor, p: Tensor, *, skew: float = 0.1) -> tuple[Tensor, Tensor]:
    if skew == 0:
        return _forward_kl(log_q, q, log_p, p)
    log_m = _log_mix(p, q, skew)
    g = log_q.sub_(log_m).exp_().mul_(p).mul_(skew - 1)
    return log_p.sub_(log_m).mul_(p).sum(-1), g


def _skew_reverse_kl(log_q: Tensor, q: Tensor, log_p: Tensor, p: Tensor, *, skew: float = 0.1) -> tuple[Tensor, Tensor]:
    if skew == 0:
        return _reverse_kl(log_q, q, log_p, p)
    log_ratio = log_q.sub_(_log_mix(q, p, skew))  # log(q / m)
    return (q * log_ratio).sum(-1), log_ratio.sub_(log_ratio.exp().mul_(skew)).mul_(q)


def _total_variation(log_q: Tensor, q: Tensor, log_p: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    half = torch.sub(q, p, out=log_p).mul_(0.5)
    return half.abs().sum(-1), half.sign_().mul_(q).mul_(0.5)


def _log_mix(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """log(weight a + (1 - weight) b), finite where both have underflowed: their terms are 0."""
    return torch.lerp(b, a, weight).clamp_(min=torch.finfo(a.dtype).tiny).log_()


_GRADIENTS = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": _total_variation,
}
