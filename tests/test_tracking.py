import gzip
import importlib.util
import json
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import LIMIT, environment

from kdkit.config import RunStopped
from kdkit.running.checkpoint import checkpoints
from kdkit.running.tracking import Tracker, read_metrics, run_name
from kdkit.train import train

KEY = "0123456789abcdef0123456789abcdef01234567"
TRAIN_KEYS = {"loss", "ce_loss", "kl_loss", "learning_rate", "grad_norm", "epoch", "step", "tokens_per_second"}
EVAL_KEYS = {"loss", "ce_loss", "kl_loss", "min_loss", "epoch", "step", "perplexity", "kl_t1", "top1_agreement",
             "acceptance_rate", "teacher_ce_loss"}  # fmt: skip


class WandbServer(BaseHTTPRequestHandler):
    """As much of Weights & Biases as its client (0.31) asks for. `server.mode`: answers, hangs, or refuses later."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        self.server.requests.append((self.path, body.decode(errors="replace")))
        if self.server.mode == "hangs":
            self.server.closing.wait()
        started = any("UpsertBucket" in earlier for _, earlier in self.server.requests[:-1])
        status = 500 if self.server.mode == "hangs" or (self.server.mode == "refuses later" and started) else 200
        content = json.dumps(self.answer(json.loads(body)) if self.path == "/graphql" else {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST

    def answer(self, request: dict) -> dict:
        query, variables = request["query"], request.get("variables") or {}
        if "upsertBucket" in query:
            project = {"id": "p", "name": "slm", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": variables.get("name"), "config": "{}", "historyLineCount": 0}
            return {"data": {"upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": True}}}
        if "createRunFiles" in query:
            address = f"http://127.0.0.1:{self.server.server_port}/upload"
            found = [{"name": name, "uploadUrl": address} for name in variables["files"]]
            return {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": found}}}
        return {"data": {"model": None}}


@contextmanager
def serve(mode: str = "answers"):
    """A server in a thread; `requests` are the (path, body) that it received."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), WandbServer)
    server.handle_error = lambda *_: None  # a client that gave up waiting
    server.mode, server.requests, server.closing, server.daemon_threads = mode, [], threading.Event(), True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()


def program(server, home: Path, *command: str, key: str = KEY) -> str:
    """What a Python program prints whose wandb client is logged in at the server."""
    variables = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": key, "HOME": str(home),
                 "WANDB_INIT_TIMEOUT": "2", "WANDB_FINISH_TIMEOUT": "3", "WANDB_MODE": ""}  # fmt: skip
    variables = {name: value for name, value in environment(**variables).items() if value}
    run = subprocess.run(
        [sys.executable, *command], env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=LIMIT,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert KEY not in run.stdout + run.stderr
    return run.stdout


def arguments(config) -> list[str]:
    return [f"--{name}={value}" for name, value in vars(config).items() if value is not None]


def received(server) -> tuple[dict, list[dict]]:
    """The first description of the run that the server received, and the logged events."""
    bodies = [json.loads(body) for path, body in server.requests if path.endswith(("graphql", "file_stream"))]
    run = next(body["variables"] for body in bodies if "upsertBucket" in body.get("query", ""))
    files = [body["files"]["wandb-history.jsonl"]["content"] for body in bodies if "wandb-history" in str(body)]
    events = [json.loads(line) for content in files for line in content]
    return run, [{name: value for name, value in event.items() if name[0] != "_"} for event in events]


def steps_of(config):
    events = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    return [event["train/step"] for event in events if "train/step" in event]


def test_metrics_of_a_run_have_every_key(small):
    config = small(max_steps=4, eval_steps=2, logging_steps=2)
    history = train(config)
    lines = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert lines == history
    train_lines = [line for line in lines if "train/step" in line]
    eval_lines = [line for line in lines if "eval/step" in line]
    assert [line["train/step"] for line in train_lines] == [2, 4]
    assert [line["eval/step"] for line in eval_lines] == [0, 2, 4]
    assert all(line.keys() == {f"train/{key}" for key in TRAIN_KEYS} for line in train_lines)
    assert all(line.keys() == {f"eval/{key}" for key in EVAL_KEYS} for line in eval_lines)


def test_min_loss_when_the_loss_rises_stays_the_least_so_far_on_resume_too(small):
    config, least = small(), []
    Path(config.output_dir).mkdir()
    for start, losses in ((0, [3.0, 1.0, 2.0]), (2, [1.5, 0.5, 4.0])):  # the evaluation after step 2 is kept
        tracker = Tracker(config, step=start)
        for step, loss in enumerate(losses, start=start + (start > 0)):
            tracker.log_evaluation({"eval/loss": loss}, step=step, epoch=0.0)
        tracker.finish()
        least.append([event["eval/min_loss"] for event in tracker.history])
    assert least == [[3.0, 1.0, 1.0], [3.0, 1.0, 1.0, 1.0, 0.5, 0.5]]
    assert [event["eval/min_loss"] for event in read_metrics(Path(config.output_dir) / "metrics.jsonl")] == least[1]


def test_offline_run_read_by_wandb_sync_has_the_settings_and_the_events(small, tmp_path, capsys):
    config = small(use_wandb=True, alpha=0.3, wandb_entity="team", max_steps=3)
    history = train(config)
    assert "and Weights & Biases (offline" in capsys.readouterr().out
    (folder,) = Path(config.output_dir).glob("wandb/offline-run-*")
    with serve() as server:
        program(server, tmp_path, "-m", "wandb", "sync", str(folder))
        run, events = received(server)
    assert (run["project"], run["entity"], run["displayName"]) == ("slm-distillation", "team", run_name(config))
    settings = {name: entry["value"] for name, entry in json.loads(run["config"]).items() if name != "_wandb"}
    assert settings == config.as_dict()
    assert events == history


def test_run_without_wandb_continues(small, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    config = small(use_wandb=True, max_steps=1)
    train(config)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "Weights & Biases" in line]
    assert "metrics.jsonl (not to Weights & Biases: " in line and "not installed" in line
    assert steps_of(config) == [1]


@pytest.mark.parametrize("mode, key, why", [("answers", "", "not logged in"), ("hangs", KEY, "249")])
def test_run_without_a_login_or_an_answer_continues(small, tmp_path, mode, key, why):
    config = small(use_wandb=True, max_steps=8)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb_id.txt").write_text("249")
    with serve(mode) as server:
        printed = program(server, tmp_path, "-m", "kdkit.train", *arguments(config), key=key)
    (line,) = [line for line in printed.splitlines() if "Weights & Biases" in line]
    assert "metrics.jsonl (not to Weights & Biases: " in line and why in line
    assert steps_of(config) == list(range(1, 9))


def test_server_that_refuses_after_the_start_costs_no_step(small, tmp_path):
    config = small(use_wandb=True, max_steps=8)
    with serve("refuses later") as server:
        printed = program(server, tmp_path, "-m", "kdkit.train", *arguments(config))
        assert "and Weights & Biases (http://127.0.0.1" in printed
        assert any("file_stream" in path for path, _ in server.requests)
    assert steps_of(config) == list(range(1, 9))


KILL_THE_CLIENT = """
import os, pathlib, signal, sys
from kdkit import load_config
from kdkit.train import train
def watch(event):
    if event.get("train/step") == 6:
        states = {file.parent.name: file.read_text() for file in pathlib.Path("/proc").glob("[0-9]*/status")}
        clients = [int(pid) for pid, state in states.items() if f"PPid:\\t{os.getpid()}\\n" in state]
        assert clients
        for client in clients:
            os.kill(client, signal.SIGKILL)
train(load_config(sys.argv[1:]), watch)
"""


def test_client_that_is_killed_costs_no_step_and_the_resumed_run_keeps_its_id_and_no_key_is_written(small, tmp_path):
    config = small(use_wandb=True, max_steps=8, save_steps=4)
    ids = []
    for command in (["-c", KILL_THE_CLIENT], ["-m", "kdkit.train"]):
        with serve() as server:
            printed = program(server, tmp_path, *command, *arguments(config))
            assert ("Weights & Biases failed (" in printed) == (command[0] == "-c")
        for query in ("RunResumeStatus", "UpsertBucket"):  # the client asks for the run, and continues it
            (body,) = [body for path, body in server.requests if path == "/graphql" and query in body][:1]
            ids.append(json.loads(body)["variables"]["name"])
        assert steps_of(config) == list(range(1, 9))
        shutil.rmtree(checkpoints(config.output_dir)[-1])  # so that there is something to resume
    assert set(ids) == {(Path(config.output_dir) / "wandb_id.txt").read_text()}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10 and not [path for path in files if KEY.encode() in path.read_bytes()]


def test_run_that_starts_over_has_another_id(small):
    config, ids = small(use_wandb=True, max_steps=1, resume="never"), set()
    for _ in range(2):
        train(config)
        ids.add((Path(config.output_dir) / "wandb_id.txt").read_text())
    assert len(ids) == 2


def test_disk_too_full_for_a_line_stops_the_run(small, no_file_above):
    config = small()
    Path(config.output_dir).mkdir()
    tracker = Tracker(config)
    with no_file_above(10), pytest.raises(RunStopped, match=r"metrics.jsonl cannot be written \(File too large\)"):
        tracker.log_evaluation({"eval/loss": 1.0}, step=0, epoch=0.0)
    tracker.finish()


def test_run_name_is_made_from_the_settings(small):
    assert run_name(small(alpha=0.5, temperature=2, seed=3)) == "embedded-to-embedded-forward_kl-alpha0.5-T2-seed3"
    assert run_name(small(alpha=1)) == "embedded-to-embedded-ce-seed0"


def test_log_that_is_resumed_drops_the_events_that_are_repeated(small):
    config = small()
    path = Path(config.output_dir) / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    events = [{"train/step": step, "train/loss": 1.0} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(event) + "\n" for event in events) + '{"train/step": 4, "trai')
    tracker = Tracker(config, step=2)
    tracker.log_training(loss=1.0, step=3, epoch=0.5)
    tracker.finish()
    assert [event["train/step"] for event in read_metrics(path)] == [1, 2, 3]
    assert "train/epoch" in read_metrics(path)[-1]


def test_damaged_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"train/step": 1}\n{"tra\n{"train/step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_metrics(tmp_path / "metrics.jsonl")
