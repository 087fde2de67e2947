"""Documents in, batches out: read, split, tokenise, shift, pack, and lay out the steps of a run.

Shapes: B rows of a micro-batch, S tokens of a row. A *row* is a dict of three lists of equal length:
`input_ids`, `labels` (the next token, or -100: not in the loss) and `position_ids` (from 0 in each document).
The causal shift happens here, in `tokenize_documents`, and nowhere else.
"""

import ast
import hashlib
import json
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Document:
    """A text and where it came from. Documents of one source are never split between training and held-out."""

    source: str
    text: str


# --- documents -----------------------------------------------------------------------------------------------


def embedded_documents() -> list[Document]:
    """The text that every Python carries: the language reference's topics and the library's docstrings.

    Some two million characters, read from the sources of the running interpreter, so that nothing needs to be
    downloaded. Test suites and repeated texts are left out. The text differs a little between Python versions;
    which module is held out does not, since that follows from its name.

    Raises:
        ValueError: if this Python came without the sources of its library.
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
        raise ValueError(
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
    """Split by a hash of each document's source: the same documents are held out on every machine and run."""

    def is_held_out(document: Document) -> bool:
        digest = hashlib.sha256(document.source.encode()).digest()
        return int.from_bytes(digest[:8], "big") < held_out * 2**64

    train = [d for d in documents if not is_held_out(d)]
    return train, [d for d in documents if is_held_out(d)]


# --- rows ----------------------------------------------------------------------------------------------------


def tokenize_documents(documents: list[Document], tokenizer, max_length: int) -> list[dict]:
    """Tokenise, shift by one, and cut into pieces of at most `max_length`.

    The tokens of a document are those the tokenizer gives, special ones included, and its end-of-text token.
    Token s is the input whose label is token s + 1, so that a document of n tokens gives n - 1 pairs; where a
    document is cut, the first piece keeps the label that the second one starts with, so no label is lost.

    Returns:
        Rows, in the order of the documents, each of one document's piece. A text of one token gives none.
    """
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = []
    encoded = tokenizer([d.text for d in documents], verbose=False)["input_ids"] if documents else []
    for ids in encoded:
        if ids[-1:] != eos:
            ids = ids + eos
        inputs, labels = ids[:-1], ids[1:]  # the causal shift
        for start in range(0, len(inputs), max_length):
            piece = slice(start, start + max_length)
            length = len(inputs[piece])
            rows.append(
                {"input_ids": inputs[piece], "labels": labels[piece], "position_ids": list(range(length))}
            )
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
