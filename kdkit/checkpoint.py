"""Save, resume, keep the last few, export.

A checkpoint is a folder of safetensors files and a small JSON: the student, the optimizer, the state of the random
numbers and the step. No teacher, and nothing that runs code when it is read. It is complete or it is not there: it is
written aside, renamed when it is whole, and only then is the oldest one removed.
"""

import json
import os
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from kdkit.config import DistillConfig, UsageError, read_config

# These say how a run is watched, not what it computes: they may differ when it goes on.
FREE_FIELDS = {"output_dir", "resume", "logging_steps", "eval_steps", "save_steps", "keep_checkpoints"}
FREE_PREFIX = ("use_wandb", "wandb_")


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(Path(output_dir).glob("checkpoints/step_*"))


def find_checkpoint(config: DistillConfig) -> Path | None:
    """The checkpoint to go on from, as `resume` says, or None for a new run.

    Raises:
        UsageError: a path that is no checkpoint, or a run of another configuration in the folder.
    """
    if config.resume == "never":
        return None
    if config.resume == "auto":
        found = checkpoints(config.output_dir)
        checkpoint = found[-1] if found else None
        run_dir = Path(config.output_dir)
    else:
        checkpoint = Path(config.resume)
        if not (checkpoint / "trainer.json").is_file():
            raise UsageError(
                f"resume is {config.resume!r}, which is no checkpoint: expected auto, never, or a folder "
                "such as runs/demo/checkpoints/step_00000200"
            )
        run_dir = checkpoint.resolve().parent.parent
    if (run_dir / "config.yaml").is_file():
        _check_same_run(config, run_dir)
    return checkpoint


def _check_same_run(config: DistillConfig, run_dir: Path) -> None:
    before, now = asdict(read_config(run_dir / "config.yaml")), asdict(config)
    differing = [
        f"{name} was {before[name]!r}, is {now[name]!r}"
        for name in now
        if before[name] != now[name] and name not in FREE_FIELDS and not name.startswith(FREE_PREFIX)
    ]
    if differing:
        raise UsageError(
            f"{run_dir} holds a run of another configuration: {'; '.join(differing)}. "
            "Choose another --output_dir, or start over with --resume never, which replaces that run"
        )


def prepare_output_dir(config: DistillConfig) -> None:
    """Make the run's folder and write config.yaml; with resume = never, the run that was there goes."""
    output_dir = Path(config.output_dir)
    if config.resume == "never":
        for name in ("checkpoints", "final"):
            shutil.rmtree(output_dir / name, ignore_errors=True)
        (output_dir / "metrics.jsonl").unlink(missing_ok=True)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        config.save(output_dir / "config.yaml")
    except OSError as error:
        raise UsageError(f"output_dir {output_dir} cannot be written ({error.strerror}): choose another") from error


def _state(accelerator: Accelerator, student, optimizer) -> tuple[dict, dict, dict]:
    """The run's state as one flat dict of tensors, and the two parts it was made of."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model_state, optimizer_state = get_state_dict(student, optimizer, options=options)
    once = {name.removeprefix("module.") for name, _ in student.named_parameters()}  # tied weights, under one name
    once |= {name.removeprefix("module.") for name, _ in student.named_buffers()}
    tensors = {f"model.{name}": value for name, value in model_state.items() if name in once}
    tensors |= {f"optimizer.{n}": value for n, value in optimizer_state.items() if isinstance(value, torch.Tensor)}
    tensors |= {f"rng.{accelerator.process_index}.{name}": value for name, value in _random_state().items()}
    return tensors, model_state, optimizer_state


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def save_checkpoint(accelerator: Accelerator, student, optimizer, step: int, config: DistillConfig) -> Path:
    """Write checkpoints/step_{step}, complete or not at all, then remove the oldest beyond `keep_checkpoints`.

    Called by all ranks. `student` and `optimizer` are the prepared ones.
    """
    root = Path(config.output_dir) / "checkpoints"
    final, aside = root / f"step_{step:08d}", root / f".writing_step_{step:08d}"
    if accelerator.is_main_process:
        for leftover in root.glob(".writing_step_*"):
            shutil.rmtree(leftover)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    tensors, _, _ = _state(accelerator, student, optimizer.optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to save in a single process")
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(aside), save_distributed=True))
    if accelerator.is_main_process:
        (aside / "trainer.json").write_text(json.dumps({"step": step}))
        shutil.rmtree(final, ignore_errors=True)
        os.rename(aside, final)
        for oldest in checkpoints(config.output_dir)[: -config.keep_checkpoints]:
            shutil.rmtree(oldest)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(accelerator: Accelerator, student, optimizer, path: Path) -> int:
    """Put a checkpoint's state into the prepared student and optimizer, and into the random numbers.

    Returns:
        The step it was written after.
    """
    tensors, model_state, optimizer_state = _state(accelerator, student, optimizer.optimizer)  # filled in place below
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process")
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)))
    optimizer_state |= {n: tensors[f"optimizer.{n}"] for n in optimizer_state if f"optimizer.{n}" in tensors}
    set_state_dict(
        student,
        optimizer.optimizer,
        model_state_dict=model_state,
        optim_state_dict=optimizer_state,
        options=StateDictOptions(flatten_optimizer_state_dict=True),
    )
    rank = accelerator.process_index
    torch.set_rng_state(tensors[f"rng.{rank}.cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[f"rng.{rank}.cuda"])
    return json.loads((path / "trainer.json").read_text())["step"]


def export(accelerator: Accelerator, student, tokenizer, output_dir: str | Path) -> Path:
    """Write final/: the student as a Hugging Face folder that `from_pretrained` loads. Called by all ranks."""
    state = accelerator.get_state_dict(student)
    model = accelerator.unwrap_model(student).model
    final, aside = Path(output_dir) / "final", Path(output_dir) / ".writing_final"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        state = {name.removeprefix("model."): value for name, value in state.items()}
        model.save_pretrained(aside, state_dict=state)
        tokenizer.save_pretrained(aside)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(aside, final)
    accelerator.wait_for_everyone()
    return final
