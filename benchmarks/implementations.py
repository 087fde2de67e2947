"""The losses that the benchmarks compare, with one signature. Libraries that are not installed are named and skipped.

Each takes `(student_hidden, student_head, teacher_hidden, teacher_head, labels, alpha, temperature, **options)` and
returns a scalar with its graph: alpha * CE + (1 - alpha) * T^2 * KL(teacher || student). If a library leaves out T^2,
the function here multiplies by it, so that all compute the same number; `CONVENTIONS` lists these cases.
"""

import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from kdkit.fused import fused_kd_loss
from kdkit.losses import kd_loss

CONVENTIONS = {
    "liger": {"T squared": "leaves T^2 to the caller", "accumulation": "divides by the call's own tokens"},
    "trl gkd": {"T squared": "leaves T^2 to the caller"},
    "trl chunked": {"T squared": "leaves T^2 to the caller", "cross-entropy": "has none"},
}


def kdkit_dense(hidden, head, teacher_hidden, teacher_head, labels, alpha, temperature, **options):
    teacher_logits = None if teacher_hidden is None else teacher_hidden @ teacher_head.T
    return kd_loss(hidden @ head.T, teacher_logits, labels, alpha=alpha, temperature=temperature, **options).loss


def kdkit_fused(hidden, head, teacher_hidden, teacher_head, labels, alpha, temperature, **options):
    arguments = {"alpha": alpha, "temperature": temperature, **options}
    return fused_kd_loss(hidden, head, teacher_hidden, teacher_head, labels, **arguments).loss


def kdkit_fused_at(commit: str) -> Callable:
    """Return the fused loss of an earlier commit of this repository, from its `losses.py` and `fused.py`."""
    root = Path(__file__).resolve().parent.parent
    package = f"kdkit_{commit}"
    sys.modules[package] = types.ModuleType(package)
    for name in ("losses", "fused"):
        command = ["git", "-C", str(root), "show", f"{commit}:kdkit/{name}.py"]
        source = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        module = sys.modules[f"{package}.{name}"] = types.ModuleType(f"{package}.{name}")
        exec(compile(source.replace("from kdkit.", f"from {package}."), f"{commit}/{name}.py", "exec"), vars(module))

    def kdkit_baseline(*tensors, **options):
        *inputs, alpha, temperature = tensors
        return module.fused_kd_loss(*inputs, alpha=alpha, temperature=temperature, **options).loss

    return kdkit_baseline


def naive(hidden, head, teacher_hidden, teacher_head, labels, alpha, temperature):
    """The straightforward loss: logits of all tokens in fp32, masked at the end."""
    z, t = (hidden @ head.T).float(), (teacher_hidden @ teacher_head.T).float()  # (N, V)
    valid = labels != -100
    log_q, log_p = F.log_softmax(z / temperature, -1), F.log_softmax(t / temperature, -1)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    kl = torch.where(valid, kl, 0).sum() / valid.sum()
    return alpha * F.cross_entropy(z, labels) + (1 - alpha) * temperature**2 * kl


def _liger(compiled: bool) -> Callable:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    def liger(hidden, head, teacher_hidden, teacher_head, labels, alpha, temperature):
        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=alpha,
            weight_soft_loss=(1 - alpha) * temperature**2,
            beta=0.0,  # in Liger, this is KL(teacher || student)
            temperature=temperature,
            compiled=compiled,
        )
        return loss(hidden, head, teacher_hidden, teacher_head, labels)

    return liger


def _trl_gkd() -> Callable:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    def trl_gkd(hidden, head, teacher_hidden, teacher_head, labels, alpha, temperature, num_items_in_batch=None):
        z, t = hidden @ head.T, teacher_hidden @ teacher_head.T
        count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        kl = GKDTrainer.generalized_jsd_loss(
            z[None], t[None], labels[None], beta=0, temperature=temperature, num_items_in_batch=count
        )
        ce = F.cross_entropy(z, labels, reduction="sum") / count if alpha > 0 else 0.0
        return alpha * ce + (1 - alpha) * temperature**2 * kl

    return trl_gkd


def _trl_chunked() -> Callable:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def trl_chunked(hidden, head, teacher_hidden, teacher_head, labels, alpha, temperature, num_items_in_batch=None):
        loss, _, _ = _chunked_divergence_loss(
            hidden[None],
            teacher_hidden[None],
            head,
            teacher_head,
            (labels != -100)[None],
            beta=0.0,
            temperature=temperature,
            num_items_in_batch=num_items_in_batch,
        )
        return (1 - alpha) * temperature**2 * loss

    return trl_chunked


def peers() -> tuple[dict[str, Callable], list[str]]:
    """Return the losses of the libraries that are installed, and a line for each one that is not."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    found, missing = {}, []
    makers = {
        "liger": lambda: _liger(compiled=False),
        "liger compiled": lambda: _liger(compiled=True),
        "trl gkd": _trl_gkd,
        "trl chunked": _trl_chunked,
    }
    for name, make in makers.items():
        try:
            found[name] = make()
        except ImportError as error:
            missing.append(f"{name} is skipped ({error}); pip install 'kdkit[peers]' has it")
    return found, missing
