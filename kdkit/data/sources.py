"""Read texts and conversations from the embedded text, files, folders and the hub. Nothing is tokenised here.

Every mistake in a dataset is reported here, in one line, before a model is loaded.
"""

import hashlib
import itertools
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from kdkit.config import DistillConfig, UsageError
from kdkit.data.records import Document, json_object, read_document
from kdkit.running.hub import explained, split_revision

BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
EMBEDDED = Path(__file__).parents[1] / "assets" / "python_docs"  # written by recipes/make_python_docs.py


class Source(NamedTuple):
    """An open split of a dataset, and which samples and columns of it are read."""

    name: str  # for messages
    part: str  # "train" or "eval": what the samples are used for
    held_out: float | None  # the fraction of the samples that is held out; None: all samples are for this part
    samples: Any  # a datasets.Dataset, or an IterableDataset if streaming
    ranges: Any  # (files, first row, last row + 1) of each split
    json_lines: bool  # a sample is a line of JSON
    kind: str  # texts, or a kind of conversations
    columns: list[str]  # of texts; of messages; or of prompts and completions
    extras: list[str]  # columns that belong to a conversation, if they exist
    reading: str  # how the samples are read, for messages
    fingerprint: str  # changes with the content


def open_sources(config: DistillConfig) -> tuple[Source, Source]:
    """Open the training and the evaluation samples with `datasets`, which caches what it downloads and parses.

    A sample is a .txt file, a line of JSON, or a row of Parquet or CSV.

    Raises:
        UsageError: the data cannot be loaded, or would be used for both training and evaluation.
    """
    eval_dataset = config.eval_dataset or config.dataset
    eval_split = config.eval_split or ("test" if eval_dataset == "embedded" else config.dataset_split)
    parts = {
        "train": ("dataset", config.dataset, config.dataset_split),
        "eval": ("eval_dataset" if config.eval_dataset else "dataset", eval_dataset, eval_split),
    }
    held_out = config.eval_fraction if parts["train"] == parts["eval"] and not config.eval_split else None
    train, evaluation = (_open(config, part, held_out, *where) for part, where in parts.items())
    for (files, start, end), (eval_files, eval_start, eval_end) in itertools.product(train.ranges, evaluation.ranges):
        apart = files == eval_files and max(start, eval_start) >= min(end, eval_end)
        if held_out is None and files & eval_files and not apart:
            raise UsageError(
                f"{evaluation.name}, is also the training data, or a part of it: give another one, or neither "
                "eval_dataset nor eval_split, which holds out eval_fraction of it"
            )
    return train, evaluation


def _open(config: DistillConfig, part: str, held_out: float | None, field: str, name: str, split: str) -> Source:
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # otherwise it contacts a server, even for a local file
    shown = f"{field} {name}, split {split}"
    with _explained(field, name):
        # dataset_config belongs to dataset, not to another eval_dataset
        builder, json_lines = _builder(field, name, config.dataset_config if name == config.dataset else None)
        files = {str(split): list(found) for split, found in (builder.config.data_files or {}).items()}
        if config.streaming:  # a stream has neither a length nor slices
            samples, version, lengths = builder.as_streaming_dataset(split=split), builder.cache_dir, {split: 1}
        else:
            builder.download_and_prepare()
            samples = builder.as_dataset(split=split)
            version, lengths = samples._fingerprint, {x: info.num_examples for x, info in samples.info.splits.items()}
        read = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
        first = next((sample for sample in samples if not json_lines or sample["text"].strip()), {})
        found = list(json_object(first["text"]) if json_lines and first else first)
    if not found:
        raise UsageError(f"{shown} is empty: give another one, or another split")
    formats = [
        ("conversations", [config.messages_column], ["tools"]),
        ("conversations", [config.prompt_column, config.completion_column], ["tools"]),
        ("texts", [config.text_column], []),
        ("ShareGPT conversations", ["conversations"], ["tools", "system"]),
        ("Alpaca conversations", ["instruction", "output"], ["system", "input"]),
        ("", [], []),
    ]
    kind, columns, extras = next(format for format in formats if set(format[1]) <= set(found))
    if not kind:
        raise UsageError(
            f"{shown} has the columns {', '.join(found)}: name the one to learn with --text_column (now "
            f"{config.text_column}) or --messages_column, or two with --prompt_column and --completion_column"
        )
    used = [*columns, *(column for column in extras if column in found)]  # other rows of JSON may have more
    unread = [column for column in found if column not in used and kind != "texts"]
    reading = f"{kind} of column {' and '.join(used)}" + (f" (not read: {', '.join(unread)})" if unread else "")
    samples = samples if json_lines else samples.select_columns(used)
    ranges = [({_identity(file) for file in files.get(x.splitname, ())}, x.from_, x.to) for x in read]
    return Source(shown, part, held_out, samples, ranges, json_lines, kind, columns, extras, reading, version)


def _identity(file: str) -> str:
    """Return what a file and a copy of it share: its size, and a hash of its first MiB."""
    if not os.path.isfile(file):  # on the hub: its address
        return file
    with open(file, "rb") as opened:
        digest = hashlib.sha256(opened.read(2**20))
    return f"{os.path.getsize(file)}/{digest.hexdigest()}"


def _builder(field: str, name: str, dataset_config: str | None) -> tuple[Any, bool]:
    """Return the builder of a dataset, and whether its samples are lines of JSON.

    Local JSON lines are read as text, and parsed in `_document`: Arrow has one type for all values of a key, so it
    would add keys of other rows, change 1 to 1.0 and "2025-01-01" to a date, and refuse files with other columns.
    """
    from datasets import Features, Value, load_dataset_builder
    from pandas import RangeIndex, read_csv

    path = EMBEDDED if name == "embedded" else Path(name)
    if not path.exists():
        if path.is_absolute() or name.startswith(".") or name.count("/") > 1 or path.suffix.lower() in BUILDERS:
            raise UsageError(f'{field} {name} does not exist: give a file, a folder, a hub id, or "embedded"')
        hub_id, revision = split_revision(name)
        return load_dataset_builder(hub_id, dataset_config, revision=revision), False
    files = [file for file in (path, *path.rglob("*")) if file.suffix.lower() in BUILDERS and file.stat().st_size]
    files = [file for file in files if not file.name.startswith("dataset_info")]
    kinds = sorted({BUILDERS[file.suffix.lower()] for file in files})
    if len(kinds) != 1:
        found = f"files of several kinds ({', '.join(kinds)})" if kinds else "no file with text"
        raise UsageError(f"{field} {name} has {found}: give files of one kind, {', '.join(BUILDERS)}")
    options = {"name": dataset_config}
    if kinds == ["text"]:
        options |= {"sample_by": "document", "encoding": "utf-8-sig"}
    if kinds == ["csv"]:  # all columns are text: "None" is no missing value, and 007 no number
        row = read_csv(files[0], nrows=1, dtype=str, keep_default_na=False)
        if not isinstance(row.index, RangeIndex):
            raise ValueError("row 1 has more fields than the header: quote texts that have commas")
        options |= {"features": Features({column: Value("string") for column in row.columns})}
        options |= {"keep_default_na": False, "na_values": [""]}  # an empty field is no text
    source = {"path": str(path.resolve())} if path.is_dir() else {"path": kinds[0], "data_files": str(path)}
    builder = load_dataset_builder(**source, **options)
    file = Path(next(itertools.chain.from_iterable((builder.config.data_files or {}).values()), ""))
    if BUILDERS.get(file.suffix.lower()) == "json":  # not the JSON beside the Arrow files of save_to_disk
        with open(file, encoding="utf-8-sig", errors="replace") as lines:
            first = next((line.strip() for line in lines if line.strip()), "")
        if not first.startswith("[") and (file.suffix.lower() == ".jsonl" or first.endswith("}")):
            return load_dataset_builder("text", data_files=dict(builder.config.data_files), encoding="utf-8-sig"), True
    return builder, False


@contextmanager
def _explained(field: str, name: str) -> Iterator[None]:
    """Explain why a dataset cannot be read, and name a file that is not in UTF-8."""
    remedy = "files need the same columns, and JSON Lines one object per line; see --dataset_config and --dataset_split"
    try:
        with explained(field, name, remedy):
            yield
    except UsageError as error:
        path = Path(name)
        for file in [path, *sorted(path.rglob("*"))] if error.__cause__ and path.exists() else []:
            if BUILDERS.get(file.suffix.lower(), "parquet") != "parquet":
                with explained(field, file, remedy):
                    file.read_bytes().decode()
        raise


def documents_of(source: Source) -> Iterator[Document]:
    """Read the samples of a source as documents.

    A stream keeps its order. Other data is shuffled, always in the same way: a limit on the number of tokens then
    gives a random selection that does not depend on the seed of the run. A hash of a row's number decides whether it
    is held out, so this does not change when rows are appended. If there is one text, its end is held out.
    """
    samples, held_out, is_eval = source.samples, source.held_out, source.part == "eval"

    def wanted(row: int) -> bool:
        digest = hashlib.sha256(str(row).encode()).digest()
        return held_out is None or is_eval == (int.from_bytes(digest[:8], "big") < held_out * 2**64)

    if not hasattr(samples, "__len__"):
        numbered = ((row, sample) for row, sample in enumerate(samples) if wanted(row))
    elif len(samples) == 1 and source.kind == "texts" and held_out is not None:
        document = _document(samples[0], 0, source)
        text, cut = document.text, int(len(document.text) * (1 - held_out))
        cut = max(text.rfind("\n", 0, cut), text.rfind(" ", 0, cut), cut - 1000) + 1  # between two words
        yield document._replace(text=text[cut:] if is_eval else text[:cut])
        return
    else:
        rows = [row for row in range(len(samples)) if wanted(row)]
        random.Random(0).shuffle(rows)
        numbered = zip(rows, samples.select(rows), strict=True)
    with _explained(*source.name.rpartition(", split ")[0].split(" ", 1)):
        for row, sample in numbered:
            if not source.json_lines or sample["text"].strip():
                yield _document(sample, row, source)


def _document(sample: dict, row: int, source: Source) -> Document:
    try:
        sample = json_object(sample["text"]) if source.json_lines else sample
        return read_document(sample, row, source.kind, source.columns, source.extras)
    except ValueError as error:
        raise UsageError(f"{source.name}, row {row + 1} {error}") from None
