"""Read texts and conversations from the embedded text, files, folders and the hub. Nothing is tokenised here.

Every mistake in a dataset is reported here, in one line, before a model is loaded.
"""

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kdkit.config import DistillConfig, UsageError
from kdkit.running.hub import explain, loading_errors, split_revision

ROLES = ("system", "developer", "user", "assistant", "tool")
BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
EMBEDDED = Path(__file__).parents[1] / "assets" / "python_docs"  # written by recipes/make_python_docs.py
BATCH = 1000  # samples that are read together, which is much faster than one by one


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
    """An open split of a dataset, and which samples and columns of it are read."""

    name: str  # for messages
    part: str  # "train" or "eval": what the samples are used for
    held_out: float | None  # the fraction of the samples that is held out; None: all samples are for this part
    samples: Any  # a datasets.Dataset, or an IterableDataset if streaming
    kind: str  # texts or conversations
    columns: list[str]  # of texts; of messages; or of prompts and completions
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
    field, name, split = "dataset", config.dataset, config.dataset_split
    eval_dataset = config.eval_dataset or name
    eval_split = config.eval_split or ("test" if eval_dataset == "embedded" else split)
    shared = (eval_dataset, eval_split) == (name, split)
    if shared and (config.eval_dataset or config.eval_split):
        raise UsageError(
            f"eval_dataset {eval_dataset}, split {eval_split}, is also the training data: give another one, or neither "
            "eval_dataset nor eval_split, which holds out eval_fraction of the samples"
        )
    if part == "eval":
        field, name, split = "eval_dataset" if config.eval_dataset else "dataset", eval_dataset, eval_split
    arguments = _load_arguments(field, name)
    if name == config.dataset:  # dataset_config belongs to dataset, not to another eval_dataset
        arguments["name"] = config.dataset_config
    try:
        samples = datasets.load_dataset(**arguments, split=split, streaming=config.streaming)
        columns = list(next(iter(samples), {}))
        version = datasets.load_dataset_builder(**arguments).cache_dir if config.streaming else samples._fingerprint
    except loading_errors() as error:
        reason = (isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__) or error
        remedy = "JSON Lines have one object per line; other fields are --dataset_config and --dataset_split"
        raise explain(field, name, reason, remedy) from error
    shown = f"{field} {name}, split {split}"
    if not columns:
        raise UsageError(f"{shown} is empty: give another one, or another split")
    kind, columns = _choose_columns(config, shown, columns)
    samples = samples.select_columns(columns)
    return Source(shown, part, config.eval_fraction if shared else None, samples, kind, columns, version)


def _load_arguments(field: str, name: str) -> dict:
    """Return the arguments for `load_dataset`."""
    path = Path(name).expanduser()
    if name == "embedded":
        return {"path": "parquet", "data_files": {s: str(EMBEDDED / f"{s}.parquet") for s in ("train", "test")}}
    if path.exists():
        files = [file for file in (path, *path.rglob("*")) if file.suffix in BUILDERS and file.stat().st_size]
        kinds = {BUILDERS[file.suffix] for file in files if not file.name.startswith("dataset_info")}
        if len(kinds) != 1:
            found = f"files of several kinds ({', '.join(sorted(kinds))})" if kinds else "no file with text"
            raise UsageError(f"{field} {name} has {found}: give files of one kind, {', '.join(BUILDERS)}")
        arguments = {"path": str(path)} if path.is_dir() else {"path": BUILDERS[path.suffix], "data_files": str(path)}
        return {**arguments, "sample_by": "document"} if kinds == {"text"} else arguments
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.suffix in BUILDERS:
        raise UsageError(f'{field} {name} does not exist: give a file, a folder, a hub id, or "embedded"')
    hub_id, revision = split_revision(name)
    return {"path": hub_id, "revision": revision}


def _choose_columns(config: DistillConfig, shown: str, columns: list[str]) -> tuple[str, list[str]]:
    prompts = [config.prompt_column, config.completion_column]
    if config.messages_column in columns:
        return "conversations", [config.messages_column]
    if set(prompts) <= set(columns):
        return "conversations", prompts
    if config.text_column in columns:
        return "texts", [config.text_column]
    raise UsageError(
        f"{shown} has the columns {', '.join(columns)}: name the one to learn with --text_column (now "
        f"{config.text_column}) or --messages_column, or two with --prompt_column and --completion_column"
    )


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

    if not hasattr(samples, "__len__"):
        yield from (_document(sample, row, source) for row, sample in enumerate(samples) if wanted(row))
    elif len(samples) == 1 and source.kind == "texts" and held_out is not None:
        document = _document(samples[0], 0, source)
        text, cut = document.text, int(len(document.text) * (1 - held_out))
        cut = max(text.rfind("\n", 0, cut), text.rfind(" ", 0, cut), cut - 1000) + 1  # between two words
        yield document._replace(text=text[cut:] if is_eval else text[:cut])
    else:
        rows = [row for row in range(len(samples)) if wanted(row)]
        random.Random(0).shuffle(rows)
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            for row, sample in zip(batch, samples.__getitems__(batch), strict=True):
                yield _document(sample, row, source)


def _document(sample: dict, row: int, source: Source) -> Document:
    where = f"{source.name}, row {row + 1}"
    if source.kind == "texts":
        (column,) = source.columns
        if not isinstance(sample[column], str):
            raise UsageError(f"{where} has {sample[column]!r:.100} in column {column!r}: remove rows without text")
        return Document(row, sample[column])
    messages, learn_from = [], 0
    for column, role in zip(source.columns, ("user", "assistant"), strict=False):
        learn_from = len(messages)  # with a prompt and a completion, the completion is learned
        value = sample[column]
        if isinstance(value, str) and len(source.columns) == 2:
            value = [{"role": role, "content": value}]
        for found in value if isinstance(value, list) else [value]:
            # `datasets` adds the fields of all messages to each of them, with None as value
            message = {k: field for k, field in found.items() if field is not None} if isinstance(found, dict) else {}
            if "tool_calls" in message:
                message.setdefault("content", "")
            if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
                raise UsageError(
                    f"{where}, column {column!r} has {found!r:.100}, expected a list of messages: "
                    f'{{"role": "user", "content": "text"}}, with the roles {", ".join(ROLES)}'
                )
            messages.append(message)
    return Document(row, messages=messages, learn_from=learn_from)
