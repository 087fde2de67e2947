"""Documents in, batches out: read, split, tokenise, shift, pack, and lay out the steps of a run.

Shapes: B rows of a micro-batch, S tokens of a row. A *row* is a dict of three lists of equal length:
`input_ids`, `labels` (the next token, or -100: not in the loss) and `position_ids` (from 0 in each document).
The causal shift happens here, in `tokenize_documents`, and nowhere else.
"""

import ast
import functools
import hashlib
import json
import math
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

from kdkit.config import DistillConfig, UsageError
from kdkit.losses import IGNORE_INDEX

# What the rows of a run depend on, but for the tokenizer.
DATA_FIELDS = ("dataset", "text_column", "eval_dataset", "eval_fraction", "max_train_tokens", "max_eval_tokens")
DATA_FIELDS += ("max_length", "packing")


@dataclass(frozen=True)
class Document:
    """A text and where it came from. Documents of one source are never split between training and held-out."""

    source: str
    text: str


# --- documents -----------------------------------------------------------------------------------------------


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


def local_documents(path: Path, text_column: str) -> list[Document]:
    """Read a .txt file (one document), a .jsonl or .json-lines file (one a line), or a folder of those.

    Raises:
        UsageError: a missing path, nothing to read in it, or a line that is not what it should be, with its number.
    """
    if not path.exists():
        raise UsageError(f'dataset {path} does not exist: give a .txt or .jsonl file, a folder of those, or "embedded"')
    suffixes = (".txt", ".jsonl", ".json")
    files = sorted(p for p in path.rglob("*") if p.suffix in suffixes) if path.is_dir() else [path]
    documents = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from None
        if file.suffix in (".jsonl", ".json"):
            documents += _json_lines(file, text, text_column)
        elif text.strip():
            documents.append(Document(str(file), text))
    if not documents:
        raise UsageError(f"{path} holds no text: no {', '.join(suffixes)} file with anything in it")
    return documents


def _json_lines(file: Path, text: str, text_column: str) -> list[Document]:
    documents = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{file}, line {number} is not JSON ({error.msg}): one object a line is wanted") from None
        if not isinstance(record, dict) or not isinstance(record.get(text_column), str):
            found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise UsageError(
                f"{file}, line {number} has no text in field {text_column!r} (found: {found}): "
                "name the field with --text_column"
            )
        if record[text_column].strip():
            documents.append(Document(f"{file}:{number}", record[text_column]))
    return documents


def split_documents(documents: list[Document], held_out: float) -> tuple[list[Document], list[Document]]:
    """Split by a hash of each document's source: the same documents are held out on every machine and run.

    Of a single document the last part is held out.
    """

    def is_held_out(document: Document) -> bool:
        digest = hashlib.sha256(document.source.encode()).digest()
        return int.from_bytes(digest[:8], "big") < held_out * 2**64

    if len(documents) == 1:  # a single file: its end is held out
        (document,) = documents
        cut = int(len(document.text) * (1 - held_out))
        cut = max(document.text.rfind("\n", 0, cut), document.text.rfind(" ", 0, cut), cut - 1000) + 1  # between words
        return [Document(document.source, document.text[:cut])], [Document(document.source, document.text[cut:])]
    train = [d for d in documents if not is_held_out(d)]
    return train, [d for d in documents if is_held_out(d)]


# --- rows ----------------------------------------------------------------------------------------------------


def tokenize_documents(
    documents: list[Document], tokenizer, max_length: int, max_tokens: int | None = None
) -> list[dict]:
    """Tokenise, shift by one, and cut into pieces of at most `max_length`.

    The tokens of a document are those the tokenizer gives, special ones included, and its end-of-text token.
    Token s is the input whose label is token s + 1, so that a document of n tokens gives n - 1 pairs; where a
    document is cut, the first piece keeps the label that the second one starts with, so no label is lost.

    Returns:
        Rows, in the order of the documents, each of one document's piece; with `max_tokens`, as many as give so many
        tokens. A text of one token gives none.
    """
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows, total = [], 0
    for first in range(0, len(documents), 100):
        texts = [document.text for document in documents[first : first + 100]]
        for ids in tokenizer(texts, verbose=False)["input_ids"]:
            ids = ids if ids[-1:] == eos else ids + eos
            inputs, labels = ids[:-1], ids[1:]  # the causal shift
            for start in range(0, len(inputs), max_length):
                if max_tokens is not None and total >= max_tokens:
                    return rows
                piece = slice(start, start + max_length)
                positions = list(range(len(inputs[piece])))
                rows.append({"input_ids": inputs[piece], "labels": labels[piece], "position_ids": positions})
                total += len(positions)
    return rows


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


# --- a run's data --------------------------------------------------------------------------------------------


def load_rows(config: DistillConfig, tokenizer) -> tuple[list[dict], list[dict]]:
    """The training and the held-out rows of a run: read, split by document, tokenised, limited, packed.

    Raises:
        UsageError: no text, or too little of it to hold some out.
    """

    def documents(name: str) -> list[Document]:
        return embedded_documents() if name == "embedded" else local_documents(Path(name), config.text_column)

    def rows(documents: list[Document], max_tokens: int | None) -> list[dict]:
        documents = random.Random(0).sample(documents, len(documents))  # the same text whatever the seed of the run
        rows = tokenize_documents(documents, tokenizer, config.max_length, max_tokens)
        return pack(rows, config.max_length) if config.packing else rows

    if config.eval_dataset is None:
        train, held_out = split_documents(documents(config.dataset), config.eval_fraction)
    else:
        train, held_out = documents(config.dataset), documents(config.eval_dataset)
    train_rows, eval_rows = rows(train, config.max_train_tokens), rows(held_out, config.max_eval_tokens)
    for name, found in (("training", train_rows), ("held-out", eval_rows)):
        if not found:
            raise UsageError(
                f"dataset {config.dataset} leaves no {name} text (eval_fraction {config.eval_fraction:g}): "
                "give more text, another eval_fraction, or an eval_dataset"
            )
    return train_rows, eval_rows


def count_tokens(rows: list[dict]) -> int:
    """Tokens in the loss."""
    return sum(label != IGNORE_INDEX for row in rows for label in row["labels"])


def empty_row(pad_token_id: int) -> dict:
    """A row without a label, for a rank that has none left but has to take part in what the ranks do together."""
    return {"input_ids": [pad_token_id], "labels": [IGNORE_INDEX], "position_ids": [0]}


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
            micro_batches.append({**collate(rows, self.pad_token_id), "train_rows": indices})
        return micro_batches
