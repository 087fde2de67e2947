import importlib.util
import json
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from kdkit.config import RunStopped
from kdkit.running.checkpoint import checkpoints
from kdkit.running.tracking import Tracker, read_metrics, run_name
from kdkit.train import train

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
spec = importlib.util.spec_from_file_location("trackers", BENCHMARKS / "trackers.py")
trackers = importlib.util.module_from_spec(spec)
sys.modules["trackers"] = trackers
spec.loader.exec_module(trackers)

TRAIN_KEYS = {"loss", "ce_loss", "kl_loss", "learning_rate", "grad_norm", "epoch", "step", "tokens_per_second"}
EVAL_KEYS = {"loss", "ce_loss", "kl_loss", "min_loss", "epoch", "step", "perplexity", "kl_t1", "top1_agreement",
             "acceptance_rate", "teacher_ce_loss"}  # fmt: skip


def offline_records(folder: Path):
    """The records that the wandb client wrote: LevelDB's log format, after a header of seven bytes."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content, record, position = file.read_bytes(), b"", 7
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # the end of a block holds no header
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(record)
            record = b""


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


def test_the_real_client_writes_the_same_offline(small, capsys):
    config = small(use_wandb=True, alpha=0.3, wandb_entity="team", max_steps=3)
    history = train(config)
    assert "and Weights & Biases (offline" in capsys.readouterr().out
    for _ in range(100):  # the client's process may still be writing, on a busy machine
        records = list(offline_records(Path(config.output_dir)))
        if any(record.HasField("exit") for record in records):
            break
        time.sleep(0.2)
    (run,) = [record.run for record in records if record.HasField("run")][:1]
    assert (run.project, run.entity, run.display_name) == ("slm-distillation", "team", run_name(config))
    settings = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert settings["alpha"] == 0.3 and settings["teacher_model"] == "embedded"
    logged = []
    for record in records:
        if record.HasField("history"):
            row = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
            logged.append({key: value for key, value in row.items() if not key.startswith("_")})
    assert logged == history


def assert_goes_on_without(printed, config, why):
    (line,) = [line for line in printed.splitlines() if "Weights & Biases" in line]
    assert "metrics.jsonl (not to Weights & Biases: " in line and why in line
    assert len(read_metrics(Path(config.output_dir) / "metrics.jsonl")) == 3


def test_without_the_client_a_run_goes_on(small, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    config = small(use_wandb=True, max_steps=1)
    train(config)
    assert_goes_on_without(capsys.readouterr().out, config, "not installed")


def with_client(config, server, home, case="", **changes) -> str:
    """What a run prints whose real client, logged in, talks to a server of this machine."""
    environment = {**trackers.environment(server, home), "WANDB_INIT_TIMEOUT": "2", **changes}
    arguments = [f"--{name}={value}" for name, value in vars(config).items() if value is not None]
    run = subprocess.run(
        [sys.executable, "-c", trackers.PROGRAM, case, *arguments],
        env={name: value for name, value in environment.items() if value}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert trackers.KEY not in run.stdout + run.stderr
    return run.stdout


def steps_of(config):
    events = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    return [event["train/step"] for event in events if "train/step" in event]


@pytest.mark.parametrize("mode, key, why", [("answers", "", "not logged in"), ("hangs", trackers.KEY, "249")])
def test_without_a_login_or_an_answer_a_run_goes_on(small, tmp_path, mode, key, why):
    config = small(use_wandb=True, max_steps=8)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb_id.txt").write_text("249")
    with trackers.serve(mode) as server:
        printed = with_client(config, server, tmp_path, WANDB_API_KEY=key)
    (line,) = [line for line in printed.splitlines() if "Weights & Biases" in line]
    assert "metrics.jsonl (not to Weights & Biases: " in line and why in line
    assert steps_of(config) == list(range(1, 9))


def test_a_server_that_begins_to_refuse_costs_no_step(small, tmp_path):
    config = small(use_wandb=True, max_steps=8)
    with trackers.serve("refuses later") as server:
        assert "and Weights & Biases (http://127.0.0.1" in with_client(config, server, tmp_path)
        assert any("file_stream" in path for path, _ in server.requests)
    assert steps_of(config) == list(range(1, 9))


def test_a_client_that_is_killed_costs_no_step_and_the_run_goes_on_under_its_id(small, tmp_path):
    """And its key is nowhere: not printed, not in a file of the run."""
    config = small(use_wandb=True, max_steps=8, save_steps=4)
    ids = []
    for case in ("killed", ""):
        with trackers.serve("answers") as server:
            printed = with_client(config, server, tmp_path, case)
            assert ("no more to Weights & Biases (" in printed) == (case == "killed")
        for query in ("RunResumeStatus", "UpsertBucket"):  # asks whether the run is there, and goes on with it
            (body,) = [body for path, body in server.requests if path == "/graphql" and query in body][:1]
            ids.append(json.loads(body)["variables"]["name"])
        assert steps_of(config) == list(range(1, 9))
        shutil.rmtree(checkpoints(config.output_dir)[-1])  # so that there is something to go on with
    assert set(ids) == {(Path(config.output_dir) / "wandb_id.txt").read_text()}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10 and not [path for path in files if trackers.KEY.encode() in path.read_bytes()]


def test_a_run_that_starts_over_is_another_one(small):
    config = small(use_wandb=True, max_steps=1)
    train(config)
    first = (Path(config.output_dir) / "wandb_id.txt").read_text()
    train(small(use_wandb=True, max_steps=1, resume="never"))
    assert (Path(config.output_dir) / "wandb_id.txt").read_text() != first


def test_a_disk_too_full_for_a_line_stops_the_run(small, no_file_above):
    config = small()
    Path(config.output_dir).mkdir()
    tracker = Tracker(config)
    with no_file_above(10), pytest.raises(RunStopped, match=r"metrics.jsonl cannot be written \(File too large\)"):
        tracker.log_evaluation({"eval/loss": 1.0}, step=0, epoch=0.0)
    tracker.finish()


def test_the_run_has_a_telling_name(small):
    assert run_name(small(alpha=0.5, temperature=2, seed=3)) == "embedded-to-embedded-forward_kl-alpha0.5-T2-seed3"
    assert run_name(small(alpha=1)) == "embedded-to-embedded-ce-seed0"


def test_a_log_that_goes_on_drops_what_will_be_logged_again(small):
    config = small()
    path = Path(config.output_dir) / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    events = [{"train/step": step, "train/loss": 1.0} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(event) + "\n" for event in events) + '{"train/step": 4, "trai')
    tracker = Tracker(config, step=2)
    tracker.log_training(1, 1, 1, 1, 1, 1, step=3, epoch=0.5)
    tracker.finish()
    assert [event["train/step"] for event in read_metrics(path)] == [1, 2, 3]
    assert "train/epoch" in read_metrics(path)[-1]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"train/step": 1}\n{"tra\n{"train/step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_metrics(tmp_path / "metrics.jsonl")
