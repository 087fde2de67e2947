"""Turn documents into rows of tokens: the chat template, what is learned, the causal shift, and the cut.

A *row* is a dict of three sequences of equal length: `input_ids`, `labels` (the next token, or -100: not in the loss)
and `position_ids` (from 0 in each document). The causal shift happens here, in `make_rows`, and nowhere else.
"""

import itertools
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from jinja2 import TemplateError

from kdkit.config import UsageError
from kdkit.data.sources import Document
from kdkit.losses import IGNORE_INDEX

BLOCK = 200  # documents that are tokenised together
BLOCKS_ALONE = 5  # tokenised before other processes are started: the start takes longer than so few blocks


def tokenize(documents: Iterable[Document], num_proc: int | None, *job) -> Iterator[tuple[list[dict], bool]]:
    """Yield the result of `make_rows(documents, *job)` for each document, in order, with `num_proc` processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_proc, documents = num_proc or max(cores - 1, 1), iter(documents)
    blocks = iter(lambda: list(itertools.islice(documents, BLOCK)), [])
    for block in itertools.islice(blocks, BLOCKS_ALONE if num_proc > 1 else None):
        yield from make_rows(block, *job)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    # A fork imports nothing and copies no tokenizer. It is safe, since these processes do not use torch or its threads.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(num_proc, context, _start_process, job) as pool:  # it starts with the first block
        while window := list(itertools.islice(blocks, 16 * num_proc)):  # map reads its input at once
            for made in pool.map(_make_rows, window):
                yield from made


def _start_process(*job) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends this one after Ctrl-C

    def end_with_main_process() -> None:  # a forked process would keep the lock of the cache
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_main_process, daemon=True).start()


def _make_rows(block: list[Document]) -> list[tuple[list[dict], bool]]:
    return make_rows(block, *_job)


def make_rows(
    documents: list[Document], tokenizer, max_length: int, truncation_mode: str | None = None
) -> list[tuple[list[dict], bool]]:
    """Tokenise documents, shift their tokens by one, and cut what is longer than `max_length`.

    A text gives the tokens of the tokenizer, with special tokens, and an end-of-text token; a conversation gives those
    of the rendered chat template. Token s is the input whose label is token s + 1, so n tokens give n - 1 pairs. If a
    text is split, the last label of a piece is the first input of the next: no label is lost.

    Args:
        documents: all texts, or all conversations.

    Returns:
        For each document its rows, as int32 arrays, and whether it was longer than max_length. A document without a
        token to learn has no rows.
    """
    if documents[0].messages is None:
        mode = truncation_mode or "split"
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        encoded = tokenizer([document.text for document in documents], return_attention_mask=False, verbose=False)
        tokenized = [(ids if ids[-1:] == end else ids + end, True) for ids in encoded["input_ids"]]
    else:
        mode = truncation_mode or "keep_start"
        tokenized = tokenize_conversations(documents, tokenizer)
    made = []
    for ids, learned in tokenized:
        ids = np.array(ids, dtype=np.int32)
        inputs, labels = ids[:-1], np.where(learned, ids, np.int32(IGNORE_INDEX))[1:]  # the causal shift
        too_long = len(inputs) > max_length
        starts = {
            "split": range(0, len(inputs), max_length),
            "keep_start": [0],
            "keep_end": [max(len(inputs) - max_length, 0)],
            "drop": [] if too_long else [0],
        }[mode]
        rows = []
        for start in starts:
            piece = slice(start, start + max_length)
            if (labels[piece] != IGNORE_INDEX).any():
                positions = np.arange(len(inputs[piece]), dtype=np.int32)
                rows.append({"input_ids": inputs[piece], "labels": labels[piece], "position_ids": positions})
        made.append((rows, too_long))
    return made


def tokenize_conversations(documents: list[Document], tokenizer) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield for each conversation its token ids, and which of them are learned.

    The turns of the assistant are learned, each with the token that ends it, but not the header before it. If the
    template marks these itself (`{% generation %}`), its marks are used. Otherwise the conversation is also rendered
    up to the start and up to the end of each turn, and the complete text has to begin with these texts.

    Raises:
        UsageError: the template refuses a conversation, or renders a turn differently when others follow (some omit
            its thinking then).
    """
    special = tokenizer.added_tokens_decoder
    if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
        yield from (_marked_turns(document, tokenizer, list(special)) for document in documents)
        return
    endings = tuple(str(token) for token in special.values() if str(token).strip())
    # without a turn to learn, a conversation is not rendered, and gives no row
    texts = [_render(document, len(document.messages) if document.turns else 0, tokenizer) for document in documents]
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    for document, text, encoding in zip(documents, texts, encoded.encodings, strict=True):
        starts, ends = np.array(encoding.offsets).reshape(-1, 2).T  # the characters of each token
        learned = np.zeros(len(starts), dtype=bool)
        for turn in document.turns:
            start, end = _find_turn(document, turn, text, tokenizer, endings)
            learned |= (starts < end) & (ends > start)
        yield encoding.ids, learned


def _marked_turns(document: Document, tokenizer, special: list[int]) -> tuple[list[int], np.ndarray]:
    if not document.turns:
        return [], np.zeros(0, dtype=bool)
    encoded = _render(
        document, len(document.messages), tokenizer, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marked, is_special = np.array(encoded["assistant_masks"], dtype=bool), np.isin(encoded["input_ids"], special)
    turn_numbers = np.cumsum(np.diff(marked, prepend=False) & marked)  # from 1
    skipped = sum(message["role"] == "assistant" for message in document.messages[: document.learn_from])
    # some templates do not mark the token that ends the turn
    marked[1:] |= marked[:-1] & is_special[1:] & ~is_special[:-1]
    return encoded["input_ids"], marked & (turn_numbers > skipped)


def _find_turn(document: Document, turn: int, text: str, tokenizer, endings: tuple) -> tuple[int, int]:
    """Return the characters (start, end) of a rendered conversation, `text`, that the assistant writes in a turn."""
    prompt = _render(document, turn, tokenizer, add_generation_prompt=True)
    until = _render(document, turn + 1, tokenizer)
    start = len(prompt)
    if prompt == _render(document, turn, tokenizer):
        # Without a generation prompt (or if it is always added) what the template writes before the content is the
        # header. With one, the assistant writes all that follows it.
        at = text.find(document.messages[turn]["content"].strip(), start, len(until))
        if at < 0 or text[start:at].strip():
            start = at
    if start < 0 or not (text.startswith(until) and until.startswith(prompt)):
        raise UsageError(
            f"row {document.row + 1}: the chat template changes the content of message {turn + 1}, or renders it in "
            "another way when messages follow, so the text that the assistant wrote is unknown: give a template that "
            "marks it with {% generation %} (--chat_template FILE), or conversations of one turn"
        )
    written = until.rstrip()  # white space after the token that ends the turn belongs to the template
    return start, len(written) if written.endswith(endings) else len(until)


def _render(document: Document, number: int, tokenizer, tokenize=False, **options):
    """Apply the chat template to the first messages of a conversation."""
    messages = document.messages[:number]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=tokenize, **options) if messages else ""
    except (TemplateError, TypeError, ValueError) as error:
        raise UsageError(
            f"row {document.row + 1}: the chat template refuses the conversation ({str(error).splitlines()[0]}): "
            f"it has the roles {', '.join(message['role'] for message in messages)}"
        ) from error
