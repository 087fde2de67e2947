"""A teacher that does not run: `python -m kdkit.targets` stored its outputs, and they are read from files.

A folder of targets has

    targets.json                 made_for: what the targets were made for, compared with the run that reads them
                                 layout: head_rows, num_parameters, context, and for each split the files' format
    head.safetensors             the head (V, H)
    train-000000.safetensors     outputs for the tokens in the loss of some consecutive rows: `hidden` (N, H), or
    eval-000000.safetensors      `ids` (N, K) and `log_probs` (N, K + 1); held-out rows always have `hidden`

Shapes: N tokens in the loss, B rows of a batch, S tokens of a row, H hidden size, V vocabulary, K top-k.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from kdkit.config import DataFields, DistillConfig, UsageError
from kdkit.data import loss_tokens, rows_digest
from kdkit.losses import IGNORE_INDEX, TopK
from kdkit.models import load_student_config, load_teacher, teacher_folder

DATA_FIELDS = [field.name for field in dataclasses.fields(DataFields) if not field.metadata.get("may_change")]
SAMPLES, SAMPLE_BYTES = 256, 2**16  # of each file of weights, for the fingerprint of a teacher


class StoredTeacher:
    """A teacher whose outputs for the rows of a run are read from files.

    For `hidden` the head is on the device of the run. For `top_k` only evaluation needs it: it stays in CPU memory.
    """

    def __init__(self, config: DistillConfig, tokenizer, train_rows, eval_rows, dtype: torch.dtype):
        self.config, self.folder = config, Path(config.targets_dir)
        made_for, layout = read_description(self.folder)
        self.head_rows, self.context = layout["head_rows"], layout["context"]
        self.num_parameters = layout["num_parameters"]
        now = describe_made_for(config, tokenizer, train_rows, eval_rows, dtype, self.head_rows)
        check_made_for(self.folder, made_for, now)
        self.train = SplitFiles(self.folder, "train", train_rows, layout["train"])
        self.eval = SplitFiles(self.folder, "eval", eval_rows, layout["eval"])
        self.train.check()
        self.eval.check()
        self.head = load_file(self.folder / "head.safetensors")["head"]  # (V, H)

    def __call__(self, batch: dict) -> tuple[Tensor | TopK, Tensor | None]:
        """Return (hidden (B, S, H), head (V, H)) or (TopK, None) for the rows in `row_ids`; 0 outside the loss."""
        labels, rows = batch["labels"], batch["row_ids"]
        held_out = not rows or rows[0] < 0  # also for padding without a row: the loss and the metrics take both forms
        stored = self.eval.read([-1 - row for row in rows]) if held_out else self.train.read(rows)
        outputs = {}
        for key, values in stored.items():  # (N, ...) -> (B, S, ...)
            outputs[key] = torch.zeros(*labels.shape, *values.shape[1:], dtype=values.dtype, device=labels.device)
            outputs[key][labels != IGNORE_INDEX] = values.to(labels.device)
        if "hidden" in outputs:
            return outputs["hidden"], self.head.to(labels.device)
        return TopK(outputs["ids"], outputs["log_probs"]), None

    def place(self, accelerator, placement: str) -> None:
        """Move the head to the device if every batch needs it; `placement` is about weights, and there are none."""
        if self.config.targets == "hidden":
            self.head = self.head.to(accelerator.device)

    @property
    def placement(self) -> str:
        """Where the outputs are read from."""
        kind = "hidden states" if self.config.targets == "hidden" else f"{self.config.top_k} most likely tokens"
        return f"not loaded: its {kind} are read from {self.folder} ({self.train.bytes_per_token:,} bytes per token)"

    def extra_head_step(self) -> None:
        """Return None: `python -m kdkit.targets` stores no teacher whose logits are not hidden @ head^T."""

    @property
    def model(self) -> torch.nn.Module:
        """The teacher itself, loaded anew in fp32: needed once, for a student that is cut from its layers."""
        return load_teacher(self.config.teacher_model, torch.float32, self.config)


class SplitFiles:
    """The files of one split: each has the outputs for the tokens in the loss of some consecutive rows.

    The position of a token follows from the rows, so no index is stored. Reading a row reads only its bytes.

    Args:
        layout: `rows_per_file`, and `tensors`: for each tensor its width and dtype, as in targets.json.
    """

    def __init__(self, folder: Path, split: str, rows, layout: dict):
        self.split, self.rows_per_file, self.tensors = split, layout["rows_per_file"], layout["tensors"]
        self.bytes_per_token = sum(width * getattr(torch, dtype).itemsize for width, dtype in self.tensors.values())
        self.ends = [0, *np.cumsum(loss_tokens(rows)).tolist()]  # row i has the tokens from ends[i] to ends[i + 1]
        starts = range(0, len(rows), self.rows_per_file)
        self.rows = [range(start, min(start + self.rows_per_file, len(rows))) for start in starts]  # of each file
        self.num_tokens = [self.ends[rows.stop] - self.ends[rows.start] for rows in self.rows]
        self.paths = [folder / f"{split}-{file:06d}.safetensors" for file in range(len(self.rows))]
        self._open = {}

    def faults(self) -> dict[int, str]:
        """Return which files are missing or damaged, and why. Reads their headers only."""
        faults = {}
        for file, path in enumerate(self.paths):
            expected = {key: (self.num_tokens[file], width) for key, (width, _) in self.tensors.items()}
            try:
                with safe_open(path, framework="pt") as content:
                    shapes = {key: tuple(content.get_slice(key).get_shape()) for key in content.keys()}  # noqa: SIM118
                if shapes != expected:
                    faults[file] = f"has {shapes}, expected {expected}"
            except FileNotFoundError:
                faults[file] = "is missing"
            except (SafetensorError, OSError) as error:
                faults[file] = f"is damaged ({error})"
        return faults

    def check(self) -> None:
        """Raise a UsageError if a file is missing or damaged."""
        if faults := self.faults():
            file, fault = next(iter(faults.items()))
            raise UsageError(
                f"{self.paths[file].parent} is not complete: {len(faults)} of {len(self.paths)} {self.split} files are "
                f"missing or damaged; {self.paths[file].name} {fault}. Run python -m kdkit.targets again with the same "
                "arguments: it makes only these files"
            )

    def read(self, rows: list[int]) -> dict[str, Tensor]:
        """Return the stored tensors of the tokens of these rows, one row after the other: (N, ...)."""
        tensors = {key: [torch.empty(0, width, dtype=getattr(torch, dt))] for key, (width, dt) in self.tensors.items()}
        for row in rows:
            file = row // self.rows_per_file
            if file not in self._open:
                self._open[file] = safe_open(self.paths[file], framework="pt")
            first = self.ends[self.rows[file].start]
            for key, pieces in tensors.items():
                pieces.append(self._open[file].get_slice(key)[self.ends[row] - first : self.ends[row + 1] - first])
        tensors = {key: torch.cat(pieces) for key, pieces in tensors.items()}
        return {key: x.int() if x.dtype == torch.uint16 else x for key, x in tensors.items()}  # few devices have uint16


# --- what the targets were made for --------------------------------------------------------------------------


def describe_made_for(config, tokenizer, train_rows, eval_rows, dtype: torch.dtype, head_rows: int) -> dict:
    """Return what must be the same where targets are made and where they are read, under names that users know."""
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    vocabulary = json.dumps([sorted(tokenizer.get_vocab().items()), special]).encode()
    made_for = {
        "targets": config.targets,
        "teacher_model": teacher_fingerprint(config),
        "tokenizer": hashlib.sha256(vocabulary).hexdigest()[:16],
        "dtype": str(dtype).removeprefix("torch."),
        **{name: getattr(config, name) for name in DATA_FIELDS},
        "training text": rows_digest(train_rows),
        "held-out text": rows_digest(eval_rows),
    }
    if config.targets == "top_k":  # of the entries that both heads have; the student is not loaded here
        student_rows = load_student_config(config).vocab_size if config.student_layers is None else head_rows
        vocab_size = min(head_rows, student_rows)
        made_for |= {"top_k": config.top_k, "temperature": config.temperature, "vocab_size": vocab_size}
    return made_for


def check_made_for(folder: Path, made_for: dict, now: dict) -> None:
    """Raise a UsageError that names what differs between the targets in a folder and the run that reads them."""
    names = [name for name in {**made_for, **now} if made_for.get(name) != now.get(name)]
    if now["teacher_model"] is None:  # the teacher's weights are not on this machine, and are not needed
        names = [name for name in names if name != "teacher_model"]
    if set(names) & set(DATA_FIELDS):  # a different text follows from a different field
        names = [name for name in names if name not in ("training text", "held-out text")]
    if names:
        differing = "; ".join(f"{name} was {made_for.get(name)!r}, is {now.get(name)!r}" for name in names)
        raise UsageError(
            f"the targets in {folder} were made for another run: {differing}. Set the same values, or make new targets "
            "with python -m kdkit.targets and another --targets_dir"
        )


def teacher_fingerprint(config: DistillConfig) -> str | None:
    """Hash the teacher's config.json and samples of its weights; None if they are not on this machine.

    Files up to 16 MiB are read completely. Samples suffice for larger ones, since training changes all weights.
    """
    folder = teacher_folder(config)
    if folder is None or not (paths := sorted(folder.glob("*.safetensors"))):
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


def read_description(folder: Path) -> tuple[dict, dict]:
    """Return `made_for` and `layout` of targets.json."""
    path = folder / "targets.json"
    if not path.is_file():
        raise UsageError(f"{path} does not exist: make targets with python -m kdkit.targets and the same arguments")
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["made_for"], content["layout"]
