"""Functions that several test files use: other values of fields, a student with dropout, several processes."""

import json
import os
import shutil
import socket
import subprocess
import types
import typing
from dataclasses import fields, replace
from pathlib import Path

from kdkit import DistillConfig
from kdkit.models import ASSETS

TESTS = Path(__file__).parent
LIMIT = 120  # seconds; a run that takes longer is considered to hang

TYPES = typing.get_type_hints(DistillConfig)
FIELDS = [field.name for field in fields(DistillConfig)]


def another(config: DistillConfig, name: str):
    """Return a valid value of the field that differs from its current value."""
    value, kind = getattr(config, name), TYPES[name]
    if value is None:
        kind = next(x for x in typing.get_args(kind) if x is not type(None))
    elif typing.get_origin(kind) is types.UnionType:
        kind = type(value)
    if typing.get_origin(kind) is typing.Literal:
        return next(choice for choice in typing.get_args(kind) if choice != value)
    if kind is bool:
        return not value
    if kind is int:
        return (value or 1) + 1
    if kind is float:
        return (value or 1) / 2
    return [0] if typing.get_origin(kind) is list else "another"


def with_another(config: DistillConfig, *names: str) -> DistillConfig:
    """Return a copy of the configuration with other values of these fields."""
    return replace(config, **{name: another(config, name) for name in names})


def student_with_dropout(folder: Path, attention_dropout: float = 0.2, **changes) -> str:
    """Write the config of the embedded student with dropout to a folder, and return the folder."""
    shutil.copytree(ASSETS / "embedded_student", folder, dirs_exist_ok=True)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"attention_dropout": attention_dropout, **changes}
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


def arguments(config: DistillConfig) -> list[str]:
    """Return the command line of a configuration."""
    return [f"--{name}={value}" for name, value in vars(config).items() if value is not None]


def json_lines(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def environment(**changes: str) -> dict[str, str]:
    """Return an environment in which a Python process ends when the process that started it ends."""
    return {**os.environ, "PYTHONPATH": f"{TESTS / 'processes'}:{TESTS.parent}", **changes}


def run_processes(
    program: list[str], timeout: float = LIMIT, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run a launcher and its ranks. No process remains after a timeout, or after pytest is killed."""
    return subprocess.run(program, env=env or environment(), capture_output=True, text=True, timeout=timeout)


def free_port() -> int:
    """Return a TCP port of this machine that no process uses."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
