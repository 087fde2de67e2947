"""Make the rows of a run (tokenise, pack, cache), and lay them out in steps and batches: B rows of S tokens."""

import dataclasses
import hashlib
import json
import math
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from kdkit.config import DataFields, DistillConfig, UsageError
from kdkit.data.chat import check_chat_template, tokenize
from kdkit.data.sources import Source, documents_of, open_source
from kdkit.losses import IGNORE_INDEX
from kdkit.running.files import sync
from kdkit.running.hub import explain

KEYS = ("input_ids", "labels", "position_ids")
PACK_TOKENS = 2**22  # packed together: enough to fill the rows well, and little enough for memory
CACHE_VERSION = 2  # increase it when the same data and settings give other rows


class Rows(Sequence):
    """Rows in an Arrow table, in memory or mapped from a file: `rows[i]` is a dict of three lists."""

    def __init__(self, table, counts: dict | None = None, origin: str = ""):
        self.table = table
        self.counts = Counter(counts)  # samples; samples too_long and dropped; tokens in the loss
        self.origin = origin  # the columns that were read

    @classmethod
    def of(cls, rows: Sequence[dict]) -> "Rows":
        """Return rows of lists or arrays as `Rows`, which they may be already."""
        import pyarrow as pa

        if isinstance(rows, cls):
            return rows
        ends = np.cumsum([0, *(len(row["input_ids"]) for row in rows)], dtype=np.int32)
        values = {
            key: np.concatenate([[], *(row[key] for row in rows)], dtype=np.int32, casting="unsafe") for key in KEYS
        }
        return cls(pa.table({key: pa.ListArray.from_arrays(ends, values[key]) for key in KEYS}))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int | slice) -> dict | list[dict]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return {key: self.table.column(key)[index].values.to_numpy().tolist() for key in KEYS}


def row_lengths(rows: Sequence[dict]) -> np.ndarray:
    """Return the number of tokens of each row."""
    import pyarrow.compute as pc

    return pc.list_value_length(Rows.of(rows).table.column("input_ids")).to_numpy()


def loss_tokens(rows: Sequence[dict]) -> np.ndarray:
    """Return the number of tokens in the loss of each row."""
    counts = [np.empty(0, dtype=np.int64)]
    for chunk in Rows.of(rows).table.column("labels").chunks:
        totals = np.cumsum(np.append(0, chunk.flatten().to_numpy() != IGNORE_INDEX))
        ends = chunk.offsets.to_numpy()
        counts.append(np.diff(totals[ends - ends[0]]))
    return np.concatenate(counts)


def count_tokens(rows: Sequence[dict]) -> int:
    """Return the number of tokens in the loss of all rows."""
    return getattr(rows, "counts", {}).get("tokens") or int(loss_tokens(rows).sum())


def rows_digest(rows: Sequence[dict]) -> str:
    """Return a hash of the content and the order of rows."""
    digest = hashlib.sha256(row_lengths(rows).tobytes())
    for key in KEYS:
        for chunk in Rows.of(rows).table.column(key).chunks:
            digest.update(chunk.flatten().to_numpy())
    return digest.hexdigest()


def pack(rows: Sequence[dict], max_length: int) -> Rows:
    """Join rows into fuller ones by best fit: from the longest to the shortest, each goes where the least room is left.

    Documents stay separate: positions start at 0 in each, so that transformers (eager and sdpa attention) build a
    mask that hides the others, and no label crosses a boundary, since the shift came before.
    """
    groups: list[list[dict]] = []
    by_room: dict[int, list[list[dict]]] = {}  # room left -> the groups with exactly this room
    rooms = 0  # bit r is set if a group has room r
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        length = len(row["input_ids"])
        if fitting := rooms >> length << length:
            room = (fitting & -fitting).bit_length() - 1  # the lowest bit: the smallest room that is large enough
            group = by_room[room].pop()
            rooms -= 0 if by_room[room] else 1 << room
        else:
            room, group = max_length, []
            groups.append(group)
        group.append(row)
        by_room.setdefault(room - length, []).append(group)
        rooms |= 1 << (room - length)
    return Rows.of([{key: np.concatenate([row[key] for row in group]) for key in KEYS} for group in groups])


# --- the rows of a run ---


def load_rows(config: DistillConfig, tokenizer) -> tuple[Rows, Rows]:
    """Return the training and the held-out rows of a run: read, tokenised, limited, packed.

    The first process makes the rows and keeps them as Arrow in the cache folder of `datasets`, while the others wait.
    Other content, another tokenizer or other settings give another file.

    Raises:
        UsageError: the data cannot be read (see `open_source`, `documents_of`), has conversations without a chat
            template, has nothing to learn, or is too small to hold a part out; the cache cannot be written.
    """
    found = []
    for source in (open_source(config, part) for part in ("train", "eval")):
        if source.kind != "texts":
            check_chat_template(tokenizer, source.name)
        rows = cached_rows(source, config, tokenizer)
        if not rows:
            remedy = f", another eval_fraction (now {source.held_out:g}), or an eval_split" if source.held_out else ""
            raise UsageError(
                f"{source.name} has nothing {'to learn' if source.part == 'train' else 'to evaluate on'}: of "
                f"{rows.counts['samples']:,} samples, {rows.counts['dropped']:,} have no token in the loss (no "
                f"assistant turn within max_length, or no text). Give more data{remedy}"
            )
        found.append(rows)
    return tuple(found)


def cache_file(source: Source, config: DistillConfig, tokenizer) -> Path:
    """Return the file of a source's rows. Everything that can change a row changes its name."""
    import datasets

    fields = [field.name for field in dataclasses.fields(DataFields) if not field.metadata.get("may_change")]
    if source.part == "train":  # tokenised once for all ways to evaluate
        fields = [name for name in fields if not name.startswith(("eval_", "max_eval_"))]
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()  # each call sets these two again, so they say nothing about rows
        tokenizer.backend_tokenizer.no_padding()
        model = tokenizer.backend_tokenizer.to_str()
    else:
        model = sorted(tokenizer.get_vocab().items())
    options = [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token", "split_special_tokens")]
    key = [
        CACHE_VERSION, source._replace(samples=None), {name: getattr(config, name) for name in fields},
        type(tokenizer).__name__, model, options, tokenizer.special_tokens_map, tokenizer.chat_template,
    ]  # fmt: skip
    name = hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:32] + ".arrow"
    return Path(datasets.config.HF_DATASETS_CACHE, "kdkit", name)


def cached_rows(source: Source, config: DistillConfig, tokenizer) -> Rows:
    """Return the rows of a source from an Arrow file, which is made first if it does not exist.

    The file is complete or does not exist, also after a kill or a power failure. The counts are in it, too, with an
    empty batch at its end.

    Raises:
        UsageError: the disk is full, or the folder is not writable.
    """
    import pyarrow as pa
    from filelock import FileLock

    file = cache_file(source, config, tokenizer)
    temporary = file.with_suffix(".writing")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            if not file.exists():
                try:
                    _write(temporary, source, config, tokenizer)
                    sync(temporary)
                    os.replace(temporary, file)
                    sync(file.parent)
                finally:
                    temporary.unlink(missing_ok=True)
    except OSError as error:
        raise explain("the cache of", source.name, error, f"{file.parent} has to be writable") from error
    reader = pa.ipc.open_file(pa.memory_map(str(file)))
    *batches, (_, last) = [reader.get_batch_with_custom_metadata(i) for i in range(reader.num_record_batches)]
    table = pa.Table.from_batches([batch for batch, _ in batches], reader.schema)
    kind = "texts" if source.kind == "texts" else "conversations"
    return Rows(table, json.loads(last["counts"]), f"{kind} of column {' and '.join(source.columns)}")


def _write(file: Path, source: Source, config: DistillConfig, tokenizer) -> None:
    import pyarrow as pa
    from tqdm import tqdm

    counts = Counter()
    limit = (config.max_train_tokens if source.part == "train" else config.max_eval_tokens) or math.inf
    made = tokenize(documents_of(source), config.num_proc, tokenizer, config.max_length, config.truncation_mode)

    def counted() -> Iterator[dict]:
        for rows, too_long in tqdm(made, f"tokenise {source.name}", unit=" samples", delay=2):
            counts.update(samples=1, too_long=too_long, dropped=not rows)
            yield from rows

    rows, empty = _up_to(counted(), limit), Rows.of([]).table
    with open(file, "wb") as sink, pa.ipc.new_file(sink, empty.schema) as writer:
        while part := list(_up_to(rows, PACK_TOKENS)):
            part = pack(part, config.max_length) if config.packing else Rows.of(part)
            counts["tokens"] += count_tokens(part)
            writer.write_table(part.table)
        writer.write_batch(pa.RecordBatch.from_pylist([], empty.schema), {"counts": json.dumps(counts)})


def _up_to(rows: Iterator[dict], limit: float) -> Iterator[dict]:
    """Yield rows up to the one that reaches a limit on the number of tokens."""
    tokens = 0
    for row in rows:
        yield row
        tokens += len(row["input_ids"])
        if tokens >= limit:
            return


def describe_rows(rows: Sequence[dict], config: DistillConfig) -> list[str]:
    """Return lines that say which columns were read, and how many samples were cut or left out."""
    rows = Rows.of(rows)
    samples, too_long, dropped = (rows.counts[name] for name in ("samples", "too_long", "dropped"))
    lines = [rows.origin] if rows.origin else []
    if too_long:
        mode = config.truncation_mode or "split if texts, keep_start if conversations"
        lines.append(f"{too_long:,} of {samples:,} samples have over {config.max_length:,} tokens: {mode}")
    if dropped:
        lines.append(f"{dropped:,} of {samples:,} samples are left out: nothing in them to learn")
    return lines


# --- steps and batches ---


class Steps:
    """The optimizer steps of a run on one rank: `steps[i]` is the list of micro-batches of step i.

    Each epoch has its own order of the rows, which depends on the seed and the epoch only. A step is a consecutive
    part of this order, for any number of ranks and micro-batches, and every row is in exactly one step of the epoch.
    So one rank and many ranks compute the same steps, and a run resumes at step i without computing the others.

    The last step of an epoch has the rows that are left. All ranks have the same number of micro-batches in it: a
    rank without a row gets a micro-batch without a label, since it has to take part in the communication.
    """

    def __init__(self, rows: Sequence[dict], config: DistillConfig, pad_token_id: int, rank=0, num_ranks=1):
        self.rows, self.pad_token_id, self.seed = rows, pad_token_id, config.seed
        self.batch_size, self.rank, self.num_ranks = config.batch_size, rank, num_ranks
        self.rows_per_step = config.batch_size * config.gradient_accumulation_steps * num_ranks
        self.steps_per_epoch = math.ceil(len(rows) / self.rows_per_step)
        self.num_steps = config.max_steps or math.ceil(config.num_epochs * self.steps_per_epoch)
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.num_steps

    def step_rows(self, step: int) -> list[int]:
        """Return the indices of the rows of a step, on all ranks."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            order = list(range(len(self.rows)))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1][position * self.rows_per_step : (position + 1) * self.rows_per_step]

    def useful_share(self) -> float:
        """Return tokens in the loss / computed positions, padding included, in the first epoch on all ranks."""
        self.step_rows(0)
        lengths = np.zeros(self.steps_per_epoch * self.rows_per_step, dtype=np.int64)
        lengths[: len(self.rows)] = row_lengths(self.rows)[self._order[1]]
        micro_batches = lengths.reshape(-1, self.batch_size, self.num_ranks)  # a rank has every num_ranks-th row
        positions = micro_batches.max(axis=1) * (micro_batches > 0).sum(axis=1)
        return count_tokens(self.rows) / int(positions.sum())

    def __getitem__(self, step: int) -> list[dict]:
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


def empty_row(pad_token_id: int) -> dict:
    """Return a row without a label, for a rank that has no row left but takes part in the communication."""
    return {"input_ids": [pad_token_id], "labels": [IGNORE_INDEX], "position_ids": [0]}


def collate(rows: Sequence[dict], pad_token_id: int, length: int | None = None) -> dict[str, torch.Tensor]:
    """Pad rows on the right to the longest (or to `length`) and stack them: three tensors of (B, S), int64.

    The padding is a document of its own (positions from 0) without labels. Only its labels mark it: its token id can
    be the one of the end of text, which is learned.
    """
    length = length or max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        padding = length - len(row["input_ids"])
        batch["input_ids"].append([*row["input_ids"], *[pad_token_id] * padding])
        batch["labels"].append([*row["labels"], *[IGNORE_INDEX] * padding])
        batch["position_ids"].append([*row["position_ids"], *range(padding)])
    return {key: torch.tensor(values) for key, values in batch.items()}
