"""Where the teacher's signal comes from: the one seam between the teacher and the loss.

A source of targets is a function of a batch that returns (teacher_hidden (B, S, Ht), teacher_head (V, Ht)), without
gradients. The loss and the loop do not know more than that.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kdkit.models import BodyAndHead

Targets = Callable[[dict[str, Tensor]], tuple[Tensor | None, Tensor | None]]


def online(teacher: BodyAndHead) -> Targets:
    """Run the teacher on each batch."""

    @torch.no_grad()
    def targets(batch):
        return teacher(batch, lambda hidden, head: (hidden, head))

    return targets


def none() -> Targets:
    """No teacher: what plain fine-tuning (alpha = 1) needs of one."""
    return lambda batch: (None, None)
