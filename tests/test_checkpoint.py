import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdkit.checkpoint import checkpoints, find_checkpoint
from kdkit.config import UsageError
from kdkit.devices import start_accelerator
from kdkit.models import ASSETS, count_parameters
from kdkit.train import train


class Cut(Exception):
    """Ends a run as Ctrl-C would."""


def cut_after(step):
    def watch(event):
        if event.get("train/step") == step:
            raise Cut

    return watch


def with_dropout(tmp_path, **fields) -> str:
    """A config of the student that has dropout."""
    folder = shutil.copytree(ASSETS / "embedded_student", tmp_path / "student", dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.2, **fields}))
    return str(folder)


def numbers(history):
    """What a run computed, without how long it took."""
    return [{k: v for k, v in event.items() if k != "train/tokens_per_second"} for event in history]


def weights(config):
    return load_file(Path(config.output_dir) / "final" / "model.safetensors")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_cut_in_an_epoch_and_resumed_is_the_uncut_one_bit_for_bit(small, tmp_path, monkeypatch, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    fields = dict(
        student_model=with_dropout(tmp_path), student_random_init=True, gradient_accumulation_steps=2, batch_size=2,
        max_steps=20, save_steps=4, eval_steps=5, alpha=0.3,
    )  # fmt: skip
    whole = small(**fields, output_dir=str(tmp_path / "whole"))
    uncut = train(whole)
    assert uncut[-1]["eval/epoch"] > 1  # 12 steps an epoch: the cut is inside the second
    parts = small(**fields, output_dir=str(tmp_path / "parts"))
    for step in (7, 14):
        with pytest.raises(Cut):
            train(parts, watch=cut_after(step))
    resumed = train(parts)
    assert numbers(resumed) == numbers(uncut)
    logged = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in logged] == resumed
    first, second = weights(whole), weights(parts)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_dropout_is_at_work_in_that_test(small, tmp_path):
    losses = []
    for dropout in (0.0, 0.2):
        config = small(
            student_model=with_dropout(tmp_path, attention_dropout=dropout), student_random_init=True, max_steps=1,
            output_dir=str(tmp_path / f"run{dropout}"),
        )  # fmt: skip
        losses.append(train(config)[1]["train/loss"])
    assert losses[0] != losses[1]


def test_the_last_three_are_kept_and_nothing_else_is_left(small):
    config = small(max_steps=10, save_steps=2)
    train(config)
    names = sorted(os.listdir(Path(config.output_dir) / "checkpoints"))
    assert names == ["step_00000006", "step_00000008", "step_00000010"]
    assert sorted(os.listdir(config.output_dir)) == ["checkpoints", "config.yaml", "final", "metrics.jsonl"]


def test_the_oldest_goes_only_once_the_new_one_is_there(small, monkeypatch):
    config = small(max_steps=8, save_steps=2)
    train(config)
    before = checkpoints(config.output_dir)
    config = small(max_steps=8, save_steps=2, resume="never")
    seen = []
    rename = os.rename

    def watched(source, target):
        if Path(target).name.startswith("step_"):
            seen.append(len(checkpoints(config.output_dir)))
        rename(source, target)

    monkeypatch.setattr(os, "rename", watched)
    train(config)
    assert len(before) == 3 and seen == [0, 1, 2, 3]  # three whole ones while the fourth was being renamed


def test_a_save_that_was_cut_short_is_not_a_checkpoint(small, monkeypatch):
    config = small(max_steps=6, save_steps=2)
    from torch.distributed import checkpoint as dcp

    save, calls = dcp.save, []

    def cut_in_the_second(state, **options):
        save(state, **options)
        calls.append(1)
        if len(calls) == 2:
            raise Cut

    monkeypatch.setattr(dcp, "save", cut_in_the_second)
    with pytest.raises(Cut):
        train(config)
    assert [path.name for path in checkpoints(config.output_dir)] == ["step_00000002"]
    history = train(config)
    assert [event["train/step"] for event in history if "train/step" in event] == [1, 2, 3, 4, 5, 6]
    assert not [name for name in os.listdir(Path(config.output_dir) / "checkpoints") if name.startswith(".")]


def test_a_finished_run_started_again_changes_nothing(small):
    config = small(save_steps=3)
    first = train(config)
    before = weights(config)
    assert train(config) == first
    assert all(torch.equal(before[name], value) for name, value in weights(config).items())


def test_no_teacher_is_in_a_checkpoint(small):
    config = small(max_steps=1)
    train(config)
    (path,) = checkpoints(config.output_dir)
    tensors = {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}
    assert {name.split(".")[0] for name in tensors} == {"model", "optimizer", "rng"}
    names = {file.suffix or file.name for file in path.iterdir()}
    assert names == {".safetensors", ".json", "SHA256SUMS"}  # nothing pickled
    student = AutoModelForCausalLM.from_pretrained(Path(config.output_dir) / "final")
    saved = sum(t.numel() for name, t in tensors.items() if name.startswith("model."))
    assert saved == count_parameters(student)  # tied weights once, and not the teacher's


# --- which checkpoint


def test_another_configuration_in_the_folder_is_refused_with_the_fields(small):
    train(small(max_steps=1))
    with pytest.raises(UsageError) as error:
        train(small(max_steps=1, alpha=0.5, learning_rate=1e-3))
    for words in ("alpha was 0.0, is 0.5", "learning_rate was 0.002, is 0.001", "--output_dir", "--resume never"):
        assert words in str(error.value)


def test_how_a_run_is_watched_may_change(small):
    train(small(max_steps=2, save_steps=1))
    train(small(max_steps=2, save_steps=2, logging_steps=5, keep_checkpoints=1, wandb_project="other"))


def test_never_starts_over(small):
    train(small(max_steps=4, save_steps=1))
    history = train(small(max_steps=2, alpha=0.5, resume="never"))
    assert [event["train/step"] for event in history if "train/step" in event] == [1, 2]
    assert [path.name for path in checkpoints(small().output_dir)] == ["step_00000002"]


def test_a_path_goes_on_from_there(small):
    config = small(max_steps=6, save_steps=2)
    first = train(config)
    history = train(small(max_steps=6, save_steps=2, resume=f"{config.output_dir}/checkpoints/step_00000004"))
    assert numbers(history) == numbers(first)


def test_a_path_that_is_no_checkpoint_is_named(small, tmp_path):
    with pytest.raises(UsageError, match="which is no checkpoint"):
        find_checkpoint(small(resume=str(tmp_path)), start_accelerator())


def test_an_output_folder_that_cannot_be_written_is_named(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"output_dir .* cannot be written"):
        train(small(output_dir=str(tmp_path / "file" / "run")))


# --- the student that is left


@pytest.mark.parametrize("tied", [True, False])
def test_final_is_a_folder_that_transformers_loads(small, tmp_path, tied):
    folder = with_dropout(tmp_path, tie_word_embeddings=tied)
    config = small(student_model=folder, student_random_init=True, max_steps=3)
    train(config)
    final = Path(config.output_dir) / "final"
    model = AutoModelForCausalLM.from_pretrained(final)
    assert type(model).__name__ == "LlamaForCausalLM" and model.config.tie_word_embeddings == tied
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied
    (newest,) = checkpoints(config.output_dir)
    saved = {name: t for file in newest.glob("*.safetensors") for name, t in load_file(file).items()}
    for name, value in model.named_parameters():
        assert torch.equal(saved[f"model.model.{name}"], value), name
    assert AutoTokenizer.from_pretrained(final)("import os")["input_ids"][0] == 0
    assert yaml.safe_load((Path(config.output_dir) / "config.yaml").read_text())["student_model"] == folder


def test_a_killed_run_goes_on(small, tmp_path):
    """SIGKILL in the middle, then the same command again: the end is that of a run left alone."""
    config = small(max_steps=30, save_steps=5)
    arguments = [f"--{name}={value}" for name, value in vars(config).items() if value is not None]
    command = [sys.executable, "-m", "kdkit.train", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while len(checkpoints(config.output_dir)) < 2:
            assert process.poll() is None, process.stdout.read().decode()
        process.kill()
    subprocess.run(command, check=True, capture_output=True)
    whole = small(max_steps=30, save_steps=None, output_dir=str(tmp_path / "whole"))
    train(whole)
    first, second = weights(whole), weights(config)
    assert all(torch.equal(first[name], second[name]) for name in first)
    steps = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert [event["train/step"] for event in steps if "train/step" in event] == list(range(1, 31))
