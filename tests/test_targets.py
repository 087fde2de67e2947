"""Stored targets: a run from them is the run with the teacher, and nothing else is taken for them."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import LIMIT, environment, run_processes
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_devices import arguments, assert_same_run, command

import kdkit.targets
from kdkit.config import UsageError
from kdkit.data import count_tokens, load_rows
from kdkit.models import load_teacher, load_tokenizer
from kdkit.running.tracking import read_metrics
from kdkit.targets import Parts, store, teacher_fingerprint
from kdkit.train import train

V = 1024  # of the embedded pair


@pytest.fixture
def stored(small, tmp_path, monkeypatch):
    """Makes configurations, with the targets they name stored, in several files."""
    monkeypatch.setattr(kdkit.targets, "PART_BYTES", 2**19)

    def make(**fields):
        config = small(**{"targets": "hidden", "targets_dir": str(tmp_path / "targets"), **fields})
        store(config)
        return config

    return make


def online(config, tmp_path):
    config = replace(config, targets="online", output_dir=str(tmp_path / "online"))
    train(config)
    return config


@pytest.mark.parametrize(
    "fields",
    [
        dict(targets="hidden", divergence="jsd", alpha=0.3, temperature=2.0, gradient_accumulation_steps=2),
        dict(targets="hidden", packing=False, divergence="total_variation", fused_loss=False),
        dict(targets="top_k", top_k=V, temperature=2.0, alpha=0.3),
        dict(targets="top_k", top_k=V, divergence="reverse_kl", packing=False, max_steps=9, num_epochs=1),
        dict(targets="top_k", top_k=V, divergence="jsd", fused_loss=False),
        dict(targets="hidden", alpha=1.0),
    ],
)
def test_a_run_from_stored_targets_is_the_run_with_the_teacher(stored, tmp_path, monkeypatch, fields):
    """Losses, gradient norms, evaluations, weights; and the teacher is not even loaded."""
    config = stored(eval_steps=2, batch_size=3, max_train_tokens=1500, **fields)  # more than one epoch
    reference = online(config, tmp_path)
    monkeypatch.setattr(kdkit.targets, "load_teacher", lambda *_: pytest.fail("the teacher is loaded"))
    train(config)
    # 1e-6 at the first step; Adam makes more of roundings afterwards
    first, expected = (read_metrics(Path(c.output_dir) / "metrics.jsonl")[1] for c in (config, reference))
    for key in ("train/ce_loss", "train/kl_loss", "train/loss", "train/grad_norm"):
        assert first[key] == pytest.approx(expected[key], rel=1e-6), key
    assert_same_run(config, reference, 2e-5)


def test_in_bf16(stored, tmp_path, monkeypatch):
    """Half the bytes; hidden states of bf16 are what the teacher gives, but for the batches it computes them in."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    config = stored()
    reference = online(config, tmp_path)
    train(config)
    ours, theirs = (read_metrics(Path(c.output_dir) / "metrics.jsonl")[1] for c in (config, reference))
    assert ours["train/kl_loss"] == pytest.approx(theirs["train/kl_loss"], rel=2e-3)
    tensors = load_file(Path(config.targets_dir) / "train-000000.safetensors")
    assert tensors["hidden"].dtype == torch.bfloat16
    config = stored(targets="top_k", top_k=8, targets_dir=str(tmp_path / "top_8"))
    tensors = load_file(Path(config.targets_dir) / "train-000000.safetensors")
    assert (tensors["ids"].dtype, tensors["log_probs"].dtype) == (torch.uint16, torch.float16)
    assert tensors["log_probs"].float().exp().sum(-1).sub(1).abs().max() < 5e-3


def test_few_tokens_give_a_lower_bound_and_the_exact_evaluation(stored, tmp_path):
    exact = read_metrics(Path(online(stored(), tmp_path).output_dir) / "metrics.jsonl")
    before = 0.0
    for k in (1, 8, 64):
        train(
            config := stored(
                targets="top_k", top_k=k, targets_dir=str(tmp_path / f"{k}"), output_dir=str(tmp_path / f"run{k}")
            )
        )
        events = read_metrics(Path(config.output_dir) / "metrics.jsonl")
        assert before < events[1]["train/kl_loss"] < exact[1]["train/kl_loss"]
        before = events[1]["train/kl_loss"]
        assert events[0] == pytest.approx(exact[0], rel=1e-6)  # the evaluation before training
    assert before > 0.7 * exact[1]["train/kl_loss"]


def test_rows_are_read_in_any_order(stored, tmp_path):
    config = stored(packing=False)
    rows, _ = load_rows(config, load_tokenizer(config))
    folder = Path(config.targets_dir)
    layout = kdkit.targets._read_json(folder)[1]["train"]
    parts = Parts(folder, "train", rows, layout)
    assert len(parts) > 2
    whole = torch.cat([load_file(parts.path(part))["hidden"] for part in range(len(parts))])
    assert len(whole) == count_tokens(rows)
    for row in (len(rows) - 1, 0, len(rows) // 2):
        assert torch.equal(parts.read([row])["hidden"], whole[parts.ends[row] : parts.ends[row + 1]])
    assert parts.read([])["hidden"].shape == (0, 256)


# --- nothing else is taken for them --------------------------------------------------------------------------


def test_another_setting_is_refused_by_name(stored):
    config = stored(targets="top_k", top_k=8)
    for fields, named in (
        (dict(max_length=32), "max_length was 64, is 32"),
        (dict(packing=False), "packing was True, is False"),
        (dict(max_train_tokens=2000), "max_train_tokens was 3000, is 2000"),
        (dict(temperature=2.0), "temperature was 1.0, is 2.0"),
        (dict(top_k=4), "top_k was 8, is 4"),
        (dict(targets="hidden"), "targets was 'top_k', is 'hidden'"),
    ):
        for refused in (train, store):
            with pytest.raises(UsageError, match=f"made for something else: {named}"):
                refused(replace(config, **fields))


def test_another_precision_is_refused(stored, monkeypatch):
    config = stored()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(UsageError, match="dtype was 'float32', is 'bfloat16'"):
        train(config)


def test_another_teacher_or_text_is_refused(stored, tmp_path, monkeypatch):
    text, model = tmp_path / "text.txt", tmp_path / "model"
    text.write_text("\n".join(f"line {number} of a text about nothing" for number in range(300)))
    teacher = load_teacher(dtype=torch.float32)
    teacher.save_pretrained(model)
    load_tokenizer(stored()).save_pretrained(model)
    config = stored(dataset=str(text), teacher_model=str(model), targets_dir=str(tmp_path / "mine"))
    before = teacher_fingerprint(config)
    teacher.model.layers[1].mlp.up_proj.weight.data[0] += 1
    teacher.save_pretrained(model)
    with pytest.raises(UsageError, match=f"teacher_model was '{before}', is"):
        train(config)
    monkeypatch.setattr(kdkit.targets, "teacher_folder", lambda config: None)  # the weights are on another machine
    train(config)
    text.write_text(text.read_text().replace("line 7 ", "line 8 "))
    with pytest.raises(UsageError, match="training text was"):
        train(config)


def test_a_student_of_the_teachers_layers(stored):
    """It is the one student that needs the teacher: once, to be made."""
    assert train(stored(student_layers=2))[-1]["eval/kl_t1"] > 0


def full_disk(tensors, path):
    if Path(path).name != ".writing_head.safetensors":
        Path(path).write_bytes(b"the beginning")
        raise SafetensorError("No space left on device")
    save_file(tensors, path)


def test_what_cannot_be_stored(small, tmp_path, monkeypatch, capsys):
    with pytest.raises(UsageError, match="targets is 'online', expected 'hidden' or 'top_k'"):
        store(small())
    with pytest.raises(UsageError, match="targets_dir is None"):
        small(targets="hidden")
    config = small(targets="top_k", top_k=V + 1, targets_dir=str(tmp_path / "targets"))
    with pytest.raises(UsageError, match="top_k is 1025, expected at most 1024"):
        store(config)
    with pytest.raises(UsageError, match="holds no targets"):
        train(config)
    monkeypatch.setattr(kdkit.targets.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**20}))
    with pytest.raises(UsageError, match=r"has 1 MiB free, the targets need 4 MiB"):
        store(replace(config, targets="hidden"))
    monkeypatch.setattr(kdkit.targets.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**30}))
    monkeypatch.setattr(kdkit.targets, "save_file", full_disk)
    with pytest.raises(UsageError, match=r"could not be written \(No space left.*make room"):
        store(replace(config, targets="hidden"))
    assert "MiB needed" in capsys.readouterr().out and not list(tmp_path.glob("targets/train*"))


# --- interrupted, damaged, shared ----------------------------------------------------------------------------


def files(folder) -> dict[str, bytes]:
    """The finished files of a folder that nobody writes to."""
    return {path.name: path.read_bytes() for path in Path(folder).glob("[!.]*.safetensors")}


def test_what_is_missing_or_damaged_is_noticed_and_made_again(stored):
    config = stored()
    whole, folder = files(config.targets_dir), Path(config.targets_dir)
    (folder / "train-000001.safetensors").unlink()
    (folder / "eval-000000.safetensors").write_bytes(whole["eval-000000.safetensors"][:-100])
    with pytest.raises(UsageError, match=r"1 of \d+ files of the train rows .* train-000001.safetensors is missing"):
        train(config)
    untouched = (folder / "train-000002.safetensors").stat().st_mtime_ns
    store(config)
    assert files(folder) == whole
    assert (folder / "train-000002.safetensors").stat().st_mtime_ns == untouched
    (folder / "eval-000000.safetensors").write_bytes(whole["eval-000000.safetensors"][:-100])
    with pytest.raises(UsageError, match=r"eval-000000.safetensors is damaged"):
        train(config)


def test_targets_killed_and_started_again_are_those_of_an_uncut_run(stored, tmp_path):
    """SIGKILL as soon as there are two files: the next run makes the others, and all are as if nothing had been."""
    config = stored(max_train_tokens=20000, batch_size=1)
    killed = replace(config, targets_dir=str(tmp_path / "killed"))
    program = "import kdkit.targets, sys; kdkit.targets.PART_BYTES = 2**19; kdkit.targets.main(sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", program, *arguments(killed)], env=environment())
    try:
        deadline = time.monotonic() + LIMIT
        while len(list(Path(killed.targets_dir).glob("train-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
    finally:
        process.kill()
        process.wait()  # nothing is read before it is dead
    whole = files(config.targets_dir)
    assert 2 <= len(files(killed.targets_dir)) < len(whole)
    store(killed)
    assert files(killed.targets_dir) == whole
    assert not list(Path(killed.targets_dir).glob(".writing*"))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_make_the_same_files(stored, tmp_path, kind):
    config = stored(targets="top_k", top_k=16, max_train_tokens=1450)  # five rows a rank do not divide
    theirs = replace(config, targets_dir=str(tmp_path / kind), batch_size=2, output_dir=str(tmp_path / f"run_{kind}"))
    program = tmp_path / "store.py"
    program.write_text(
        "import kdkit.targets, sys\nkdkit.targets.PART_BYTES = 2**19\nkdkit.targets.main(sys.argv[1:])\n"
    )
    for what in ([str(program)], ["-m", "kdkit.train"])[: 2 if kind == "fsdp" else 1]:
        run = run_processes(command(kind, *what, *arguments(theirs)))
        assert run.returncode == 0, run.stdout + run.stderr
    assert files(theirs.targets_dir).keys() == files(config.targets_dir).keys()
    for name in files(config.targets_dir):
        ours, found = (load_file(Path(folder) / name) for folder in (config.targets_dir, theirs.targets_dir))
        for key, value in ours.items():
            torch.testing.assert_close(found[key].double(), value.double(), rtol=1e-5, atol=1e-5)
    if kind == "fsdp":
        train(config)
        assert_same_run(theirs, config, 2e-5)
