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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from kdkit.config import DistillConfig, UsageError
from kdkit.data.records import Document
from kdkit.losses import IGNORE_INDEX
from kdkit.running.hub import first_line

BLOCK = 200  # documents that are tokenised together
BLOCKS_ALONE = 5  # tokenised before other processes are started: the start takes longer than so few blocks


def tokenize(documents: Iterable[Document], tokenizer, config: DistillConfig) -> Iterator[tuple[list[dict], set[str]]]:
    """Yield the result of `make_rows` for each document, in order, with `config.num_proc` processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_proc, documents = config.num_proc or max(cores - 1, 1), iter(documents)
    blocks = iter(lambda: list(itertools.islice(documents, BLOCK)), [])
    job = (tokenizer, config.max_length, config.truncation_mode, config.chat_template_options)
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
    # it ends with the main process: otherwise a forked process would keep the lock of the cache
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def _make_rows(block: list[Document]) -> list[tuple[list[dict], set[str]]]:
    return make_rows(block, *_job)


def make_rows(
    documents: list[Document], tokenizer, max_length: int, truncation_mode: str | None = None, template_options=None
) -> list[tuple[list[dict], set[str]]]:
    """Tokenise documents (all texts, or all conversations), shift their tokens by one, and cut the long ones.

    A text gives the tokens of the tokenizer, with special tokens, and an end-of-text token; a conversation gives those
    of the rendered chat template. Token s is the input whose label is token s + 1, so n tokens give n - 1 pairs. If a
    text is split, the last label of a piece is the first input of the next: no label is lost.

    Returns for each document its rows, as int32 arrays, and what is remarkable: "too_long" (for max_length), and the
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
            pieces = _cut(inputs, labels, max_length, mode, bos)
            rows += [piece for piece in pieces if (piece["labels"] != IGNORE_INDEX).any()]
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


Turns = list[tuple[int, int]]  # the characters (start, end) of each turn that is learned


def tokenize_conversations(
    documents: list[Document], tokenizer, template_options: dict | None = None
) -> Iterator[tuple[list[tuple[list[int], np.ndarray]], set[str]]]:
    """Yield for each conversation its samples (token ids, and which of them are learned), and what is remarkable.

    The turns of the assistant are learned, each with the token that ends it, but not the header before it: as the
    template marks them (`{% generation %}`), or else what it adds when a turn follows. If it renders a turn in another
    way when others follow (some omit earlier thinking), each turn is a sample that ends with it, as in generation.

    Remarks: "per_turn" (a sample for each turn), "hidden" (the template does not show all of a turn or a tool, or
    changes it), "endless" (a turn does not end with a special token).

    Raises:
        UsageError: the template does not fit a conversation, or does not read an option.
    """
    endings = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if str(token).strip())
    rendered = [_render_turns(document, tokenizer, template_options or {}, endings) for document in documents]
    batch = [text for texts, _ in rendered for text, _ in texts]
    encoded = tokenizer(batch or [""], add_special_tokens=False, return_attention_mask=False, verbose=False)
    encodings = iter(encoded.encodings)
    for texts, remarks in rendered:
        samples = []
        for (_, turns), encoding in zip(texts, encodings, strict=False):
            starts, ends = np.array(encoding.offsets).reshape(-1, 2).T  # the characters of each token
            learned = np.zeros(len(starts), dtype=bool)
            for start, end in turns:
                learned |= (starts < end) & (ends > start)
            samples.append((encoding.ids, learned))
        yield samples, remarks


def _render_turns(document: Document, tokenizer, options: dict, endings: tuple) -> tuple[list[tuple[str, Turns]], set]:
    """Return the texts of a conversation with the turns in each, and the remarks on it."""
    messages, tools = document.messages, document.tools

    def render(number: int, **more) -> str:
        more = {"tools": tools, **options, **more}
        return tokenizer.apply_chat_template(messages[:number], tokenize=False, **more) if number else ""

    if not document.turns:
        return [], set()  # gives no row
    try:
        template = tokenizer.get_chat_template(tools=tools)
        taken = set(re.findall(r"\w+", template)) - {"messages", "tools", "add_generation_prompt"}
        if unknown := [name for name in options if name not in taken]:
            raise ValueError(f"it does not read {unknown[0]!r} of chat_template_options")
        if re.search(r"\{%-?\s*generation\s*-?%\}", template):
            context = {"return_assistant_tokens_mask": True, **tokenizer.special_tokens_map, **options}
            (text,), (marks,) = render_jinja_template([messages], tools, chat_template=template, **context)
            texts = [(text, _marked_turns(document, text, marks, endings))]
            shown = [text] * len(document.turns)  # marks may leave out a part of a turn, such as its thinking
        else:
            texts, shown = _unmarked_turns(document, render, endings), None
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UsageError(
            f"row {document.row + 1}: the chat template does not fit the roles {roles} ({first_line(error)[:300]}): "
            "correct the row, or try other --chat_template_options or another --chat_template FILE"
        ) from error
    turns = [text[start:end] for text, turns in texts for start, end in turns]
    found = {"per_turn": len(texts) > 1, "endless": not all(turn.endswith(endings) for turn in turns)}
    found["hidden"] = _is_hidden(document, shown or turns, texts[-1][0])
    return texts, {remark for remark in found if found[remark]}


def _marked_turns(document: Document, text: str, marks: Turns, endings: tuple) -> Turns:
    """Return the marked turns that are learned. Some templates do not mark the token that ends a turn."""
    turns = []
    for start, end in marks:
        if not text[start:end].endswith(endings):
            end += len(max((ending for ending in endings if text.startswith(ending, end)), key=len, default=""))
        turns.append((start, end))
    assistant = [index for index, message in enumerate(document.messages) if message["role"] == "assistant"]
    if assistant == document.turns:
        return turns
    if len(turns) != len(assistant):
        raise ValueError(f"it marks {len(turns)} turns of {len(assistant)}: which ones are not to be learned?")
    return [turns[assistant.index(turn)] for turn in document.turns]


def _unmarked_turns(document: Document, render: Callable, endings: tuple) -> list[tuple[str, Turns]]:
    """Return the text of the conversation with its turns, or a text for each turn."""
    text, alone = render(len(document.messages)), []
    for turn in document.turns:
        prompt, until = render(turn, add_generation_prompt=True), render(turn + 1)
        start, content = len(prompt), document.messages[turn]["content"].strip()
        if prompt == render(turn):
            # Without a generation prompt (or if it is always added) what the template writes before the content is
            # the header. With one, the assistant writes all that follows it.
            at = until.find(content, start)
            if at < 0 or until[start:at].strip():
                start = at
        if start < 0 or not until.startswith(prompt):
            same = next((i for i, (a, b) in enumerate(zip(prompt, until, strict=False)) if a != b), len(prompt))
            text = f"it writes {until[same:]!r:.60} in message {turn + 1}, not {prompt[same:] + content!r:.60}"
            raise ValueError(f"{text}; {{% generation %}} can mark what the assistant wrote")
        written = until.rstrip()  # white space after the token that ends the turn belongs to the template
        alone.append((until, [(start, len(written) if written.endswith(endings) else len(until))]))
    if all(text.startswith(until) for until, _ in alone):
        return [(text, [turn for _, (turn,) in alone])]
    return alone


def _is_hidden(document: Document, shown: list[str], text: str) -> bool:
    """Return whether a learned turn, as it is `shown`, or a tool in `text` is missing, not complete or changed."""

    def is_in(text: str, parts: list) -> bool:  # templates trim white space
        return all("".join(part.split()) in "".join(text.split()) for part in parts if isinstance(part, str))

    def name(tool: dict) -> str | None:
        return tool.get("function", tool).get("name")

    found = is_in(text, [name(tool) for tool in document.tools or []])
    for turn, part in zip(document.turns, shown, strict=True):
        message = document.messages[turn]
        written = [message.get(key) for key in ("content", "reasoning_content", "reasoning", "thinking")]
        found &= is_in(part, written + [name(call) for call in message.get("tool_calls", [])])
    return not found
