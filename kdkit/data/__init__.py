"""The text of a run: sources (files and the hub), chat (tokens and labels), batches (packing and steps)."""

from kdkit.data.batches import (
    DATA_FIELDS,
    MappedRows,
    Rows,
    Steps,
    collate,
    count_tokens,
    describe_rows,
    empty_row,
    load_rows,
    loss_tokens,
    pack,
    row_lengths,
    rows_digest,
)
from kdkit.data.chat import tokenize_documents
from kdkit.data.sources import Document, embedded_documents, split_documents

__all__ = [
    "DATA_FIELDS",
    "Document",
    "MappedRows",
    "Rows",
    "Steps",
    "collate",
    "count_tokens",
    "describe_rows",
    "embedded_documents",
    "empty_row",
    "load_rows",
    "loss_tokens",
    "pack",
    "row_lengths",
    "rows_digest",
    "split_documents",
    "tokenize_documents",
]  # fmt: skip
