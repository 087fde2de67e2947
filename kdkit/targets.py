"""Run the teacher once over the text of a run, and store its outputs for all later runs on the same text.

    python -m kdkit.targets --config recipes/x.yaml --targets top_k --targets_dir targets/x     # run the teacher once
    python -m kdkit.train --config recipes/x.yaml --targets top_k --targets_dir targets/x       # train students

- `hidden`: its last hidden states, 2 * H bytes per token in bf16. With the head, which is stored once, they give the
  complete distribution, at any temperature and for every divergence: a run with them equals the online run.
- `top_k`: the ids and log-probabilities of its K most likely tokens at one temperature, and the probability of all
  others together: about 6 * K bytes per token. The divergence over these K + 1 buckets is a lower bound. Held-out text
  is stored as hidden states, for an exact evaluation.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from kdkit.command_line import load_config
from kdkit.config import DistillConfig, UsageError
from kdkit.data import collate, empty_row, load_rows, settle_packing
from kdkit.fused import precise_logits
from kdkit.losses import IGNORE_INDEX, soft_cap, top_k
from kdkit.models import check_models, load_teacher, load_tokenizer, teacher_dtype
from kdkit.running import files
from kdkit.running.devices import leave_processes, start_accelerator
from kdkit.teachers.online import OnlineTeacher
from kdkit.teachers.stored import MODEL_FACTS, SplitFiles, describe_made_for, read_layout

CHUNK = 1024  # tokens whose logits exist at one time, while the most likely ones are selected
FILE_BYTES = 64 * 2**20  # about the size of a file: a killed command loses at most one file per rank


def store(config: DistillConfig) -> Path:
    """Run the teacher over the rows of a run, store its outputs in `targets_dir` and return it. Called on every rank.

    A file is complete or not there: after an interruption, the same command computes only the missing files, on any
    number of ranks. Raises a UsageError if the folder has targets for another run, or the disk has too little room.
    """
    if config.targets == "online":
        raise UsageError("targets is 'online', expected 'hidden' or 'top_k'")
    accelerator = start_accelerator()
    check_models(config)
    tokenizer, folder = load_tokenizer(config), Path(config.targets_dir)
    rows = load_rows(config, tokenizer)
    dtype = teacher_dtype(config, accelerator.mixed_precision)
    teacher = OnlineTeacher(load_teacher(config.teacher_model, dtype, config))
    teacher.place(accelerator, config.teacher_placement)
    notes = teacher.examine(rows[0], accelerator.device)
    rows, more = settle_packing(rows, config, tokenizer, {"teacher": teacher.packs})
    made_for = describe_made_for(config, *rows, dtype)
    rows, vocab_size = {"train": rows[0], "eval": rows[1]}, made_for.get("vocab_size")
    if config.targets == "top_k" and config.top_k > vocab_size:
        raise UsageError(f"top_k is {config.top_k}, expected at most {vocab_size}, the entries of the vocabulary")
    head = teacher(send_to_device(collate([empty_row(0)], 0), accelerator.device))[1]  # (V, H)
    layout = _layout(config, teacher, head.shape[1], str(dtype).removeprefix("torch."))
    if (folder / "targets.json").is_file():
        layout = read_layout(folder, made_for)
    splits = {name: SplitFiles(folder, name, rows[name], layout[name]) for name in rows}
    if accelerator.is_main_process:
        _prepare_folder(folder, list(splits.values()), {"made_for": made_for, "layout": layout})
    accelerator.wait_for_everyone()  # before any rank writes a file, all must have looked for missing ones
    accelerator.print("\n         ".join([f"teacher  {config.teacher_model}: {teacher.placement}", *notes, *more]))

    def compute(chosen: list[dict], names) -> dict[str, Tensor]:
        """Return the outputs `names` for the tokens of some rows. Without rows, the teacher runs on padding."""
        pad = tokenizer.pad_token_id
        batch = send_to_device(collate(chosen or [empty_row(pad)], pad), accelerator.device)
        hidden, head = teacher(batch)
        found = {"hidden": hidden[batch["labels"] != IGNORE_INDEX]}  # (N, H)
        if "ids" in names:
            tops = []
            for chunk in found["hidden"].split(CHUNK):
                logits = soft_cap(precise_logits(chunk, head[:vocab_size]), teacher.soft_cap)
                tops.append(top_k(logits, config.top_k, config.temperature))
            found["ids"], found["log_probs"] = (torch.cat(tensors) for tensors in zip(*tops, strict=True))
        return {name: found[name].cpu() for name in names}

    if accelerator.is_main_process and not (folder / "head.safetensors").is_file():
        files.write(folder / "head.safetensors", save({"head": head.cpu()}))
    for name, split in splits.items():
        _store_missing(split, rows[name], compute, config.batch_size, accelerator)
    accelerator.wait_for_everyone()
    accelerator.print(f"the targets are in {folder}")
    return folder


def _layout(config: DistillConfig, teacher: OnlineTeacher, width: int, dtype: str) -> dict:
    """Return `layout` of targets.json: for each split, (width, dtype) of its tensors and the rows per file."""
    layout = {name: getattr(teacher, name) for name in MODEL_FACTS}
    ids = "uint16" if teacher.head_rows <= 2**16 else "int32"
    log_probs = "float16" if dtype == "bfloat16" else "float32"  # two bytes if that is the precision of the run
    most_likely = {"ids": (config.top_k, ids), "log_probs": (config.top_k + 1, log_probs)}
    hidden = {"hidden": (width, dtype)}
    for split, tensors in {"train": hidden if config.targets == "hidden" else most_likely, "eval": hidden}.items():
        token_bytes = sum(width * getattr(torch, dtype).itemsize for width, dtype in tensors.values())
        layout[split] = {"rows_per_file": max(1, FILE_BYTES // (config.max_length * token_bytes)), "tensors": tensors}
    return layout


def _prepare_folder(folder: Path, splits: list[SplitFiles], description: dict) -> None:
    """Check the disk space, and write targets.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".writing_*"):
        leftover.unlink()
    need, free = sum(split.missing_bytes for split in splits), shutil.disk_usage(folder).free
    room = f"targets_dir {folder} has {free / 2**20:,.0f} MiB free, the targets need {need / 2**20:,.0f} MiB"
    if need > 0.98 * free:
        raise UsageError(f"{room}: choose another disk, less text (max_train_tokens), or targets top_k")
    print(f"disk     {room}")
    files.write(folder / "targets.json", json.dumps(description, indent=2))


def _store_missing(split: SplitFiles, rows, compute: Callable, batch_size: int, accelerator: Accelerator) -> None:
    """Store the missing files, each on one rank. All ranks call the teacher equally often: it may be sharded."""
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    missing = list(split.missing.items())
    for first in tqdm(range(0, len(missing), num_ranks), "store", disable=not accelerator.is_main_process):
        turn = missing[first : first + num_ranks]
        path, indices = turn[rank] if rank < len(turn) else (None, [])
        mine = [rows[index] for index in indices]
        starts = range(0, len(turn[0][1]), batch_size)  # no file of a split has more rows than those before it
        batches = [compute(mine[start : start + batch_size], split.tensors) for start in starts]
        if path is not None:
            tensors = {name: torch.cat([batch[name] for batch in batches]) for name in split.tensors}
            tensors = {name: x.to(getattr(torch, split.tensors[name][1])) for name, x in tensors.items()}
            files.write(path, save(tensors))


def main(argv: list[str] | None = None) -> None:
    """`python -m kdkit.targets [--config recipe.yaml] [--field value ...]`, the fields of `python -m kdkit.train`."""
    try:
        store(load_config(argv, command="python -m kdkit.targets"))
    except UsageError as error:
        sys.exit(f"kdkit: {error}")
    except OSError as error:
        sys.exit(f"kdkit: targets cannot be written ({error}): make room, or change targets_dir; then run it again")
    leave_processes()


if __name__ == "__main__":
    main()
