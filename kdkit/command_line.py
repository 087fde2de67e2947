"""Read the configuration of a run from a command line and a YAML file.

python -m kdkit.train --config recipes/demo.yaml --alpha 0.5
"""

import argparse
import difflib
import json
import re
import sys
import types
import typing
from pathlib import Path

import yaml

from kdkit.config import FIELDS, GROUPS, DistillConfig, UsageError

TYPES = {  # of fields, in words
    int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping",
    list[int]: "a list of whole numbers", types.NoneType: "null",
}  # fmt: skip


def load_config(argv: list[str] | None = None, command: str = "python -m kdkit.train") -> DistillConfig:
    """Read a configuration from a command line: `[--config recipe.yaml] [--field value ...]`.

    The command line (`argv`, or that of the process) overrides the YAML file. `command` is the name in --help.

    Raises:
        UsageError (a ValueError): an unknown field (with the nearest name), or a value of the wrong type or range.
        SystemExit: after --help.
    """
    import jsonargparse

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config")
    try:
        known, rest = first.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    except argparse.ArgumentError:
        raise UsageError("--config is the last argument, expected the path of a YAML file after it") from None
    for argument in rest:
        if argument.startswith("--") and argument != "--help":
            _check_name(argument[2:].split("=")[0], "the command line", "--")

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    usage = f"{command} [--config FILE] [--field value ...]"
    parser = jsonargparse.ArgumentParser(usage=usage, description=DistillConfig.__doc__, exit_on_error=False)
    parser.add_argument("--config", metavar="FILE", help="A YAML file of fields; the command line overrides it.")
    for group in GROUPS:
        parser.add_class_arguments(group)
    try:
        values = parser.parse_args(([] if known.config is None else _read_yaml(known.config)) + rest)
    except jsonargparse.ArgumentError as error:
        raise UsageError(_explain(_one_line(error))) from None
    return DistillConfig(**{name: values[name] for name in FIELDS})


def read_config(path: Path) -> DistillConfig:
    """Read a YAML file of fields, such as the config.yaml of a run."""
    return load_config(["--config", str(path)])


def _read_yaml(path: str) -> list[str]:
    """The fields of a YAML file as arguments of a command line, with the names checked."""
    try:
        values = yaml.safe_load(Path(path).read_bytes()) or {}  # bytes, since a byte order mark may say UTF-16
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML in UTF-8: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds a {type(values).__name__}, expected lines of `field: value`")
    for name in values:
        _check_name(str(name), path)
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()]


def _check_name(name: str, where: str, prefix: str = "") -> None:
    if name in FIELDS:
        return
    nearest = [field for field in FIELDS if name == "".join(word[0] for word in field.split("_"))]  # lr, bs
    nearest += difflib.get_close_matches(name.replace("-", "_"), FIELDS, n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{nearest[0]}?" if nearest else "python -m kdkit.train --help lists the fields"
    raise UsageError(f"{where} has an unknown field {prefix}{name}: {hint}")


def _explain(message: str) -> str:
    """Say what is expected of a field in words, where jsonargparse says it in types of Python."""
    found = re.search(r'key "(\w+)".* [Gg](?:ot|iven) value: (.*)', message)
    if not found or found[1] not in FIELDS:
        return message
    return (
        f"{found[1]} is {found[2]!r}, expected {' or '.join(_expected(typing.get_type_hints(DistillConfig)[found[1]]))}"
    )


def _expected(kind) -> list[str]:
    if typing.get_origin(kind) is typing.Literal:
        return list(typing.get_args(kind))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return [name for part in typing.get_args(kind) for name in _expected(part)]
    return [TYPES[kind]]


def _one_line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
