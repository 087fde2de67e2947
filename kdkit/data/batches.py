"""Make the rows of a run (tokenise, pack, cache), and lay them out in steps and batches: B rows of S tokens."""

import bisect
import dataclasses
import hashlib
import json
import math
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from kdkit.config import DataFields, DistillConfig, UsageError
from kdkit.data.chat import tokenize
from kdkit.data.sources import Source, documents_of, open_source
from kdkit.losses import IGNORE_INDEX
from kdkit.running.files import publish
from kdkit.running.hub import explain

KEYS = ("input_ids", "labels", "position_ids")
REMARKS = {  # of kdkit.data.chat on conversations
    "hidden": "the chat template does not show all of a message or a tool, or changes it",
    "endless": "a turn of the assistant has no token that ends it, so stopping is not learned",
    "per_turn": "a sample for each turn, as the chat template renders a turn in another way when others follow",
}
PACK_TOKENS = 2**22  # tokens that are packed together: enough to fill the rows well, few enough for memory
CACHE_VERSION = 4  # increase it when the same data and settings give other rows


class Rows(Sequence):
    """Rows in an Arrow table, in memory or mapped from a file: `rows[i]` is a dict of three lists."""

    def __init__(self, table, counts: dict | None = None):
        self.table = table
        self.counts = Counter(counts)  # kind (of the samples), samples, too_long, dropped, tokens (in the loss)

    @classmethod
    def of(cls, rows: Sequence[dict]) -> "Rows":
        """Convert rows of lists or arrays to `Rows`; `Rows` are returned unchanged."""
        import pyarrow as pa

        if isinstance(rows, cls):
            return rows
        return cls(pa.table({key: pa.array([row[key] for row in rows], pa.list_(pa.int32())) for key in KEYS}))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int | slice) -> dict | list[dict]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return {key: self.table[key][index].values.to_numpy().tolist() for key in KEYS}


def row_lengths(rows: Sequence[dict]) -> np.ndarray:
    """Return the number of tokens of each row."""
    return np.concatenate([np.diff(chunk.offsets) for chunk in Rows.of(rows).table["labels"].chunks])


def loss_tokens(rows: Sequence[dict]) -> np.ndarray:
    """Return the number of tokens in the loss of each row."""
    rows, lengths = Rows.of(rows), row_lengths(rows)
    in_loss = np.concatenate([chunk.flatten().to_numpy() != IGNORE_INDEX for chunk in rows.table["labels"].chunks])
    return np.add.reduceat(in_loss, np.cumsum(lengths) - lengths, dtype=np.int64)


def count_tokens(rows: Sequence[dict]) -> int:
    """Return the number of tokens in the loss of all rows."""
    return getattr(rows, "counts", {}).get("tokens") or int(loss_tokens(rows).sum())


def is_packed(rows: Sequence[dict]) -> bool:
    """Return whether a row has several documents: positions start at 0 in each."""
    starts = sum(int((chunk.flatten().to_numpy() == 0).sum()) for chunk in Rows.of(rows).table["position_ids"].chunks)
    return starts > len(rows)


def rows_digest(rows: Sequence[dict]) -> str:
    """Return a hash of the content and the order of rows."""
    digest = hashlib.sha256(row_lengths(rows).tobytes())
    for key in KEYS:
        for chunk in Rows.of(rows).table[key].chunks:
            digest.update(chunk.flatten().to_numpy())
    return digest.hexdigest()


def pack(rows: Sequence[dict], max_length: int) -> Rows:
    """Join rows into fuller ones by best fit: the longest first, each into the fullest group that has room for it.

    Documents stay separate: positions start at 0 in each, so that transformers (eager and sdpa attention) build a
    mask that hides the others, and no label crosses a boundary, since labels are shifted already.
    """
    groups: list[list[dict]] = []  # of rows that are joined
    with_room: list[tuple[int, int, list[dict]]] = []  # (room left, -number of the last row, group), sorted
    for number, row in enumerate(sorted(rows, key=lambda row: -len(row["input_ids"]))):
        length = len(row["input_ids"])
        best = bisect.bisect_left(with_room, (length,))  # the smallest room that is large enough
        if best < len(with_room):
            room, _, group = with_room.pop(best)
        else:
            room, group = max_length, []
            groups.append(group)
        group.append(row)
        if room > length:
            bisect.insort(with_room, (room - length, -number, group))
    return Rows.of([{key: np.concatenate([row[key] for row in group]) for key in KEYS} for group in groups])


def load_rows(config: DistillConfig, tokenizer) -> tuple[Rows, Rows]:
    """Return the training and the held-out rows of a run: read, tokenised, limited, and packed unless packing is False.

    The first process makes them, and keeps them as Arrow in the cache folder of `datasets`, while the others wait.

    Raises:
        UsageError: the data cannot be read, has conversations without a chat template, has nothing to learn, or is too
            small to hold a part out; the cache cannot be written.
    """
    config, found = dataclasses.replace(config, packing=_packing(config)), []
    for part, purpose in (("train", "to learn"), ("eval", "to evaluate on")):
        source = open_source(config, part)
        if source.kind == "conversations" and not (tokenizer.chat_template and tokenizer.is_fast):
            raise UsageError(
                f"{source.name} has conversations, but the teacher has no fast tokenizer with a chat template: use the "
                "instruction-tuned teacher, give a template with --chat_template FILE, or learn from a column of texts "
                "with --messages_column null --prompt_column null"
            )
        rows = _cached_rows(source, config, tokenizer)
        if not rows:
            remedy = f", another eval_fraction (now {source.held_out:g}), or an eval_split" if source.held_out else ""
            raise UsageError(
                f"{source.name} has nothing {purpose} ({describe_rows(rows, config)}): give more data{remedy}"
            )
        found.append(rows)
    return tuple(found)


def settle_packing(
    rows: tuple[Rows, Rows], config: DistillConfig, tokenizer, packs: dict[str, bool]
) -> tuple[tuple[Rows, Rows], list[str]]:
    """Return the rows of `load_rows`, loaded again with one sample each if a model needs that; and a line to print.

    `packs` says of the teacher and the student whether documents that share a row do not see each other.

    Raises:
        UsageError: `packing` is True, or the stored targets are those of packed rows.
    """
    mixing = " and ".join(f"the {role}" for role, separate in packs.items() if not separate)
    packing = _packing(config)
    if packing is False or not mixing:
        return rows, []
    if packing:
        again = (
            "" if config.packing else f", and with targets that are made with it: those in {config.targets_dir} are not"
        )
        raise UsageError(
            f"packing is on, but in {mixing} the samples of a row see each other: use --packing false{again}"
        )
    rows = load_rows(dataclasses.replace(config, packing=False), tokenizer)
    return rows, [f"packing: no, one sample per row, since in {mixing} the samples of a row would see each other"]


def _packing(config: DistillConfig) -> bool | None:
    """Return the field `packing`; where it is None, what stored targets or on-policy distillation need, if either."""
    path = Path(config.targets_dir or "", "targets.json")
    if config.packing is None and config.writes_own_text:  # each row is one prompt
        return False
    if config.packing is not None or config.targets == "online" or not path.is_file():
        return config.packing
    return json.loads(path.read_text(encoding="utf-8"))["made_for"]["packing"]


def cache_folder(source: Source, config: DistillConfig, tokenizer) -> Path:
    """Return the folder of a source's rows. Everything that can change a row changes its name."""
    import datasets

    ignored = ("eval_", "max_eval_") if source.part == "train" else ()  # these do not change the training rows
    names = [field.name for field in dataclasses.fields(DataFields) if not field.metadata.get("may_change")]
    fields = {name: getattr(config, name) for name in names if not name.startswith(ignored)}
    fields["packing"] = config.packing is not False
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()  # each call sets both again, so they do not change rows
        tokenizer.backend_tokenizer.no_padding()
        model = tokenizer.backend_tokenizer.to_str()
    else:
        model = sorted(tokenizer.get_vocab().items())
    options = [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token", "split_special_tokens")]
    key = [
        CACHE_VERSION, source._replace(samples=None), fields, type(tokenizer).__name__, model, options,
        tokenizer.special_tokens_map, tokenizer.chat_template,
    ]  # fmt: skip
    name = hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:32]
    return Path(datasets.config.HF_DATASETS_CACHE, "kdkit", name)


def _cached_rows(source: Source, config: DistillConfig, tokenizer) -> Rows:
    """Return the rows of a source from their folder, which is complete or absent, also after a power failure."""
    import pyarrow as pa
    from filelock import FileLock

    folder = cache_folder(source, config, tokenizer)
    temporary = folder.with_name(f".writing_{folder.name}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                temporary.mkdir(exist_ok=True)
                try:
                    _write_rows(temporary, source, config, tokenizer)
                    publish(temporary, folder)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise explain("the cache of", source.name, error, f"{folder.parent} has to be writable") from error
    table = pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow"))).read_all()
    return Rows(table, json.loads((folder / "counts.json").read_text()))


def _write_rows(folder: Path, source: Source, config: DistillConfig, tokenizer) -> None:
    import pyarrow as pa
    from tqdm import tqdm

    counts = Counter(kind=source.reading)
    job = (tokenizer, config.max_length, config.truncation_mode, config.chat_template_options)
    samples = tokenize(documents_of(source), config.num_proc, *job)

    def made() -> Iterator[dict]:
        for rows, remarks in tqdm(samples, f"tokenise {source.name}", unit=" samples", delay=2):
            counts.update(samples=1, dropped=not rows, **dict.fromkeys(remarks, 1))
            yield from rows

    limited = _up_to(made(), getattr(config, f"max_{source.part}_tokens") or math.inf)
    with open(folder / "rows.arrow", "wb") as file, pa.ipc.new_file(file, Rows.of([]).table.schema) as writer:
        while part := list(_up_to(limited, PACK_TOKENS)):
            part = Rows.of(part) if config.packing is False else pack(part, config.max_length)
            counts["tokens"] += count_tokens(part)
            writer.write_table(part.table)
    (folder / "counts.json").write_text(json.dumps(counts))


def _up_to(rows: Iterator[dict], limit: float) -> Iterator[dict]:
    """Yield rows up to the one that reaches a limit on the number of tokens."""
    tokens = 0
    while tokens < limit and (row := next(rows, None)):
        yield row
        tokens += len(row["input_ids"])


def describe_rows(rows: Sequence[dict], config: DistillConfig) -> str:
    """Return a line that says what was read, and how many samples were cut or left out."""
    counts = Rows.of(rows).counts
    mode = config.truncation_mode or ("split" if "texts" in str(counts["kind"]) else "keep_start")
    return (
        f"{counts['samples']:,} {counts['kind']}: {counts['too_long']:,} have over {config.max_length:,} tokens "
        f"({mode}); {counts['dropped']:,} are left out, as they have no token in the loss"
        + "".join(f"; {counts[key]:,} of {counts['samples']:,}: {text}" for key, text in REMARKS.items() if counts[key])
    )


class Steps:
    """The optimizer steps of a run on one rank: `steps[i]` is the list of micro-batches of step i.

    Each epoch has its own order of the rows, which depends on the seed and the epoch only. A step is a consecutive
    part of this order (the last one of an epoch may be smaller), for any number of ranks and micro-batches. So one
    rank and many ranks compute the same steps, and a run resumes at step i without computing the others. All ranks
    have the same number of micro-batches, since they communicate in each: see `empty_row`.
    """

    def __init__(
        self, rows: Sequence[dict], config: DistillConfig, pad_token_id: int, rank=0, num_ranks=1, on_gpu: bool = False
    ):
        self.rows, self.pad_token_id, self.seed = rows, pad_token_id, config.seed
        self.max_length, self.on_gpu = config.max_length, on_gpu
        self.batch_size, self.rank, self.num_ranks = config.batch_size, rank, num_ranks
        self.rows_per_step = config.batch_size * config.gradient_accumulation_steps * num_ranks
        self.steps_per_epoch = math.ceil(len(rows) / self.rows_per_step)
        self.num_steps = config.max_steps or math.ceil(config.num_epochs * self.steps_per_epoch)
        self._epoch, self._order = -1, []

    def __len__(self) -> int:
        return self.num_steps

    def step_rows(self, step: int) -> list[int]:
        """Return the indices of the rows of a step, on all ranks."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch != epoch:
            self._epoch, self._order = epoch, list(range(len(self.rows)))
            random.Random(f"{self.seed}/{epoch}").shuffle(self._order)
        return self._order[position * self.rows_per_step : (position + 1) * self.rows_per_step]

    def useful_share(self) -> float:
        """Return the fraction of computed positions, with padding, that are in the loss, in the first epoch."""
        self.step_rows(0)
        lengths = np.zeros(self.steps_per_epoch * self.rows_per_step, dtype=np.int64)
        lengths[: len(self.rows)] = row_lengths(self.rows)[self._order]
        micro_batches = lengths.reshape(-1, self.batch_size, self.num_ranks)  # a rank has every num_ranks-th row
        positions = micro_batches.max(axis=1) * (micro_batches > 0).sum(axis=1)
        return count_tokens(self.rows) / int(positions.sum())

    def __getitem__(self, step: int) -> list[dict]:
        if not 0 <= step < self.num_steps:
            raise IndexError(step)
        step_rows, on_all_ranks = self.step_rows(step), self.batch_size * self.num_ranks
        micro_batches = []
        for start in range(0, len(step_rows), on_all_ranks):
            indices = step_rows[start : start + on_all_ranks][self.rank :: self.num_ranks]
            rows = [self.rows[index] for index in indices]
            micro_batches.append({**self.collate(rows), "row_ids": indices})
        return micro_batches

    def collate(self, rows: Sequence[dict]) -> dict:
        """Return a micro-batch of these rows, or of padding if there are none."""
        rows = rows or [empty_row(self.pad_token_id)]
        length = max(len(row["labels"]) for row in rows)
        if self.on_gpu:  # kernels are fast at multiples of 64, and a compiler sees fewer shapes
            length = min(math.ceil(length / 64) * 64, self.max_length)
        return collate(rows, self.pad_token_id, length, pin_memory=self.on_gpu)

    def prefetched(self, start: int) -> Iterator[list[dict]]:
        """Yield the steps from `start` on. Each is made while the one before is computed."""
        with ThreadPoolExecutor(1) as thread:
            made = thread.submit(self.__getitem__, start) if start < len(self) else None
            for step in range(start, len(self)):
                micro_batches = made.result()
                if step + 1 < len(self):
                    made = thread.submit(self.__getitem__, step + 1)
                yield micro_batches


def empty_row(pad_token_id: int) -> dict:
    """Return a row without a label, for a rank that has no row left."""
    return {"input_ids": [pad_token_id], "labels": [IGNORE_INDEX], "position_ids": [0]}


def collate(
    rows: Sequence[dict], pad_token_id: int, length: int | None = None, pin_memory: bool = False
) -> dict[str, torch.Tensor | int]:
    """Pad rows on the right to the longest (or to `length`) and stack them.

    The padding is a document of its own (positions from 0) without labels. Only its labels mark it: its token id may
    be that of the end of text, which has to be learned.

    Returns:
        input_ids, labels, position_ids: (B, S), int64.
        valid: (N,), the indices of the tokens in the loss in the flattened labels.
        cu_seq_lens: int32, the starts of the documents in the flattened batch, and its end; max_length: the longest.
    """
    length = length or max(len(row["labels"]) for row in rows)
    batch = {key: [] for key in KEYS}
    for row in rows:
        padding = length - len(row["labels"])
        batch["input_ids"].append([*row["input_ids"], *[pad_token_id] * padding])
        batch["labels"].append([*row["labels"], *[IGNORE_INDEX] * padding])
        batch["position_ids"].append([*row["position_ids"], *range(padding)])
    batch = {key: torch.tensor(values) for key, values in batch.items()}
    # both are needed on the device, and would be slow to find there: the host would have to wait for the answer
    batch["valid"] = (batch["labels"].flatten() != IGNORE_INDEX).nonzero().squeeze(1)
    starts = (batch["position_ids"].flatten() == 0).nonzero().squeeze(1)
    batch["cu_seq_lens"] = torch.cat([starts, torch.tensor([batch["labels"].numel()])]).int()
    if pin_memory:  # copies to a GPU do not wait for it then
        batch = {key: value.pin_memory() for key, value in batch.items()}
    return {**batch, "max_length": int(batch["cu_seq_lens"].diff().max())}
