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
import pyarrow as pa
import pyarrow.compute as pc
import torch
from filelock import FileLock
from tqdm import tqdm

from kdkit.config import DataFields, DistillConfig, UsageError
from kdkit.data.chat import tokenize
from kdkit.data.sources import Source, documents_of, open_sources
from kdkit.losses import IGNORE_INDEX
from kdkit.running.files import publish

KEYS = ("input_ids", "labels", "position_ids")
REMARKS = {  # of kdkit.data.chat on conversations
    "hidden": "the chat template does not show all of a turn or a tool, or changes it",
    "endless": "a turn of the assistant has no token that ends it, so stopping is not learned",
    "per_turn": "a sample for each turn, as the chat template renders a turn in another way when others follow",
}
PACK_TOKENS = 2**22  # tokens that are packed together: enough to fill the rows well, few enough for memory
DATA_FIELDS = [field.name for field in dataclasses.fields(DataFields) if not field.metadata.get("may_change")]
CACHE_VERSION = 6  # increase it when the same data and settings give other rows


class Rows(Sequence):
    """Rows in an Arrow table, in memory or mapped from a file: `rows[i]` is a dict of three lists."""

    def __init__(self, table: pa.Table, counts: dict | None = None):
        """Counts: kind (of the samples), samples, too_long, dropped, tokens (in the loss), and remarks."""
        self.table, self.counts = table, Counter(counts)

    @classmethod
    def of(cls, rows: Sequence[dict]) -> "Rows":
        """Convert rows of lists or arrays to `Rows`; `Rows` are returned unchanged."""
        if isinstance(rows, cls):
            return rows
        return cls(pa.table({key: pa.array([row[key] for row in rows], pa.list_(pa.int32())) for key in KEYS}))

    @property
    def are_texts(self) -> bool:
        """Whether the rows are texts, and not conversations."""
        return "texts" in str(self.counts["kind"])

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int | slice) -> dict | list[dict]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return {key: self.table[key][index].values.to_numpy().tolist() for key in KEYS}


def row_lengths(rows: Sequence[dict]) -> np.ndarray:
    """Return the number of tokens of each row."""
    return pc.list_value_length(Rows.of(rows).table["labels"]).to_numpy()


def loss_tokens(rows: Sequence[dict]) -> np.ndarray:
    """Return the number of tokens in the loss of each row."""
    in_loss = pc.not_equal(pc.list_flatten(Rows.of(rows).table["labels"]), IGNORE_INDEX).to_numpy()
    return np.add.reduceat(in_loss, np.cumsum(row_lengths(rows)) - row_lengths(rows), dtype=np.int64)


def count_tokens(rows: Sequence[dict]) -> int:
    """Return the number of tokens in the loss of all rows."""
    return getattr(rows, "counts", {}).get("tokens") or int(loss_tokens(rows).sum())


def prompt_of(row: dict) -> list[int]:
    """Return the tokens before the first one in the loss, which is the label of the last of them; all if none is."""
    first = next((i for i, label in enumerate(row["labels"]) if label != IGNORE_INDEX), len(row["labels"]) - 1)
    return row["input_ids"][: first + 1]


def is_packed(rows: Sequence[dict]) -> bool:
    """Return whether a row has several documents: positions start at 0 in each."""
    is_start = pc.equal(pc.list_flatten(Rows.of(rows).table["position_ids"]), 0)
    return pc.sum(is_start).as_py() > len(rows)


def rows_digest(rows: Sequence[dict]) -> str:
    """Return a hash of the content and the order of rows."""
    digest = hashlib.sha256(row_lengths(rows).tobytes())
    for key in KEYS:
        for chunk in pc.list_flatten(Rows.of(rows).table[key]).chunks:
            digest.update(chunk.to_numpy())
    return digest.hexdigest()


def pack(rows: Sequence[dict], max_length: int) -> Rows:
    """Join rows into fuller ones by best fit: the longest first, each into the fullest group that has room for it.

    Documents stay separate: positions start at 0 in each, so that masks hide the others, and labels are shifted before.
    """
    groups: list[list[dict]] = []  # of rows that are joined
    with_room: list[tuple[int, int, list[dict]]] = []  # (room left, -number of the last row, group), sorted
    for number, row in enumerate(sorted(rows, key=lambda row: -len(row["input_ids"]))):
        length = len(row["input_ids"])
        best = bisect.bisect_left(with_room, (length,))  # the smallest room that is large enough
        room, _, group = with_room.pop(best) if best < len(with_room) else (max_length, 0, [])
        groups += [] if group else [group]
        group.append(row)
        if room > length:
            bisect.insort(with_room, (room - length, -number, group))
    if len(groups) == len(rows):  # nothing was joined: the same rows, in the same order, as without packing
        return Rows.of(rows)
    return Rows.of([{key: np.concatenate([row[key] for row in group]) for key in KEYS} for group in groups])


def load_rows(config: DistillConfig, tokenizer) -> tuple[Rows, Rows]:
    """Return the training and the held-out rows of a run: read, tokenised, limited, and packed unless packing is False.

    The first process makes them, and keeps them as Arrow in the cache folder of `datasets`, while the others wait.
    """
    config, sources = dataclasses.replace(config, packing=_packing(config)), open_sources(config)
    found = []
    for source, purpose in zip(sources, ("to learn", "to evaluate on"), strict=True):
        if source.kind != "texts" and not (tokenizer.chat_template and tokenizer.is_fast):
            column = source.columns[-1] if len(source.columns) == 2 else "NAME"
            raise UsageError(
                f"{source.name} has conversations, but the teacher has no fast tokenizer with a chat template: use its "
                "instruction-tuned version, give --chat_template FILE, or learn from a column of texts with "
                f"--text_column {column} --messages_column null --prompt_column null"
            )
        rows = _cached_rows(source, config, tokenizer)
        if not rows:
            more = f", another eval_fraction (now {source.held_out:g}), or an eval_split" if source.held_out else ""
            said = describe_rows(rows, config)
            raise UsageError(f"{source.name} has nothing {purpose} ({said}): give more data{more}")
        found.append(rows)
    return tuple(found)


def settle_packing(rows: tuple[Rows, Rows], config: DistillConfig, tokenizer, packs: dict[str, bool]) -> tuple:
    """Return the rows of `load_rows`, loaded again with one sample each if a model needs that; and lines to print.

    `packs` says of the teacher and the student whether documents that share a row do not see each other.
    """
    mixing = " and ".join(f"the {role}" for role, separate in packs.items() if not separate)
    packing, why = _packing(config), f"in {mixing} the samples of a row would see each other"
    if packing is False or not mixing:
        return rows, []
    if packing:
        made = "" if config.packing else f", and make the targets in {config.targets_dir} again with it"
        raise UsageError(f"packing is on, but {why}: use --packing false{made}")
    rows = load_rows(dataclasses.replace(config, packing=False), tokenizer)
    return rows, [f"packing: no, one sample per row, since {why}"]


def _packing(config: DistillConfig) -> bool | None:
    """Return the field `packing`; where it is None, what stored targets or on-policy distillation need, if either."""
    path = Path(config.targets_dir or "", "targets.json")
    if config.packing is None and config.targets != "online" and path.is_file() and not config.writes_own_text:
        return json.loads(path.read_text(encoding="utf-8"))["made_for"]["packing"]
    return False if config.packing is None and config.writes_own_text else config.packing  # each row is one prompt


def cache_folder(source: Source, config: DistillConfig, tokenizer) -> Path:
    """Return the folder of a source's rows. Everything that can change a row changes its name."""
    import datasets

    ignored = ("eval_", "max_eval_") if source.part == "train" else ()  # these do not change the training rows
    fields = {name: getattr(config, name) for name in DATA_FIELDS if not name.startswith(ignored)}
    fields["packing"] = config.packing is not False
    model = sorted(tokenizer.get_vocab().items())
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()  # each call sets both again, so they do not change rows
        tokenizer.backend_tokenizer.no_padding()
        model = tokenizer.backend_tokenizer.to_str()
    options = ("add_bos_token", "add_eos_token", "split_special_tokens", "special_tokens_map", "chat_template")
    options = [type(tokenizer).__name__, *(getattr(tokenizer, name, None) for name in options)]
    key = [CACHE_VERSION, source._replace(samples=None, ranges=None), fields, model, options]
    name = hashlib.sha256(json.dumps(key, default=str).encode()).hexdigest()[:32]
    return Path(datasets.config.HF_DATASETS_CACHE, "kdkit", name)


def _cached_rows(source: Source, config: DistillConfig, tokenizer) -> Rows:
    """Return the rows of a source from their folder, which is complete or absent, also after a power failure."""
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
        remedy = "make room, or set HF_HOME to a larger disk"
        raise UsageError(f"the cache {folder.parent} cannot be written ({error}): {remedy}") from error
    table = pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow"))).read_all()
    return Rows(table, json.loads((folder / "counts.json").read_text()))


def _write_rows(folder: Path, source: Source, config: DistillConfig, tokenizer) -> None:
    counts = Counter(kind=source.reading)
    samples = tokenize(documents_of(source), tokenizer, config)

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
    tokens = 0
    while tokens < limit and (row := next(rows, None)):
        yield row
        tokens += len(row["input_ids"])


def describe_rows(rows: Sequence[dict], config: DistillConfig) -> str:
    """Return a line that says what was read, and how many samples were cut or left out."""
    rows = Rows.of(rows)
    counts, mode = rows.counts, config.truncation_mode or ("split" if rows.are_texts else "keep_start")
    if mode != "split" and 2 * counts["too_long"] > counts["samples"]:
        mode += "; these are most of them: raise max_length"
    return (
        f"{counts['samples']:,} {counts['kind']}: {counts['too_long']:,} have over {config.max_length:,} tokens "
        f"({mode}); {counts['dropped']:,} are left out, as they have no token in the loss"
        + "".join(f"; {counts[key]:,} of {counts['samples']:,}: {text}" for key, text in REMARKS.items() if counts[key])
    )


class Steps:
    """The optimizer steps of a run on one rank: `steps[i]` is the list of micro-batches of step i.

    The order of rows in an epoch depends on the seed and the epoch only. A step is a consecutive part of it for any
    number of ranks, so a run resumes at any step. All ranks have as many micro-batches, some of `empty_row` only.
    """

    def __init__(self, rows: Sequence[dict], config, pad_token_id: int, rank=0, num_ranks=1, on_gpu=False):
        self.rows, self.config, self.pad_token_id, self.on_gpu = rows, config, pad_token_id, on_gpu
        self.rank, self.num_ranks = rank, num_ranks
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
            random.Random(f"{self.config.seed}/{epoch}").shuffle(self._order)
        return self._order[position * self.rows_per_step : (position + 1) * self.rows_per_step]

    def useful_share(self) -> float:
        """Return the fraction of computed positions, with padding, that are in the loss, in the first epoch."""
        self.step_rows(0)
        empty = self.steps_per_epoch * self.rows_per_step - len(self.rows)
        lengths = np.pad(row_lengths(self.rows)[self._order], (0, empty)).astype(np.int64)
        micro_batches = lengths.reshape(-1, self.config.batch_size, self.num_ranks)  # a rank has every num_ranks-th row
        positions = micro_batches.max(axis=1) * (micro_batches > 0).sum(axis=1)
        return count_tokens(self.rows) / int(positions.sum())

    def __getitem__(self, step: int) -> list[dict]:
        if not 0 <= step < self.num_steps:
            raise IndexError(step)
        rows, on_all_ranks = self.step_rows(step), self.config.batch_size * self.num_ranks
        starts = range(0, len(rows), on_all_ranks)
        parts = [rows[start : start + on_all_ranks][self.rank :: self.num_ranks] for start in starts]
        return [{**self.collate([self.rows[row] for row in part]), "row_ids": part} for part in parts]

    def collate(self, rows: Sequence[dict]) -> dict:
        """Return a micro-batch of these rows, or of padding if there are none."""
        rows, multiple = rows or [empty_row(self.pad_token_id)], 64 if self.on_gpu else 1
        length = max(len(row["labels"]) for row in rows)  # kernels are fast at multiples, and there are fewer shapes
        length = min(math.ceil(length / multiple) * multiple, max(length, self.config.max_length))
        return collate(rows, self.pad_token_id, length, pin_memory=self.on_gpu)

    def prefetched(self, start: int) -> Iterator[list[dict]]:
        """Yield the steps from `start` on. Each is made while the one before is computed."""
        with ThreadPoolExecutor(1) as thread:
            made = None
            for step in range(start, len(self) + 1):
                ready, made = made, thread.submit(self.__getitem__, step) if step < len(self) else None
                if ready:
                    yield ready.result()


def empty_row(pad_token_id: int, length: int = 1) -> dict:
    """Return a row without a label, for a rank that has no row left."""
    return {"input_ids": [pad_token_id] * length, "labels": [IGNORE_INDEX] * length, "position_ids": [*range(length)]}


def collate(rows: Sequence[dict], pad_token_id: int, length: int | None = None, pin_memory=False) -> dict:
    """Pad rows on the right to the longest (or to `length`) and stack them.

    The padding is a document of its own (positions from 0) without labels. Only its labels mark it: its token id may
    be that of the end of text, which has to be learned.

    Returns input_ids, labels, position_ids: (B, S), int64; valid: (N,), the indices of the tokens in the loss in the
    flattened labels; cu_seq_lens: int32, where documents start and the batch ends; max_length: of a document.
    """
    length = length or max(len(row["labels"]) for row in rows)
    padded = [(row, empty_row(pad_token_id, length - len(row["labels"]))) for row in rows]
    batch = {key: torch.tensor([[*row[key], *padding[key]] for row, padding in padded]) for key in KEYS}
    # both are needed on the device, and would be slow to find there: the host would have to wait for the answer
    batch["valid"] = (batch["labels"].flatten() != IGNORE_INDEX).nonzero().squeeze(1)
    starts = (batch["position_ids"].flatten() == 0).nonzero().squeeze(1)
    batch["cu_seq_lens"] = torch.cat([starts, torch.tensor([batch["labels"].numel()])]).int()
    if pin_memory:  # copies to a GPU do not wait for it then
        batch = {key: value.pin_memory() for key, value in batch.items()}
    return {**batch, "max_length": int(batch["cu_seq_lens"].diff().max())}
