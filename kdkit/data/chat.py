"""Turn documents into rows of tokens: the chat template, what is learned, the causal shift, and the cut.

A *row* is a dict of three sequences of equal length: `input_ids`, `labels` (the next token, or -100: not in the loss)
and `position_ids` (from 0 in each document). The causal shift happens here, in `make_rows`, and nowhere else.
"""

import functools
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from jinja2 import TemplateError

from kdkit.config import UsageError
from kdkit.data.records import Document
from kdkit.losses import IGNORE_INDEX
from kdkit.running.hub import first_line

BLOCK = 200  # documents that are tokenised together
BLOCKS_ALONE = 5  # tokenised before other processes are started: the start takes longer than so few blocks


def tokenize(documents: Iterable[Document], num_proc: int | None, *job) -> Iterator[tuple[list[dict], set[str]]]:
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


def _make_rows(block: list[Document]) -> list[tuple[list[dict], set[str]]]:
    return make_rows(block, *_job)


def make_rows(
    documents: list[Document], tokenizer, max_length: int, truncation_mode: str | None = None, template_options=None
) -> list[tuple[list[dict], set[str]]]:
    """Tokenise documents, shift their tokens by one, and cut what is longer than `max_length`.

    A text gives the tokens of the tokenizer, with special tokens, and an end-of-text token; a conversation gives those
    of the rendered chat template. Token s is the input whose label is token s + 1, so n tokens give n - 1 pairs. If a
    text is split, the last label of a piece is the first input of the next: no label is lost.

    Args:
        documents: all texts, or all conversations.

    Returns:
        For each document its rows, as int32 arrays, and what is remarkable: "too_long" (for max_length), and the
        remarks of `tokenize_conversations`. A document without a token to learn has no rows.
    """
    bos, empty = tokenizer.bos_token_id, tokenizer("")["input_ids"]
    bos = bos if empty[:1] == [bos] else None  # None: the tokenizer starts no text with it
    if documents[0].messages is None:
        mode = truncation_mode or "split"
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        encoded = tokenizer([document.text for document in documents], return_attention_mask=False, verbose=False)
        texts = [ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids for ids in encoded["input_ids"]]
        tokenized = [([(ids if ids[-1:] == end else ids + end, True)], set()) for ids in texts]
    else:
        mode = truncation_mode or "keep_start"
        tokenized = tokenize_conversations(documents, tokenizer, template_options)
    made = []
    for samples, remarks in tokenized:
        rows = []
        for ids, learned in samples:
            ids = np.array(ids, dtype=np.int32)
            inputs, labels = ids[:-1], np.where(learned, ids, np.int32(IGNORE_INDEX))[1:]  # the causal shift
            remarks |= {"too_long"} if len(inputs) > max_length else set()
            rows += [
                row for row in _cut(inputs, labels, max_length, mode, bos) if (row["labels"] != IGNORE_INDEX).any()
            ]
        made.append((rows, remarks))
    return made


def _cut(inputs: np.ndarray, labels: np.ndarray, max_length: int, mode: str, bos: int | None) -> Iterator[dict]:
    """Yield the pieces of a sample. Each starts with `bos` if the sample does; only the sample's own has a label."""
    too_long, has_bos = len(inputs) > max_length, bos is not None and inputs[:1].tolist() == [bos]
    room = max_length - has_bos
    starts = {
        "split": [0, *range(max_length, len(inputs), room)],
        "keep_start": [0],
        "keep_end": [len(inputs) - room if too_long else 0],
        "drop": [] if too_long else [0],
    }[mode]
    for start in starts:
        piece = slice(start, start + (room if start else max_length))
        row = {"input_ids": inputs[piece], "labels": labels[piece]}
        if start and has_bos and inputs[start] != bos:
            row = {"input_ids": np.insert(inputs[piece], 0, bos), "labels": np.insert(labels[piece], 0, IGNORE_INDEX)}
        yield {**row, "position_ids": np.arange(len(row["labels"]), dtype=np.int32)}


Sample = tuple[list[int], np.ndarray]  # token ids, and which of them are learned


def tokenize_conversations(
    documents: list[Document], tokenizer, template_options: dict | None = None
) -> Iterator[tuple[list[Sample], set[str]]]:
    """Yield for each conversation its samples, and what is remarkable.

    The turns of the assistant are learned, each with the token that ends it, but not the header before it. If the
    template marks these itself (`{% generation %}`), its marks are used. Otherwise the conversation is also rendered
    up to the start and up to the end of each turn. If the complete text begins with these texts, it is the sample.
    If not (some templates omit the thinking of earlier turns), each turn is a sample that ends with it: the turn and
    what is before it are rendered as in generation.

    Remarks: "per_turn" (a sample for each turn), "hidden" (the template does not show all of a message or a tool, or
    changes it), "endless" (a turn does not end with a special token).

    Raises:
        UsageError: the template refuses a conversation, changes the start of a turn, or does not read an option.
    """
    special, options = tokenizer.added_tokens_decoder, template_options or {}
    endings, prepared = tuple(str(token) for token in special.values() if str(token).strip()), []
    for document in documents:
        render = functools.partial(_render, document, tokenizer, options)
        samples, texts, remarks = [], [], set()  # texts: (text, the characters (start, end) of each turn)
        if not document.turns:
            pass  # is not rendered, and gives no row
        elif _is_marked(document, tokenizer, options):
            samples, shown = [_marked_turns(document, render, list(special))], render(len(document.messages))
            remarks |= _hidden(document, itertools.repeat(shown), shown)
        else:
            texts = _rendered_turns(document, render, endings)
            remarks |= {"per_turn"} if len(texts) > 1 else set()
            turns = [text[start:end] for text, spans in texts for start, end in spans]
            remarks |= _hidden(document, turns, texts[-1][0])
        prepared.append((samples, texts, remarks))
    batch = [text for _, texts, _ in prepared for text, _ in texts]
    encoded = tokenizer(batch or [""], add_special_tokens=False, return_attention_mask=False, verbose=False)
    encodings = iter(encoded.encodings)
    for samples, texts, remarks in prepared:
        for (_, spans), encoding in zip(texts, encodings, strict=False):
            starts, ends = np.array(encoding.offsets).reshape(-1, 2).T  # the characters of each token
            learned = np.zeros(len(starts), dtype=bool)
            for start, end in spans:
                learned |= (starts < end) & (ends > start)
            samples.append((encoding.ids, learned))
        for ids, learned in samples:
            last = learned & ~np.append(learned[1:], False)  # the last token of each turn
            remarks |= set() if np.isin(np.array(ids)[last], list(special)).all() else {"endless"}
        yield samples, remarks


def _is_marked(document: Document, tokenizer, options: dict) -> bool:
    """Return whether the template marks the turns of the assistant; refuse options that it does not read."""
    try:
        template = tokenizer.get_chat_template(tools=document.tools)
    except ValueError as error:
        raise UsageError(f"{first_line(error)[:200]}: give the one to use with --chat_template FILE") from error
    for name in options:
        if name in ("messages", "tools", "add_generation_prompt") or not re.search(rf"\b{re.escape(name)}\b", template):
            raise UsageError(f"chat_template_options has {name!r}, which the chat template does not take: remove it")
    return bool(re.search(r"\{%-?\s*generation\s*-?%\}", template))


def _hidden(document: Document, turns: Iterable[str], text: str) -> set[str]:
    """Return {"hidden"} if the template shows a message or a tool not at all, not completely or changed."""

    def squeeze(shown: str) -> str:  # templates trim white space
        return "".join(shown.split())

    def is_in(shown: str, parts: list) -> bool:
        parts = [part for part in parts if isinstance(part, str)]  # some templates write a part as JSON
        return all(squeeze(x) in shown or squeeze(json.dumps(x, ensure_ascii=False)[1:-1]) in shown for x in parts)

    text, messages = squeeze(text), document.messages
    context = [m["content"] for m in messages[: document.turns[-1]] if m["role"] != "assistant"]
    found = is_in(text, context + [tool.get("function", tool).get("name") for tool in document.tools or []])
    for message, shown in zip((messages[turn] for turn in document.turns), turns, strict=False):
        parts = [message.get(key) for key in ("content", "reasoning_content", "reasoning", "thinking")]
        calls = [call.get("function", call).get("name") for call in message.get("tool_calls", [])]
        found &= is_in(squeeze(shown), parts + calls)
    return set() if found else {"hidden"}


def _marked_turns(document: Document, render: Callable, special: list[int]) -> Sample:
    encoded = render(len(document.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    marked, is_special = np.array(encoded["assistant_masks"], dtype=bool), np.isin(encoded["input_ids"], special)
    numbers = np.cumsum(np.diff(marked, prepend=False) & marked)  # of the turns, from 1
    assistant = [index for index, message in enumerate(document.messages) if message["role"] == "assistant"]
    if assistant != document.turns and numbers[-1] != len(assistant):
        raise UsageError(
            f"row {document.row + 1}: the chat template marks {numbers[-1]} turns of {len(assistant)}, so it is "
            "unknown which ones are not to be learned: remove empty turns"
        )
    # some templates do not mark the token that ends the turn
    marked[1:] |= marked[:-1] & is_special[1:] & ~is_special[:-1]
    if assistant != document.turns:
        marked &= np.isin(numbers, [assistant.index(turn) + 1 for turn in document.turns])
    return encoded["input_ids"], marked


def _rendered_turns(document: Document, render: Callable, endings: tuple) -> list[tuple[str, list[tuple[int, int]]]]:
    """Return (text, the characters (start, end) of each turn) of the conversation, or of each turn alone."""
    text, alone = render(len(document.messages)), []
    for turn in document.turns:
        prompt, until = render(turn, add_generation_prompt=True), render(turn + 1)
        start, where = len(prompt), f"row {document.row + 1}, message {turn + 1}: the chat template"
        if prompt == render(turn):
            # Without a generation prompt (or if it is always added) what the template writes before the content is
            # the header. With one, the assistant writes all that follows it.
            at = until.find(document.messages[turn]["content"].strip(), start)
            if at < 0 or until[start:at].strip():
                start = at
        if start < 0:
            raise UsageError(
                f"{where} changes the content, so the text that the assistant wrote is unknown: give a template that "
                "marks it with {% generation %} (--chat_template FILE)"
            )
        if not until.startswith(prompt):
            same = next((i for i, (a, b) in enumerate(zip(prompt, until, strict=False)) if a != b), 0)
            raise UsageError(
                f"{where} ends a prompt with {prompt[same:]!r:.60}, but writes {until[same:]!r:.60} in the answer: "
                "try --chat_template_options, or give a template where both agree (--chat_template FILE)"
            )
        written = until.rstrip()  # white space after the token that ends the turn belongs to the template
        alone.append((until, [(start, len(written) if written.endswith(endings) else len(until))]))
    if all(text.startswith(until) for until, _ in alone):
        return [(text, [span for _, (span,) in alone])]
    return alone


def _render(document: Document, tokenizer, template_options: dict, number: int, tokenize=False, **options):
    """Apply the chat template to the first messages of a conversation."""
    messages, options = document.messages[:number], {"tools": document.tools, **template_options, **options}
    try:
        return tokenizer.apply_chat_template(messages, tokenize=tokenize, **options) if messages else ""
    except (TemplateError, TypeError, ValueError) as error:
        raise UsageError(
            f"row {document.row + 1}: the chat template refuses the conversation ({str(error).splitlines()[0]}): "
            f"it has the roles {', '.join(message['role'] for message in messages)}"
        ) from error
