"""Models and datasets from a hub: a small server on this machine that answers as the hub does."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse

import pytest

from kdkit.config import UsageError
from kdkit.models import ASSETS
from kdkit.running.hub import explained

COMMIT = "c" * 40
CARD = """---
configs:
- config_name: small
  data_files:
  - {split: train, path: small/train.jsonl}
  - {split: test, path: small/test.jsonl}
- config_name: other
  data_files: other.jsonl
---
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """What transformers and datasets ask the hub for: whether a repository exists, its list of files, and each file."""

    repositories: dict[str, dict[str, bytes]] = {}  # noqa: RUF012  ("datasets/some/data" -> path -> content)
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path).strip("/")
        self.asked.append(path)
        api = path.startswith("api/")
        path = path.removeprefix("api/").removeprefix("models/")
        found = next((name for name in self.repositories if path == name or path.startswith(f"{name}/")), None)
        if found is None:
            return self.answer(404, code="RepoNotFound")
        files, rest = self.repositories[found], path[len(found) :].strip("/").split("/", 2)
        if api and rest[0] == "tree":
            inside = rest[2] + "/" if len(rest) == 3 else ""
            return self.answer(200, self.entries(files, inside))
        if api:
            name = found.removeprefix("datasets/")
            return self.answer(200, {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]})
        if rest[0] == "resolve" and rest[2] in files:
            return self.answer(200, files[rest[2]])
        return self.answer(404, code="EntryNotFound")

    do_HEAD = do_GET

    @staticmethod
    def entries(files, inside):
        names = [file for file in files if file.startswith(inside) and "/" not in file[len(inside) :]]
        return [{"type": "file", "path": n, "size": len(files[n]), "oid": hash_of(files[n])} for n in names]

    def answer(self, status, body=b"", code=None):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "ETag": f'"{hash_of(body)}"', "X-Error-Code": code}.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def hash_of(content):
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub(tmp_path):
    """The environment of a process with an empty cache and a hub that has some/model and some/data."""
    lines = [json.dumps({"messages": [{"role": r, "content": f"{r} {i}"} for r in ("user", "assistant")]})
             for i in range(30)]  # fmt: skip
    Hub.repositories = {
        "some/model": {file.name: file.read_bytes() for file in (ASSETS / "embedded_teacher").iterdir()},
        "datasets/some/data": {
            "README.md": CARD.encode(),
            "small/train.jsonl": "\n".join(lines[:20]).encode(),
            "small/test.jsonl": "\n".join(lines[20:]).encode(),
            "other.jsonl": b'{"text": "x"}',
        },
    }
    Hub.repositories["some/model"]["chat_template.jinja"] = (
        b"{% for m in messages %}<|bos|>{{ m['role'] }}\n{{ m['content'] }}<|eos|>\n{% endfor %}"
    )
    Hub.asked.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1", "ACCELERATE_MIXED_PRECISION": "no",
    }  # fmt: skip
    server.shutdown()
    server.server_close()


def python_m(module, *argv, env):
    return subprocess.run([sys.executable, "-m", module, *argv], capture_output=True, text=True, env=env)


@pytest.mark.slow
def test_run_from_the_hub_is_cached_for_use_offline(hub, tmp_path):
    data = ["--teacher_model", "some/model", "--dataset", "some/data", "--dataset_config", "small",
            "--eval_split", "test", "--max_length", "64"]  # fmt: skip
    done = python_m(
        "kdkit.train", *data, "--student_layers", "2", "--max_steps", "2", "--use_wandb", "false",
        "--output_dir", str(tmp_path / "run"), env=hub,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "conversations of column messages" in done.stdout and "step 0      held-out CE" in done.stdout
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    assert f"datasets/some/data/resolve/{COMMIT}/small/test.jsonl" in Hub.asked

    Hub.asked.clear()
    shown = python_m("kdkit.data", *data, env={**hub, "HF_HUB_OFFLINE": "1"})
    assert shown.returncode == 0, shown.stderr[-2000:]
    assert "<|bos|>assistant\n[assistant 1" in shown.stdout and not Hub.asked

    other = python_m("kdkit.data", *data[:4], "--dataset_config", "third", env=hub)
    assert other.stderr.strip().splitlines()[-1].startswith("kdkit: dataset some/data could not be loaded")
    assert "third" in other.stderr and "small" in other.stderr  # the configurations that exist


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_reason_in_a_wrapped_error_is_found_at_any_depth(depth):
    error: Exception = PermissionError(28, "No space left on device")
    for _ in range(depth):
        try:
            raise RuntimeError("wrapped") from error
        except RuntimeError as wrapped:
            error = wrapped
    with pytest.raises(UsageError, match="dataset x does not fit on the disk"), explained("dataset", "x", "try y"):
        raise error


def test_unknown_reason_is_quoted_with_the_remedy():
    with pytest.raises(UsageError) as error, explained("dataset", "x", "try y"):
        raise ValueError("odd\nlong")
    assert str(error.value) == "dataset x could not be loaded: odd (try y)"
