"""The data of a run: sources (files and the hub), chat (tokens and labels), batches (packing, cache and steps)."""
# ruff: noqa: F401, I001

from kdkit.data.batches import (
    Rows, Steps, collate, count_tokens, describe_rows, empty_row, load_rows, loss_tokens, pack, row_lengths,
    rows_digest,
)  # fmt: skip
