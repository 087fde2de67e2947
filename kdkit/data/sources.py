"""Read texts and conversations from the embedded text, files, folders and the hub. Nothing is tokenised here.

Every mistake in a dataset is reported here, in one line, before a model is loaded.
"""

import filecmp
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kdkit.config import DistillConfig, UsageError
from kdkit.data.records import ALPACA, Document, json_object, read_document
from kdkit.running.hub import explain, loading_errors, split_revision

BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
EMBEDDED = Path(__file__).parents[1] / "assets" / "python_docs"  # written by recipes/make_python_docs.py
BATCH = 1000  # samples that are read together, which is much faster than one by one


class Source(NamedTuple):
    """An open split of a dataset, and which samples and columns of it are read."""

    name: str  # for messages
    part: str  # "train" or "eval": what the samples are used for
    held_out: float | None  # the fraction of the samples that is held out; None: all samples are for this part
    samples: Any  # a datasets.Dataset, or an IterableDataset if streaming
    json_lines: bool  # a sample is a line of JSON
    kind: str  # texts or conversations
    columns: list[str]  # of texts; of messages; or of prompts and completions
    extras: list[str]  # columns that belong to a conversation: tools, system, input
    reading: str  # how the samples are read, for messages
    fingerprint: str  # changes with the content


def open_source(config: DistillConfig, part: str) -> Source:
    """Open the samples of a part ("train" or "eval") with `datasets`, which caches what it downloads and parses.

    A sample is a .txt file, a line of JSON, or a row of Parquet or CSV.

    Raises:
        UsageError: the data cannot be loaded or parsed, has no such split, is empty, has none of the configured
            columns, or would be used for both training and evaluation.
    """
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # otherwise it contacts a server, even for a local file
    eval_dataset = config.eval_dataset or config.dataset
    eval_split = config.eval_split or ("test" if eval_dataset == "embedded" else config.dataset_split)
    parts = {
        "train": ("dataset", config.dataset, config.dataset_split),
        "eval": ("eval_dataset" if config.eval_dataset else "dataset", eval_dataset, eval_split),
    }
    field, name, split = parts[part]
    builder, json_lines = _builder(config, field, name)
    try:
        if config.streaming:
            samples, version, lengths = builder.as_streaming_dataset(split=split), builder.cache_dir, {}
        else:
            builder.download_and_prepare()
            samples = builder.as_dataset(split=split)
            version, lengths = samples._fingerprint, {x: info.num_examples for x, info in samples.info.splits.items()}
        first = next((sample for sample in samples if not json_lines or sample["text"].strip()), {})
    except loading_errors() as error:
        raise _explain(field, name, error) from error
    shown = f"{field} {name}, split {split}"
    first = _checked(f"{shown}, row 1", json_object, first["text"]) if json_lines and first else first
    if not first:
        raise UsageError(f"{shown} is empty: give another one, or another split")
    if config.eval_dataset or config.eval_split:
        _check_overlap(config, parts, lengths)
    kind, columns, extras, reading = _choose_columns(config, shown, list(first))
    samples = samples if json_lines else samples.select_columns([*columns, *extras])
    held_out = config.eval_fraction if parts["train"] == parts["eval"] else None
    return Source(shown, part, held_out, samples, json_lines, kind, columns, extras, reading, version)


def _builder(config: DistillConfig, field: str, name: str) -> tuple[Any, bool]:
    """Return the builder of a dataset, and whether its samples are lines of JSON.

    Local JSON lines are read as text, and parsed in `_document`: Arrow has one type for all values of a key, so it
    would add keys of other rows, change 1 to 1.0 and "2025-01-01" to a date, and refuse files with other columns.
    """
    import datasets
    import pandas

    arguments = _load_arguments(field, name)
    if name == config.dataset:  # dataset_config belongs to dataset, not to another eval_dataset
        arguments["name"] = config.dataset_config
    try:
        builder = datasets.load_dataset_builder(**arguments)
    except loading_errors() as error:
        raise _explain(field, name, error) from error
    files = {split: list(found) for split, found in (builder.config.data_files or {}).items()}
    file = Path(next((file for found in files.values() for file in found), ""))
    kind = BUILDERS.get(file.suffix.lower()) if file.is_file() else None
    if kind == "json" and _has_json_lines(file):
        return datasets.load_dataset_builder("text", data_files=files, encoding="utf-8-sig"), True
    if kind == "csv":  # all columns are text: "None" is no missing value, and 007 no number
        try:
            row = pandas.read_csv(file, nrows=1, dtype=str, keep_default_na=False)
        except ValueError as error:
            raise _explain(field, name, error) from error
        if not isinstance(row.index, pandas.RangeIndex):
            raise UsageError(f"{field} {file}: row 1 has more fields than the header: quote texts that have commas")
        features = datasets.Features({column: datasets.Value("string") for column in row.columns})
        options = {"features": features, "keep_default_na": False, "na_values": [""]}  # an empty field is no text
        builder = datasets.load_dataset_builder(**arguments, **options)
    return builder, False


def _has_json_lines(file: Path) -> bool:
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        first = next((line for line in lines if line.strip()), "")
    try:
        return isinstance(json.loads(first), dict)
    except ValueError:
        return file.suffix.lower() == ".jsonl" and not first.startswith("[")  # its rows are checked one by one


def _explain(field: str, name: str, error: Exception) -> UsageError:
    """Explain why a dataset cannot be read, with the line of a file that is not in UTF-8."""
    path = Path(name).expanduser()
    for file in [path, *sorted(path.rglob("*"))] if path.exists() else []:
        if BUILDERS.get(file.suffix.lower(), "parquet") != "parquet":
            with open(file, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    try:
                        line.decode("utf-8")
                    except UnicodeDecodeError as found:
                        return UsageError(
                            f"{field} {file}, line {number} is not UTF-8 ({found}): convert the file, for instance "
                            "with `iconv -f LATIN1 -t UTF-8` (or -f UTF-16)"
                        )
    while type(error).__name__ == "DatasetGenerationError" and error.__cause__:
        error = error.__cause__
    remedy = "files need the same columns, and JSON Lines one object per line; other fields are --dataset_config and "
    return explain(field, name, error, f"{remedy}--dataset_split")


def _check_overlap(config: DistillConfig, parts: dict, lengths: dict[str, int]) -> None:
    """Raise a UsageError if both parts read a row of the same file, whatever the names of the files are."""
    from datasets import ReadInstruction

    def same(a: str, b: str) -> bool:
        return a == b or (Path(a).is_file() and Path(b).is_file() and filecmp.cmp(a, b, shallow=False))

    found = {part: _builder(config, *parts[part][:2])[0].config.data_files for part in parts}
    known = {split: 10**15 for files in found.values() for split in map(str, files)}  # streams have no length or slices
    if found["train"] == found["eval"]:
        known |= lengths
    ranges = {}
    for part, (field, name, split) in parts.items():
        try:
            ranges[part] = ReadInstruction.from_spec(split).to_absolute(known)
            ranges[part] = [(found[part][each.splitname], each.from_, each.to) for each in ranges[part]]
        except (ValueError, KeyError) as error:
            raise UsageError(f"{field} {name} has no split {split} ({error}): give another one") from error
    for (train_files, start, end), (files, eval_start, eval_end) in itertools.product(*ranges.values()):
        equal = len(train_files) == len(files) and all(map(same, train_files, files))
        shared = equal or any(same(*pair) for pair in itertools.product(train_files, files))
        if shared and not (equal and max(start, eval_start) >= min(end, eval_end)):
            raise UsageError(
                f"eval_dataset {parts['eval'][1]}, split {parts['eval'][2]}, is also the training data, or a part of "
                "it: give another one, or neither eval_dataset nor eval_split, which holds out eval_fraction of it"
            )


def _load_arguments(field: str, name: str) -> dict:
    """Return the arguments for `load_dataset`."""
    path = Path(name).expanduser()
    if name == "embedded":
        return {"path": "parquet", "data_files": {s: str(EMBEDDED / f"{s}.parquet") for s in ("train", "test")}}
    if path.exists():
        files = [file for file in (path, *path.rglob("*")) if file.suffix.lower() in BUILDERS and file.stat().st_size]
        kinds = {BUILDERS[file.suffix.lower()] for file in files if not file.name.startswith("dataset_info")}
        if len(kinds) != 1:
            found = f"files of several kinds ({', '.join(sorted(kinds))})" if kinds else "no file with text"
            raise UsageError(f"{field} {name} has {found}: give files of one kind, {', '.join(BUILDERS)}")
        (kind,) = kinds
        arguments = {"path": str(path.resolve())} if path.is_dir() else {"path": kind, "data_files": str(path)}
        return {**arguments, "sample_by": "document", "encoding": "utf-8-sig"} if kind == "text" else arguments
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.suffix.lower() in BUILDERS:
        raise UsageError(f'{field} {name} does not exist: give a file, a folder, a hub id, or "embedded"')
    hub_id, revision = split_revision(name)
    return {"path": hub_id, "revision": revision}


def _choose_columns(config: DistillConfig, shown: str, found: list[str]) -> tuple[str, list[str], list[str], str]:
    """Return the kind of the samples, their columns, the columns that belong to them, and how they are read."""
    prompts, extras, style = [config.prompt_column, config.completion_column], ["tools"], ""
    if config.messages_column in found:
        columns = [config.messages_column]
    elif set(prompts) <= set(found):
        columns = prompts
    elif config.text_column in found:
        return "texts", [config.text_column], [], f"texts of column {config.text_column}"
    elif "conversations" in found:
        columns, extras, style = ["conversations"], ["tools", "system"], "ShareGPT "
    elif set(ALPACA) <= set(found):
        columns, extras, style = ALPACA, ["system", "input"], "Alpaca "
    else:
        raise UsageError(
            f"{shown} has the columns {', '.join(found)}: name the one to learn with --text_column (now "
            f"{config.text_column}) or --messages_column, or two with --prompt_column and --completion_column"
        )
    unread = [column for column in found if column not in [*columns, *extras]]
    extras = [column for column in extras if column in found]
    reading = f"{style}conversations of column {' and '.join([*columns, *extras])}"
    return "conversations", columns, extras, reading + (f" (not read: {', '.join(unread)})" if unread else "")


def documents_of(source: Source) -> Iterator[Document]:
    """Read the samples of a source as documents.

    A stream keeps its order. Other data is shuffled, always in the same way: a limit on the number of tokens then
    gives a random selection that does not depend on the seed of the run. A hash of a row's number decides whether it
    is held out, so this does not change when rows are appended. If there is one text, its end is held out.

    Raises:
        UsageError: a sample has neither a text nor a conversation in its columns.
    """
    samples, held_out, is_eval = source.samples, source.held_out, source.part == "eval"

    def wanted(row: int) -> bool:
        digest = hashlib.sha256(str(row).encode()).digest()
        return held_out is None or is_eval == (int.from_bytes(digest[:8], "big") < held_out * 2**64)

    def read() -> Iterator[tuple[int, dict]]:
        if hasattr(samples, "__len__"):
            rows = [row for row in range(len(samples)) if wanted(row)]
            random.Random(0).shuffle(rows)
            for start in range(0, len(rows), BATCH):
                batch = rows[start : start + BATCH]
                yield from zip(batch, samples.__getitems__(batch), strict=True)
            return
        try:
            yield from ((row, sample) for row, sample in enumerate(samples) if wanted(row))
        except loading_errors() as error:
            raise _explain(*source.name.rpartition(", split ")[0].split(" ", 1), error) from error

    if hasattr(samples, "__len__") and len(samples) == 1 and source.kind == "texts" and held_out is not None:
        document = _document(samples[0], 0, source)
        text, cut = document.text, int(len(document.text) * (1 - held_out))
        cut = max(text.rfind("\n", 0, cut), text.rfind(" ", 0, cut), cut - 1000) + 1  # between two words
        yield document._replace(text=text[cut:] if is_eval else text[:cut])
        return
    for row, sample in read():
        if not source.json_lines or sample["text"].strip():
            yield _document(sample, row, source)


def _document(sample: dict, row: int, source: Source) -> Document:
    where, extras = f"{source.name}, row {row + 1}", source.extras if source.kind == "conversations" else None
    sample = _checked(where, json_object, sample["text"]) if source.json_lines else sample
    return _checked(where, read_document, sample, row, source.columns, extras)


def _checked(where: str, function: Callable, *arguments) -> Any:
    try:
        return function(*arguments)
    except ValueError as error:
        raise UsageError(f"{where} {error}") from None
