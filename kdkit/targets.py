"""Where the teacher's signal comes from: the one seam between the teacher and the loss.

    python -m kdkit.targets --config recipes/x.yaml --targets top_k --targets_dir targets/x     # run the teacher once
    python -m kdkit.train --config recipes/x.yaml --targets top_k --targets_dir targets/x       # train students

A source of targets is a function of a batch. What it returns, without gradients, goes on to the loss as it is:
(teacher_hidden (B, S, Ht), teacher_head (V, Ht)), or (TopK of (B, S, K) and (B, S, K + 1), None). The loss and the
loop do not know more than that.

The teacher takes about half of every step. Its targets for a token are the same in every epoch and for every student,
so they can be computed once and stored, in one of two ways:

- `hidden`, its last hidden states: 2 * Ht bytes a token in bf16. With the head, which is stored once, they give the
  whole distribution, at any temperature, for every divergence: a run is the one with the teacher, step for step.
- `top_k`, the ids and log-probabilities of its K likeliest tokens at one temperature, and the mass of all others in
  one bucket: some 6 * K bytes a token. The divergence over K + 1 buckets is a lower bound of the full one.

Held-out text is always stored as hidden states, so that evaluation is exact. Shapes: N tokens in the loss, H hidden
width, V vocabulary, K top-k.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from kdkit.config import DataFields, DistillConfig, UsageError, load_config
from kdkit.data import collate, empty_row, load_rows, loss_tokens, rows_digest
from kdkit.fused import precise_logits
from kdkit.losses import IGNORE_INDEX, TopK, top_k
from kdkit.models import (
    BodyAndHead,
    check_models,
    context_of,
    count_parameters,
    load_student_config,
    load_teacher,
    load_tokenizer,
    teacher_dtype,
    teacher_folder,
)
from kdkit.running import files
from kdkit.running.devices import leave_processes, place_teacher, start_accelerator

Targets = Callable[[dict], tuple[Tensor | TopK | None, Tensor | None]]

CHUNK = 1024  # tokens whose logits exist at once, while the likeliest are looked for
PART_BYTES = 64 * 2**20  # about the size of a file, which is what a kill can cost
DATA_FIELDS = [f.name for f in dataclasses.fields(DataFields) if not f.metadata.get("may_change")]
SAMPLES, SAMPLE_BYTES = 256, 2**16  # of each file of weights, to tell teachers apart without reading all of them


def of(teacher: BodyAndHead) -> Targets:
    """Those of a teacher that runs on each batch, or of a `StoredTeacher`."""

    @torch.no_grad()
    def targets(batch):
        return teacher(batch, lambda hidden, head: (hidden, head))

    return targets


def none() -> Targets:
    """No teacher: what plain fine-tuning (alpha = 1) needs of one."""
    return lambda batch: (None, None)


def open_teacher(config: DistillConfig, mixed_precision: str, tokenizer, train_rows, eval_rows):
    """The frozen teacher of a run: a transformers model, or, as `targets` says, what is stored of one.

    Args:
        config: the run's.
        mixed_precision: accelerate's.
        tokenizer, train_rows, eval_rows: the run's, which have to be those of the stored targets.

    Raises:
        UsageError: no such model; stored targets that are not there, not whole, or were made for something else.
    """
    dtype = teacher_dtype(config, mixed_precision)
    if config.targets == "online":
        return load_teacher(config.teacher_model, dtype, config)
    return StoredTeacher(config, tokenizer, train_rows, eval_rows, dtype)


class StoredTeacher(BodyAndHead):
    """What `python -m kdkit.targets` left of a teacher, in its place: it is called as the teacher is.

    A batch says by its `row_ids` which rows it is made of: 0, 1, ... for training
    rows, -1, -2, ... for held-out ones. No weights are here but the head's; for
    `top_k`, where only evaluation needs it, it stays with the CPU between its uses.
    """

    def __init__(self, config, tokenizer, train_rows, eval_rows, dtype):
        torch.nn.Module.__init__(self)
        self.folder = Path(config.targets_dir)
        self.made_for, layout = _read_json(self.folder)
        vocab_size = _shared_vocabulary(config, layout["head_rows"])
        now = _made_for(config, tokenizer, train_rows, eval_rows, dtype, vocab_size)
        _check_made_for(self.folder, self.made_for, now)
        self.kind, self.num_parameters, self.context = config.targets, layout["num_parameters"], layout["context"]
        self.parts = {
            "train": Parts(self.folder, "train", train_rows, layout["train"]),
            "eval": Parts(self.folder, "eval", eval_rows, layout["eval"]),
        }
        for parts in self.parts.values():
            parts.check()
        head = load_file(self.folder / "head.safetensors")["head"]  # (V, H)
        if self.kind == "hidden":
            self.register_buffer("head", head)  # goes where the module goes
        else:
            self.head = head

    def __str__(self) -> str:
        kind = "hidden states" if self.kind == "hidden" else f"{self.made_for['top_k']} likeliest tokens and the tail"
        size = self.parts["train"].bytes_per_token
        return f"not loaded: its {kind} are read from {self.folder} ({size:,} bytes a token)"

    def forward(self, batch: dict, use: Callable, *arguments):
        """use(hidden (B, S, H), head (V, H), *arguments), or use(TopK, None, *arguments), of the batch's rows."""
        rows = batch["row_ids"]
        held_out = bool(rows) and rows[0] < 0
        labels = batch["labels"]
        stored = self.parts["eval" if held_out else "train"].read([-1 - row for row in rows] if held_out else rows)
        padded = {key: _pad(values.to(labels.device), labels) for key, values in stored.items()}
        if "hidden" in padded:
            return use(padded["hidden"], self.head.to(labels.device), *arguments)
        return use(TopK(padded["ids"], padded["log_probs"]), None, *arguments)


def _pad(values: Tensor, labels: Tensor) -> Tensor:
    """(N, ...) of the tokens in the loss -> (B, S, ...), with zeros where there is no label."""
    padded = values.new_zeros(*labels.shape, *values.shape[1:])
    padded[labels != IGNORE_INDEX] = values
    return padded


# --- files ---------------------------------------------------------------------------------------------------


class Parts:
    """The files of one set of rows: each has, for some consecutive rows, an entry for each of their tokens in the loss.

    Which tokens are where follows from the rows, so that no index is stored. Files are mapped into memory: reading a
    row reads a row.
    """

    def __init__(self, folder: Path, name: str, rows: list[dict], layout: dict):
        """layout: `rows_per_part`, and for each tensor its width and dtype, as in targets.json."""
        self.folder, self.name, self.tensors = folder, name, layout["tensors"]
        self.rows_per_part, self.num_rows = layout["rows_per_part"], len(rows)
        self.ends = [0, *loss_tokens(rows).cumsum().tolist()]  # row i has the tokens from ends[i] to ends[i + 1]
        self._open = {}

    def __len__(self) -> int:
        return math.ceil(self.num_rows / self.rows_per_part)

    def path(self, part: int) -> Path:
        """The file of a part."""
        return self.folder / f"{self.name}-{part:06d}.safetensors"

    def rows(self, part: int) -> range:
        """The rows of a part."""
        return range(part * self.rows_per_part, min((part + 1) * self.rows_per_part, self.num_rows))

    @property
    def bytes_per_token(self) -> int:
        """What is stored of a token."""
        return sum(width * getattr(torch, dtype).itemsize for width, dtype in self.tensors.values())

    def fault(self, part: int) -> str | None:
        """What is wrong with the file of a part, which is not read for it; None if nothing is."""
        rows = self.rows(part)
        num_tokens = self.ends[rows.stop] - self.ends[rows.start]
        try:
            with safe_open(self.path(part), framework="pt") as file:
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            return "is missing"
        except (SafetensorError, OSError) as error:
            return f"is damaged ({error})"
        expected = {key: (num_tokens, width) for key, (width, _) in self.tensors.items()}
        return None if shapes == expected else f"holds {shapes}, expected {expected}"

    def check(self) -> None:
        """Raise a UsageError if a part is not whole."""
        faults = {part: fault for part in range(len(self)) if (fault := self.fault(part))}
        if faults:
            part, fault = next(iter(faults.items()))
            raise UsageError(
                f"{self.folder} is not complete: {len(faults)} of {len(self)} files of the {self.name} rows are "
                f"missing or damaged; {self.path(part).name} {fault}. Run python -m kdkit.targets again with the same "
                "arguments: it makes what is missing"
            )

    def read(self, rows: list[int]) -> dict[str, Tensor]:
        """The stored tensors of these rows' tokens, one after the other: (N, ...)."""
        pieces = {
            key: [torch.empty(0, width, dtype=getattr(torch, dtype))] for key, (width, dtype) in self.tensors.items()
        }
        for row in rows:
            part = row // self.rows_per_part
            if part not in self._open:
                self._open[part] = safe_open(self.path(part), framework="pt")
            start = self.ends[part * self.rows_per_part]
            for key, found in pieces.items():
                tokens = slice(self.ends[row] - start, self.ends[row + 1] - start)
                found.append(self._open[part].get_slice(key)[tokens])
        tensors = {key: torch.cat(found) for key, found in pieces.items()}
        return {key: x.int() if x.dtype == torch.uint16 else x for key, x in tensors.items()}  # few devices know uint16


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file of tensors, whole or not at all."""
    aside = path.with_name(f".writing_{path.name}")
    try:
        save_file({key: value.contiguous() for key, value in tensors.items()}, aside)
    except (SafetensorError, OSError) as error:
        aside.unlink(missing_ok=True)
        raise UsageError(
            f"{path} could not be written ({error}). The files before it are kept: make room, and run the same command "
            "again"
        ) from error
    files.sync(aside)
    os.replace(aside, path)


# --- what the targets were made for --------------------------------------------------------------------------


def _made_for(config, tokenizer, train_rows, eval_rows, dtype: torch.dtype, vocab_size: int) -> dict:
    """All that has to be the same where targets are made and where they are used, by names that a user knows."""
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    made_for = {
        "targets": config.targets,
        "teacher_model": teacher_fingerprint(config),
        "tokenizer": _digest(json.dumps([sorted(tokenizer.get_vocab().items()), special]).encode()),
        "dtype": str(dtype).removeprefix("torch."),
        **{name: getattr(config, name) for name in DATA_FIELDS},
        "training text": rows_digest(train_rows)[:16],
        "held-out text": rows_digest(eval_rows)[:16],
    }
    if config.targets == "top_k":
        made_for |= {"top_k": config.top_k, "temperature": config.temperature, "vocab_size": vocab_size}
    return made_for


def _check_made_for(folder: Path, made_for: dict, now: dict) -> None:
    names = [name for name in {**made_for, **now} if made_for.get(name) != now.get(name)]
    if now["teacher_model"] is None:  # the weights are not on this machine, and need not be
        names = [name for name in names if name != "teacher_model"]
    if set(names) & set(DATA_FIELDS):  # of which these two follow
        names = [name for name in names if name not in ("training text", "held-out text")]
    if names:
        differing = "; ".join(f"{name} was {made_for.get(name)!r}, is {now.get(name)!r}" for name in names)
        raise UsageError(
            f"the targets in {folder} were made for something else: {differing}. Make others with "
            "python -m kdkit.targets and another --targets_dir"
        )


def teacher_fingerprint(config: DistillConfig) -> str | None:
    """A digest of the teacher's config.json and of samples of its weights; None where they are not on this machine.

    Files of up to 16 MiB are read whole. Of larger ones samples do: when a model is trained on, all weights change.
    """
    folder = teacher_folder(config)
    paths = [] if folder is None else sorted(folder.glob("*.safetensors"))
    if not paths:
        return None
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(max(sample * SAMPLE_BYTES, size * sample // SAMPLES))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _shared_vocabulary(config: DistillConfig, teacher_rows: int) -> int:
    """The entries that both heads have, without a student."""
    return (
        teacher_rows if config.student_layers is not None else min(teacher_rows, load_student_config(config).vocab_size)
    )


def _read_json(folder: Path) -> tuple[dict, dict]:
    try:
        content = json.loads((folder / "targets.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"targets_dir {folder} holds no targets (no targets.json in it): make them with python -m kdkit.targets "
            "and the arguments of the run"
        ) from None
    return content["made_for"], content["layout"]


# --- making them ---------------------------------------------------------------------------------------------


@torch.no_grad()
def store(config: DistillConfig) -> Path:
    """Run the teacher once over the text of a run, and store its targets in `targets_dir`. Called on every rank.

    Goes on where it was stopped, on as many ranks as there are now: a file is whole or not there.

    Returns:
        targets_dir.

    Raises:
        UsageError: `targets` is online, the folder has other targets, or the disk has no room for them.
    """
    if config.targets == "online":
        raise UsageError("targets is 'online', expected 'hidden' or 'top_k': what to store of the teacher")
    accelerator = start_accelerator()
    check_models(config)
    tokenizer, folder = load_tokenizer(config), Path(config.targets_dir)
    rows = dict(zip(("train", "eval"), load_rows(config, tokenizer), strict=True))
    dtype = teacher_dtype(config, accelerator.mixed_precision)
    teacher = load_teacher(config.teacher_model, dtype, config)
    head_rows, width = teacher.get_output_embeddings().weight.shape
    vocab_size = _shared_vocabulary(config, head_rows)
    if config.targets == "top_k" and config.top_k > vocab_size:
        raise UsageError(f"top_k is {config.top_k}, expected at most {vocab_size}, the entries of the vocabulary")

    layout = {"head_rows": head_rows, "num_parameters": count_parameters(teacher), "context": context_of(teacher)}
    for name in rows:
        kind = config.targets if name == "train" else "hidden"
        tensors = _tensors(kind, width, config.top_k, vocab_size, dtype)
        row_bytes = config.max_length * sum(width * getattr(torch, kind).itemsize for width, kind in tensors.values())
        layout[name] = {"rows_per_part": max(1, PART_BYTES // row_bytes), "tensors": tensors}
    made_for = _made_for(config, tokenizer, rows["train"], rows["eval"], dtype, vocab_size)
    parts = {name: Parts(folder, name, rows[name], layout[name]) for name in rows}
    if accelerator.is_main_process:
        _prepare(folder, made_for, layout, parts)
    accelerator.wait_for_everyone()

    teacher, place = place_teacher(teacher, config.teacher_placement, accelerator)
    accelerator.print(f"teacher  {config.teacher_model}: {place}")
    empty = collate([empty_row(tokenizer.pad_token_id)], tokenizer.pad_token_id)
    head = teacher({key: value.to(accelerator.device) for key, value in empty.items()}, lambda _, head: head.cpu())
    if accelerator.is_main_process and not (folder / "head.safetensors").is_file():
        _write(folder / "head.safetensors", {"head": head})
    for name in rows:
        keep = _keep_hidden if name == "eval" or config.targets == "hidden" else _keep_top_k(config, vocab_size)
        _store_rows(parts[name], rows[name], teacher, keep, config.batch_size, tokenizer.pad_token_id, accelerator)
    accelerator.wait_for_everyone()
    accelerator.print(f"the targets are in {folder}")
    return folder


def _tensors(kind: str, width: int, k: int, vocab_size: int, dtype: torch.dtype) -> dict[str, tuple[int, str]]:
    """Width and dtype of what is stored of a token: in two bytes a number, or four where the run is in fp32."""
    if kind == "hidden":
        return {"hidden": (width, str(dtype).removeprefix("torch."))}
    ids = "uint16" if vocab_size <= 2**16 else "int32"
    return {"ids": (k, ids), "log_probs": (k + 1, "float16" if dtype == torch.bfloat16 else "float32")}


def _prepare(folder: Path, made_for: dict, layout: dict, parts: dict[str, Parts]) -> None:
    """Say what is to be made and where, see that there is room, and write targets.json."""
    if (folder / "targets.json").is_file():
        _check_made_for(folder, _read_json(folder)[0], made_for)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".writing_*"):
            leftover.unlink()
        files.write_text(folder / "targets.json", json.dumps({"made_for": made_for, "layout": layout}, indent=2))
    except OSError as error:
        raise UsageError(f"targets_dir {folder} cannot be written ({error.strerror}): choose another") from error
    need = 0
    for name, these in parts.items():
        missing = [part for part in range(len(these)) if these.fault(part)]
        tokens = sum(these.ends[these.rows(part).stop] - these.ends[these.rows(part).start] for part in missing)
        need += tokens * these.bytes_per_token
        kind = "and ".join(f"{width} {dtype} of {key} " for key, (width, dtype) in these.tensors.items())
        print(f"{name:8} {tokens:,} of {these.ends[-1]:,} tokens to go, {these.bytes_per_token:,} bytes each: {kind}")
    free = shutil.disk_usage(folder).free
    print(f"disk     {need / 2**20:,.1f} MiB needed, {free / 2**20:,.1f} MiB free in {folder}")
    if need > 0.98 * free:
        raise UsageError(
            f"targets_dir {folder} has {free / 2**20:,.0f} MiB free, the targets need {need / 2**20:,.0f} MiB: "
            "choose another disk, less text (max_train_tokens), or targets top_k with a smaller top_k"
        )


def _keep_hidden(hidden: Tensor, head: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {"hidden": hidden[labels != IGNORE_INDEX].cpu()}  # (N, H)


def _keep_top_k(config: DistillConfig, vocab_size: int):
    def keep(hidden: Tensor, head: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden, head = hidden[labels != IGNORE_INDEX], head[:vocab_size]  # (N, H), (V, H)
        found = [top_k(precise_logits(x, head), config.top_k, config.temperature) for x in hidden.split(CHUNK)]
        ids, log_probs = (torch.cat(x).cpu() for x in zip(*found, strict=True))  # (N, K), (N, K + 1)
        return {"ids": ids, "log_probs": log_probs}

    return keep


def _store_rows(parts: Parts, rows, teacher, keep, batch_size: int, pad_token_id: int, accelerator) -> None:
    """Make the parts that are missing, each on one rank. All ranks call the teacher as often: it may be sharded."""
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    missing = [part for part in range(len(parts)) if parts.fault(part)]
    accelerator.wait_for_everyone()  # all have looked before one writes
    progress = tqdm(
        total=len(missing), desc=f"targets {parts.name}", unit="file", disable=not accelerator.is_main_process
    )
    for first in range(0, len(missing), num_ranks):
        now = missing[first : first + num_ranks]
        mine = [rows[index] for index in parts.rows(now[rank])] if rank < len(now) else []
        kept = []
        for start in range(0, len(parts.rows(now[0])), batch_size):
            batch = collate(mine[start : start + batch_size] or [empty_row(pad_token_id)], pad_token_id)
            batch = {key: value.to(accelerator.device) for key, value in batch.items()}
            kept.append(teacher(batch, keep, batch["labels"]))
        if mine:
            dtypes = {key: getattr(torch, dtype) for key, (_, dtype) in parts.tensors.items()}
            _write(parts.path(now[rank]), {key: torch.cat([x[key] for x in kept]).to(dtypes[key]) for key in dtypes})
        progress.update(len(now))
    progress.close()


def main(argv: list[str] | None = None) -> None:
    """`python -m kdkit.targets [--config recipe.yaml] [--field value ...]`, the fields of `python -m kdkit.train`."""
    try:
        store(load_config(argv, command="python -m kdkit.targets"))
    except UsageError as error:
        sys.exit(f"kdkit: {error}")
    leave_processes()


if __name__ == "__main__":
    main()
