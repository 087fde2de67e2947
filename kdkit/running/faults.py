"""What was not finite, on which rank, whose fault it is, and in which rows.

A step is checked once, by numbers that all ranks share: the sums of the losses and the gradient's norm. Only when one
of them is not finite are its rows looked at here, one by one and with the run's own loss. Nothing is changed.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor

from kdkit.config import DistillConfig, RunStopped
from kdkit.losses import IGNORE_INDEX, TopK
from kdkit.running import files


def stop_at_fault(
    student: torch.nn.Module,
    kd_loss: Callable,
    tokenizer,
    config: DistillConfig,
    accelerator: Accelerator,
    get_targets: Callable,
    micro_batches: Iterable[dict[str, Tensor]],
    step: int,
    what: str,
) -> NoReturn:
    """Look again at micro-batches that gave something not finite, write the rows at fault aside, and stop the run.

    Called by all ranks, with as many micro-batches each. The rows are in not_finite_step_{step}_rank_{rank}.jsonl of
    the run's folder, with their text.

    Raises:
        RunStopped: always, with the step, and for each rank at fault the part of the loss, the model and the rows.
    """
    rows = []
    for number, batch in enumerate(micro_batches):
        batch = send_to_device(batch, accelerator.device)
        with torch.no_grad():
            verdicts = student(batch, partial(_verdicts, kd_loss), *get_targets(batch), batch["labels"])
        for row, verdict in enumerate(verdicts):
            entry = {"micro_batch": number, "row": row, "fault": verdict}
            entry |= {key: value[row].tolist() for key, value in batch.items() if isinstance(value, Tensor)}
            rows.append({**entry, "text": tokenizer.decode(entry["input_ids"])})
    culprits = [row for row in rows if row["fault"]]
    counts = Counter(row["fault"] for row in culprits)
    said = [f"rank {accelerator.process_index}: {fault} in {n} of {len(rows)} rows" for fault, n in counts.items()]
    everywhere = gather_object(said)
    name = f"not_finite_step_{step:08d}_rank"
    if culprits or not everywhere:  # where no row is at fault by itself, all of them are written
        lines = "".join(json.dumps(row) + "\n" for row in culprits or rows)
        files.write_text(Path(config.output_dir) / f"{name}_{accelerator.process_index}.jsonl", lines)
    accelerator.wait_for_everyone()
    raise RunStopped(
        f"{what} of step {step} is not finite ({'; '.join(everywhere) or 'every loss is: the backward pass is not'}). "
        f"The rows are in {config.output_dir}/{name}_*.jsonl; no weight was changed by them. Started again, the run "
        "goes on from its newest checkpoint, and meets them again"
    )


def _verdicts(
    kd_loss: Callable, hidden: Tensor, head: Tensor, teacher_hidden, teacher_head, labels: Tensor
) -> list[str]:
    """For each row of (B, S) the parts of the loss that are not finite and the model at fault, or ""."""
    teachers = [None] * len(labels) if teacher_hidden is None else teacher_hidden
    if isinstance(teacher_hidden, TopK):
        teachers = [TopK(*row) for row in zip(*teacher_hidden, strict=True)]
    return [
        _verdict(kd_loss, hidden[row], head, teachers[row], teacher_head, labels[row]) for row in range(len(labels))
    ]


def _verdict(kd_loss, hidden: Tensor, head: Tensor, teacher_hidden, teacher_head, labels: Tensor) -> str:
    if not (labels != IGNORE_INDEX).any():
        return ""  # nothing of it is in the loss
    ce, ce_gradient = _finite(kd_loss, hidden, head, None, None, labels, alpha=1.0)
    teacher, divergence, divergence_gradient = True, True, True
    if isinstance(teacher_hidden, TopK):
        teacher = bool(torch.isfinite(teacher_hidden.log_probs).all())
    elif teacher_hidden is not None:
        teacher, _ = _finite(kd_loss, teacher_hidden, teacher_head, None, None, labels, alpha=1.0)
    if teacher_hidden is not None:
        divergence, divergence_gradient = _finite(
            kd_loss, hidden, head, teacher_hidden, teacher_head, labels, alpha=0.0
        )
    parts = {"cross-entropy": ce, "divergence": divergence}
    if ce and divergence:
        parts = {"gradient of the cross-entropy": ce_gradient, "gradient of the divergence": divergence_gradient}
    models = {"student": ce, "teacher": teacher}
    bad = [name for name, finite in parts.items() if not finite]
    by = [name for name, finite in models.items() if not finite] or ["student and teacher, each finite alone"]
    return f"{' and '.join(bad)} ({' and '.join(by)})" if bad else ""


def _finite(kd_loss, hidden: Tensor, *others, alpha: float) -> tuple[bool, bool]:
    """Whether a part of the loss, and its gradient for the hidden states, are finite."""
    with torch.enable_grad():
        hidden = hidden.detach().requires_grad_()
        result = kd_loss(hidden, *(x.detach() if isinstance(x, Tensor) else x for x in others), alpha=alpha)
        (gradient,) = torch.autograd.grad(result.loss, hidden)
    part = result.ce_loss if alpha == 1 else result.kl_loss
    return math.isfinite(part), bool(torch.isfinite(gradient).all())
