"""Read a sample (a row) as a document: a text, or a conversation as chat templates expect it.

Errors are ValueErrors with a message that continues the sentence "row 3 ...".
"""

import json
from typing import Any, NamedTuple

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {"human": "user", "gpt": "assistant"}
FLAGS = ("weight", "train", "training", "loss")  # of a message: 0 or false if it is not learned


class Document(NamedTuple):
    """A text, or a conversation if `messages` is given."""

    row: int
    text: str = ""
    messages: list[dict] | None = None  # role, content and anything else that the chat template reads
    turns: list[int] | tuple = ()  # the indices of the messages that are learned, all of the assistant
    tools: list[dict] | None = None  # definitions that the chat template shows


def json_object(line: str) -> dict:
    """Parse a line of JSON."""
    try:
        sample = json.loads(line)
        if "\\ud" in line.lower():
            json.dumps(sample, ensure_ascii=False).encode()  # half of a surrogate pair is no character
    except ValueError as error:
        raise ValueError(f"is not valid JSON ({error}): correct or remove {line!r:.60}") from None
    if not isinstance(sample, dict):
        raise ValueError(f"has {line!r:.60}, expected a JSON object with the columns as keys")
    return sample


def read_document(sample: dict, row: int, kind: str, columns: list[str], extras: list[str]) -> Document:
    """Return the document of a sample; the arguments are those of `kdkit.data.sources.Source`."""
    messages, turns, more = [], [], {name: sample.get(name) for name in extras}
    if kind == "texts":
        if not isinstance(sample.get(columns[0]), str):
            raise ValueError(f"has {sample.get(columns[0])!r:.100} in column {columns[0]!r}: remove rows without text")
        return Document(row, sample[columns[0]])
    if more.get("system"):
        messages.append({"role": "system", "content": more["system"]})
    for column, role in zip(columns, ("user", "assistant"), strict=False):
        value = sample.get(column)
        if isinstance(value, str) and role == "user" and more.get("input"):
            value += f"\n\n{more['input']}"
        if isinstance(value, str):
            value = [{"role": role, "content": value}] if len(columns) == 2 else _parse(value)
        for found in value if isinstance(value, list) else [value]:
            try:
                message, learned = _message(found)
            except ValueError as error:
                raise ValueError(f"has {found!r:.100} in column {column!r}, {error}") from None
            if learned and column == columns[-1]:  # with a prompt and a completion, the completion is learned
                turns.append(len(messages))
            messages.append(message)
    tools = _without_null(_parse(more.get("tools") or None))
    if not isinstance(tools or [], list) or not all(isinstance(tool, dict) for tool in tools or []):
        raise ValueError(f"has {tools!r:.100} in column 'tools', expected a list of definitions")
    return Document(row, "", messages, turns, tools)


def _message(found: Any) -> tuple[dict, bool]:
    """Return a message as chat templates expect it, and whether it is learned."""
    message = _without_null(found) if isinstance(found, dict) else {}
    if "from" in message:
        role = message.pop("from")
        message |= {"role": SHAREGPT.get(role, role), "content": message.pop("value", None)}
    for call in message.get("tool_calls", ()):
        message.setdefault("content", "")
        function = call.get("function", call)  # OpenAI has the arguments as text, templates expect an object
        function["arguments"] = _parse(function.get("arguments") or {})
    if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
        raise ValueError(f'expected a list of messages: {{"role": "user", "content": "x"}}, roles {", ".join(ROLES)}')
    flags, is_assistant = {name: message.pop(name, None) for name in FLAGS}, message["role"] == "assistant"
    is_valid = all(flag in ((None, 0, 1) if is_assistant else (None, 0)) for flag in flags.values())
    if not is_valid or {"train_detail", "training_detail"} & set(message):
        raise ValueError(f"expected {', '.join(FLAGS)} as 0, 1, false or true, 1 only if the assistant wrote it")
    return message, is_assistant and all(flag in (None, 1) for flag in flags.values())


def _parse(value: Any) -> Any:
    """Return what a text of JSON holds, and anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"expected JSON, not {value!r:.60} ({error})") from None


def _without_null(value: Any) -> Any:
    """Remove keys with null at any depth: Arrow gives each sample the keys of all others, with null."""
    if isinstance(value, dict):
        return {key: _without_null(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_null(each) for each in value]
    if not isinstance(value, str | int | float | None):
        raise ValueError(f"where {value!r:.60} was text before Arrow read it: give a local file of JSON lines")
    return value
