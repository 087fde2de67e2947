"""The data of a run: sources (files and the hub), chat (tokens and labels), batches (packing, cache and steps)."""
# ruff: noqa: F401, I001

from kdkit.data.batches import (
    DATA_FIELDS, Rows, Steps, collate, count_tokens, describe_rows, empty_row, is_packed, load_rows, loss_tokens, pack,
    prompt_of, row_lengths, rows_digest, settle_packing,
)  # fmt: skip
