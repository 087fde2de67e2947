"""Run the teacher once over the text of a run, and store its outputs for all later runs on the same text.

    python -m kdkit.targets --config recipes/x.yaml --targets top_k --targets_dir targets/x     # run the teacher once
    python -m kdkit.train --config recipes/x.yaml --targets top_k --targets_dir targets/x       # train students

The teacher takes about half of the time of every step. Its outputs for a token are the same in every epoch and for
every student, so they can be computed once, in one of two forms:

- `hidden`: its last hidden states, 2 * H bytes per token in bf16. With the head, which is stored once, they give the
  complete distribution, at any temperature and for every divergence: a run with them equals the online run.
- `top_k`: the ids and log-probabilities of its K most likely tokens at one temperature, and the probability of all
  other tokens together: about 6 * K bytes per token. The divergence over these K + 1 buckets is a lower bound.

Held-out text is always stored as hidden states, for an exact evaluation. `kdkit.teachers.stored` describes the files.
Shapes: N tokens in the loss, H hidden size, V vocabulary, K top-k.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from kdkit.config import DistillConfig, UsageError, load_config
from kdkit.data import collate, empty_row, load_rows
from kdkit.fused import precise_logits
from kdkit.losses import IGNORE_INDEX, top_k
from kdkit.models import check_head, check_models, load_teacher, load_tokenizer, teacher_dtype
from kdkit.running import files
from kdkit.running.devices import leave_processes, start_accelerator
from kdkit.teachers import OnlineTeacher, SplitFiles, check_made_for, describe_made_for, read_description

CHUNK = 1024  # tokens whose logits exist at one time, while the most likely ones are selected
FILE_BYTES = 64 * 2**20  # about the size of a file: a killed command loses at most one file per rank


def store(config: DistillConfig) -> Path:
    """Run the teacher once over the rows of a run and store its outputs in `targets_dir`. Called on every rank.

    A file is complete or not there: after an interruption, the same command computes only the missing files, on any
    number of ranks.

    Returns:
        targets_dir.

    Raises:
        UsageError: `targets` is online, the folder has targets for another run, or the disk has too little room.
    """
    if config.targets == "online":
        raise UsageError("targets is 'online', expected 'hidden' or 'top_k': what to store of the teacher")
    accelerator = start_accelerator()
    check_models(config)
    tokenizer, folder = load_tokenizer(config), Path(config.targets_dir)
    rows = dict(zip(("train", "eval"), load_rows(config, tokenizer), strict=True))
    dtype = teacher_dtype(config, accelerator.mixed_precision)
    teacher = OnlineTeacher(load_teacher(config.teacher_model, dtype, config))
    check_head(teacher, "teacher")
    made_for = describe_made_for(config, tokenizer, *rows.values(), dtype, teacher.head_rows)
    vocab_size = made_for.get("vocab_size")
    if config.targets == "top_k" and config.top_k > vocab_size:
        raise UsageError(f"top_k is {config.top_k}, expected at most {vocab_size}, the entries of the vocabulary")

    layout = {name: getattr(teacher, name) for name in ("head_rows", "num_parameters", "context")}
    layout["train"] = _split_layout(config.targets, config, teacher, dtype)
    layout["eval"] = _split_layout("hidden", config, teacher, dtype)
    splits = {name: SplitFiles(folder, name, rows[name], layout[name]) for name in rows}
    if accelerator.is_main_process:
        _prepare_folder(folder, made_for, layout, splits)
    accelerator.wait_for_everyone()

    teacher.place(accelerator, config.teacher_placement)
    accelerator.print(f"teacher  {config.teacher_model}: {teacher.placement}")
    row = collate([empty_row(tokenizer.pad_token_id)], tokenizer.pad_token_id)
    _, head = teacher(send_to_device(row, accelerator.device))
    if accelerator.is_main_process and not (folder / "head.safetensors").is_file():
        _write(folder / "head.safetensors", {"head": head.cpu()})
    for name, split in splits.items():
        _store_split(split, rows[name], teacher, config, vocab_size, tokenizer.pad_token_id, accelerator)
    accelerator.wait_for_everyone()
    accelerator.print(f"the targets are in {folder}")
    return folder


def _split_layout(kind: str, config: DistillConfig, teacher: OnlineTeacher, dtype: torch.dtype) -> dict:
    """Return the width and dtype of what is stored per token, and the number of rows per file."""
    if kind == "hidden":
        width = teacher.model.get_output_embeddings().weight.shape[1]
        tensors = {"hidden": (width, str(dtype).removeprefix("torch."))}
    else:  # two bytes per number if that is the precision of the run
        ids = "uint16" if teacher.head_rows <= 2**16 else "int32"
        log_probs = "float16" if dtype == torch.bfloat16 else "float32"
        tensors = {"ids": (config.top_k, ids), "log_probs": (config.top_k + 1, log_probs)}
    row_bytes = config.max_length * sum(width * getattr(torch, dtype).itemsize for width, dtype in tensors.values())
    return {"rows_per_file": max(1, FILE_BYTES // row_bytes), "tensors": tensors}


def _prepare_folder(folder: Path, made_for: dict, layout: dict, splits: dict[str, SplitFiles]) -> None:
    """Print the plan, check the disk space, write targets.json."""
    if (folder / "targets.json").is_file():
        check_made_for(folder, read_description(folder)[0], made_for)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".writing_*"):
            leftover.unlink()
        files.write_text(folder / "targets.json", json.dumps({"made_for": made_for, "layout": layout}, indent=2))
    except OSError as error:
        raise UsageError(f"targets_dir {folder} cannot be written ({error.strerror}): choose another") from error
    need = 0
    for name, split in splits.items():
        tokens = sum(split.num_tokens[file] for file in split.faults())
        need += tokens * split.bytes_per_token
        kind = " and ".join(f"{width} {dtype} of {key}" for key, (width, dtype) in split.tensors.items())
        print(
            f"{name:8} {tokens:,} of {split.ends[-1]:,} tokens to store, {split.bytes_per_token:,} bytes each: {kind}"
        )
    free = shutil.disk_usage(folder).free
    print(f"disk     {need / 2**20:,.1f} MiB needed, {free / 2**20:,.1f} MiB free in {folder}")
    if need > 0.98 * free:
        raise UsageError(
            f"targets_dir {folder} has {free / 2**20:,.0f} MiB free, the targets need {need / 2**20:,.0f} MiB: "
            "choose another disk, less text (max_train_tokens), or targets top_k with a smaller top_k"
        )


def _store_split(split: SplitFiles, rows, teacher, config, vocab_size, pad_token_id: int, accelerator) -> None:
    """Store the missing files, each on one rank. All ranks call the teacher equally often, since it may be sharded."""
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    missing = list(split.faults())
    accelerator.wait_for_everyone()  # before any rank writes a file, all must have looked for missing ones
    is_main = accelerator.is_main_process
    progress = tqdm(total=len(missing), desc=f"store {split.split}", unit="file", disable=not is_main)
    for first in range(0, len(missing), num_ranks):
        now = missing[first : first + num_ranks]
        mine = [rows[index] for index in split.rows[now[rank]]] if rank < len(now) else []
        kept = []
        for start in range(0, len(split.rows[now[0]]), config.batch_size):
            batch = collate(mine[start : start + config.batch_size] or [empty_row(pad_token_id)], pad_token_id)
            batch = send_to_device(batch, accelerator.device)
            hidden, head = teacher(batch)
            hidden = hidden[batch["labels"] != IGNORE_INDEX]  # (N, H)
            hidden_only = "hidden" in split.tensors
            kept.append({"hidden": hidden.cpu()} if hidden_only else _select(hidden, head[:vocab_size], config))
        if mine:
            dtypes = {key: getattr(torch, dtype) for key, (_, dtype) in split.tensors.items()}
            tensors = {key: torch.cat([x[key] for x in kept]).to(dtype) for key, dtype in dtypes.items()}
            _write(split.paths[now[rank]], tensors)
        progress.update(len(now))
    progress.close()


@torch.no_grad()
def _select(hidden: Tensor, head: Tensor, config: DistillConfig) -> dict[str, Tensor]:
    """Return the ids (N, K) and log-probabilities (N, K + 1) of the most likely tokens and of all others together."""
    found = [top_k(precise_logits(x, head), config.top_k, config.temperature) for x in hidden.split(CHUNK)]
    ids, log_probs = (torch.cat(x).cpu() for x in zip(*found, strict=True))
    return {"ids": ids, "log_probs": log_probs}


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file of tensors under a temporary name, and rename it once it is on the disk."""
    temporary = path.with_name(f".writing_{path.name}")
    try:
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary)
        shutil.copymode(path.with_name("targets.json"), temporary)  # safetensors ignores the umask, and writes 0600
        files.sync(temporary)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(
            f"{path} could not be written ({error}). Complete files are kept: make room, and run the same command again"
        ) from error
    os.replace(temporary, path)


def main(argv: list[str] | None = None) -> None:
    """`python -m kdkit.targets [--config recipe.yaml] [--field value ...]`, the fields of `python -m kdkit.train`."""
    try:
        store(load_config(argv, command="python -m kdkit.targets"))
    except UsageError as error:
        sys.exit(f"kdkit: {error}")
    leave_processes()


if __name__ == "__main__":
    main()
