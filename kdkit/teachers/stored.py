"""A teacher that does not run: `python -m kdkit.targets` stored its outputs, and they are read from files.

A folder of targets has

    targets.json                 made_for: what the targets were made for, compared with the run that reads them
                                 layout: head_rows, num_parameters, context, and the format of the files of a split
    head.safetensors             the head (V, H)
    train-000000.safetensors     outputs for the tokens in the loss of some consecutive rows: `hidden` (N, H), or
    eval-000000.safetensors      `ids` (N, K) and `log_probs` (N, K + 1); held-out rows always have `hidden`

Shapes: N tokens in the loss, B rows of a batch, S tokens of a row, H hidden size, V vocabulary, K top-k.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from kdkit.config import DistillConfig, UsageError
from kdkit.data import DATA_FIELDS, is_packed, loss_tokens, rows_digest
from kdkit.losses import TopK
from kdkit.models import check_models, load_teacher, teacher_fingerprint

MODEL_FACTS = ("head_rows", "num_parameters", "context", "soft_cap")


class StoredTeacher:
    """A teacher whose outputs for the rows of a run are read from files."""

    def __init__(self, config: DistillConfig, train_rows, eval_rows, dtype: torch.dtype):
        self.config, folder = config, Path(config.targets_dir)
        layout = read_layout(folder, describe_made_for(config, train_rows, eval_rows, dtype))
        for name in MODEL_FACTS:
            setattr(self, name, layout[name])
        self.packs = True  # for the rows of this run, which are those that the targets were made for
        self.train = SplitFiles(folder, "train", train_rows, layout["train"])
        self.eval = SplitFiles(folder, "eval", eval_rows, layout["eval"])
        if missing := [*self.train.missing, *self.eval.missing]:
            what = f"{len(missing)} files of the targets are missing or damaged, such as {missing[0]}"
            raise UsageError(f"{what}: run python -m kdkit.targets again with the same arguments to make these")
        self.head = load_file(folder / "head.safetensors")["head"]  # (V, H)
        self.placement = f"not loaded: its outputs ({config.targets}) are read from {folder}"

    def __call__(self, batch: dict) -> tuple[Tensor | TopK, Tensor | None]:
        """Return (hidden (B, S, H), head (V, H)) or (TopK, None) for the rows in `row_ids`, with 0 for other tokens."""
        labels, rows, split = batch["labels"], batch["row_ids"], self.train
        if not rows or rows[0] < 0:  # also for a batch of padding only: the loss and the metrics accept both forms
            rows, split = [-1 - row for row in rows], self.eval
        outputs = {}
        for key in split.tensors:
            values = split.read(key, rows)  # (N, width)
            if labels.device.type == "cuda":
                values = values.pin_memory()  # the copy does not wait for the GPU then
            values = values.to(labels.device, non_blocking=True)
            outputs[key] = values.new_zeros(*labels.shape, values.shape[1])  # (B, S, width)
            outputs[key].flatten(0, 1)[batch["valid"]] = values
        if "hidden" in outputs:
            return outputs["hidden"], self.head.to(labels.device)
        return TopK(outputs["ids"], outputs["log_probs"]), None

    def place(self, accelerator, placement: str) -> None:
        """Move the head to the device if every batch needs it: for `top_k`, only evaluation does."""
        if self.config.targets == "hidden":
            self.head = self.head.to(accelerator.device)

    def examine(self, rows, device: torch.device) -> list[str]:
        return []  # `python -m kdkit.targets` has examined the teacher

    def compile_layers(self) -> None:
        """There is nothing to compile."""

    @property
    def model(self) -> torch.nn.Module:
        """The teacher itself, in fp32: needed once, for a student that is cut from its layers."""
        return load_teacher(self.config.teacher_model, torch.float32, self.config)


class SplitFiles:
    """The files of one split, whose format is `layout`. The place of a token follows from the rows: no index exists."""

    def __init__(self, folder: Path, split: str, rows, layout: dict):
        self.rows_per_file, self.tensors = layout["rows_per_file"], layout["tensors"]
        self.ends = [0, *np.cumsum(loss_tokens(rows)).tolist()]  # row i has the tokens from ends[i] to ends[i + 1]
        self.opened, self.missing = {}, {}  # files by their first row; the rows of missing and damaged files by path
        for start in range(0, len(rows), self.rows_per_file):
            path = folder / f"{split}-{start // self.rows_per_file:06d}.safetensors"
            try:
                self.opened[start] = safe_open(path, framework="pt")  # reads the header, which shows a truncated file
            except (SafetensorError, OSError):
                self.missing[path] = range(start, min(start + self.rows_per_file, len(rows)))
        token_bytes = sum(width * getattr(torch, dtype).itemsize for width, dtype in self.tensors.values())
        missing = sum(self.ends[rows.stop] - self.ends[rows.start] for rows in self.missing.values())
        self.missing_bytes = missing * token_bytes

    def read(self, key: str, rows: list[int]) -> Tensor:
        """Return a stored tensor for the tokens of these rows, one row after the other: (N, width)."""
        width, dtype = self.tensors[key]
        pieces = [torch.empty(0, width, dtype=getattr(torch, dtype))]
        for row in rows:
            first = row - row % self.rows_per_file  # of its file
            start, stop = self.ends[row] - self.ends[first], self.ends[row + 1] - self.ends[first]
            pieces.append(self.opened[first].get_slice(key)[start:stop])
        values = torch.cat(pieces)
        return values.int() if values.dtype == torch.uint16 else values  # few operations support uint16


def describe_made_for(config: DistillConfig, train_rows, eval_rows, dtype: torch.dtype) -> dict:
    """Return what determines the targets of a run: the teacher and its dtype, the text, and what is stored."""
    made_for = {
        "targets": config.targets,
        "teacher_model": teacher_fingerprint(config),
        "dtype": str(dtype).removeprefix("torch."),
        **{name: getattr(config, name) for name in DATA_FIELDS},
        "packing": is_packed(train_rows) or is_packed(eval_rows),
        "training text": rows_digest(train_rows),
        "held-out text": rows_digest(eval_rows),
    }
    if config.targets == "top_k":  # of the entries that both heads have
        vocab_size = min(model_config.get_text_config().vocab_size for model_config in check_models(config))
        made_for |= {"top_k": config.top_k, "temperature": config.temperature, "vocab_size": vocab_size}
    return made_for


def read_layout(folder: Path, made_for: dict) -> dict:
    """Return `layout` of targets.json, or raise a UsageError: there is none, or `made_for` differs."""
    path = folder / "targets.json"
    if not path.is_file():
        raise UsageError(f"{path} does not exist: make targets with python -m kdkit.targets and the same arguments")
    content = json.loads(path.read_text(encoding="utf-8"))
    before = content["made_for"]
    if made_for["teacher_model"] is None:  # not on this machine, and not needed
        before["teacher_model"] = None
    if changes := [f"{n} was {before.get(n)!r}, is {now!r}" for n, now in made_for.items() if before.get(n) != now]:
        what = f"the targets in {folder} were made for another run: {'; '.join(changes)}"
        raise UsageError(f"{what}. Set the same values, or make new targets with another --targets_dir")
    return content["layout"]
