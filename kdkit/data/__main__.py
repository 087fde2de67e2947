"""Show what a run reads, and its first rows, with the tokens in the loss marked.

python -m kdkit.data [--config recipes/x.yaml] [--field value ...]
"""

import itertools
import os
import sys
from collections.abc import Iterator

from kdkit.config import UsageError, load_config
from kdkit.data.batches import Steps, count_tokens, describe_rows, load_rows
from kdkit.losses import IGNORE_INDEX
from kdkit.models import load_tokenizer


def row_tokens(row: dict) -> Iterator[tuple[int, bool, bool]]:
    """Yield for each token of a row, labels included: (id, is it in the loss, does a document start with it).

    A token is in the loss as the label of the token before it, so the first of a document never is.
    """
    for index, position in enumerate(row["position_ids"]):
        if position == 0:
            yield row["input_ids"][index], False, True
        if row["labels"][index] != IGNORE_INDEX:
            yield row["labels"][index], True, False
        elif row["position_ids"][index + 1 : index + 2] not in ([], [0]):
            yield row["input_ids"][index + 1], False, False


def show_row(row: dict, tokenizer, colour: bool = True) -> str:
    """Return a row as text. What is in the loss is green, the rest grey; without colour it is [in brackets]."""
    shown = []
    for learned, group in itertools.groupby(row_tokens(row), key=lambda token: token[1]):
        for number, (token, _, starts) in enumerate(group):
            edge = "[" if learned and number == 0 and not colour else ""
            text = tokenizer.decode([token])
            shown.append(("\n---\n" if starts and shown else "") + edge)
            shown.append(f"\033[{32 if learned else 90}m{text}\033[0m" if colour else text)
        shown.append("]" if learned and not colour else "")
    return "".join(shown)


def main(argv: list[str] | None = None) -> None:
    """Run `python -m kdkit.data [--config recipe.yaml] [--field value ...]`."""
    try:
        config = load_config(argv, command="python -m kdkit.data")
        tokenizer = load_tokenizer(config)
        train_rows, eval_rows = load_rows(config, tokenizer)
    except UsageError as error:
        sys.exit(f"kdkit: {error}")
    steps = Steps(train_rows, config, tokenizer.pad_token_id)
    print(
        f"{config.dataset}: {len(train_rows):,} rows, {count_tokens(train_rows):,} tokens in the loss "
        f"({steps.useful_share():.0%} of the positions); held out {count_tokens(eval_rows):,}",
        *describe_rows(train_rows, config),
        sep="\n",
    )
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for index in range(min(3, len(train_rows))):
        print(f"\n=== row {index} ===\n{show_row(train_rows[index], tokenizer, colour)}")


if __name__ == "__main__":
    main()
