"""Rows: in memory, or tokenised once and kept in an Arrow file; packed, counted, and padded into a batch.

For what a row is, see `kdkit.tokens`.
"""

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from kdkit.files import sync, write_text
from kdkit.hub import explain
from kdkit.losses import IGNORE_INDEX


class Rows(list):
    """Rows in memory, and what was counted when they were made."""

    def __init__(self, rows: Iterable[dict], counts: Counter):
        super().__init__(rows)
        self.counts = counts


class MappedRows(Sequence):
    """Rows in an Arrow file, read when asked for, and what was counted when they were made."""

    def __init__(self, file: Path):
        import datasets

        self.origin = ""  # the columns they were made of
        self.dataset = datasets.Dataset.from_file(str(file))
        self.counts = Counter(json.loads(file.with_suffix(".json").read_text()))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | slice) -> dict | list[dict]:
        if isinstance(index, slice):
            return [self.dataset[i] for i in range(*index.indices(len(self)))]
        return self.dataset[index]


def cached_rows(file: Path, make: Callable[[], Iterable[dict]], counts: Counter, name: str) -> MappedRows:
    """The rows in an Arrow file, which the first process to come makes, while the others wait for it.

    The file is complete or it is not there.

    Args:
        file: where they are kept.
        make: called for the rows when the file is not there.
        counts: what `make` counts; kept in a JSON file beside.
        name: of the data, for messages.

    Raises:
        UsageError: no room on the disk, or a folder that cannot be written.
    """
    import pyarrow as pa
    from filelock import FileLock

    schema = pa.schema([(key, pa.list_(pa.int32())) for key in ("input_ids", "labels", "position_ids")])
    aside = file.with_suffix(".writing")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            if not file.exists():
                with open(aside, "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
                    rows = iter(make())
                    while batch := list(itertools.islice(rows, 1000)):
                        stream.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
                write_text(file.with_suffix(".json"), json.dumps(counts))
                sync(aside)
                os.replace(aside, file)
                sync(file.parent)
    except OSError as error:
        raise explain("the cache of", name, error, f"{file.parent} has to be writable") from error
    return MappedRows(file)


def count_tokens(rows: Sequence[dict]) -> int:
    """Tokens in the loss."""
    if isinstance(rows, MappedRows):
        return rows.counts["tokens"]
    return sum(label != IGNORE_INDEX for row in rows for label in row["labels"])


def row_lengths(rows: Sequence[dict]) -> list[int]:
    """Tokens of each row."""
    if isinstance(rows, MappedRows):
        import pyarrow.compute as pc

        return pc.list_value_length(rows.dataset.data.column("input_ids")).to_pylist()
    return [len(row["input_ids"]) for row in rows]


def empty_row(pad_token_id: int) -> dict:
    """A row without a label, for a rank that has none left but has to take part in what the ranks do together."""
    return {"input_ids": [pad_token_id], "labels": [IGNORE_INDEX], "position_ids": [0]}


def pack(rows: list[dict], max_length: int) -> list[dict]:
    """Join rows into fuller ones, best fit first: each goes where it leaves the least room (decreasing length).

    Documents stay apart: positions start at 0 in each, from which transformers' attention (eager and sdpa) builds
    a mask that lets none see another, and no label crosses a boundary, since the shift came before.
    """
    bins: list[list[dict]] = []
    open_bins: dict[int, list[int]] = {}  # room left -> bins with just that room
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        length = len(row["input_ids"])
        room = next((r for r in range(length, max_length) if open_bins.get(r)), max_length)
        if room == max_length:
            bins.append([])
            index = len(bins) - 1
        else:
            index = open_bins[room].pop()
        bins[index].append(row)
        open_bins.setdefault(room - length, []).append(index)
    return [{key: [x for row in group for x in row[key]] for key in group[0]} for group in bins]


def collate(rows: list[dict], pad_token_id: int, length: int | None = None) -> dict[str, torch.Tensor]:
    """Pad rows on the right to the longest (or to `length`) and stack them: three tensors of (B, S), int64.

    Padding is a document of its own (positions from 0 again) with no label; it is told by its labels, never by its
    token id, which may well be that of the end of text.
    """
    length = length or max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        padding = length - len(row["input_ids"])
        batch["input_ids"].append(row["input_ids"] + [pad_token_id] * padding)
        batch["labels"].append(row["labels"] + [IGNORE_INDEX] * padding)
        batch["position_ids"].append(row["position_ids"] + list(range(padding)))
    return {key: torch.tensor(value) for key, value in batch.items()}
