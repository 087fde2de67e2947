import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import wandb
from helpers import LIMIT, environment

from kdkit.config import RunStopped
from kdkit.running.tracking import Tracker, read_metrics, run_name
from kdkit.train import train

KEY = "0123456789abcdef0123456789abcdef01234567"
TRAIN_KEYS = {"loss", "ce_loss", "kl_loss", "learning_rate", "grad_norm", "epoch", "step", "tokens_per_second"}
EVAL_KEYS = {"loss", "ce_loss", "kl_loss", "min_loss", "epoch", "step", "perplexity", "kl_t1", "top1_agreement",
             "acceptance_rate", "teacher_ce_loss"}  # fmt: skip


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


def test_offline_run_has_the_settings_and_the_events_and_no_key(small, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    config = small(use_wandb=True, alpha=0.3, wandb_entity="team", max_steps=3)
    log, runs, events = wandb.Run.log, [], []

    def watched(run, event):
        runs.append(run)
        events.append(event)
        log(run, event)

    monkeypatch.setattr(wandb.Run, "log", watched)
    assert events == train(config) == read_metrics(Path(config.output_dir) / "metrics.jsonl") != []
    assert "and Weights & Biases (offline" in capsys.readouterr().out
    assert (runs[0].project, runs[0].entity, runs[0].name) == ("slm-distillation", "team", run_name(config))
    assert dict(runs[0].config) == config.as_dict()
    files = [path for path in Path(config.output_dir).rglob("*") if path.is_file()]
    assert len(files) > 10 and not [path for path in files if KEY.encode() in path.read_bytes()]


def test_run_without_wandb_continues(small, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = small(use_wandb=True, max_steps=1)
    train(config)
    assert "note     not to Weights & Biases: import of wandb" in capsys.readouterr().out
    assert steps_of(config) == [1]


@pytest.mark.slow
@pytest.mark.parametrize("key, why", [("", "not logged in"), (KEY, "")])
def test_run_without_a_login_or_an_answer_continues(small, tmp_path, key, why):
    config = small(use_wandb=True, max_steps=8)
    arguments = [f"--{name}={value}" for name, value in vars(config).items() if value is not None]
    # without the other variables of wandb: a client in this process leaves the address of its service in one
    variables = {name: value for name, value in environment().items() if not name.startswith("WANDB")}
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts connections, and never answers
        variables |= {"WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}", "HOME": str(tmp_path),
                      "WANDB_INIT_TIMEOUT": "2", "WANDB_FINISH_TIMEOUT": "3"}  # fmt: skip
        run = subprocess.run(
            [sys.executable, "-m", "kdkit.train", *arguments], env=variables | ({"WANDB_API_KEY": key} if key else {}),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT,
        )  # fmt: skip
    assert run.returncode == 0 and KEY not in run.stdout + run.stderr, run.stdout + run.stderr
    assert f"note     not to Weights & Biases: {why}" in run.stdout
    assert steps_of(config) == list(range(1, 9))


@pytest.mark.slow
def test_client_that_is_killed_costs_no_step(small, capsys):
    config = small(use_wandb=True, max_steps=8)

    def kill_the_client(event):
        if event.get("train/step") == 6:
            states = {file.parent.name: file.read_text() for file in Path("/proc").glob("[0-9]*/status")}
            clients = [int(pid) for pid, state in states.items() if f"PPid:\t{os.getpid()}\n" in state]
            for client in clients:
                os.kill(client, signal.SIGKILL)
            assert clients

    train(config, watch=kill_the_client)
    with suppress(ConnectionError):
        wandb.teardown()  # so that the next test starts another client
    assert "note     not to Weights & Biases: " in capsys.readouterr().out
    assert steps_of(config) == list(range(1, 9))


def test_run_that_is_resumed_has_the_same_id_and_one_that_starts_over_another(small):
    config, ids = small(use_wandb=True, max_steps=2, save_steps=1), {}
    for resume in ("auto", f"{config.output_dir}/checkpoints/step_00000001", "never"):
        train(replace(config, resume=resume), watch=lambda _, resume=resume: ids.update({resume: wandb.run.id}))
    first, resumed, over = ids.values()
    assert first == resumed != over == (Path(config.output_dir) / "wandb_id.txt").read_text()


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
