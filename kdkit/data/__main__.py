"""Show what a run reads, and its first rows, with the tokens in the loss marked.

python -m kdkit.data [--config recipes/x.yaml] [--field value ...]
"""

import itertools
import sys
from collections.abc import Iterator

from kdkit.config import UsageError, load_config
from kdkit.data.batches import Steps, count_tokens, describe_rows, load_rows
from kdkit.losses import IGNORE_INDEX
from kdkit.models import load_tokenizer


def row_tokens(row: dict) -> Iterator[tuple[int, bool, int]]:
    """Yield for each token of a row, labels included: (id, is it in the loss, number of the document).

    A token is in the loss as the label of the token before it, so the first of a document never is.
    """
    document = 0
    for index, position in enumerate(row["position_ids"]):
        if position == 0:
            document += 1
            yield row["input_ids"][index], False, document
        if row["labels"][index] != IGNORE_INDEX:
            yield row["labels"][index], True, document
        elif row["position_ids"][index + 1 : index + 2] not in ([], [0]):
            yield row["input_ids"][index + 1], False, document


def show_row(row: dict, tokenizer) -> str:
    """Return a row as text: [what is in the loss] is in brackets, and a line --- separates documents."""
    documents = []
    for _, tokens in itertools.groupby(row_tokens(row), key=lambda token: token[2]):
        text = ""
        for in_loss, run in itertools.groupby(tokens, key=lambda token: token[1]):
            decoded = tokenizer.decode([token for token, _, _ in run])
            text += f"[{decoded}]" if in_loss else decoded
        documents.append(text)
    return "\n---\n".join(documents)


def main(argv: list[str] | None = None) -> None:
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
    for index, row in enumerate(train_rows[:3]):
        print(f"\n=== row {index} ===\n{show_row(row, tokenizer)}")


if __name__ == "__main__":
    main()
