"""Rows in, batches out: pack, cache and lay out the steps of a run; and look at samples.

    python -m kdkit.data [--config recipes/x.yaml] [--field value ...]    # shows a few rows, in the loss or out of it

Shapes: B rows of a micro-batch, S tokens of a row. For what a row is, see `kdkit.data.chat`; for what it is made of,
`kdkit.data.sources`.
"""

import hashlib
import itertools
import json
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from kdkit.config import DistillConfig, UsageError
from kdkit.data.chat import check_chat_template, make_rows, up_to
from kdkit.data.sources import Document, Source, documents_of, embedded_documents, open_source, split_documents
from kdkit.losses import IGNORE_INDEX
from kdkit.running.files import sync, write_text
from kdkit.running.hub import explain

# What the rows of a run depend on, but for the tokenizer.
DATA_FIELDS = (
    "dataset", "dataset_config", "dataset_split", "streaming", "text_column", "messages_column",
    "prompt_column", "completion_column", "chat_template", "eval_dataset", "eval_split", "eval_fraction",
    "max_train_tokens", "max_eval_tokens", "max_length", "truncation_mode", "packing",
)  # fmt: skip
PACK_TOKENS = 2**22  # packed together: more would hardly fill rows better, and would have to be in memory
CACHE_VERSION = 1  # to be raised when the same text gives other rows


# --- a run's data --------------------------------------------------------------------------------------------


def load_rows(config: DistillConfig, tokenizer) -> tuple[Sequence[dict], Sequence[dict]]:
    """The training and the held-out rows of a run: read, split by document, tokenised, limited, packed.

    The embedded text is tokenised in memory. Anything else is tokenised once, by whichever process comes first, and
    kept as Arrow under the cache of `datasets`; other content, tokenizer or settings make another file.

    Raises:
        UsageError: what `open_source` and `documents_of` raise; no chat template for conversations; nothing to learn;
            or too little to hold some out.
    """
    separate = config.eval_dataset is not None or config.eval_split is not None
    eval_dataset, eval_split = config.eval_dataset or config.dataset, config.eval_split or config.dataset_split
    parts = ("all", "all") if separate else ("train", "held_out")
    same_split = eval_split == config.dataset_split or config.dataset == "embedded"  # which has but one
    if separate and eval_dataset == config.dataset and same_split:
        raise UsageError(
            f"eval_dataset {eval_dataset}, split {eval_split}, is what is trained on: name another, or leave both "
            "eval_dataset and eval_split out, which holds out eval_fraction of the samples"
        )
    return (
        _part_rows(config, tokenizer, config.dataset, config.dataset_split, parts[0], config.max_train_tokens),
        _part_rows(config, tokenizer, eval_dataset, eval_split, parts[1], config.max_eval_tokens),
    )


def _part_rows(config, tokenizer, name: str, split: str, part: str, max_tokens: int | None) -> Sequence[dict]:
    counts: Counter = Counter()

    def rows(documents: Iterable[Document]) -> Iterator[dict]:
        rows = up_to(make_rows(documents, tokenizer, config.max_length, config.truncation_mode, counts), max_tokens)
        for row in _pack_in_parts(rows, config.max_length) if config.packing else rows:
            counts["tokens"] += count_tokens([row])
            yield row

    if name == "embedded":
        documents = embedded_documents()
        if part != "all":
            documents = split_documents(documents, config.eval_fraction)[part == "held_out"]
        documents = random.Random(0).sample(documents, len(documents))  # the same text whatever the seed of the run
        found = Rows(rows(documents), counts)
    else:
        source = open_source(config, name, split)
        if source.kind != "texts":
            check_chat_template(tokenizer, source.name)
        file = _cache_file(config, tokenizer, source, part, max_tokens)
        found = cached_rows(file, lambda: rows(documents_of(source, config, part)), counts, source.name)
        found.origin = (
            f"{'texts' if source.kind == 'texts' else 'conversations'} of column {' and '.join(source.columns)}"
        )
    if found:
        return found
    samples = found.counts["samples"]
    if part == "all" or samples:
        raise UsageError(
            f"{name}, split {split}, has nothing to learn: of {samples:,} samples {found.counts['dropped']:,} have no "
            "token in the loss (no turn of the assistant within max_length, or no text): give others, or raise it"
        )
    raise UsageError(
        f"{name}, split {split}, leaves no {'training' if part == 'train' else 'held-out'} sample (eval_fraction "
        f"{config.eval_fraction:g}): give more text, another eval_fraction, an eval_split or an eval_dataset"
    )


def _pack_in_parts(rows: Iterable[dict], max_length: int) -> Iterator[dict]:
    waiting, tokens = [], 0
    for row in rows:
        waiting.append(row)
        tokens += len(row["input_ids"])
        if tokens >= PACK_TOKENS:
            yield from pack(waiting, max_length)
            waiting, tokens = [], 0
    yield from pack(waiting, max_length)


def _cache_file(config, tokenizer, source: Source, part: str, max_tokens: int | None) -> Path:
    import datasets

    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(sorted(tokenizer.get_vocab()))
    key = [
        CACHE_VERSION, source.fingerprint, source.kind, source.columns, part, config.eval_fraction, max_tokens,
        config.max_length, config.truncation_mode, config.packing, config.streaming, backend, tokenizer.eos_token,
        tokenizer.chat_template if source.kind != "texts" else None,
    ]  # fmt: skip
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    return Path(datasets.config.HF_DATASETS_CACHE) / "kdkit" / f"{name}.arrow"


def describe_rows(rows: Sequence[dict], config: DistillConfig) -> list[str]:
    """Lines about the columns that were read, and what was cut and left out when the rows were made."""
    counts = getattr(rows, "counts", Counter())
    lines = [rows.origin] if isinstance(rows, MappedRows) else []
    if counts["too_long"]:
        mode = config.truncation_mode or "split if texts, keep_start if conversations"
        lines.append(
            f"{counts['too_long']:,} of {counts['samples']:,} samples have over {config.max_length:,} tokens: {mode}"
        )
    if counts["dropped"]:
        lines.append(f"{counts['dropped']:,} of {counts['samples']:,} samples are left out: nothing in them to learn")
    return lines


class Steps(Dataset):
    """The optimizer steps of a run as one rank sees them: item i is the list of micro-batches of step i.

    Each epoch takes the rows in an order of its own, which follows from the seed and the epoch alone. A step is a
    consecutive part of that order, whatever the number of ranks and micro-batches it is cut into, and each row is in
    one step of the epoch: so runs on one rank or many see the same steps, and going on from step i is a slice.

    The last step of an epoch has what is left. All ranks have the same number of micro-batches in it; one for which
    no row is left gets a micro-batch without a label, since it has to take part in what the ranks do together.
    """

    def __init__(self, rows: list[dict], config: DistillConfig, pad_token_id: int, rank: int = 0, num_ranks: int = 1):
        self.rows, self.pad_token_id, self.seed = rows, pad_token_id, config.seed
        self.batch_size, self.rank, self.num_ranks = config.batch_size, rank, num_ranks
        self.rows_per_step = config.batch_size * config.gradient_accumulation_steps * num_ranks
        self.steps_per_epoch = math.ceil(len(rows) / self.rows_per_step)
        self.num_steps = config.max_steps or math.ceil(config.num_epochs * self.steps_per_epoch)
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.num_steps

    def step_rows(self, step: int) -> list[int]:
        """The indices of the rows of a step, over all ranks."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            order = list(range(len(self.rows)))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1][position * self.rows_per_step : (position + 1) * self.rows_per_step]

    def useful_share(self) -> float:
        """Tokens in the loss by positions that are computed, padding included, in an epoch on all ranks."""
        lengths, positions = row_lengths(self.rows), 0
        for step in range(self.steps_per_epoch):
            step_rows = self.step_rows(step)
            for rank in range(self.num_ranks):
                mine = [lengths[row] for row in step_rows[rank :: self.num_ranks]]
                for start in range(0, len(mine), self.batch_size):
                    micro_batch = mine[start : start + self.batch_size]
                    positions += max(micro_batch) * len(micro_batch)
        return count_tokens(self.rows) / positions

    def __getitem__(self, step: int) -> list[dict[str, torch.Tensor]]:
        if not 0 <= step < self.num_steps:
            raise IndexError(step)
        step_rows = self.step_rows(step)
        mine = step_rows[self.rank :: self.num_ranks]
        num_micro_batches = math.ceil(len(step_rows[:: self.num_ranks]) / self.batch_size)  # rank 0 has the most
        micro_batches = []
        for start in range(0, num_micro_batches * self.batch_size, self.batch_size):
            indices = mine[start : start + self.batch_size]
            rows = [self.rows[index] for index in indices] or [empty_row(self.pad_token_id)]
            micro_batches.append({**collate(rows, self.pad_token_id), "row_ids": indices})
        return micro_batches


# --- rows ---


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


def _lists(rows: Sequence[dict], key: str) -> list:
    """The lists of one key, as chunks of Arrow."""
    import pyarrow as pa

    if isinstance(rows, MappedRows):
        return rows.dataset.data.column(key).chunks
    return [pa.array([row[key] for row in rows], pa.list_(pa.int32()))]


def loss_tokens(rows: Sequence[dict]) -> np.ndarray:
    """Tokens in the loss of each row: (num_rows,)."""
    counts = []
    for chunk in _lists(rows, "labels"):
        before = np.concatenate([[0], np.cumsum(chunk.flatten().to_numpy() != IGNORE_INDEX)])
        lengths = chunk.value_lengths().to_numpy()
        ends = np.cumsum(lengths)
        counts.append(before[ends] - before[ends - lengths])
    return np.concatenate(counts)


def rows_digest(rows: Sequence[dict]) -> str:
    """A hash of the content and the order of rows."""
    digest = hashlib.sha256()
    for key in ("input_ids", "labels", "position_ids"):
        for chunk in _lists(rows, key):
            digest.update(chunk.value_lengths().to_numpy())
        for chunk in _lists(rows, key):
            digest.update(chunk.flatten().to_numpy())
    return digest.hexdigest()[:16]


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
