"""The two teachers: where the online one is kept, and that a run with stored targets is the online run."""

import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from helpers import json_lines, run_processes
from safetensors.torch import load_file, save_file
from test_devices import arguments, assert_same_run, command, script

import kdkit.targets
from kdkit.config import UsageError
from kdkit.data import collate, empty_row, load_rows
from kdkit.losses import TopK
from kdkit.models import load_teacher, load_tokenizer, teacher_fingerprint
from kdkit.running.tracking import read_metrics
from kdkit.targets import store
from kdkit.teachers import OnlineTeacher, open_teacher
from kdkit.train import train

V = 1024  # of the embedded pair
BATCH = {"input_ids": torch.arange(8)[None], "position_ids": torch.arange(8)[None]}


@pytest.fixture
def stored(small, tmp_path, monkeypatch):
    """Makes configurations whose targets are stored, in several files."""
    monkeypatch.setattr(kdkit.targets, "FILE_BYTES", 2**19)

    def make(**fields):
        config = small(**{"targets": "hidden", "targets_dir": str(tmp_path / "targets"), **fields})
        store(config)
        return config

    return make


def online(config, tmp_path):
    config = replace(config, targets="online", output_dir=str(tmp_path / "online"))
    train(config)
    return config


def events(config):
    return read_metrics(Path(config.output_dir) / "metrics.jsonl")


def opened(config):
    tokenizer = load_tokenizer(config)
    rows = load_rows(config, tokenizer)
    return open_teacher(config, "no", *rows), *rows


# --- the online teacher


def test_online_teacher_is_frozen_and_gives_no_gradients():
    model = load_teacher(dtype=torch.float32).train().requires_grad_(True)
    teacher = OnlineTeacher(model)
    assert not any(module.training for module in teacher.modules())
    hidden, head = teacher(BATCH)
    assert not (hidden.requires_grad or any(parameter.requires_grad for parameter in teacher.parameters()))
    torch.testing.assert_close(hidden @ head.T, model(**BATCH).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_offloaded_teacher_of_one_process_gives_the_same_outputs(tied):
    """Also the head, whose forward is never called, so that no hook of accelerate would fetch it."""
    model = load_teacher(dtype=torch.float32)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    teacher = OnlineTeacher(model)
    expected = teacher(BATCH)
    teacher.place(Accelerator(), "offload")
    assert sum(parameter.is_meta for parameter in teacher.parameters()) > 10
    torch.testing.assert_close(teacher(BATCH), expected, rtol=0, atol=0)


@pytest.mark.slow
def test_teacher_of_two_fsdp_ranks_gives_the_same_outputs_wherever_it_is_kept(tmp_path):
    """With fsdp_cpu_ram_efficient_loading only rank 0 needs to have the weights: the other one receives them."""
    save_file({"hidden": OnlineTeacher(load_teacher(dtype=torch.float32))(BATCH)[0]}, tmp_path / "expected.safetensors")
    program = script(tmp_path, f"""
        import torch
        from safetensors.torch import load_file
        from kdkit.models import load_teacher
        from kdkit.running.devices import leave_processes, start_accelerator
        from kdkit.teachers import OnlineTeacher
        accelerator = start_accelerator()
        batch = {{"input_ids": torch.arange(8)[None], "position_ids": torch.arange(8)[None]}}
        for placement in ("replicate", "shard", "offload", "auto"):
            teacher = OnlineTeacher(load_teacher(dtype=torch.float32))
            if not accelerator.is_main_process:
                teacher._replace_parameters(torch.device("meta"))
            teacher.place(accelerator, placement)
            hidden, head = teacher(batch)
            torch.testing.assert_close(hidden, load_file({str(tmp_path / "expected.safetensors")!r})["hidden"])
            assert head.shape == (1024, 256) and teacher.head_rows == 1024
            print(f"rank {{accelerator.process_index}}: {{teacher.placement}}", flush=True)
        leave_processes()
    """)  # fmt: skip
    run = run_processes(command("fsdp", program))
    assert run.returncode == 0, run.stdout + run.stderr
    placements = ["a copy on each device (replicate)", "in CPU memory (offload)", *["sharded over 2 ranks (shard)"] * 2]
    assert all(sorted(re.findall(rf"rank {rank}: (.*?\))", run.stdout)) == placements for rank in (0, 1))


def test_sharded_teacher_of_one_process_is_refused(small):
    with pytest.raises(UsageError, match=r"teacher_placement is shard, but there is one process"):
        train(small(teacher_placement="shard"))


# --- a run with stored targets


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
def test_run_with_stored_targets_equals_the_online_run(stored, tmp_path, monkeypatch, fields):
    """Losses, gradient norms, evaluations, weights; and the teacher is not even loaded."""
    config = stored(eval_steps=2, batch_size=3, max_train_tokens=1500, **fields)  # more than one epoch
    reference = online(config, tmp_path)
    for module in ("kdkit.teachers", "kdkit.teachers.stored"):
        monkeypatch.setattr(f"{module}.load_teacher", lambda *_: pytest.fail("the teacher is loaded"))
    train(config)
    first, expected = events(config)[1], events(reference)[1]
    for key in ("train/ce_loss", "train/kl_loss", "train/loss", "train/grad_norm"):
        assert first[key] == pytest.approx(expected[key], rel=1e-6), key
    assert_same_run(config, reference, 2e-5)  # after the first step Adam amplifies rounding errors


def test_stored_targets_serve_text_of_which_no_two_samples_fit_in_a_row(stored, tmp_path):
    """The rows are those without packing, also in their order, since the samples differ in length."""
    texts = [{"text": f"The number {i} " + "is odd, is even, " * (4 + i % 2)} for i in range(60)]
    config = stored(dataset=str(json_lines(tmp_path / "long.jsonl", *texts)), max_train_tokens=None)
    assert len({len(row["input_ids"]) for row in opened(config)[1]}) > 1
    train(config)


def test_bf16_run_stores_two_bytes_per_number_and_stays_near_the_online_run(stored, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    config = stored()
    reference = online(config, tmp_path)
    train(config)
    assert events(config)[1]["train/kl_loss"] == pytest.approx(events(reference)[1]["train/kl_loss"], rel=2e-3)
    assert load_file(Path(config.targets_dir) / "train-000000.safetensors")["hidden"].dtype == torch.bfloat16
    config = stored(targets="top_k", top_k=8, targets_dir=str(tmp_path / "top_8"))
    tensors = load_file(Path(config.targets_dir) / "train-000000.safetensors")
    assert (tensors["ids"].dtype, tensors["log_probs"].dtype) == (torch.uint16, torch.float16)
    assert tensors["log_probs"].float().exp().sum(-1).sub(1).abs().max() < 5e-3


def test_top_k_targets_give_a_lower_bound_and_the_exact_evaluation(stored, tmp_path):
    exact = events(online(stored(), tmp_path))
    before = 0.0
    for k in (1, 8, 64):
        fields = dict(targets_dir=str(tmp_path / f"{k}"), output_dir=str(tmp_path / f"run{k}"))
        train(config := stored(targets="top_k", top_k=k, **fields))
        start, first = events(config)[:2]
        assert before < first["train/kl_loss"] < exact[1]["train/kl_loss"]
        before = first["train/kl_loss"]
        assert start == pytest.approx(exact[0], rel=1e-6)  # the evaluation before training
    assert before > 0.7 * exact[1]["train/kl_loss"]


def test_stored_teacher_serves_training_held_out_and_padding_batches(stored):
    """Held-out rows have negative numbers; a rank without a row has a batch that training and evaluation both take."""
    teacher, train_rows, eval_rows = opened(stored(targets="top_k", top_k=8))
    targets, head = teacher({**collate(train_rows[1:3], 0), "row_ids": [1, 2]})
    assert isinstance(targets, TopK) and targets.ids.shape[-1] == 8 and head is None
    (row,) = eval_rows[:1]
    hidden, head = teacher({**collate([row], 0), "row_ids": [-1]})
    expected, _ = OnlineTeacher(load_teacher(dtype=torch.float32))(collate([row], 0))
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)
    hidden, head = teacher({**collate([empty_row(0)], 0), "row_ids": []})
    assert hidden.shape == (1, 1, 256) and head.shape == (V, 256) == (teacher.head_rows, 256)


def test_student_of_the_teachers_layers_trains_from_stored_targets(stored):
    """The one student that needs the teacher: once, to be made."""
    assert train(stored(student_layers=2))[-1]["eval/kl_t1"] > 0


# --- targets that were made for something else are refused


def test_targets_for_other_settings_are_refused_by_name(stored):
    config = stored(targets="top_k", top_k=8, packing=True)
    others = dict(max_length=32, packing=False, max_train_tokens=2000, temperature=2.0, top_k=4, targets="hidden")
    for name, value in others.items():
        for command_line in (train, store):
            with pytest.raises(UsageError, match=f"{name} was {getattr(config, name)!r}, is {value!r}"):
                command_line(replace(config, **{name: value}))
    with pytest.raises(UsageError, match="dtype was 'float32', is 'bfloat16'"):
        train(replace(config, teacher_dtype="bfloat16"))


def test_targets_of_another_teacher_or_text_are_refused(stored, tmp_path, monkeypatch):
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
    (model / "model.safetensors").unlink()  # the weights are on another machine
    train(config)
    text.write_text(text.read_text().replace("line 7 ", "line 8 "))
    with pytest.raises(UsageError, match="training text was"):
        train(config)


# --- the command that stores


def test_targets_that_cannot_be_stored_are_refused(small, tmp_path):
    with pytest.raises(UsageError, match="targets is 'online', expected 'hidden' or 'top_k'"):
        store(small())
    with pytest.raises(UsageError, match="targets_dir is None"):
        small(targets="hidden")
    config = small(targets="top_k", top_k=V + 1, targets_dir=str(tmp_path / "targets"))
    with pytest.raises(UsageError, match="top_k is 1025, expected at most 1024"):
        store(config)
    with pytest.raises(UsageError, match=r"targets\.json does not exist: make targets with"):
        train(config)


def test_disk_without_room_is_named(small, tmp_path, monkeypatch, no_file_above):
    config = small(targets="hidden", targets_dir=str(tmp_path / "targets"))
    with monkeypatch.context() as patch, pytest.raises(UsageError, match="has 1 MiB free, the targets need 4 MiB"):
        patch.setattr("kdkit.targets.shutil.disk_usage", lambda _: SimpleNamespace(free=2**20))
        store(config)
    assert not list(tmp_path.glob("targets/*"))  # so that less can be stored there
    with no_file_above(2**19), pytest.raises(SystemExit, match=r"targets cannot be written .*: make room"):
        kdkit.targets.main(arguments(config))
    assert not (Path(config.targets_dir) / "head.safetensors").exists()


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.safetensors")}


def test_missing_and_damaged_files_are_noticed_and_stored_again(stored, monkeypatch):
    """With the number of rows per file that the complete files have."""
    config = stored()
    complete, folder = contents(config.targets_dir), Path(config.targets_dir)
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # safetensors itself ignores the umask
    (folder / "train-000001.safetensors").unlink()
    (folder / "eval-000000.safetensors").write_bytes(complete["eval-000000.safetensors"][:-100])
    with pytest.raises(UsageError, match=r"2 files .* are missing or damaged, such as .*train-000001.safetensors"):
        train(config)
    untouched = (folder / "train-000002.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(kdkit.targets, "FILE_BYTES", 2**20)
    store(config)
    assert contents(folder) == complete
    assert (folder / "train-000002.safetensors").stat().st_mtime_ns == untouched


@pytest.mark.slow
def test_killed_command_leaves_complete_files_and_stores_the_others_later(stored, tmp_path):
    config = stored()
    killed = replace(config, targets_dir=str(tmp_path / "killed"))
    program = script(tmp_path, """
        import os, signal, sys
        import kdkit.targets
        kdkit.targets.FILE_BYTES = 2**19
        rename = os.replace
        def killed_at_the_second_part(source, destination):
            if destination.name == "train-000001.safetensors":
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, destination)
        os.replace = killed_at_the_second_part
        kdkit.targets.main(sys.argv[1:])
    """)  # fmt: skip
    run = run_processes([sys.executable, program, *arguments(killed)])
    assert run.returncode == -signal.SIGKILL
    left = {path.name for path in Path(killed.targets_dir).iterdir()}
    assert left == {"targets.json", "head.safetensors", "train-000000.safetensors", ".writing_train-000001.safetensors"}
    store(killed)
    assert contents(killed.targets_dir) == contents(config.targets_dir)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_store_the_same_files_as_one(stored, tmp_path, kind):
    config = stored(targets="top_k", top_k=16, max_train_tokens=1450)  # five rows a rank do not divide
    theirs = replace(config, targets_dir=str(tmp_path / kind), batch_size=2, output_dir=str(tmp_path / f"run_{kind}"))
    program = "import kdkit.targets, sys\nkdkit.targets.FILE_BYTES = 2**19\nkdkit.targets.main(sys.argv[1:])"
    for what in ([script(tmp_path, program)], ["-m", "kdkit.train"])[: 2 if kind == "fsdp" else 1]:
        run = run_processes(command(kind, *what, *arguments(theirs)))
        assert run.returncode == 0, run.stdout + run.stderr
    assert contents(theirs.targets_dir).keys() == contents(config.targets_dir).keys()
    for name in contents(config.targets_dir):
        ours, found = (load_file(Path(folder) / name) for folder in (config.targets_dir, theirs.targets_dir))
        for key, value in ours.items():
            torch.testing.assert_close(found[key].double(), value.double(), rtol=1e-5, atol=1e-5)
    if kind == "fsdp":
        train(config)
        assert_same_run(theirs, config, 2e-5)
