import importlib.util
import json
import os
import re
import shutil
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from families import tiny
from helpers import FIELDS, student_with_dropout, with_another
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdkit import DistillConfig, load_config
from kdkit.config import RunStopped, UsageError
from kdkit.models import (
    ASSETS,
    BodyAndHead,
    check_export,
    count_parameters,
    load_student,
    load_teacher,
    load_tokenizer,
)
from kdkit.running.checkpoint import (
    check_inputs,
    checkpoints,
    export,
    find_checkpoint,
    save_checkpoint,
)
from kdkit.running.devices import start_accelerator
from kdkit.running.tracking import read_metrics
from kdkit.teachers import describe_inputs
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
    """The events of a run without the time that it took."""
    return [{k: v for k, v in event.items() if k != "train/tokens_per_second"} for event in history]


def steps_of(history):
    return [event["train/step"] for event in history if "train/step" in event]


def weights(config):
    return load_file(Path(config.output_dir) / "final" / "model.safetensors")


def assert_same_weights(one, other):
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_run_cut_twice_within_epochs_equals_the_run_without_a_cut_bit_for_bit(small, tmp_path, monkeypatch, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    fields = dict(
        student_model=student_with_dropout(tmp_path / "student"), student_random_init=True,
        gradient_accumulation_steps=2, batch_size=2, max_steps=20, save_steps=4, eval_steps=5, alpha=0.3,
    )  # fmt: skip
    complete = small(**fields, output_dir=str(tmp_path / "complete"))
    uncut = train(complete)
    assert uncut[-1]["eval/epoch"] > 1  # an epoch has 12 steps: the second cut is inside the second epoch
    parts = small(**fields, output_dir=str(tmp_path / "parts"))
    for step in (7, 14):
        with pytest.raises(Cut):
            train(parts, watch=cut_after(step))
    resumed = train(parts)
    assert numbers(resumed) == numbers(uncut)
    assert read_metrics(tmp_path / "parts" / "metrics.jsonl") == resumed
    assert_same_weights(complete, parts)


@pytest.mark.parametrize(
    "name", [name for name in ("SGD", "RMSprop", "Adafactor", "Muon") if hasattr(torch.optim, name)]
)
def test_run_with_another_optimizer_is_resumed_bit_for_bit(small, tmp_path, name):
    def make(model, config):
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.ndim == 2 or name != "Muon")  # Muon trains matrices only
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        more = {"momentum": 0.9} if name == "SGD" else {}
        return getattr(torch.optim, name)(trained, lr=config.peak_learning_rate, **more)

    complete, parts = (small(output_dir=str(tmp_path / part), save_steps=3) for part in ("complete", "parts"))
    uncut = train(complete, make_optimizer=make)
    with pytest.raises(Cut):
        train(parts, watch=cut_after(4), make_optimizer=make)
    assert numbers(train(parts, make_optimizer=make)) == numbers(uncut)
    assert_same_weights(complete, parts)


def test_optimizer_whose_state_a_checkpoint_would_lose_is_an_error(small):
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["count"] = self.state[parameter].get("count", 0) + 1

    with pytest.raises(RunStopped, match=r"the optimizer has state\..*count, expected a tensor"):
        train(small(save_steps=2), make_optimizer=lambda model, config: Counting(model.parameters(), lr=1e-3))


def test_interrupt_during_a_save_is_not_an_error_of_the_disk(small, monkeypatch):
    """torch puts what is raised while a rank writes into an exception of its own."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(small(save_steps=2))


def test_newest_three_are_kept_and_the_oldest_is_removed_after_the_new_one_is_there(small, monkeypatch):
    config, seen = small(max_steps=10, save_steps=2), []
    rename = os.rename

    def watched(source, target):
        if Path(target).name.startswith("step_"):
            seen.append(len(checkpoints(config.output_dir)))
        rename(source, target)

    monkeypatch.setattr(os, "rename", watched)
    train(config)
    assert seen == [0, 1, 2, 3, 3]
    names = sorted(os.listdir(Path(config.output_dir) / "checkpoints"))
    assert names == ["step_00000006", "step_00000008", "step_00000010"]
    assert sorted(os.listdir(config.output_dir)) == ["checkpoints", "config.yaml", "final", "metrics.jsonl"]


def test_save_that_is_cut_leaves_no_checkpoint_and_its_files_are_removed(small, monkeypatch):
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
    assert steps_of(train(replace(config, save_steps=3))) == [1, 2, 3, 4, 5, 6]
    assert not [name for name in os.listdir(Path(config.output_dir) / "checkpoints") if name.startswith(".")]


def test_checkpoint_holds_no_teacher_tied_weights_once_and_no_pickle(small):
    config = small(max_steps=1)
    train(config)
    (path,) = checkpoints(config.output_dir)
    tensors = {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}
    assert {name.split(".")[0] for name in tensors} == {"model", "optimizer", "rng"}
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    student = AutoModelForCausalLM.from_pretrained(Path(config.output_dir) / "final")
    saved = sum(t.numel() for name, t in tensors.items() if name.startswith("model."))
    assert saved == count_parameters(student)


# --- which checkpoint

# Fields that say how a run is watched, stored and laid out. All others decide what it computes.
FREE = {"output_dir", "resume", "logging_steps", "eval_steps", "save_steps", "keep_checkpoints", "teacher_placement",
        "gradient_checkpointing", "compile_models", "targets_dir", "fused_loss", "compile_loss", "num_proc",
        "use_wandb", "wandb_project", "wandb_entity", "wandb_run_name"}  # fmt: skip


def test_each_field_that_is_not_free_is_refused_by_name_on_resume(small):
    config = small(max_steps=1, packing=False, targets_dir="stored", max_new_tokens=8)
    train(config)
    for name in set(FIELDS) - FREE - {"student_layers_by"}:  # which alone is no valid configuration
        with pytest.raises(UsageError, match=rf"another configuration: {name} was .*, is [^;]*\. Choose.*resume never"):
            train(with_another(config, name))


def test_all_free_fields_together_are_accepted_on_resume(small, tmp_path):
    config = small(max_steps=3, save_steps=1, eval_steps=1)
    with pytest.raises(Cut):
        train(config, watch=cut_after(3))
    moved = shutil.copytree(config.output_dir, tmp_path / "moved")
    given = {"output_dir": str(moved), "resume": str(moved / "checkpoints" / "step_00000002")}
    given |= {"compile_loss": False}
    assert steps_of(train(replace(with_another(config, *FREE - given.keys()), **given))) == [1, 2, 3]


def test_batch_size_and_accumulation_may_change_if_the_rows_of_a_step_do_not(small, saved, run):
    shutil.rmtree(checkpoints(run.output_dir)[-1])
    history = train(replace(run, batch_size=2, gradient_accumulation_steps=2))
    expected = read_metrics(Path(saved.output_dir) / "metrics.jsonl")
    assert [e["train/loss"] for e in history[5:-1]] == pytest.approx(
        [e["train/loss"] for e in expected[5:-1]], rel=1e-5
    )


def test_resume_never_starts_a_new_run_and_removes_the_old_one(small):
    train(small(max_steps=4, save_steps=1))
    assert steps_of(train(small(max_steps=2, alpha=0.5, resume="never"))) == [1, 2]
    assert [path.name for path in checkpoints(small().output_dir)] == ["step_00000002"]


def test_path_or_finished_run_is_resumed_with_the_same_result(saved, run):
    expected = numbers(read_metrics(Path(saved.output_dir) / "metrics.jsonl"))
    assert numbers(train(run)) == expected
    assert numbers(train(replace(run, resume=f"{run.output_dir}/checkpoints/step_00000004"))) == expected
    assert_same_weights(saved, run)


@pytest.mark.parametrize(
    "start, unset", [({"student_layers": 2}, "--student_layers null"), ({"student_random_init": True},
                     "--student_random_init false"), ({}, "")],
)  # fmt: skip
def test_finished_run_is_trained_on_by_what_its_refusal_names(small, tmp_path, start, unset):
    config = small(max_steps=2, **start)
    before, final = train(config), f"{config.output_dir}/final"
    with pytest.raises(UsageError, match=r"max_steps was 2, is 4\. Choose another --output_dir") as refused:
        train(replace(config, max_steps=4))
    named = re.search(r"\(to train its student on, add (.*?)\)", str(refused.value))[1].split()
    assert named == ["--student_model", final, *unset.split()]
    kept = AutoModelForCausalLM.from_pretrained(final).state_dict()
    argv = ["--config", f"{config.output_dir}/config.yaml", "--max_steps=4", f"--output_dir={tmp_path / 'on'}", *named]
    history = train(load_config(argv))
    assert steps_of(history) == [1, 2, 3, 4]
    assert history[0]["eval/ce_loss"] == pytest.approx(before[-1]["eval/ce_loss"], abs=1e-6)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(final).state_dict(), kept, rtol=0, atol=0)


def test_run_that_is_not_finished_names_no_student_to_train_on(small):
    with pytest.raises(Cut):
        train(small(max_steps=4, save_steps=1), watch=cut_after(3))
    with pytest.raises(UsageError, match="max_steps was 4, is 5") as refused:
        train(small(max_steps=5, save_steps=1))
    assert "student_model" not in str(refused.value)


def test_run_cut_before_its_first_checkpoint_starts_again(small):
    config = small(max_steps=3)
    with pytest.raises(Cut):
        train(config, watch=cut_after(2))
    assert [event.get("eval/step") for event in train(config)] == [0, None, None, None, 3]


def test_output_folder_that_cannot_be_written_is_named(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"output_dir .* cannot be written"):
        train(small(output_dir=str(tmp_path / "file" / "run")))


# --- the exported student


@pytest.mark.parametrize("tied", [True, False])
def test_final_is_loaded_by_transformers_with_the_trained_weights(small, tmp_path, tied):
    folder = student_with_dropout(tmp_path / "student", tie_word_embeddings=tied)
    config = small(student_model=folder, student_random_init=True, max_steps=3)
    before = os.umask(0o022)
    train(config)
    os.umask(before)
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
    for path in Path(config.output_dir).rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path


@pytest.fixture
def folder(tmp_path):
    """A folder with a student and a tokenizer."""
    return shutil.copytree(ASSETS / "embedded_teacher", tmp_path / "model")


def exported(config):
    """Export the student of a configuration without training it. Returns it, and it as it is read again."""
    accelerator, tokenizer = start_accelerator(), load_tokenizer(config)
    student = load_student(config, load_teacher(config.teacher_model, torch.float32)).eval()
    check_export(BodyAndHead(student), tokenizer, config)
    return student, AutoModelForCausalLM.from_pretrained(export(accelerator, BodyAndHead(student), tokenizer, config))


@pytest.mark.parametrize("cut", [False, True])
def test_final_gives_the_logits_in_memory_also_with_a_head_that_the_config_calls_tied(small, folder, cut):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = 2 * tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    fields = {"teacher_model": str(folder), "student_layers": 2} if cut else {"student_model": str(folder)}
    student, again = exported(small(**fields))
    ids = torch.arange(20, 60)[None]
    assert not again.config.tie_word_embeddings
    torch.testing.assert_close(again(ids).logits, student(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("cut", [False, True])
def test_generation_of_the_student_stops_where_the_teachers_does(small, folder, tmp_path, cut):
    teacher = shutil.copytree(folder, tmp_path / "teacher")
    given = {"eos_token_id": [1, 7], "do_sample": False, "temperature": 0.6}  # which transformers does not save
    (teacher / "generation_config.json").write_text(json.dumps(given))
    (folder / "generation_config.json").write_text(json.dumps({**given, "eos_token_id": 5}))
    fields = {"student_layers": 2} if cut else {"student_model": str(folder)}
    _, again = exported(small(teacher_model=str(teacher), **fields))
    assert again.config.eos_token_id == again.generation_config.eos_token_id == [1, 7]
    assert again.generation_config.do_sample and again.generation_config.temperature == 0.6
    again.lm_head.weight.data.zero_()
    again.lm_head.weight.data[7] = 1  # the likeliest token ends the text, or the one with id 0 does not
    bias = torch.zeros(1024).index_fill_(0, torch.tensor(7), 9.0)
    again.lm_head.register_forward_hook(lambda module, args, output: output + 99 * bias)
    assert again.generate(torch.tensor([[3]]), max_new_tokens=9).tolist() == [[3, 7]]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])  # the second has other names in its file than in memory
def test_export_that_does_not_write_the_weights_in_memory_is_no_final_folder(small, monkeypatch, family):
    config, tokenizer, wrong = small(), load_tokenizer(small()), {}
    student = BodyAndHead(tiny(family))
    save = type(student.model).save_pretrained

    def save_others(model, folder, state_dict):
        changed = {
            name: value + wrong.get(name, 0) for name, value in state_dict.items() if wrong.get(name, 0) is not None
        }
        save(model, folder, state_dict=changed)

    monkeypatch.setattr(type(student.model), "save_pretrained", save_others)
    Path(config.output_dir).mkdir()
    for wrong["model.norm.weight"] in (0, 1e-3, None):
        if wrong["model.norm.weight"] == 0:
            assert export(start_accelerator(), student, tokenizer, config).is_dir()
            shutil.rmtree(Path(config.output_dir) / "final")
            continue
        with pytest.raises(RunStopped, match=r"the student could not be saved .* not what is in memory"):
            export(start_accelerator(), student, tokenizer, config)
        assert not list(Path(config.output_dir).iterdir())


def test_student_that_cannot_be_exported_is_refused_before_it_is_trained(small):
    config, tokenizer = small(), load_tokenizer(small())
    student = load_student(config, None)
    for change in ({"tie_word_embeddings": not student.config.tie_word_embeddings}, {"num_hidden_layers": 1}):
        broken = BodyAndHead(load_student(config, None))
        broken.model.config.update(change)
        with pytest.raises(UsageError, match=r"the student could not be saved as .*another"):
            check_export(broken, tokenizer, config)
    student.generation_config.num_return_sequences = -1
    student.generation_config.max_new_tokens = -1
    with pytest.raises(UsageError, match=r"the student could not be saved as .*generation_config"):
        check_export(BodyAndHead(student), tokenizer, config)


def test_inputs_that_changed_are_named_and_a_checkpoint_without_them_is_accepted(small, tmp_path, folder):
    config = small(teacher_model=str(folder), output_dir=str(tmp_path / "run"))
    rows = [{"input_ids": [i], "labels": [i], "position_ids": [0]} for i in range(4)]
    inputs = describe_inputs(config, rows[:3], rows[3:])
    assert inputs == describe_inputs(config, rows[:3], rows[3:])
    accelerator, student = start_accelerator(), BodyAndHead(load_student(small(), None))
    student, optimizer = accelerator.prepare(student, torch.optim.AdamW(student.parameters()))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    save_checkpoint(accelerator, student, optimizer, 1, config, inputs)
    (path,) = checkpoints(config.output_dir)
    check_inputs(path, config, inputs)
    check_inputs(path, config, {**inputs, "teacher_model": None})  # its weights are not on this machine
    with pytest.raises(UsageError, match=r"^dataset embedded has changed since .*step_00000001.*--resume never"):
        check_inputs(path, config, describe_inputs(config, rows, rows[3:]))
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(UsageError, match=r"^teacher_model .*model has changed"):
        check_inputs(path, config, describe_inputs(config, rows[:3], rows[3:]))
    state = json.loads((path / "trainer.json").read_text())
    (path / "trainer.json").write_text(json.dumps({k: v for k, v in state.items() if k != "inputs"}))
    check_inputs(path, config, describe_inputs(config, rows))


def test_parameter_without_a_gradient_does_not_prevent_a_resume(small, tmp_path, monkeypatch):
    def with_unused(*arguments):
        student = load_student(*arguments)
        student.model.layers[0].unused = torch.nn.Linear(3, 3)
        return student

    monkeypatch.setattr("kdkit.train.load_student", with_unused)
    monkeypatch.setattr("kdkit.train.check_export", lambda *_: None, raising=False)  # its config has no such part
    monkeypatch.setattr("kdkit.train.export", lambda accelerator, student, *_: kept.append(student.state_dict()))
    kept, complete, parts = (
        [],
        small(max_steps=4, save_steps=2),
        small(max_steps=4, save_steps=2, output_dir=str(tmp_path / "parts")),
    )
    train(complete)
    with pytest.raises(Cut):
        train(parts, watch=cut_after(3))
    train(parts)
    torch.testing.assert_close(kept[1], kept[0], rtol=0, atol=0)


# --- kills and damage


@pytest.mark.slow
def test_run_killed_in_an_evaluation_a_save_and_the_export_ends_as_one_that_is_not(tmp_path):
    alone = DistillConfig(**kills.RUN, max_steps=16, output_dir=str(tmp_path / "alone_1"))
    train(alone)
    moments = ["in an evaluation", "in a save", "while exporting"]
    result = kills.series(tmp_path, moments, num_ranks=1, max_steps=16)
    assert result["kills"].total() == result["restarts"] == 3
    assert (result["lost"], result["once"], result["equal"]) == (0, True, True)


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
    """A copy of that run, which a test may damage."""
    shutil.copytree(saved.output_dir, tmp_path / "run")
    return replace(saved, output_dir=str(tmp_path / "run"))


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[20] ^= 4
    path.write_bytes(content)


def rewrite(path, change):
    """Change the tensors of a checkpoint."""
    with safe_open(path / SHARD, "pt") as file:
        parts = json.loads(file.metadata()["DCP_SHARDING_INFO"])
    tensors = change(load_file(path / SHARD))
    parts = {name: parts.get(name, {"saved_offsets": [0] * value.ndim}) for name, value in tensors.items()}
    save_file(tensors, path / SHARD, metadata={"DCP_SHARDING_INFO": json.dumps(parts)})
    state = json.loads((path / "trainer.json").read_text())
    (path / "trainer.json").write_text(json.dumps({**state, "files": [SHARD]}))


SHARD = "shard-00001-model-00001-of-00001.safetensors"
DAMAGES = {
    "truncated": (truncate, SHARD, f"{SHARD} cannot be read"),
    "missing": (Path.unlink, SHARD, f"{SHARD} cannot be read"),
    "header": (flip_a_bit, SHARD, f"{SHARD} cannot be read"),
    "state missing": (Path.unlink, "trainer.json", "trainer.json cannot be read"),
    "state truncated": (truncate, "trainer.json", "trainer.json cannot be read"),
    "state of another kind": (lambda path: path.write_text('{"files": 1}'), "trainer.json", "trainer.json cannot be"),
}


@pytest.mark.parametrize("damage, file, why", DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoint_is_skipped_with_its_reason(run, capsys, damage, file, why):
    before, newest = checkpoints(run.output_dir)[-2:]
    damage(newest / file)
    assert find_checkpoint(run, start_accelerator()) == before
    note, _ = capsys.readouterr().out.splitlines()
    assert f"step_00000006 is damaged ({why}" in note and note.endswith("; resuming from step_00000004")
    with pytest.raises(UsageError, match=r"resume is .* step_00000006 is damaged"):
        train(replace(run, resume=str(newest)))


def test_run_resumed_from_before_damaged_checkpoints_ends_the_same_and_keeps_good_ones(saved, run):
    for path in checkpoints(run.output_dir)[1:]:
        truncate(path / SHARD)
    with pytest.raises(Cut):
        train(replace(run, save_steps=1, keep_checkpoints=1), watch=cut_after(4))
    assert [path.name for path in checkpoints(run.output_dir)] == ["step_00000003"]
    assert numbers(train(run)) == numbers(read_metrics(Path(saved.output_dir) / "metrics.jsonl"))
    assert_same_weights(saved, run)


def test_only_damaged_checkpoints_are_an_error_and_nothing_is_changed(run):
    for path in checkpoints(run.output_dir):
        truncate(path / SHARD)
    (checkpoints(run.output_dir)[0] / "trainer.json").unlink()
    before = sorted(Path(run.output_dir).rglob("*"))
    with pytest.raises(UsageError) as error:
        train(run)
    for words in (f"step_00000006 is damaged ({SHARD}", "step_00000004 is", "step_00000002 is", "--resume never"):
        assert words in str(error.value)
    assert sorted(Path(run.output_dir).rglob("*")) == before


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda t: {k: v for k, v in t.items() if k != "model.model.model.norm.weight"}, "norm.weight is None"),
        (lambda t: {**t, "model.model.model.norm.weight": torch.zeros(7)}, r"norm.weight is \(\(7,\), 7\)"),
        (lambda t: {**t, "model.model.model.layers.2.x": torch.zeros(7)}, "layers.2.x"),
        (lambda t: {k: v for k, v in t.items() if "exp_avg_sq" not in k}, "optimizer.state.*exp_avg_sq is None"),
    ],
)
def test_checkpoint_of_another_student_is_not_loaded_in_part(run, change, named):
    rewrite(checkpoints(run.output_dir)[-1], change)
    with pytest.raises(UsageError, match=f"does not fit the student: .*{named}"):
        train(run)


def test_content_is_on_the_disk_before_each_rename(small, monkeypatch):
    """A power cut could otherwise leave a name without its content: sync content, rename, sync the folder."""
    config, done = small(max_steps=2, save_steps=2), []
    rename, replace_file = os.rename, os.replace

    def watch(call):
        def watched(source, target):
            inside = [path for path in Path(source).rglob("*") if path.is_file()] if Path(source).is_dir() else []
            done.append((Path(target), {Path(source), *inside}))
            call(source, target)

        return watched

    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
    monkeypatch.setattr(os, "rename", watch(rename))
    monkeypatch.setattr(os, "replace", watch(replace_file))
    train(config)
    renames = {entry[0]: (index, entry[1]) for index, entry in enumerate(done) if isinstance(entry, tuple)}
    (newest,), folder = checkpoints(config.output_dir), Path(config.output_dir)
    for target in (newest, folder / "final", folder / "config.yaml", folder / "metrics.jsonl"):
        index, sources = renames[target]
        assert all(source in done[:index] for source in sources), target
        assert target.parent in done[index:], target
    assert folder / "metrics.jsonl" in done[renames[folder / "metrics.jsonl"][0] : renames[newest][0]]


# --- full disks


def test_save_that_fails_ends_the_command_with_one_line_and_keeps_the_earlier_checkpoints(saved, run, no_file_above):
    for path in checkpoints(run.output_dir)[1:]:
        shutil.rmtree(path)
    arguments = [f"--{name}={value}" for name, value in vars(run).items() if value is not None]
    with no_file_above(2**20), pytest.raises(SystemExit, match=r"kdkit: step 4 could not be saved .*File too large"):
        main(arguments)
    assert os.listdir(Path(run.output_dir) / "checkpoints") == ["step_00000002"]
    train(run)  # with room again
    assert_same_weights(saved, run)


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
