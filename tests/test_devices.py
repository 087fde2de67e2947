"""Several ranks: real processes, started by accelerate's launcher and by torchrun, that talk over gloo."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from helpers import LIMIT, arguments, environment, free_port, run_processes, student_with_dropout
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import AutoModelForCausalLM

from kdkit.config import UsageError
from kdkit.data import Steps, load_rows
from kdkit.models import load_tokenizer
from kdkit.running import devices
from kdkit.running.checkpoint import checkpoints
from kdkit.running.tracking import read_metrics
from kdkit.train import train

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


def command(kind: str, *program: str, precision: str = "no") -> list[str]:
    if kind == "fsdp":
        config = str(ROOT / "accelerate_configs" / "fsdp_cpu.yaml")
        launcher = ["accelerate.commands.launch", "--config_file", config, "--mixed_precision", precision]
    else:
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return [sys.executable, "-m", *launcher, *program]


def launch(kind: str, config, **options) -> str:
    run = run_processes(command(kind, "-m", "kdkit.train", *arguments(config), **options))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "returned a view" not in run.stderr  # FSDP warns that its hook on such an output may be lost
    return run.stdout


def weights(config) -> torch.Tensor:
    tensors = load_file(Path(config.output_dir) / "final" / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def assert_same_run(config, reference, tolerance):
    """The same events without the time, and the same weights, to a relative tolerance (0: bit for bit)."""
    ours, theirs = (read_metrics(Path(c.output_dir) / "metrics.jsonl") for c in (config, reference))
    assert len(ours) == len(theirs) > 0
    for event, other in zip(ours, theirs, strict=True):
        assert event.keys() == other.keys()
        for key in event.keys() - {"train/tokens_per_second"}:
            expected = pytest.approx(other[key], rel=tolerance, abs=0 if tolerance == 0 else 1e-7)
            assert event[key] == expected, (key, event)
    difference = (weights(config) - weights(reference)).norm() / weights(reference).norm()
    assert difference <= tolerance


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Steps of eight ragged rows on one rank, two ranks with DDP and two with FSDP, in one or four micro-batches.
    Two epochs of a number of rows that no batch size divides. The first test that needs a run makes it."""
    from kdkit import DistillConfig

    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    root = tmp_path_factory.mktemp("ranks")

    def config(name, **fields):
        return DistillConfig(
            max_train_tokens=1450, max_eval_tokens=600, max_length=64, packing=False, max_steps=None, num_epochs=2,
            alpha=0.3, temperature=2.0, logging_steps=1, eval_steps=3, save_steps=3, keep_checkpoints=9,
            use_wandb=False, output_dir=str(root / name), **fields,
        )  # fmt: skip

    return {
        ("one", 4): config("one4", batch_size=2, gradient_accumulation_steps=4),
        ("one", 1): config("one1", batch_size=8),
        ("ddp", 4): config("ddp4", batch_size=1, gradient_accumulation_steps=4),
        ("fsdp", 4): config("fsdp4", batch_size=1, gradient_accumulation_steps=4),
        ("fsdp", 1): config("fsdp1", batch_size=4),
        ("ddp", 1): config("ddp1", batch_size=4),
    }


def finished(runs, kind, accumulation):
    """The run, made the first time it is asked for."""
    config = runs[kind, accumulation]
    if not (Path(config.output_dir) / "final").exists():
        train(config) if kind == "one" else launch(kind, config)
    return config


CASES = [("fsdp", 1), *(pytest.param(*x, marks=pytest.mark.slow) for x in (("fsdp", 4), ("ddp", 1), ("ddp", 4)))]


@pytest.mark.parametrize("kind, accumulation", CASES)
def test_two_ranks_are_one_rank(runs, kind, accumulation):
    reference = finished(runs, "one", accumulation)
    assert_same_run(finished(runs, kind, accumulation), reference, 2e-5)
    first = [read_metrics(Path(c.output_dir) / "metrics.jsonl")[1] for c in (runs[kind, accumulation], reference)]
    for key, tolerance in (("train/ce_loss", 1e-6), ("train/kl_loss", 1e-6), ("train/grad_norm", 1e-5)):
        assert first[0][key] == pytest.approx(first[1][key], rel=tolerance)  # the first step: before Adam amplifies


@pytest.mark.slow
def test_last_step_of_an_epoch_in_those_runs_is_incomplete(runs):
    """So one rank gets a micro-batch without a row."""
    config = runs["ddp", 4]
    tokenizer = load_tokenizer(config)
    steps = Steps(load_rows(config, tokenizer)[0], config, tokenizer.pad_token_id, rank=1, num_ranks=2)
    assert any((batch["labels"] == -100).all() for batch in steps[steps.steps_per_epoch - 1])


@pytest.mark.slow
def test_run_saved_on_two_ranks_and_resumed_on_one_is_the_same(runs, tmp_path):
    whole = finished(runs, "fsdp", 4)
    config = resumed(whole, tmp_path, "one", batch_size=2)
    assert_same_run(config, finished(runs, "one", 4), 2e-5)


@pytest.mark.slow
def test_run_saved_on_one_rank_and_resumed_on_two_is_the_same(runs, tmp_path):
    whole = finished(runs, "one", 4)
    assert_same_run(resumed(whole, tmp_path, "fsdp", batch_size=1), whole, 2e-5)


def resumed(config, tmp_path, kind, **fields):
    """Resume a copy of a finished run from its third step."""
    folder = shutil.copytree(config.output_dir, tmp_path / "resumed")
    shutil.rmtree(folder / "final")
    for path in checkpoints(folder)[1:]:
        shutil.rmtree(path)
    config = replace(config, output_dir=str(folder), **fields)
    if kind == "one":
        train(config)
    else:
        assert "step_00000003" in launch(kind, config)
    return config


@pytest.mark.slow
def test_run_resumed_on_half_the_ranks_alone_reports_the_rows_of_a_step(runs, tmp_path, capsys):
    folder = shutil.copytree(finished(runs, "fsdp", 1).output_dir, tmp_path / "run")
    shutil.rmtree(checkpoints(folder)[-1])
    train(replace(runs["fsdp", 1], output_dir=str(folder)))
    assert "4 rows per step, 8 when it was written" in capsys.readouterr().out


@pytest.mark.slow
def test_two_ranks_have_different_dropout(small, tmp_path):
    """On the same rows: what the teacher gives is then the same on both, and what the student gives is not."""
    look = """
        import json, os, sys
        from torch.nn.modules.module import register_module_forward_hook
        from kdkit.train import main
        sums, seen = [], {"teacher": [], "student": []}
        def keep(module, inputs, output):
            if type(module).__name__ == "LlamaModel":
                sums.append(output.last_hidden_state.double().sum().item())
                if module.training:  # the student; the teacher came just before, with the same rows
                    seen["teacher"].append(sums[-2])
                    seen["student"].append(sums[-1])
        register_module_forward_hook(keep)
        folder, *arguments = sys.argv[1:]
        main(arguments)
        with open(f"{folder}/{os.environ['RANK']}.json", "w") as file:
            json.dump(seen, file)
    """
    (tmp_path / "text.jsonl").write_text((json.dumps({"text": "the same words " * 9}) + "\n") * 99)
    config = small(
        student_model=student_with_dropout(tmp_path / "student"), student_random_init=True, max_steps=2, packing=False,
        dataset=str(tmp_path / "text.jsonl"), batch_size=1,
    )  # fmt: skip
    run = run_processes(command("ddp", script(tmp_path, look), str(tmp_path), *arguments(config)))
    assert run.returncode == 0, run.stdout + run.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["teacher"] == second["teacher"] and len(first["teacher"]) == 2
    assert not set(first["student"]) & set(second["student"])


# --- sharding

PROBE = """
    import torch, torch.distributed as dist
    from torch.distributed.tensor import DTensor
    from kdkit import DistillConfig
    from kdkit.running.devices import leave_processes, start_accelerator
    from kdkit.teachers import OnlineTeacher
    from kdkit.models import BodyAndHead, count_parameters, load_student, load_teacher
    from kdkit.train import make_optimizer

    accelerator = start_accelerator()
    config = DistillConfig()
    teacher = load_teacher()
    student = load_student(config, teacher)
    whole = {"teacher": count_parameters(teacher), "student": count_parameters(student)}
    optimizer = make_optimizer(student, config)
    student, optimizer = accelerator.prepare(BodyAndHead(student), optimizer)
    teacher = OnlineTeacher(teacher)
    teacher.place(accelerator, "auto")
    batch = {"input_ids": torch.arange(32)[None], "position_ids": torch.arange(32)[None]}
    student(batch, lambda hidden, head: (hidden @ head.T).float().logsumexp(-1).sum()).backward()
    teacher(batch)
    # targets are not rounded to bf16 on their way into the sharded student, and autocast is on there
    targets = torch.full((32,), 1.001)
    inside = lambda hidden, head, targets: (targets.clone(), head.dtype)
    received, dtype = student(batch, inside, targets)
    assert torch.equal(received, targets) and dtype == torch.bfloat16, (received, dtype)
    for name, module in (("teacher", teacher), ("student", student)):
        for layer in module.modules():  # what the root keeps gathered after its forward goes when it is told to
            if hasattr(layer, "reshard"):
                layer.reshard()
        parameters = list(module.parameters())
        assert all(isinstance(p, DTensor) for p in parameters), name
        local = sum(p.to_local().numel() for p in parameters)
        total = torch.tensor(local)
        dist.all_reduce(total)
        assert total == whole[name], (name, total, whole)
        assert abs(local - whole[name] / 2) < 0.01 * whole[name], (name, local, whole)
    assert all(p.dtype == torch.bfloat16 and p.grad is None for p in teacher.parameters())
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in student.parameters())
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert mine == {id(p) for p in student.parameters()}
    print(f"rank {accelerator.process_index} holds its half; {teacher.placement}", flush=True)
    leave_processes()
"""


def script(tmp_path, text) -> str:
    (tmp_path / "script.py").write_text(textwrap.dedent(text))
    return str(tmp_path / "script.py")


@pytest.mark.slow
def test_each_rank_holds_its_half_of_both_models(tmp_path):
    run = run_processes(command("fsdp", script(tmp_path, PROBE), precision="bf16"))
    assert run.returncode == 0, run.stdout + run.stderr
    for rank in (0, 1):
        assert f"rank {rank} holds its half; sharded over 2 ranks (shard)" in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_student_exported_by_fsdp_is_the_one_of_the_checkpoint(small, tmp_path, tied):
    folder = student_with_dropout(tmp_path / "student", attention_dropout=0.0, tie_word_embeddings=tied)
    config = small(student_model=folder, student_random_init=True, max_steps=2, teacher_placement="offload")
    assert "in CPU memory (offload)" in launch("fsdp", config, precision="bf16")
    model = AutoModelForCausalLM.from_pretrained(Path(config.output_dir) / "final")
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float32
    assert ("lm_head.weight" in load_file(Path(config.output_dir) / "final" / "model.safetensors")) != tied
    (checkpoint,) = checkpoints(config.output_dir)
    parts = [load_file(file) for file in sorted(checkpoint.glob("*.safetensors"))]
    assert len(parts) == 2
    for name, value in model.named_parameters():
        shards = [part[f"model.model.{name}"] for part in parts if f"model.model.{name}" in part]
        assert torch.equal(torch.cat(shards), value), name


@pytest.mark.slow
def test_activation_checkpointing_changes_no_number(runs, tmp_path):
    whole = finished(runs, "fsdp", 1)
    config = replace(whole, output_dir=str(tmp_path / "run"))
    program = command("fsdp", "-m", "kdkit.train", *arguments(config))
    place = program.index("--mixed_precision")
    program[place:place] = ["--fsdp_activation_checkpointing", "true"]
    run = run_processes(program)
    assert run.returncode == 0, run.stdout + run.stderr
    assert_same_run(config, whole, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_compiled_models_change_no_number_but_for_rounding(runs, tmp_path, kind):
    config = replace(runs[kind, 1], compile_models=True, output_dir=str(tmp_path / "run"))
    launch(kind, config)
    assert_same_run(config, finished(runs, kind, 1), 1e-3)


# --- what goes wrong


@pytest.mark.slow
def test_rank_killed_in_a_save_ends_the_other_and_the_resumed_run_is_the_same_bit_for_bit(runs, tmp_path):
    kill = """
        import os, signal, sys
        from torch.distributed import checkpoint as dcp
        from kdkit.train import main
        save, calls = dcp.save, []
        def killed_in_the_second(state, **options):
            calls.append(1)
            if len(calls) == 2 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            save(state, **options)
        dcp.save = killed_in_the_second
        main(sys.argv[1:])
    """
    complete = finished(runs, "fsdp", 4)
    config = replace(complete, output_dir=str(tmp_path / "killed"))
    started = time.time()
    run = run_processes(command("fsdp", script(tmp_path, kill), *arguments(config)))
    assert run.returncode != 0 and time.time() - started < LIMIT - 30
    assert [path.name for path in checkpoints(config.output_dir)] == ["step_00000003"]
    assert "step_00000003" in launch("fsdp", config)
    assert_same_run(config, complete, 0)


@pytest.mark.slow
def test_loss_not_finite_on_one_rank_stops_both_and_the_rank_is_named(small, tmp_path):
    broken = """
        import functools, os, sys
        from torch.nn.modules.module import register_module_forward_hook
        from kdkit import train
        events = []
        def spoil(module, inputs, output):
            is_teacher = type(module).__name__ == "LlamaModel" and not module.norm.weight.requires_grad
            if is_teacher and os.environ["RANK"] == "1" and len(events) == 3:  # an evaluation and two steps
                output.last_hidden_state[0] *= float("nan")
        register_module_forward_hook(spoil)
        train.train = functools.partial(train.train, watch=events.append)
        train.main(sys.argv[1:])
    """
    config = small(max_steps=6, save_steps=2)
    run = run_processes(command("ddp", script(tmp_path, broken), *arguments(config)))
    assert run.returncode != 0
    # the launcher may end the second rank before its line is printed
    assert "kdkit: step 3 is not finite: loss, KL, gradient (the losses of rank 1)" in run.stderr
    names = sorted(path.name for path in Path(config.output_dir).glob("not_finite*"))
    assert names == [f"not_finite_step_00000003_rank_{rank}.jsonl" for rank in (0, 1)]
    assert [path.name for path in checkpoints(config.output_dir)] == ["step_00000002"]


@pytest.mark.slow
def test_sharded_checkpoint_without_a_chunk_is_not_loaded_in_part(runs, tmp_path):
    """The chunk of one rank is missing, and the files are complete: names and shapes are complete."""
    folder = shutil.copytree(finished(runs, "fsdp", 1).output_dir, tmp_path / "run")
    newest = checkpoints(folder)[-1]
    (shard,) = newest.glob("shard-00001-*")
    with safe_open(shard, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(shard)
    del tensors["model.model.model.embed_tokens.weight"]
    save_file(tensors, shard, metadata=metadata)
    with pytest.raises(
        UsageError, match=r"embed_tokens.weight is \((\(.*\)), \d+\) in the checkpoint and \(\1, \d+\) in the student"
    ):
        train(replace(runs["fsdp", 1], output_dir=str(folder), batch_size=8))


@pytest.mark.parametrize(
    "variables, named",
    [
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
            r"1 process.* with FSDP, but DistributedType.NO",
        ),
        ({"WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, "asked for 2 processes, but no GPU is found"),
        ({"WORLD_SIZE": "2"}, r"asked for 2 process\(es\), but DistributedType\.NO with 1"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision is fp16, expected bf16 or no"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DEEPSPEED .* not supported"),
    ],
)
def test_launcher_that_gets_something_else_than_it_asked_for_is_an_error(monkeypatch, variables, named):
    """Here as accelerate is without our help: each process would train alone, without a message."""
    monkeypatch.setattr(devices, "_start_cpu_processes", lambda fsdp: None)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=named):
        devices.start_accelerator()


# --- accelerate's configurations


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_file_reaches_the_processes_as_it_is_written(path, monkeypatch):
    """By what the launcher hands its processes, and what accelerate makes of that there. It reads over what it does
    not know, a misspelt key among it."""
    written = yaml.safe_load(path.read_text())
    fsdp = written.pop("fsdp_config", {})
    launched = launch_command_parser().parse_args(["--config_file", str(path), "kdkit.train"])
    launched, _, _ = _validate_launch_command(launched)
    for name in ("num_processes", "num_machines", "main_process_port", "main_process_ip", "mixed_precision"):
        assert name not in written or getattr(launched, name) == written[name], name
    assert (launched.use_fsdp, launched.multi_gpu) == (path.stem.startswith("fsdp"), path.stem == "ddp")
    if written["num_processes"] == 1:
        return
    for name, value in prepare_multi_gpu_env(launched).items():
        monkeypatch.setenv(name, value)
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert (os.environ["CUDA_VISIBLE_DEVICES"] == "-1") == bool(written.get("use_cpu"))
    assert (os.environ.get("ACCELERATE_USE_FSDP") == "true") == launched.use_fsdp == bool(fsdp)
    if fsdp:
        plugin = FullyShardedDataParallelPlugin()
        assert fsdp == {
            "fsdp_version": plugin.fsdp_version,
            "fsdp_auto_wrap_policy": {transformer_auto_wrap_policy: "TRANSFORMER_BASED_WRAP"}[plugin.auto_wrap_policy],
            "fsdp_reshard_after_forward": plugin.reshard_after_forward,
            "fsdp_state_dict_type": plugin.state_dict_type.name,
            "fsdp_cpu_ram_efficient_loading": plugin.cpu_ram_efficient_loading,
            "fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
            "fsdp_activation_checkpointing": plugin.activation_checkpointing,
        }


@pytest.mark.slow
def test_two_launchers_meet_as_two_machines_would(small):
    config = small(max_steps=2)
    file = str(ROOT / "accelerate_configs" / "fsdp_multinode.yaml")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", "2",
                "--main_process_port", str(free_port()), "--mixed_precision", "no"]  # fmt: skip
    started = [
        subprocess.Popen(
            [*launcher, "--machine_rank", str(rank), "-m", "kdkit.train", *arguments(config)],
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=LIMIT)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(printed)
    assert "x ranks 2" in printed[0] and "sharded over 2 ranks" in printed[0]
