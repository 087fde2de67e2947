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
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from kdkit.config import UsageError
from kdkit.data.sources import Document
from kdkit.losses import IGNORE_INDEX

BLOCK = 200  # documents that are tokenised together
SECONDS_ALONE = 1.0  # how long one process tokenises before it starts others


def tokenize(
    documents: Iterable[Document], tokenizer, max_length: int, truncation_mode: str | None, num_proc: int | None = 1
) -> Iterator[tuple[list[dict], bool]]:
    """Yield what `make_rows` makes of each document, in order.

    Args:
        documents, tokenizer, max_length, truncation_mode: see `make_rows`.
        num_proc: the number of processes that are started after SECONDS_ALONE. Smaller data is done before that.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_proc, start, documents = num_proc or max(cores - 1, 1), time.monotonic(), iter(documents)
    blocks = iter(lambda: list(itertools.islice(documents, BLOCK)), [])
    job = (tokenizer, max_length, truncation_mode)
    for block in blocks:
        yield from make_rows(block, *job)
        if num_proc > 1 and time.monotonic() - start >= SECONDS_ALONE:
            break
    else:
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    # A fork imports nothing and copies no tokenizer. It is safe, since these processes do not use torch or its threads.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool, pending = ProcessPoolExecutor(num_proc, context, _set_job, job), deque()
    try:
        for block in blocks:
            pending.append(pool.submit(_do_job, block))
            if len(pending) == 4 * num_proc:  # limits the memory, and what is tokenised in vain
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


_job = ()  # in a process that tokenises: the arguments of `make_rows`


def _set_job(*job) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends this one after Ctrl-C
    threading.Thread(target=_end_with_main_process, daemon=True).start()


def _end_with_main_process() -> None:
    """Wait until the main process is killed, and end, since a forked process still holds the lock of the cache."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _do_job(block: list[Document]) -> list[tuple[list[dict], bool]]:
    return list(make_rows(block, *_job))


def make_rows(
    documents: list[Document], tokenizer, max_length: int, truncation_mode: str | None = None
) -> Iterator[tuple[list[dict], bool]]:
    """Tokenise documents, shift their tokens by one, and cut what is longer than `max_length`.

    The tokens of a text are those that the tokenizer gives, special ones included, and its end-of-text token. The
    tokens of a conversation are those of the rendered chat template. Token s is the input whose label is token s + 1,
    so n tokens give n - 1 pairs. Where a document is split, the last label of a piece is the first input of the next
    one, so no label is lost.

    Args:
        documents: texts and conversations, tokenised together.
        tokenizer: needs a chat template for conversations.
        max_length: the most tokens of a row.
        truncation_mode: what is done with a longer document, as in the configuration.

    Yields:
        For each document its rows, as int32 arrays, and whether it was longer than max_length. A document without a
        token to learn has no rows.
    """
    texts = _tokenize_texts([document.text for document in documents if document.messages is None], tokenizer)
    chats = tokenize_conversations([document for document in documents if document.turns], tokenizer)
    for document in documents:
        if document.messages is not None and not document.turns:
            yield [], False
            continue
        ids, learned = next(texts if document.messages is None else chats)
        ids = np.array(ids, dtype=np.int32)
        labels = np.full_like(ids, IGNORE_INDEX)
        for tokens in learned:
            labels[tokens.start : tokens.stop] = ids[tokens.start : tokens.stop]
        row = {"input_ids": ids[:-1], "labels": labels[1:]}  # the causal shift
        row["position_ids"] = np.arange(len(row["labels"]), dtype=np.int32)
        rows, too_long = [row], len(row["labels"]) > max_length
        if too_long:
            mode = truncation_mode or ("split" if document.messages is None else "keep_start")
            pieces = {
                "split": [slice(start, start + max_length) for start in range(0, len(row["labels"]), max_length)],
                "keep_start": [slice(max_length)],
                "keep_end": [slice(-max_length, None)],
                "drop": [],
            }[mode]
            rows = [{key: values[piece] for key, values in row.items()} for piece in pieces]
            for row in rows:
                row["position_ids"] = row["position_ids"] - row["position_ids"][0]
        yield [row for row in rows if (row["labels"] != IGNORE_INDEX).any()], too_long


def _tokenize_texts(texts: list[str], tokenizer) -> Iterator[tuple[list[int], list[range]]]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for ids in tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"] if texts else []:
        ids = ids if ids[-1:] == end else ids + end
        yield ids, [range(len(ids))]


# --- conversations ---


def check_chat_template(tokenizer, name: str) -> None:
    """Check that a tokenizer can be used for conversations.

    Raises:
        UsageError: the tokenizer has no chat template, or cannot give the characters of each token.
    """
    if not tokenizer.chat_template:
        raise UsageError(
            f"{name} has conversations, but the teacher's tokenizer has no chat template: use the instruction-tuned "
            "teacher, give a template with --chat_template FILE, or learn from a column of texts with "
            "--messages_column null --prompt_column null"
        )
    if not tokenizer.is_fast:
        raise UsageError(f"{name} has conversations, which need a fast tokenizer: save it as tokenizer.json")


def tokenize_conversations(documents: list[Document], tokenizer) -> Iterator[tuple[list[int], list[range]]]:
    """Yield for each conversation its token ids, and which of them are learned, as ranges of indices.

    The turns of the assistant are learned, each with the token that ends it, but not the header before it. If the
    template marks these itself (`{% generation %}`), its marks are used. Otherwise the conversation is also rendered
    up to the start and up to the end of each turn, and the complete text has to begin with these texts. A template
    that renders earlier turns in another way when more turns follow (some omit the thinking) is refused.

    Raises:
        UsageError: the template refuses a conversation, or renders a turn differently when others follow.
    """
    complete = [(document, len(document.messages)) for document in documents]
    if documents and re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
        tokenized = _render(tokenizer, complete, tokenize=True, return_assistant_tokens_mask=True)
        special = set(tokenizer.added_tokens_decoder)
        for document, ids, mask in zip(documents, tokenized["input_ids"], tokenized["assistant_masks"], strict=True):
            edges = np.flatnonzero(np.diff([0, *mask, 0])).tolist()
            skipped = sum(message["role"] == "assistant" for message in document.messages[: document.learn_from])
            marked = list(zip(edges[::2], edges[1::2], strict=True))[skipped:]
            # some templates leave the token that ends the turn outside of the mark
            ended = [s < len(ids) and ids[s] in special and ids[s - 1] not in special for _, s in marked]
            yield ids, [range(start, stop + end) for (start, stop), end in zip(marked, ended, strict=True)]
        return
    texts = _render(tokenizer, complete)
    # each turn is rendered with its header, and up to its end; what is the complete text is not rendered again
    turns = [(document, turn) for document in documents for turn in document.turns]
    prompts = iter(
        _render(tokenizer, [(document, turn) for document, turn in turns if turn], add_generation_prompt=True)
    )
    untils = iter(_render(tokenizer, [(d, turn + 1) for d, turn in turns if turn + 1 < len(d.messages)]))
    endings = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if str(token).strip())
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False) if texts else None
    for index, (document, text) in enumerate(zip(documents, texts, strict=True)):
        learned = []
        for turn in document.turns:
            prompt = next(prompts) if turn else ""
            until = next(untils) if turn + 1 < len(document.messages) else text
            start, end = _span(tokenizer, document, turn, text, prompt, until, endings)
            learned.append(_tokens(encoded.encodings[index], start, end))
        yield encoded["input_ids"][index], learned


def _span(tokenizer, document: Document, turn: int, text: str, prompt: str, until: str, endings) -> tuple[int, int]:
    """Return the characters (start, end) of a rendered conversation, `text`, that the assistant writes in a turn.

    `prompt` is the text before the turn with the header of the turn (the generation prompt), `until` the text up to
    the end of the turn. The turn ends with one of the tokens `endings`.
    """
    where, content = f"row {document.row + 1}", document.messages[turn]["content"].strip()
    if not (text.startswith(until) and until.startswith(prompt)):
        raise UsageError(
            f"{where}: the chat template does not render message {turn + 1} at the end of a conversation as it does "
            "within one, so the text that the assistant wrote is unknown: give a template that marks it with "
            "{% generation %} (--chat_template FILE), or conversations of one turn"
        )
    start = len(prompt)
    at = text.find(content, start, len(until))
    # Text between prompt and content is the header if the template has no generation prompt (or adds it in any case).
    # Otherwise the assistant writes this text, too. To render once more is only necessary if there is such a text.
    if content and (at < 0 or text[start:at].strip()) and prompt == "".join(_render(tokenizer, [(document, turn)])):
        if at < 0:
            raise UsageError(f"{where}: the chat template does not show the content of message {turn + 1} unchanged")
        start = at
    written = until.rstrip()  # white space after the token that ends the turn belongs to the template
    return start, len(written) if written.endswith(endings) else len(until)


def _tokens(encoding, start: int, end: int) -> range:
    """Return the tokens that overlap the characters from `start` to `end` (exclusive)."""
    # None: the tokenizer dropped this character
    first = next((t for char in range(start, end) if (t := encoding.char_to_token(char)) is not None), None)
    if first is None:
        return range(0)
    last = next(t for char in range(end - 1, start - 1, -1) if (t := encoding.char_to_token(char)) is not None)
    while last + 1 < len(encoding) and encoding.token_to_chars(last + 1)[0] < end:  # several tokens of one character
        last += 1
    return range(first, last + 1)


def _render(tokenizer, beginnings: list[tuple[Document, int]], **options):
    """Apply the chat template to the first messages of conversations: (conversation, number of messages)."""
    from jinja2 import TemplateError

    beginnings = [(document, number) for document, number in beginnings if number]
    if not beginnings:
        return []
    try:
        messages = [document.messages[:number] for document, number in beginnings]
        return tokenizer.apply_chat_template(messages, **{"tokenize": False, **options})
    except (TemplateError, TypeError, ValueError) as error:
        if len(beginnings) > 1:  # find the conversation
            for beginning in beginnings:
                _render(tokenizer, [beginning], **options)
        document, number = beginnings[0]
        raise UsageError(
            f"row {document.row + 1}: the chat template refuses the conversation ({str(error).splitlines()[0]}): "
            f"it has the roles {', '.join(message['role'] for message in document.messages[:number])}"
        ) from error
