import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from helpers import FIELDS, student_with_dropout, with_another
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdkit import DistillConfig
from kdkit.config import RunStopped, UsageError
from kdkit.data import load_rows
from kdkit.models import count_parameters, load_tokenizer
from kdkit.running import files
from kdkit.running.checkpoint import checkpoints, find_checkpoint
from kdkit.running.devices import start_accelerator
from kdkit.running.tracking import read_metrics
from kdkit.targets import store
from kdkit.train import main, train

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
spec = importlib.util.spec_from_file_location("kills", BENCHMARKS / "kills.py")
kills = importlib.util.module_from_spec(spec)
sys.modules["kills"] = kills
spec.loader.exec_module(kills)


class Cut(Exception):
    """Ends a run as Ctrl-C would."""


def cut_after(step):
    def watch(event):
        if event.get("train/step") == step:
            raise Cut

    return watch


def numbers(history):
    """What a run computed, without how long it took."""
    return [{k: v for k, v in event.items() if k != "train/tokens_per_second"} for event in history]


def weights(config):
    return load_file(Path(config.output_dir) / "final" / "model.safetensors")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_cut_in_an_epoch_and_resumed_is_the_uncut_one_bit_for_bit(small, tmp_path, monkeypatch, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    fields = dict(
        student_model=student_with_dropout(tmp_path / "student"), student_random_init=True,
        gradient_accumulation_steps=2, batch_size=2, max_steps=20, save_steps=4, eval_steps=5, alpha=0.3,
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
            student_model=student_with_dropout(tmp_path / "student", dropout), student_random_init=True, max_steps=1,
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


# Fields that say how a run is watched, stored and laid out. All others decide what it computes.
FREE = {"output_dir", "resume", "logging_steps", "eval_steps", "save_steps", "keep_checkpoints", "num_proc",
        "teacher_placement", "targets_dir", "export_dtype", "fused_loss", "compile_loss", "use_wandb", "wandb_project",
        "wandb_entity", "wandb_run_name"}  # fmt: skip


def test_each_field_that_is_not_free_is_refused_by_name_on_resume(small):
    config = small(max_steps=1, packing=False, targets_dir="stored")
    train(config)
    for name in set(FIELDS) - FREE:
        with pytest.raises(UsageError, match=rf"another configuration: {name} was .*, is [^;]*\. Choose"):
            train(with_another(config, name))


def test_all_free_fields_together_are_accepted_on_resume(small, tmp_path):
    config = small(max_steps=3, save_steps=1, eval_steps=1)
    with pytest.raises(Cut):
        train(config, watch=cut_after(3))
    moved = shutil.copytree(config.output_dir, tmp_path / "moved")
    given = {"output_dir": str(moved), "resume": str(moved / "checkpoints" / "step_00000002")}
    history = train(replace(with_another(config, *FREE - given.keys()), **given))
    assert [event["train/step"] for event in history if "train/step" in event] == [1, 2, 3]


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
    folder = student_with_dropout(tmp_path / "student", tie_word_embeddings=tied)
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


# --- kills


def test_a_killed_run_ends_as_one_left_alone(tmp_path):
    """SIGKILL in an evaluation, in a save and while exporting, each time the same command again."""
    alone = DistillConfig(**kills.RUN, max_steps=16, output_dir=str(tmp_path / "alone_1"))
    train(alone)
    moments = ["in an evaluation", "in a save", "while exporting"]
    result = kills.series(tmp_path, moments, num_ranks=1, max_steps=16)
    assert result["kills"].total() == result["restarts"] == 3
    assert (result["lost"], result["once"], result["equal"]) == (0, True, True)


def test_killed_before_the_first_checkpoint_it_begins_anew(small):
    config = small(max_steps=3)
    with pytest.raises(Cut):
        train(config, watch=cut_after(2))
    assert [event.get("eval/step") for event in train(config)] == [0, None, None, None, 3]


# --- broken checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of six steps with a checkpoint after each second one."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    AcceleratorState._reset_state(reset_partial_state=True)
    config = DistillConfig(
        max_train_tokens=3000, max_eval_tokens=600, max_length=64, batch_size=4, max_steps=6, logging_steps=1,
        eval_steps=None, save_steps=2, use_wandb=False, output_dir=str(tmp_path_factory.mktemp("saved") / "run"),
    )  # fmt: skip
    train(config)
    AcceleratorState._reset_state(reset_partial_state=True)
    return config


@pytest.fixture
def run(saved, tmp_path):
    """A copy of it that may be damaged."""
    shutil.copytree(saved.output_dir, tmp_path / "run")
    return DistillConfig(**{**vars(saved), "output_dir": str(tmp_path / "run")})


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def drop_a_line(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def keep_nothing_but(path):
    for other in set(path.parent.iterdir()) - {path}:
        other.unlink()


SHARD = "shard-00001-model-00001-of-00001.safetensors"
DAMAGES = [
    (truncate, SHARD, f"{SHARD} ("),
    (flip_a_bit, SHARD, "is not what was written"),
    (Path.unlink, SHARD, f"{SHARD} is missing"),
    (flip_a_bit, "trainer.json", "trainer.json"),
    (Path.unlink, "trainer.json", "trainer.json is missing"),
    (Path.unlink, "SHA256SUMS", "SHA256SUMS is missing"),
    (drop_a_line, "SHA256SUMS", "SHA256SUMS does not list trainer.json"),
    (truncate, "SHA256SUMS", "SHA256SUMS does not list"),
    (flip_a_bit, "SHA256SUMS", ""),
    (keep_nothing_but, "SHA256SUMS", "is missing"),
]


@pytest.mark.parametrize("damage, file, why", DAMAGES, ids=lambda x: getattr(x, "__name__", None))
def test_a_broken_checkpoint_is_passed_over_and_named(run, capsys, damage, file, why):
    before, newest = checkpoints(run.output_dir)[-2:]
    damage(newest / file)
    assert find_checkpoint(run, start_accelerator()) == before
    (line,) = capsys.readouterr().out.splitlines()
    assert why in line and "step_00000006 (" in line and "going on from step_00000004" in line


def test_from_the_one_before_the_run_ends_as_it_would_have(saved, run):
    for name, damage in (("step_00000006", truncate), ("step_00000004", flip_a_bit)):
        damage(Path(run.output_dir) / "checkpoints" / name / SHARD)
    assert numbers(train(run)) == numbers(read_metrics(Path(saved.output_dir) / "metrics.jsonl"))
    assert all(torch.equal(value, weights(run)[name]) for name, value in weights(saved).items())


def test_without_a_whole_one_the_error_says_what_was_tried_and_nothing_is_touched(run):
    for path in checkpoints(run.output_dir):
        truncate(path / SHARD)
    (checkpoints(run.output_dir)[0] / "trainer.json").unlink()
    before = sorted(Path(run.output_dir).rglob("*"))
    with pytest.raises(UsageError) as error:
        train(run)
    for words in ("step_00000006 (shard", "step_00000004 (shard", "step_00000002 (", "--resume never"):
        assert words in str(error.value)
    assert sorted(Path(run.output_dir).rglob("*")) == before


def test_a_path_to_a_broken_one_is_refused(run):
    path = checkpoints(run.output_dir)[-1]
    flip_a_bit(path / SHARD)
    with pytest.raises(UsageError, match="is not what was written"):
        train(DistillConfig(**{**vars(run), "resume": str(path)}))


def test_broken_ones_do_not_push_out_whole_ones(run):
    for path in checkpoints(run.output_dir)[1:]:
        truncate(path / SHARD)
    config = DistillConfig(**{**vars(run), "save_steps": 1, "keep_checkpoints": 1})
    with pytest.raises(Cut):
        train(config, watch=cut_after(4))
    assert [path.name for path in checkpoints(run.output_dir)] == ["step_00000003"]


def rewrite(path, change):
    """Change the tensors of a checkpoint, and its checksums with them."""
    with safe_open(path / SHARD, "pt") as file:
        parts = json.loads(file.metadata()["DCP_SHARDING_INFO"])
    tensors = change(load_file(path / SHARD))
    parts = {name: parts.get(name, {"saved_offsets": [0] * value.ndim}) for name, value in tensors.items()}
    save_file(tensors, path / SHARD, metadata={"DCP_SHARDING_INFO": json.dumps(parts)})
    files.write_sums(path, {name: files.sha256(path / name) for name in (SHARD, "trainer.json")})


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda t: {k: v for k, v in t.items() if k != "model.model.model.norm.weight"}, "norm.weight is None"),
        (lambda t: {**t, "model.model.model.norm.weight": torch.zeros(7)}, r"norm.weight is \(7,\)"),
        (lambda t: {**t, "model.model.model.layers.2.x": torch.zeros(7)}, "layers.2.x"),
        (lambda t: {k: v for k, v in t.items() if "exp_avg_sq" not in k}, "optimizer.state.*exp_avg_sq is None"),
    ],
)
def test_a_checkpoint_of_something_else_is_not_loaded_in_part(run, change, named):
    rewrite(checkpoints(run.output_dir)[-1], change)
    with pytest.raises(UsageError, match=f"does not fit the student: .*{named}"):
        train(run)


def test_it_is_on_the_disk_before_it_counts(small, monkeypatch):
    """The order in which a power cut could otherwise undo things: content, name, the folder with the name."""
    config, done = small(max_steps=2, save_steps=2), []
    rename = os.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
    monkeypatch.setattr(os, "rename", lambda a, b: (done.append(("rename", Path(b).name)), rename(a, b)))
    train(config)
    (newest,) = checkpoints(config.output_dir)
    named = done.index(("rename", newest.name))
    aside = newest.with_name(f".writing_{newest.name}")
    for path in [*(aside / file.name for file in newest.iterdir()), aside, Path(config.output_dir) / "metrics.jsonl"]:
        assert path in done[:named], path
    assert newest.parent in done[named:]
    final = Path(config.output_dir) / "final"
    named = done.index(("rename", "final"))
    assert {final.with_name(".writing_final") / file.name for file in final.iterdir()} <= set(done[:named])


class Disk:
    """Watches what is renamed, and whether its content was on the disk by then."""

    def __init__(self, monkeypatch):
        self.synced, self.names, self.unsafe = {}, [], []
        monkeypatch.setattr(os, "fsync", partial(self._fsync, os.fsync))
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, partial(self._rename, getattr(os, name)))

    def _fsync(self, fsync, descriptor):
        fsync(descriptor)
        status = os.stat(descriptor)
        self.synced[status.st_dev, status.st_ino] = status.st_mtime_ns

    def _rename(self, rename, source, target, **options):
        self.unsafe += [(target, path) for path in [Path(source), *Path(source).rglob("*")] if not self.has(path)]
        self.names.append(Path(target))
        rename(source, target, **options)

    def has(self, path) -> bool:
        """Whether a file, or a folder's list of names, was synced after it was last written."""
        status = os.stat(path)
        return self.synced.get((status.st_dev, status.st_ino)) == status.st_mtime_ns


def test_content_is_on_the_disk_before_any_renaming_and_at_the_end(small, tmp_path, monkeypatch):
    """A file that is renamed before its content is written may be there, and empty, after a power cut."""
    text, targets = tmp_path / "text.jsonl", tmp_path / "targets"
    text.write_text("".join(json.dumps({"text": f"text number {i} " * 9}) + "\n" for i in range(200)))
    config = small(dataset=str(text), targets="hidden", targets_dir=str(targets), max_steps=2, save_steps=1)
    load_rows(replace(config, max_length=32), load_tokenizer(config))  # `datasets` makes its own files here
    disk = Disk(monkeypatch)
    store(config)
    train(config)
    assert not disk.unsafe
    assert {path.name for path in disk.names} | {path.suffix for path in disk.names} >= {
        ".arrow", "targets.json", "head.safetensors", "train-000000.safetensors", "config.yaml", "metrics.jsonl",
        "step_00000001", "step_00000002", "final",
    }  # fmt: skip
    made = {path for name in disk.names for path in name.parent.glob(f"{name.stem}*") if path.suffix != ".lock"}
    assert not [path for path in made if not disk.has(path)]


# --- full disks


def test_a_save_that_fails_stops_the_run_and_keeps_what_was_saved(saved, run, no_file_above):
    for path in checkpoints(run.output_dir)[1:]:
        shutil.rmtree(path)
    with no_file_above(2**20), pytest.raises(RunStopped) as error:
        train(run)
    for words in ("step 4 could not be saved", "File too large", "the newest checkpoint is step_00000002"):
        assert words in str(error.value)
    assert os.listdir(Path(run.output_dir) / "checkpoints") == ["step_00000002"]
    train(run)  # with room again
    assert all(torch.equal(value, weights(run)[name]) for name, value in weights(saved).items())


def test_a_full_disk_ends_the_command_with_one_line(small, tmp_path):
    """A real one: a file system of 16 MB in memory, with room for two checkpoints and a half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting takes root")
    try:
        config = small(max_steps=8, save_steps=2, output_dir=str(disk / "run"))
        arguments = [f"--{name}={value}" for name, value in vars(config).items() if value is not None]
        with pytest.raises(SystemExit, match=r"kdkit: step 6 could not be saved .*No space left on device"):
            main(arguments)
        assert sorted(os.listdir(disk / "run" / "checkpoints")) == ["step_00000002", "step_00000004"]
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        main(arguments)
        assert len(checkpoints(disk / "run")) == 3 and (disk / "run" / "final").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- nothing that runs code


class MakesAFile:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_is_unpickled_from_a_checkpoint(run, tmp_path):
    path = checkpoints(run.output_dir)[-1]
    for name in ("pytorch_model.bin", "optimizer.bin", "random_states_0.pkl", "__0_0.distcp", "a.pt"):
        torch.save({"x": MakesAFile(tmp_path / "made")}, path / name)
    train(run)
    assert not (tmp_path / "made").exists()
    torch.load(path / "a.pt", weights_only=False)
    assert (tmp_path / "made").exists()  # so the test can fail
