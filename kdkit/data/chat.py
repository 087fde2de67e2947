"""Documents to rows of tokens: the chat template, what is in the loss, the causal shift, and the cut.

A *row* is a dict of three lists of equal length: `input_ids`, `labels` (the next token, or -100: not in the loss) and
`position_ids` (from 0 in each document). The causal shift happens here, in `make_rows`, and nowhere else.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from kdkit.config import UsageError
from kdkit.data.sources import Document
from kdkit.losses import IGNORE_INDEX

BATCH = 100  # documents tokenised at a time


def tokenize_documents(
    documents: list[Document], tokenizer, max_length: int, max_tokens: int | None = None
) -> list[dict]:
    """Rows of at most `max_length` tokens, in the order of the documents, each of one document's piece.

    With `max_tokens`, as many as give so many tokens. See `make_rows`.
    """
    return list(up_to(make_rows(documents, tokenizer, max_length), max_tokens))


def up_to(rows: Iterable[dict], max_tokens: int | None) -> Iterator[dict]:
    """Rows until they have `max_tokens` tokens; None is all."""
    total = 0
    for row in rows:
        yield row
        total += len(row["input_ids"])
        if max_tokens is not None and total >= max_tokens:
            return


def make_rows(
    documents: Iterable[Document],
    tokenizer,
    max_length: int,
    truncation_mode: str | None = None,
    counts: Counter | None = None,
) -> Iterator[dict]:
    """Tokenise, shift by one, and cut what is longer than `max_length`.

    The tokens of a text are those the tokenizer gives, special ones included, and its end-of-text token; those of a
    conversation are what the chat template makes of it. Token s is the input whose label is token s + 1, so that n
    tokens give n - 1 pairs; where a document is split, the first piece keeps the label that the second one starts
    with, so no label is lost.

    Args:
        documents: texts and conversations.
        tokenizer: with a chat template, for conversations.
        max_length: the most tokens of a row.
        truncation_mode: what is done with a longer document, as in the configuration.
        counts: is told the `samples` read, those `too_long`, and those `dropped` since they have nothing to learn.
    """
    counts = Counter() if counts is None else counts
    documents = iter(documents)
    while batch := list(itertools.islice(documents, BATCH)):
        for document, (ids, learned) in zip(batch, _tokenize(batch, tokenizer), strict=True):
            inputs = ids[:-1]
            labels = [i if learn else IGNORE_INDEX for i, learn in zip(ids[1:], learned[1:], strict=True)]  # the shift
            counts["samples"] += 1
            pieces = [slice(0, max_length)]
            if len(inputs) > max_length:
                counts["too_long"] += 1
                mode = truncation_mode or ("split" if document.messages is None else "keep_start")
                pieces = {
                    "split": [slice(start, start + max_length) for start in range(0, len(inputs), max_length)],
                    "keep_start": pieces,
                    "keep_end": [slice(-max_length, None)],
                    "drop": [],
                }[mode]
            pieces = [piece for piece in pieces if any(label != IGNORE_INDEX for label in labels[piece])]
            counts["dropped"] += not pieces
            for piece in pieces:
                positions = list(range(len(inputs[piece])))
                yield {"input_ids": inputs[piece], "labels": labels[piece], "position_ids": positions}


def _tokenize(documents: list[Document], tokenizer) -> Iterator[tuple[list[int], list[bool]]]:
    """For each document its token ids, and for each of them whether it is learned."""
    texts = [document.text for document in documents if document.messages is None]
    text_ids = iter(tokenizer(texts, verbose=False)["input_ids"] if texts else [])
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in documents:
        if document.messages is None:
            ids = list(next(text_ids))
            ids = ids if ids[-1:] == eos else ids + eos
            yield ids, [True] * len(ids)
        else:
            yield tokenize_conversation(document, tokenizer)


# --- conversations -------------------------------------------------------------------------------------------


def check_chat_template(tokenizer, name: str) -> None:
    """Raises:
    UsageError: a tokenizer that has no chat template, or cannot tell which characters a token is made of.
    """
    if not tokenizer.chat_template:
        raise UsageError(
            f"{name} has conversations, and the teacher's tokenizer has no chat template: take the instruction-tuned "
            "teacher, give a template with --chat_template FILE, or learn from a column of texts with "
            "--messages_column null --prompt_column null"
        )
    if not tokenizer.is_fast:
        raise UsageError(f"{name} has conversations, for which a fast tokenizer is needed: save it as tokenizer.json")


def tokenize_conversation(document: Document, tokenizer) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation through the chat template, and for each whether it is learned.

    Learned is what the assistant has to write: its turns, each with the token that ends it, not the header in front
    of it. Where the template marks that itself (`{% generation %}`), its marks are used. Elsewhere the conversation is
    rendered up to each turn, and must go on as it began: a template that writes earlier turns another way when more
    follow (some leave out the thinking) does not show what the assistant wrote.

    Raises:
        UsageError: a template that refuses the conversation, or does not go on as it began.
    """
    where = f"row {int(document.source) + 1}" if document.source.isdecimal() else document.source
    turns = [n for n, message in enumerate(document.messages) if message["role"] == "assistant"]
    if not document.messages:
        return [], []
    if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
        marked = _apply(tokenizer, document.messages, where, tokenize=True, return_assistant_tokens_mask=True)
        ids, learned = list(marked["input_ids"]), _runs(marked["assistant_masks"])
        skipped = sum(turn < document.learn_from for turn in turns)
        special = set(tokenizer.added_tokens_decoder)
        learned = [range(run.start, run.stop + _end_is_behind(run, ids, special)) for run in learned]
        learned = {position for run in learned[skipped:] for position in run}
        return ids, [position in learned for position in range(len(ids))]
    text = _apply(tokenizer, document.messages, where)
    spans = [_turn(tokenizer, document.messages, n, text, where) for n in turns if n >= document.learn_from]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    learned = [
        any(start < span_end and end > span_start for span_start, span_end in spans)
        for start, end in encoded["offset_mapping"]
    ]
    return list(encoded["input_ids"]), learned


def _end_is_behind(run: range, ids: list[int], special: set[int]) -> bool:
    """Whether the token that ends a turn is just behind what the template marked."""
    return ids[run.stop - 1] not in special and run.stop < len(ids) and ids[run.stop] in special


def _turn(tokenizer, messages: list[dict], number: int, text: str, where: str) -> tuple[int, int]:
    """The characters of the rendered conversation that the assistant writes in a turn: (start, end)."""
    content = messages[number]["content"].strip()
    before = _apply(tokenizer, messages[:number], where) if number else ""
    prompt = _apply(tokenizer, messages[:number], where, add_generation_prompt=True) if number else ""
    until = _apply(tokenizer, messages[: number + 1], where)
    if not (text.startswith(until) and until.startswith(prompt)):
        raise UsageError(
            f"{where}: the chat template does not render message {number + 1} at the end of a conversation as it does "
            "within one, so that what the assistant wrote cannot be told: give a template that marks it with "
            "{% generation %} (--chat_template FILE), or conversations of one turn"
        )
    start = len(prompt)
    if (
        prompt == before and content
    ):  # no header of its own for the assistant, or one that the template adds in any case
        at = text.find(content, start, len(until))
        if at < 0:
            raise UsageError(f"{where}: the chat template does not show the content of message {number + 1} as it is")
        start = at if text[start:at].strip() else start
    written = until.rstrip()  # what follows the token that ends the turn is the template's
    endings = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    ended = any(written.endswith(ending) for ending in endings if ending.strip())
    return start, len(written) if ended else len(until)


def _apply(tokenizer, messages: list[dict], where: str, tokenize: bool = False, **options):
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=tokenize, **options)
    except (TemplateError, TypeError, ValueError) as error:
        raise UsageError(
            f"{where}: the chat template refuses the conversation ({str(error).splitlines()[0]}): "
            f"it has the roles {', '.join(message['role'] for message in messages)}"
        ) from error


def _runs(mask: list[int]) -> list[range]:
    """The ranges in which a mask is 1."""
    edges = [i for i, (a, b) in enumerate(itertools.pairwise([0, *mask, 0])) if a != b]
    return [range(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True)]
