"""The loss of `kdkit.losses` computed from hidden states and heads, without ever holding all logits.

Shapes: H hidden size, V vocabulary, N valid tokens, C tokens of a chunk, R tokens of a block, K top-k.

For 4,096 tokens, 151,936 entries, fp32 and two models, logits take 5 GB, and a plain loss holds several tensors of that
size. Here they exist for C tokens at a time:

1. tokens with label -100 are left out first, so that they cost nothing;
2. one matrix product per model writes the chunk's logits into a buffer that all chunks share;
3. autograd computes the gradient of `kdkit.losses.loss_sums` with respect to the student's logits, and it overwrites
   them; this is done in blocks of R tokens, whose temporary tensors stay in the CPU's cache;
4. two matrix products turn that gradient into the gradients of the hidden states and of the head.

The forward pass does all the work, and the backward pass only scales. (Checkpointing would compute all logits twice.)

Precision: the gradient of the forward KL, q - p, is a small difference of nearly equal numbers. Logits are therefore
fp32 even if hidden states and heads are bf16: logits rounded to bf16 cost about 10 % of the gradient at a KL of 0.04.
"""

import functools
import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdkit.losses import DIVERGENCES, IGNORE_INDEX, KDLoss, TopK, check_loss_arguments, loss_sums, soft_cap

CHUNK_TOKENS = {"cpu": 144, "gpu": 1024}  # C, at least: every chunk reads both heads and fills two (C, V) buffers
CHUNK_ELEMENTS = 2**22  # C * V, at least: with a small vocabulary, C is larger
BLOCK_ELEMENTS = {"cpu": 2**18, "gpu": 2**30}  # R * V, at most: a GPU takes a chunk as one block
COMPILE_LOGITS = {"cpu": 2**34, "gpu": 2**38}  # in a run of fewer logits, compiling takes longer than it saves
HEAD_ROWS = 512  # rows of a head that the CPU converts to fp32 at a time


class _Model(NamedTuple):
    hidden: Tensor  # (tokens, H)
    head: Tensor  # (V, H), cut to the vocabulary that both models share
    dtype: torch.dtype  # of the operands of the matrix products


def fused_kd_loss(
    student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor | TopK | None, teacher_head: Tensor | None,
    labels: Tensor, *,
    alpha: float, temperature: float, divergence: str = "forward_kl",
    num_items_in_batch: int | Tensor | None = None, vocab_size: int | None = None,
    student_cap: float | None = None, teacher_cap: float | None = None, valid: Tensor | None = None,
    chunk_size: int | None = None, compile: bool = False, **divergence_options: float,
) -> KDLoss:  # fmt: skip
    """`kd_loss(student_hidden @ student_head.T, teacher_hidden @ teacher_head.T, labels, ...)`, a chunk at a time.

    The matrix products run in the dtype of the hidden states, or in autocast's dtype inside `torch.autocast`; the
    logits are fp32 (or float64). Each gradient has the dtype of its tensor; that of the head is summed over the chunks
    in this dtype. The teacher never gets a gradient.

    Args:
        student_hidden: (..., H), the input of the student's head.
        student_head: (V, H).
        teacher_hidden, teacher_head: those of the teacher, whose H may differ. At alpha = 1 they may be None, and their
            values are not read. Or `TopK` and None: then only the student's logits are computed.
        labels: (...), already shifted; tokens with label -100 are not in the loss.
        alpha, temperature, divergence, num_items_in_batch, divergence_options: as in `kdkit.losses.kd_loss`.
        vocab_size: the entries of both vocabularies to use; None uses those of the narrower head.
        student_cap, teacher_cap: if given, the model's logits are cap * tanh(hidden @ head^T / cap).
        valid: (N,), the indices of the tokens in the loss in the flattened labels, if they are known; finding them
            makes the host wait for the GPU.
        chunk_size: the number of tokens whose logits exist at one time; None chooses it.
        compile: use `torch.compile` for step 3; the first call then takes about 15 seconds more.

    Returns:
        KDLoss. Its loss can be differentiated once.

    Raises:
        ValueError: an argument out of range, or shapes that do not match.
    """
    check_loss_arguments(alpha, temperature, divergence)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1 token, or None for the default")
    widths = [len(head) for head in (student_head, teacher_head) if head is not None]
    vocab_size = min(*widths, vocab_size or widths[0])
    if valid is None:
        valid = (labels != IGNORE_INDEX).flatten().nonzero().squeeze(1)  # (N,)
    student = _model("student", student_hidden, student_head, labels, vocab_size)
    teacher = None
    if alpha < 1 and isinstance(teacher_hidden, TopK):
        teacher = _top_k(teacher_hidden, labels)
    elif alpha < 1:
        if teacher_hidden is None or teacher_head is None:
            raise ValueError(f"teacher_hidden or teacher_head is None, which only alpha = 1 allows; alpha is {alpha}")
        teacher = _model("teacher", teacher_hidden, teacher_head, labels, vocab_size)
    device = labels.device.type
    chunk_size = chunk_size or max(CHUNK_TOKENS["cpu" if device == "cpu" else "gpu"], CHUNK_ELEMENTS // vocab_size)
    block = functools.partial(
        compile_block(device) if compile else block_sums_and_gradient,
        alpha=alpha, temperature=temperature, divergence=DIVERGENCES[divergence], options=divergence_options,
        student_cap=student_cap, teacher_cap=teacher_cap,
    )  # fmt: skip
    labels = labels.flatten()[valid]  # (N,)
    num_items = labels.numel() if num_items_in_batch is None else num_items_in_batch
    num_items = torch.as_tensor(num_items, device=labels.device)
    inputs = (student_hidden, student_head)
    if not torch.is_grad_enabled():
        inputs = (student_hidden.detach(), student_head.detach())  # no gradient is then computed for them
    chunk_size = min(chunk_size, len(valid))
    with torch.autocast(device, enabled=False):
        losses = _ChunkedLoss.apply(*inputs, student, teacher, valid, labels, num_items, block, chunk_size)
    return KDLoss(*losses, num_items)


def _model(name: str, hidden: Tensor, head: Tensor, labels: Tensor, vocab_size: int) -> _Model:
    """Check the shapes of one model's operands, and return them with one row per token."""
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(f"labels are {tuple(labels.shape)}, {name}_hidden {tuple(hidden.shape)}: one label per token")
    if hidden.shape[-1] != head.shape[1]:
        raise ValueError(f"{name}_hidden has H = {hidden.shape[-1]}, {name}_head {head.shape[1]}: expected the same")
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    head = head[:vocab_size].detach()
    if device != "cpu":
        head = head.to(dtype)  # a CPU converts a few rows at a time, see `_logits`
    return _Model(hidden.detach().reshape(labels.numel(), -1), head, dtype)


def _top_k(teacher: TopK, labels: Tensor) -> TopK:
    """Check the shapes of the teacher's buckets, and return them with one row per token."""
    ids, log_probs = (tuple(x.shape) for x in teacher)
    if ids[:-1] != labels.shape or log_probs != (*labels.shape, ids[-1] + 1):
        shapes = f"(*labels.shape, K) and (*labels.shape, K + 1), with labels {tuple(labels.shape)}"
        raise ValueError(f"ids are {ids} and log_probs {log_probs}, expected {shapes}")
    return TopK(*(x.reshape(labels.numel(), -1) for x in teacher))


class _ChunkedLoss(torch.autograd.Function):
    """The loss, CE and T^2 * D, divided by num_items. The gradients are computed in the forward pass and kept."""

    @staticmethod
    def forward(ctx, hidden, head, student, teacher, valid, labels, num_items, block, chunk_size) -> tuple[Tensor, ...]:
        inputs = zip((hidden, head), ctx.needs_input_grad[:2], strict=True)
        d_hidden, d_head = (x.new_zeros(x.shape) if needed else None for x, needed in inputs)
        device, vocab_size, on_cpu = valid.device, len(student.head), valid.device.type == "cpu"
        width = math.ceil(vocab_size / 8) * 8  # rows that start at a multiple of 16 bytes are read faster
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        # On a CPU, fp32 master weights and the fp32 gradient stay fp32: the product rounds its operands to bf16.
        grad_dtype = dtype if on_cpu and student.head.dtype == dtype else student.dtype
        head = student.head.to(grad_dtype)
        # On a GPU, partial sums in bf16 would be possible otherwise.
        in_fp32 = {"out_dtype": dtype} if device.type == "cuda" and grad_dtype != dtype else {}
        block_size = max(4, BLOCK_ELEMENTS["cpu" if on_cpu else "gpu"] // vocab_size)
        buffers = [
            torch.empty(chunk_size, width, dtype=dtype, device=device) for _ in (student, teacher)
        ]  # (C, at least V)
        sums, scale = torch.zeros(3, dtype=dtype, device=device), 1 / num_items.clamp(min=1).to(dtype)

        for first in range(0, len(valid), max(chunk_size, 1)):
            tokens = valid[first : first + chunk_size]  # (C,), indices into the hidden states
            z = _logits(student, tokens, buffers[0])  # (C, V)
            targets = []
            if isinstance(teacher, _Model):
                targets = [_logits(teacher, tokens, buffers[1])]  # (C, V)
            elif teacher is not None:
                targets = [x[tokens] for x in teacher]  # (C, K), (C, K + 1)
            # The gradient overwrites the logits. In a smaller dtype, its rows end before later rows of the logits.
            grad = z  # (C, V)
            if grad_dtype != dtype:
                grad = buffers[0].view(grad_dtype).view(-1, width)[: len(z), :vocab_size]
            num_blocks = math.ceil(len(z) / block_size)
            pieces = [x.tensor_split(num_blocks) for x in (grad, z, labels[first : first + chunk_size], *targets)]
            for d_z, *arguments in zip(*pieces, strict=True):
                block_sums, gradient = block(*arguments)
                sums += block_sums
                torch.mul(gradient, scale, out=d_z)  # rounded once, to the dtype of the products
            with _operands_as(student.dtype, device):
                if d_hidden is not None:
                    d_hidden.view(-1, d_hidden.shape[-1])[tokens] = torch.mm(grad, head, **in_fp32).to(d_hidden.dtype)
                if d_head is not None:
                    _add_product(d_head[:vocab_size], grad.T, student.hidden[tokens].to(grad_dtype))
        losses = tuple(x * scale for x in sums)  # new tensors: FSDP warns if an output is a view
        ctx.save_for_backward(d_hidden, d_head)
        ctx.mark_non_differentiable(*losses[1:])
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # In place, or the head's gradient would exist twice; but not if the graph is kept for another backward pass.
        multiply = torch.mul if torch._C._autograd._get_current_graph_task_keep_graph() else Tensor.mul_
        return *(None if x is None else multiply(x, grad_loss) for x in ctx.saved_tensors), *[None] * 7


def block_sums_and_gradient(
    z: Tensor, labels: Tensor, *teacher: Tensor, alpha: float, temperature: float, divergence: Callable, options: dict,
    student_cap: float | None = None, teacher_cap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the sums (3,) of loss, CE and T^2 * D over a block, and the gradient (R, V) of the first for z.

    z (R, V) are the student's logits, before its soft cap, and labels is (R,). `teacher` is its logits (R, V), or the
    two tensors of `TopK`, or nothing at alpha = 1. The other arguments are those of `kdkit.losses.loss_sums`.
    """
    targets = TopK(*teacher) if len(teacher) == 2 else next((soft_cap(logits, teacher_cap) for logits in teacher), None)
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        ce_sum, kl_sum = loss_sums(soft_cap(z, student_cap), targets, labels, alpha, temperature, divergence, **options)
        loss_sum = alpha * ce_sum + (1 - alpha) * kl_sum
        (gradient,) = torch.autograd.grad(loss_sum, z)
    return torch.stack([loss_sum, ce_sum, kl_sum]).detach(), gradient


@functools.cache
def compile_block(device_type: str, function: Callable = block_sums_and_gradient) -> Callable:
    """Compile `block_sums_and_gradient` for blocks of any size."""
    # With this option each logit is read twice and its gradient written once: 18 bytes per entry for all divergences.
    # Without it the compiler stores intermediate results of some, which is faster on a CPU, but not on a GPU.
    options = None if device_type == "cpu" else {"realize_reads_threshold": 32}
    torch._dynamo.config.trace_autograd_ops = True  # lets the compiler trace torch.autograd.grad
    return torch.compile(function, dynamic=True, options=options)


def missing_compiler(device: torch.device) -> str | None:
    """Return what `torch.compile` would need on this machine and does not find, or None."""
    if device.type == "cpu":
        return None if shutil.which(os.environ.get("CXX", "g++")) else "no C++ compiler was found"
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def should_compile(wanted: bool | None, num_logits: float, device: torch.device) -> tuple[bool, str]:
    """Return whether to compile the loss of a run, and a line that explains it.

    `wanted` is the field `compile_loss`; None decides by `num_logits`, tokens x vocabulary of the run on one device.
    """
    kind = "cpu" if device.type == "cpu" else "gpu"
    if wanted is False:
        return False, "not compiled (compile_loss is false)"
    if wanted is None and num_logits < COMPILE_LOGITS[kind]:
        return False, "not compiled (compiling would take longer than it saves in a run of this size)"
    if missing := missing_compiler(device):
        return False, f"not compiled ({missing})"
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        return False, f"not compiled (torch {torch.__version__} cannot compile torch.autograd.grad)"
    return True, "compiled in the first step"


def precise_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden (N, H) @ head (V, H).T in fp32 (or float64), exact to that dtype also for bf16 operands: (N, V)."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    out = torch.empty(len(hidden), len(head), dtype=dtype, device=hidden.device)
    return _logits(_Model(hidden, head, hidden.dtype), slice(None), out)


def _logits(model: _Model, tokens: Tensor | slice, buffer: Tensor) -> Tensor:
    """hidden[tokens] @ head.T in the first rows and columns of the buffer, exact to its dtype: (C, V)."""
    hidden, head = model.hidden[tokens].to(model.dtype), model.head  # (C, H), (V, H)
    out = buffer[: len(hidden), : len(head)]
    if head.dtype == hidden.dtype == out.dtype:
        return torch.mm(hidden, head.T, out=out)
    if out.device.type == "cuda":
        return torch.mm(hidden, head.T, out_dtype=out.dtype, out=out)
    hidden = hidden.to(out.dtype)
    with _operands_as(model.dtype, out.device):
        for i in range(0, len(head), HEAD_ROWS):
            torch.mm(hidden, head[i : i + HEAD_ROWS].to(out.dtype).T, out=out[:, i : i + HEAD_ROWS])
    return out


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where both may have a smaller dtype than the total."""
    if a.device.type == "cuda" and total.dtype == torch.float32 != a.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


@contextmanager
def _operands_as(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Let a CPU round the operands of fp32 products to bf16: exact if they are bf16 numbers already, and faster."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # from torch 2.9 on
    if dtype != torch.bfloat16 or device.type != "cpu" or matmul is None:
        yield
        return
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
