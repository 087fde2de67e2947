"""Read a sample (a row) as a document: a text, or a conversation as chat templates expect it.

The functions below `read_document` raise ValueError; its message continues the sentence "row 3 ...".
"""

import json
from typing import Any, NamedTuple

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
ALPACA = ["instruction", "output"]
FLAGS = ("weight", "train", "training", "loss")  # of a message: 0 or false if it is not learned


class Document(NamedTuple):
    """A text, or a conversation if `messages` is given."""

    row: int
    text: str = ""
    messages: list[dict] | None = None  # role, content and anything else that the chat template reads
    turns: list[int] | tuple = ()  # the indices of the messages that are learned, all of the assistant
    tools: list[dict] | None = None  # definitions that the chat template shows


def read_document(sample: dict, row: int, columns: list[str], extras: list[str] | None) -> Document:
    """Return the document of a sample; `extras` are the columns that belong to a conversation, None for a text."""
    if extras is not None:
        return _conversation(sample, row, columns, extras)
    if not isinstance(sample.get(columns[0]), str):
        raise ValueError(f"has {sample.get(columns[0])!r:.100} in column {columns[0]!r}: remove rows without text")
    return Document(row, sample[columns[0]])


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


def _conversation(sample: dict, row: int, columns: list[str], extras: list[str]) -> Document:
    messages, turns = [], []
    if "system" in extras and sample.get("system"):
        messages.append({"role": "system", "content": sample["system"]})
    for column, role in zip(columns, ("user", "assistant"), strict=False):
        value = sample.get(column)
        if "input" in extras and role == "user" and sample.get("input") and isinstance(value, str):
            value = f"{value}\n\n{sample['input']}"
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
    tools = _without_null(_parse(sample.get("tools") or None))
    if not isinstance(tools or [], list) or not all(isinstance(tool, dict) for tool in tools or []):
        raise ValueError(f"has {tools!r:.100} in column 'tools', expected a list of definitions")
    return Document(row, "", messages, turns, tools)


def _message(found: Any) -> tuple[dict, bool]:
    """Return a message as chat templates expect it, and whether it is learned."""
    message = _without_null(found) if isinstance(found, dict) else {}
    if "from" in message:
        role, content = message.pop("from"), message.pop("value", None)
        message |= {"role": SHAREGPT.get(role, role), "content": content}
        if role == "function_call":
            calls = _parse(content)
            calls = calls if isinstance(calls, list) else [calls]
            message |= {"content": "", "tool_calls": [{"type": "function", "function": call} for call in calls]}
    for call in message.get("tool_calls", ()):
        message.setdefault("content", "")
        function = call.get("function", call)  # OpenAI has the arguments as text, templates expect an object
        function["arguments"] = _parse(function.get("arguments") or {})
    if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
        raise ValueError(
            f'expected a list of messages: {{"role": "user", "content": "text"}}, with the roles {", ".join(ROLES)}'
        )
    flags, is_assistant = {name: message.pop(name, None) for name in FLAGS}, message["role"] == "assistant"
    if any(flag not in (None, 0, 1) for flag in flags.values()) or {"train_detail", "training_detail"} & set(message):
        raise ValueError(f"expected 0, 1, false or true as {', '.join(FLAGS)}, for complete messages")
    if not is_assistant and any(flags.values()):
        raise ValueError("but only turns of the assistant can be learned: remove the flag, or set it to 0")
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
