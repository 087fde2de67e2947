"""What a failing Weights & Biases costs: the real client, a server on this machine that answers, refuses or hangs.

python benchmarks/trackers.py        # ten minutes: seconds of the steps, the client's share of them, and of all

The server knows as much of the protocol as the client (0.31) asks of it, and nothing is sent anywhere else.
"""

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

KEY = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    """Answers as `server.mode` says: "answers", "refuses" (500) or "hangs", or one of these once a run has begun."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        self.server.requests.append((self.path, body.decode(errors="replace")))
        begun = any("UpsertBucket" in earlier for _, earlier in self.server.requests[:-1])
        mode = self.server.mode.removesuffix(" later")
        if mode == "answers" or (self.server.mode.endswith(" later") and not begun):
            return self.reply(200, self.answer(json.loads(body)) if self.path == "/graphql" else {})
        if mode == "hangs":
            self.server.closing.wait()
        self.reply(500, {"error": "refused"})

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

    def reply(self, status: int, answer: dict) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serve(mode: str):
    """A server in a thread; `requests` are the (path, body) that it got."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # a client that gave up waiting
    server.mode, server.requests, server.closing, server.daemon_threads = mode, [], threading.Event(), True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()


def environment(server, home: Path) -> dict:
    """That of a client that is logged in at the server."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    address = f"http://127.0.0.1:{server.server_port}"
    waits = {"WANDB_INIT_TIMEOUT": "5", "WANDB_FINISH_TIMEOUT": "3"}
    return {**kept, **waits, "WANDB_BASE_URL": address, "WANDB_API_KEY": KEY, "HOME": str(home)}


PROGRAM = """
import os, signal, subprocess, sys, time
from kdkit import load_config
from kdkit.running.tracking import Tracker
from kdkit.train import train
kill, times, calls, call = sys.argv[1] == "killed", [], [], Tracker._try_wandb
def timed(*arguments):
    started = time.perf_counter()
    call(*arguments)
    calls.append(time.perf_counter() - started)
Tracker._try_wandb = timed
def watch(event):
    if "train/step" in event:
        times.append(time.perf_counter())
    if kill and event.get("train/step") == 6:  # the client's process, a child of this one
        names = {pid: open(f"/proc/{pid}/comm").read() for pid in os.listdir("/proc") if pid.isdigit()}
        mine = [int(pid) for pid in names if f"PPid:\\t{os.getpid()}\\n" in open(f"/proc/{pid}/status").read()]
        for pid in mine:
            os.kill(pid, signal.SIGKILL)
        assert mine, "no process of the client's"
train(load_config(sys.argv[2:]), watch)
if times[4:]:
    print("SECONDS", times[-1] - times[4], sum(calls[6:-2]))  # step 6 to the last
"""


def run(case: str, folder: Path, steps: int) -> tuple[float, float, float, bool]:
    """Seconds of the steps from the sixth on, those spent in the client, of the whole program; metrics.jsonl whole?"""
    fields = {
        "max_train_tokens": 20000, "max_eval_tokens": 600, "max_length": 128, "logging_steps": 1, "eval_steps": "null",
        "save_steps": "null", "max_steps": steps, "output_dir": folder / "run", "use_wandb": case != "without",
    }  # fmt: skip
    command = [sys.executable, "-c", PROGRAM, case, *(f"--{name}={value}" for name, value in fields.items())]
    modes = {"without": "answers", "killed": "answers"}
    with serve(modes.get(case, case)) as server:
        started = time.perf_counter()
        done = subprocess.run(command, env=environment(server, folder), capture_output=True, text=True, timeout=300)
        took = time.perf_counter() - started
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    whole = [line["train/step"] for line in lines if "train/step" in line] == list(range(1, steps + 1))
    training, client = done.stdout.split("SECONDS")[1].split()
    return float(training), float(client), took, whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    cases = ["without", "answers", "refuses", "hangs", "refuses later", "hangs later", "killed"]
    seconds: dict[str, list] = {case: [] for case in cases}
    for _ in range(arguments.rounds):
        for case in cases:
            with tempfile.TemporaryDirectory() as folder:
                seconds[case].append(run(case, Path(folder), arguments.steps))
    print(
        "| the server, or the client's process | steps, s | x without | in the client | all, s | metrics.jsonl whole |"
    )
    print("|---|---|---|---|---|---|")
    for case, rounds in seconds.items():
        ratios = [mine[0] / base[0] for mine, base in zip(rounds, seconds["without"], strict=True)]
        steps, program = (statistics.median(x[i] for x in rounds) for i in (0, 2))
        client = f"{100 * statistics.median(x[1] / x[0] for x in rounds):.1f} %"
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
        whole = "yes" if all(x[3] for x in rounds) else "NO"
        print(f"| {case} | {steps:.2f} | {spread} | {client} | {program:.1f} | {whole} |")


if __name__ == "__main__":
    main()
