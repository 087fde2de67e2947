"""Documents: texts and conversations, from the embedded text, files, folders and the hub.

Nothing is tokenised here. What is wrong with a dataset is told here, in one line, before a model is loaded.
"""

import ast
import functools
import hashlib
import json
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kdkit.config import DistillConfig, UsageError
from kdkit.running.hub import explain, loading_errors, split_revision

ROLES = ("system", "developer", "user", "assistant", "tool")
BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
BATCH = 1000  # samples read at a time


@dataclass(frozen=True)
class Document:
    """A text or a conversation, and where it came from. All of one source is held out, or none of it."""

    source: str
    text: str = ""
    messages: list[dict] | None = None
    """Of a conversation: dicts of role, content and what else the chat template reads."""
    learn_from: int = 0
    """The first message that is learned from: a prompt may have turns of the assistant, too."""


# --- the embedded text ---------------------------------------------------------------------------------------


@functools.cache
def embedded_documents() -> list[Document]:
    """The text that every Python carries: the language reference's topics and the library's docstrings.

    Some two million characters, read from the sources of the running interpreter, so that nothing needs to be
    downloaded. Test suites and repeated texts are left out. The text differs a little between Python versions;
    which module is held out does not, since that follows from its name.

    Raises:
        UsageError: if this Python came without the sources of its library.
    """
    documents, seen = [], set()

    def add(source: str, name: str, text: str) -> None:
        text = text.strip()
        if len(text) >= 20 and text not in seen:
            seen.add(text)
            documents.append(Document(source, f"{name}\n\n{text}\n"))

    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    for name, text in sorted(topics.items()):
        add(f"topics/{name}", name, text)

    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data"}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if skip.intersection(relative.parts) or relative.parts[0].startswith("config-"):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # a template or a test of the parser, which holds no documentation
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        for name, docstring in _docstrings(tree, module):
            add(relative.as_posix(), name, docstring)

    if len(documents) < 1000:
        raise UsageError(
            f"the embedded text is made of the sources of Python's own library, and {root} holds only "
            f"{len(documents)} documented objects (some 5,000 are usual). Use a Python that was installed with its "
            "sources (python.org, conda, pyenv and uv all do), or give your own text: --dataset path/to/text.txt"
        )
    return documents


def _docstrings(node: ast.AST, name: str):
    """Yield (dotted name, docstring) of a module, its classes and functions, in the order of the source."""
    if docstring := ast.get_docstring(node):
        yield name, docstring
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(child, f"{name}.{child.name}")


def split_documents(documents: list[Document], held_out: float) -> tuple[list[Document], list[Document]]:
    """Split by a hash of each document's source: the same documents are held out on every machine and run.

    Of a single text the last part is held out.
    """
    if len(documents) == 1 and documents[0].messages is None:  # a single file: its end is held out
        (document,) = documents
        cut = int(len(document.text) * (1 - held_out))
        cut = max(document.text.rfind("\n", 0, cut), document.text.rfind(" ", 0, cut), cut - 1000) + 1  # between words
        return [Document(document.source, document.text[:cut])], [Document(document.source, document.text[cut:])]
    train = [d for d in documents if not is_held_out(d.source, held_out)]
    return train, [d for d in documents if is_held_out(d.source, held_out)]


def is_held_out(source: str, share: float) -> bool:
    """Whether the hash of a source falls into the share that is held out."""
    digest = hashlib.sha256(source.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


# --- datasets ------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """A split of a dataset, opened, and its columns found."""

    name: str  # for messages
    samples: Any  # a datasets.Dataset, or an IterableDataset when streaming
    kind: str  # texts, messages, or prompts (and completions)
    columns: list[str]
    fingerprint: str  # another one for other content


def open_source(config: DistillConfig, name: str, split: str) -> Source:
    """Open a split of a hub dataset, a file or a folder through `datasets`, which caches what it downloads and reads.

    A .txt file is one sample; a line of JSON, a row of Parquet or CSV is one. dataset_config is
    that of `config.dataset`.

    Raises:
        UsageError: it cannot be loaded or read (with the file and the line), has no such split, is empty, or has none
            of the columns.
    """
    from datasets import load_dataset, load_dataset_builder

    field = "dataset" if name == config.dataset else "eval_dataset"
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
        raise UsageError(f"{shown} is empty: give another one, or another split with --dataset_split")
    kind, chosen = _choose_columns(config, shown, columns)
    return Source(shown, samples.select_columns(chosen), kind, chosen, fingerprint)


def _load_arguments(field: str, name: str) -> tuple[list[Path], dict]:
    """The local files of a dataset, if it is one, and what `load_dataset` is called with."""
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise UsageError(f"{field} {name} is a {path.suffix or 'nameless'} file: {', '.join(BUILDERS)} can be read")
        files, arguments = [path], {"path": BUILDERS[path.suffix], "data_files": str(path)}
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in BUILDERS)
        files = [file for file in files if file.name not in ("dataset_infos.json", "dataset_info.json", "state.json")]
        kinds = {BUILDERS[file.suffix] for file in files}
        if len(kinds) != 1:
            found = (
                f"files of several kinds ({', '.join(sorted(kinds))})" if kinds else f"no {', '.join(BUILDERS)} file"
            )
            raise UsageError(f"{field} {name} has {found}: give a folder with files of one kind, or a single file")
        arguments = {"path": str(path)}
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.suffix in BUILDERS:
        raise UsageError(f'{field} {name} does not exist: give a file, a folder, a hub id, or "embedded"')
    else:
        path, revision = split_revision(name)
        return [], {"path": path, "revision": revision}
    if not any(file.stat().st_size for file in files):
        raise UsageError(f"{field} {name} holds no text: it is empty")
    if BUILDERS[files[0].suffix] == "text":
        arguments["sample_by"] = "document"
    return files, arguments


def _check_files(files: list[Path]) -> None:
    """Find what could not be read: `datasets` does not tell the line.

    Raises:
        UsageError: a file that is not UTF-8, or a line that is not a JSON object.
    """
    for file in files:
        if BUILDERS[file.suffix] == "parquet":
            continue
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UsageError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from None
        if BUILDERS[file.suffix] != "json" or text.lstrip().startswith("["):  # one array, which is read as a whole
            continue
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                kind = type(json.loads(line)).__name__ if line.strip() else "dict"
            except json.JSONDecodeError as error:
                kind = f"not JSON ({error.msg})"
            if kind != "dict":
                raise UsageError(f"{file}, line {number} is {kind}: one JSON object a line is wanted")


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


def documents_of(source: Source, config: DistillConfig, part: str) -> Iterator[Document]:
    """The samples of a source as documents, checked one by one as they are read.

    Args:
        source: from `open_source`.
        config: for streaming and eval_fraction.
        part: "train" or "held_out", of a source that is split by a hash of the row's number; or "all".

    Raises:
        UsageError: a sample that is not what it should be, with its row.
    """

    def wanted(row: int) -> bool:
        return part == "all" or (part == "held_out") == is_held_out(str(row), config.eval_fraction)

    if config.streaming:
        yield from (_document(sample, row, source) for row, sample in enumerate(source.samples) if wanted(row))
        return
    rows = len(source.samples)
    if rows == 1 and part != "all":
        yield from split_documents([_document(source.samples[0], 0, source)], config.eval_fraction)[part == "held_out"]
        return
    order = [row for row in range(rows) if wanted(row)]
    random.Random(0).shuffle(order)  # the same text whatever the seed of the run
    for start in range(0, len(order), BATCH):
        batch = source.samples[order[start : start + BATCH]]
        for index, row in enumerate(order[start : start + BATCH]):
            yield _document({name: values[index] for name, values in batch.items()}, row, source)


def _document(sample: dict, row: int, source: Source) -> Document:
    where = f"{source.name}, row {row + 1}"
    values = [sample[name] for name in source.columns]
    if source.kind == "texts":
        if not isinstance(values[0], str):
            raise UsageError(
                f"{where} has no text in column {source.columns[0]!r} (found: {type(values[0]).__name__}): "
                "name the column of texts with --text_column, or leave such rows out"
            )
        return Document(str(row), values[0])
    if source.kind == "prompts":
        for name, role, at in zip(source.columns, ("user", "assistant"), (0, 1), strict=True):
            if isinstance(values[at], str):
                values[at] = [{"role": role, "content": values[at]}]
            values[at] = check_messages(values[at], f"{where}, column {name!r}")
        return Document(str(row), messages=values[0] + values[1], learn_from=len(values[0]))
    return Document(str(row), messages=check_messages(values[0], f"{where}, column {source.columns[0]!r}"))


def check_messages(messages: Any, where: str) -> list[dict]:
    """A conversation without its empty fields.

    Raises:
        UsageError: something that is not a list of messages with a known role and a content.
    """
    if not isinstance(messages, list):
        raise UsageError(f"{where} is {type(messages).__name__}, expected a list of messages with role and content")
    checked = []
    for number, message in enumerate(messages, start=1):
        message = {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
        if "role" not in message or not ("content" in message or "tool_calls" in message):
            raise UsageError(
                f"{where}, message {number} has no role and content (found: {', '.join(message) or 'nothing'}): "
                'each message is like {"role": "user", "content": "..."}'
            )
        if message["role"] not in ROLES:
            raise UsageError(
                f"{where}, message {number} has the unknown role {message['role']!r}: "
                f"rename it to one of {', '.join(ROLES)}"
            )
        if not isinstance(message.setdefault("content", ""), str):
            raise UsageError(
                f"{where}, message {number} has a {type(message['content']).__name__} as content, not text"
            )
        checked.append(message)
    return checked
