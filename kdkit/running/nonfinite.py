"""Stop a run, before a weight is changed, when a loss or a gradient is not finite."""

import json
import math
from pathlib import Path

import torch
from accelerate.utils import gather_object

from kdkit.config import RunStopped
from kdkit.running import files


def stop_if_not_finite(
    what: str, numbers, micro_batches, step: int, config, tokenizer, accelerator, local_losses=None
) -> None:
    """Raise RunStopped if one of `numbers`, the same on all ranks, is not finite. Waits for the device once.

    Each rank writes the text of its `micro_batches`. The message names the ranks whose `local_losses` are not finite.
    """
    if math.isfinite(sum(numbers.values())):
        return
    names = ", ".join(name for name, number in numbers.items() if not math.isfinite(number))
    is_culprit = local_losses is not None and not torch.isfinite(local_losses).all()
    ranks = ", ".join(gather_object([str(accelerator.process_index)] if is_culprit else []))
    # not strict: a row of padding has no id
    rows = [row for batch in micro_batches for row in zip(batch["row_ids"], batch["input_ids"], strict=False)]
    lines = [json.dumps({"row_id": row_id, "text": tokenizer.decode(ids)}) + "\n" for row_id, ids in rows]
    path = Path(config.output_dir) / f"not_finite_step_{step:08d}_rank_{accelerator.process_index}.jsonl"
    files.write(path, "".join(lines))
    accelerator.wait_for_everyone()
    raise RunStopped(
        f"{what} {step} is not finite: {names}{ranks and f' (the losses of rank {ranks})'}. No weight was changed by "
        f"it. Look for broken samples in {path.parent}/not_finite_*.jsonl, or lower learning_rate: the same command "
        "resumes from the newest checkpoint, and meets the same rows again"
    )
