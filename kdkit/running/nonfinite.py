"""Stop a run, before a weight is changed, when a loss or a gradient is not finite."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from kdkit.config import DistillConfig, RunStopped
from kdkit.running import files


def stop_if_not_finite(
    what: str,
    numbers: Mapping[str, float | Tensor],
    micro_batches: Iterable[dict],
    step: int,
    config: DistillConfig,
    tokenizer,
    accelerator: Accelerator,
    local_losses: Tensor | None = None,
) -> None:
    """Stop all ranks if one of `numbers` is not finite. Waits for the device once.

    Each rank writes its rows, with their text, to not_finite_step_{step}_rank_{rank}.jsonl in the folder of the run.

    Args:
        what: what was computed, for the message: "training step" or "evaluation".
        numbers: name -> number, the same on all ranks, such as the sum of the cross-entropy over the ranks.
        micro_batches: the batches of this rank that the numbers were computed from; read only if the run stops.
        step: the optimizer step.
        config, tokenizer, accelerator: those of the run.
        local_losses: the losses of this rank alone, from which the message names the ranks.

    Raises:
        RunStopped: a number is not finite.
    """
    if math.isfinite(sum(numbers.values())):
        return
    names = ", ".join(name for name, number in numbers.items() if not math.isfinite(number))
    rank = accelerator.process_index
    has_fault = local_losses is not None and not torch.isfinite(local_losses).all()
    ranks = ", ".join(map(str, gather_object([rank] if has_fault else [])))
    lines = []
    for index, batch in enumerate(micro_batches):
        columns = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in batch.items()}
        for row, text in enumerate(tokenizer.batch_decode(columns["input_ids"])):
            values = {key: column[row] for key, column in columns.items() if row < len(column)}
            lines.append(json.dumps({"micro_batch": index, "row": row, **values, "text": text}) + "\n")
    name = f"not_finite_step_{step:08d}_rank"
    files.write_text(Path(config.output_dir) / f"{name}_{rank}.jsonl", "".join(lines))
    accelerator.wait_for_everyone()
    raise RunStopped(
        f"{what} {step} is not finite: {names}{ranks and f' (the losses of rank {ranks})'}. No weight was changed by "
        f"it. Its rows are in {config.output_dir}/{name}_*.jsonl; look for broken samples there, or lower "
        "learning_rate. The same command resumes from the newest checkpoint, and meets the same rows again"
    )
