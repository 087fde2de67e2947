"""Read texts and conversations from the embedded text, files, folders and the hub. Nothing is tokenised here.

Every mistake in a dataset is reported here, in one line, before a model is loaded.
"""

import hashlib
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kdkit.config import DistillConfig, UsageError
from kdkit.running.hub import explain, loading_errors, split_revision

ROLES = ("system", "developer", "user", "assistant", "tool")
BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
EMBEDDED = Path(__file__).parents[1] / "assets" / "python_docs"  # written by recipes/make_python_docs.py
BATCH = 1000  # samples that are read together


class Document(NamedTuple):
    """A text, or a conversation if `messages` is given."""

    row: int
    text: str = ""
    messages: list[dict] | None = None  # role, content and anything else that the chat template reads
    learn_from: int = 0  # index of the first message that is learned: a prompt can have assistant turns, too

    @property
    def turns(self) -> list[int]:
        """The indices of the messages that are learned."""
        roles = [message["role"] for message in self.messages or []]
        return [index for index in range(self.learn_from, len(roles)) if roles[index] == "assistant"]


class Source(NamedTuple):
    """An open split of a dataset, and what of it is read."""

    name: str  # for messages
    part: str  # "train" or "eval": what the samples are used for
    held_out: float | None  # the fraction of the samples that is held out; None: all samples are for this part
    samples: Any  # a datasets.Dataset, or an IterableDataset if streaming
    kind: str  # texts, messages, or prompts (and completions)
    columns: list[str]
    fingerprint: str  # changes with the content


# --- datasets ---


def open_source(config: DistillConfig, part: str) -> Source:
    """Open the samples of a part ("train" or "eval") with `datasets`, which caches what it downloads and parses.

    A sample is a .txt file, a line of JSON, or a row of Parquet or CSV. `config.dataset_config` applies to
    `config.dataset` only. The embedded text has two splits, train and test.

    Raises:
        UsageError: the data cannot be loaded or parsed (with the file and line), has no such split, is empty, has
            none of the configured columns, or is to be both trained and evaluated on.
    """
    from datasets import config as settings
    from datasets import load_dataset, load_dataset_builder

    settings.HF_UPDATE_DOWNLOAD_COUNTS = False  # a request to a server, even for a local file
    field, name, split, held_out = _choose_split(config, part)
    files, arguments = _load_arguments(field, name)
    if name == config.dataset:
        arguments["name"] = config.dataset_config
    try:
        samples = load_dataset(**arguments, split=split, streaming=config.streaming)
        if config.streaming:
            fingerprint = f"{load_dataset_builder(**arguments).cache_dir} {split}"
            columns = list(next(iter(samples), {}))
        else:
            fingerprint, columns = samples._fingerprint, samples.column_names
    except loading_errors() as error:
        _check_files(files)
        if "corresponds to no data" in str(error):
            raise UsageError(f"{field} {name}, split {split} is empty: give another one") from error
        remedy = "other fields: --dataset_config and --dataset_split; or give a file, a folder or a hub id"
        raise explain(field, name, error, remedy) from error
    shown = f"{field} {name}, split {split}"
    if not columns or (not config.streaming and len(samples) == 0):
        raise UsageError(f"{shown} is empty: give another one, or another split")
    kind, chosen = _choose_columns(config, shown, columns)
    return Source(shown, part, held_out, samples.select_columns(chosen), kind, chosen, fingerprint)


def _choose_split(config: DistillConfig, part: str) -> tuple[str, str, str, float | None]:
    """Return field, name and split of the data of a part, and the fraction to hold out if both parts share a split."""
    eval_dataset = config.eval_dataset or config.dataset
    eval_split = config.eval_split or ("test" if eval_dataset == "embedded" else config.dataset_split)
    shared = (eval_dataset, eval_split) == (config.dataset, config.dataset_split)
    if shared and (config.eval_dataset or config.eval_split):
        raise UsageError(
            f"eval_dataset {eval_dataset}, split {eval_split}, is also the training data: give another one, or neither "
            "eval_dataset nor eval_split, which holds out eval_fraction of the samples"
        )
    held_out = config.eval_fraction if shared else None
    if part == "train":
        return "dataset", config.dataset, config.dataset_split, held_out
    return "eval_dataset" if config.eval_dataset else "dataset", eval_dataset, eval_split, held_out


def _load_arguments(field: str, name: str) -> tuple[list[Path], dict]:
    """Return the local files of a dataset (none for a hub dataset), and the arguments for `load_dataset`."""
    if name == "embedded":
        return [], {"path": "parquet", "data_files": {s: str(EMBEDDED / f"{s}.parquet") for s in ("train", "test")}}
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise UsageError(f"{field} {name} is a {path.suffix or 'nameless'} file: {', '.join(BUILDERS)} can be read")
        files, arguments = [path], {"path": BUILDERS[path.suffix], "data_files": str(path)}
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in BUILDERS)
        files = [file for file in files if file.name not in ("dataset_infos.json", "dataset_info.json", "state.json")]
        kinds = sorted({BUILDERS[file.suffix] for file in files})
        if len(kinds) != 1:
            found = f"files of several kinds ({', '.join(kinds)})" if kinds else f"no {', '.join(BUILDERS)} file"
            raise UsageError(f"{field} {name} has {found}: give a folder with files of one kind, or a single file")
        arguments = {"path": str(path)}
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.suffix in BUILDERS:
        raise UsageError(f'{field} {name} does not exist: give a file, a folder, a hub id, or "embedded"')
    else:
        path, revision = split_revision(name)
        return [], {"path": path, "revision": revision}
    if not any(file.stat().st_size for file in files):
        raise UsageError(f"{field} {name} is empty, there is no text in it: give another file or folder")
    if BUILDERS[files[0].suffix] == "text":
        arguments["sample_by"] = "document"
    return files, arguments


def _check_files(files: list[Path]) -> None:
    """Find the line that could not be read, which the errors of `datasets` do not name.

    Raises:
        UsageError: a file is not UTF-8, or a line is not a JSON object.
    """
    for file in files:
        if BUILDERS[file.suffix] == "parquet":
            continue
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UsageError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from None
        if BUILDERS[file.suffix] != "json" or text.lstrip().startswith("["):  # a single array has no lines to check
            continue
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                kind = type(json.loads(line)).__name__ if line.strip() else "dict"
            except json.JSONDecodeError as error:
                kind = f"not JSON ({error.msg})"
            if kind != "dict":
                raise UsageError(f"{file}, line {number} is {kind}: write one JSON object per line")


def _choose_columns(config: DistillConfig, shown: str, columns: list[str]) -> tuple[str, list[str]]:
    if config.messages_column in columns:
        return "messages", [config.messages_column]
    if config.prompt_column in columns and config.completion_column in columns:
        return "prompts", [config.prompt_column, config.completion_column]
    if config.text_column in columns:
        return "texts", [config.text_column]
    wanted = [config.messages_column, f"{config.prompt_column} with {config.completion_column}", config.text_column]
    raise UsageError(
        f"{shown} has no column {', '.join(repr(name) for name in wanted if name)}; it has {', '.join(columns)}: "
        "name one with --text_column, --messages_column, or --prompt_column and --completion_column"
    )


# --- samples ---


def documents_of(source: Source) -> Iterator[Document]:
    """Read the samples of a source as documents.

    A stream keeps its order. Other data is shuffled, always in the same way: a limit on the number of tokens then
    gives a random selection that does not depend on the seed of the run. A hash of a row's number decides whether it
    is held out, so this does not change when rows are appended. Of a single text the end is held out.

    Raises:
        UsageError: a sample has something else than a text or a conversation in its columns (with its row).
    """

    def wanted(row: int) -> bool:
        if source.held_out is None:
            return True
        digest = hashlib.sha256(str(row).encode()).digest()
        return (source.part == "eval") == (int.from_bytes(digest[:8], "big") < source.held_out * 2**64)

    if not hasattr(source.samples, "__len__"):
        yield from (_document(sample, row, source) for row, sample in enumerate(source.samples) if wanted(row))
    elif len(source.samples) == 1 and source.kind == "texts" and source.held_out is not None:
        yield _document(_part_of_text(source), 0, source)
    else:
        rows = [row for row in range(len(source.samples)) if wanted(row)]
        random.Random(0).shuffle(rows)
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            columns = source.samples[batch]  # one read of many rows is much faster than many reads
            for index, row in enumerate(batch):
                yield _document({name: values[index] for name, values in columns.items()}, row, source)


def _part_of_text(source: Source) -> dict:
    """Cut a single text between two words, close to the fraction that is held out."""
    (column,), (sample,) = source.columns, source.samples
    if not isinstance(text := sample[column], str):
        return sample
    cut = int(len(text) * (1 - source.held_out))
    cut = max(text.rfind("\n", 0, cut), text.rfind(" ", 0, cut), cut - 1000) + 1
    return {column: text[cut:] if source.part == "eval" else text[:cut]}


def _document(sample: dict, row: int, source: Source) -> Document:
    where = f"{source.name}, row {row + 1}"
    values = [sample[name] for name in source.columns]
    if source.kind == "texts":
        if not isinstance(values[0], str):
            raise UsageError(
                f"{where} has no text in column {source.columns[0]!r} (found: {type(values[0]).__name__}): "
                "name the column of texts with --text_column, or remove such rows"
            )
        return Document(row, values[0])
    if source.kind == "prompts":
        values = [
            [{"role": role, "content": value}] if isinstance(value, str) else value
            for role, value in zip(("user", "assistant"), values, strict=True)
        ]
    parts = [_check_messages(v, f"{where}, column {c!r}") for v, c in zip(values, source.columns, strict=True)]
    return Document(row, messages=[*itertools.chain(*parts)], learn_from=len(parts[0]) if parts[1:] else 0)


def _check_messages(messages: Any, where: str) -> list[dict]:
    """Return a conversation without the empty fields that `datasets` adds to its messages.

    Raises:
        UsageError: the value is not a list of messages with a known role and a content.
    """
    if not isinstance(messages, list):
        raise UsageError(f"{where} is {type(messages).__name__}, expected a list of messages with role and content")
    checked = []
    for number, message in enumerate(messages, start=1):
        message = {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
        if "tool_calls" in message:
            message.setdefault("content", "")
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise UsageError(
                f"{where}, message {number} has no known role and content (found: {str(message)[:100]}): write "
                f'{{"role": "user", "content": "text"}}, with one of the roles {", ".join(ROLES)}'
            )
        checked.append(message)
    return checked
