"""Show what a run reads, and its first rows, with the tokens in the loss marked.

python -m kdkit.data [--config recipes/x.yaml] [--field value ...]
"""

import itertools
import sys

from kdkit.command_line import load_config
from kdkit.config import UsageError
from kdkit.data.batches import count_tokens, describe_rows, load_rows
from kdkit.losses import IGNORE_INDEX
from kdkit.models import load_tokenizer


def show_row(row: dict, tokenizer) -> str:
    """Return a row as text: [text in the loss] is in brackets, and a line --- separates documents."""
    starts = [index for index, position in enumerate(row["position_ids"]) if position == 0]
    documents = []
    for start, end in itertools.pairwise([*starts, len(row["labels"])]):
        labels = row["labels"][start:end]  # a token is in the loss as the label of the token before it
        tokens = zip([*row["input_ids"][start:end], labels[-1]], [IGNORE_INDEX, *labels], strict=True)
        text = ""
        for in_loss, run in itertools.groupby(tokens, key=lambda token: token[1] != IGNORE_INDEX):
            decoded = tokenizer.decode([token for token, _ in run if token != IGNORE_INDEX])
            text += f"[{decoded}]" if in_loss else decoded
        documents.append(text)
    return "\n---\n".join(documents)


def main(argv: list[str] | None = None) -> None:
    """`python -m kdkit.data [--config recipe.yaml] [--field value ...]`."""
    try:
        config = load_config(argv, command="python -m kdkit.data")
        tokenizer = load_tokenizer(config)
        train_rows, eval_rows = load_rows(config, tokenizer)
    except UsageError as error:
        sys.exit(f"kdkit: {error}")
    print(f"{config.dataset}: {len(train_rows):,} rows, {count_tokens(train_rows):,} tokens in the loss", end="; ")
    print(f"{count_tokens(eval_rows):,} held-out tokens", describe_rows(train_rows, config), sep="\n")
    for index, row in enumerate(train_rows[:3]):
        print(f"\n=== row {index} ===\n{show_row(row, tokenizer)}")


if __name__ == "__main__":
    main()
