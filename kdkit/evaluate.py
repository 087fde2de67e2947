"""Measure on held-out text whether distillation works.

    python -m kdkit.evaluate runs/demo_ce runs/demo        # compare finished runs: table, samples and figure
    python -m kdkit.evaluate --draft runs/demo             # what the student saves in speculative decoding

Shapes: N tokens in the loss, V vocabulary; p is the teacher's distribution and q the student's, at T = 1 unless stated.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from kdkit.config import DistillConfig, RunStopped, UsageError
from kdkit.data import collate, empty_row, is_packed
from kdkit.losses import DIVERGENCES, IGNORE_INDEX, forward_kl, soft_cap
from kdkit.models import examine, wrap

CHUNK_TOKENS = 1024  # tokens whose logits exist at once
# name -> a function of the logits of student and teacher, (C, V) each, and the labels (C,), which returns (C,) numbers.
# Their mean over all held-out tokens is eval/NAME.
METRICS = {
    "ce_loss": lambda student, teacher, labels: F.cross_entropy(student, labels, reduction="none"),
    "teacher_ce_loss": lambda student, teacher, labels: F.cross_entropy(teacher, labels, reduction="none"),
    "kl_t1": lambda student, teacher, labels: forward_kl(student, teacher),
    "top1_agreement": lambda student, teacher, labels: student.argmax(-1) == teacher.argmax(-1),
    "acceptance_rate": lambda student, teacher, labels: torch.minimum(student.softmax(-1), teacher.softmax(-1)).sum(-1),
}


def metric_sums(
    student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, labels: Tensor,
    config: DistillConfig, vocab_size: int | None = None, student_cap: float | None = None,
    teacher_cap: float | None = None,
) -> Tensor:  # fmt: skip
    """Sum the metrics over the tokens in the loss, so that the sums of batches and ranks can be added.

    The arguments are those of `kdkit.losses.dense_kd_loss`. Returns (M + 2,) float64: the M sums of `METRICS`, that of
    T^2 * divergence, and the number of tokens.
    """
    vocab_size = min(len(student_head), len(teacher_head), vocab_size or len(student_head))
    valid = labels != IGNORE_INDEX
    labels, student_hidden, teacher_hidden = labels[valid], student_hidden[valid], teacher_hidden[valid]
    student_head, teacher_head = student_head[:vocab_size].float(), teacher_head[:vocab_size].float()
    sums = torch.zeros(len(METRICS) + 2, dtype=torch.float64, device=labels.device)
    with torch.autocast(labels.device.type, enabled=False):  # products in fp32: bf16 logits would distort a small KL
        for start in range(0, labels.numel(), CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            student_logits = soft_cap(student_hidden[chunk].float() @ student_head.T, student_cap)  # (C, V)
            teacher_logits = soft_cap(teacher_hidden[chunk].float() @ teacher_head.T, teacher_cap)  # (C, V)
            logits, options = (student_logits, teacher_logits), config.divergence_options
            per_token = (
                *(function(*logits, labels[chunk]) for function in METRICS.values()),
                config.temperature**2 * DIVERGENCES[config.divergence](*logits, config.temperature, **options),
                torch.ones_like(labels[chunk]),
            )
            sums += torch.stack([values.double().sum() for values in per_token])
    return sums


def evaluation_batches(
    rows: Sequence[dict], batch_size: int, pad_token_id: int, accelerator: Accelerator | None = None
) -> Iterator[dict]:
    """Yield the held-out rows of one rank in micro-batches. Each rank has the same number of them, as FSDP requires."""
    rank, num_ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    indices = range(rank, len(rows), num_ranks)
    for start in range(0, math.ceil(len(rows) / num_ranks), batch_size):
        chosen = indices[start : start + batch_size]
        batch = collate([rows[index] for index in chosen] or [empty_row(pad_token_id)], pad_token_id)
        yield {**batch, "row_ids": [-1 - index for index in chosen]}  # held-out rows count down from -1


@torch.no_grad()
def evaluate(
    student: nn.Module, teacher: nn.Module | Callable, rows: Sequence[dict], config: DistillConfig, *,
    pad_token_id: int, vocab_size: int | None = None, accelerator: Accelerator | None = None,
) -> dict[str, float]:  # fmt: skip
    """Evaluate a student on held-out rows, in nats per token. Each row counts once, over all ranks.

    The numbers do not depend on the batch size or the number of ranks. The student's mode (train or eval) is restored.

    Args:
        student, teacher: transformers causal language models, or a `BodyAndHead` and a teacher of `kdkit.teachers`.
        pad_token_id: any id; padding is not in the loss.
        vocab_size: the entries of both vocabularies to use; None uses those of the narrower head.
        accelerator: needed if there are several ranks.

    Returns:
        `eval/loss`, `eval/kl_loss` (T^2 * divergence, as in the loss), `eval/perplexity`, and those of `METRICS`:
        `eval/ce_loss`, `eval/teacher_ce_loss`, `eval/kl_t1` (KL(p || q) at T = 1), `eval/top1_agreement` (both models
        find the same next token most likely) and `eval/acceptance_rate` (sum_v min(p_v, q_v), the expected acceptance
        of the student as a draft model, Leviathan et al. 2023, arXiv:2211.17192).
    """
    device = accelerator.device if accelerator else next(student.parameters()).device
    student, teacher = (
        _examined(model, role, rows, device) for role, model in (("student", student), ("teacher", teacher))
    )
    arguments = config, vocab_size, getattr(student, "module", student).soft_cap, teacher.soft_cap
    was_training = student.training
    student.eval()
    sums = torch.zeros(len(METRICS) + 2, dtype=torch.float64, device=device)
    for batch in evaluation_batches(rows, config.batch_size, pad_token_id, accelerator):
        batch = send_to_device(batch, device)
        sums += student(batch, metric_sums, *teacher(batch), batch["labels"], *arguments)
    student.train(was_training)
    if accelerator:
        sums = accelerator.reduce(sums, "sum")
    *totals, num_items = sums.tolist()
    *means, divergence = (total / (num_items or math.nan) for total in totals)
    metrics = {f"eval/{name}": mean for name, mean in zip(METRICS, means, strict=True)}
    ce = metrics["eval/ce_loss"]
    return {
        "eval/loss": config.alpha * ce + (1 - config.alpha) * divergence,
        "eval/kl_loss": divergence,
        "eval/perplexity": math.exp(min(ce, 700)),
        **metrics,
    }


def _examined(model, role: str, rows: Sequence[dict], device: torch.device):
    """Return a transformers model wrapped and examined, and anything else unchanged."""
    wrapped = wrap(model)
    if wrapped is not model:
        examine(wrapped, role, rows, device)
        if is_packed(rows) and not wrapped.packs:
            raise UsageError(f"the {role} lets documents in one row see each other: load the rows with packing=False")
    return wrapped


def check_copy(metrics: dict[str, float], config: DistillConfig) -> None:
    """Raise RunStopped if the student is by name the teacher, but does not have its distribution before training."""
    same = config.student_layers is None and config.student_is_pretrained
    same = same and config.student_model == config.teacher_model
    if same and metrics["eval/kl_t1"] > 0.02:  # rounding to bf16 causes about 0.001
        raise RunStopped(
            f"teacher and student are both {config.teacher_model}, but their KL is {metrics['eval/kl_t1']:.3f} and "
            "not 0: one of them is not loaded or not run as it should be. Please report this model"
        )


def describe_metrics(metrics: dict[str, float], step: int, vocab_size: int) -> str:
    """Describe an evaluation after `step` steps in one line; before the first step, say what is unusual about it."""
    teacher, student = metrics["eval/teacher_ce_loss"], metrics["eval/ce_loss"]
    line = (
        f"step {step:<6} held-out CE: student {student:.3f}, teacher {teacher:.3f}; KL {metrics['eval/kl_t1']:.3f}, "
        f"top-1 agreement {metrics['eval/top1_agreement']:.1%}"
    )
    if step == 0 and student > math.log(vocab_size) + 1:
        chance = f"{math.log(vocab_size):.1f}, that of {vocab_size:,} equally likely tokens"
        line += f"\nnote     the student's CE is above {chance}: a student with fewer layers has to be trained first"
    if step == 0 and teacher > student:
        line += (
            "\nwarning  the teacher is worse than the student on this data: it would teach noise. Check that it is the "
            "right model, that its chat template fits the data, or train the teacher on such data first"
        )
    return line


def align(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table of cells as text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]) for cells in lines]


if __name__ == "__main__":
    from kdkit.compare import main

    main()
