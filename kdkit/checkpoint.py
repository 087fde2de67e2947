"""Save, resume, keep the last few, export.

A checkpoint is a folder of safetensors files and a small JSON: the student, the optimizer, the state of the random
numbers and the step. No teacher, and nothing that runs code when it is read. It is complete or it is not there: it is
written aside, renamed when it is whole, and only then is the oldest one removed.
"""

import json
import os
import re
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

# These say how a run is watched and computed, not what it computes: they may differ when it goes on.
FREE_FIELDS = {"output_dir", "resume", "logging_steps", "eval_steps", "save_steps", "keep_checkpoints"}
FREE_FIELDS |= {"teacher_placement", "targets_dir", "export_dtype", "fused_loss"}
FREE_PREFIX = ("use_wandb", "wandb_")
# What these and the number of ranks make together, the rows of a step, may not.
STEP_FIELDS = {"batch_size", "gradient_accumulation_steps"}


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(Path(output_dir).glob("checkpoints/step_*"))


def find_checkpoint(config: DistillConfig, num_ranks: int = 1) -> Path | None:
    """The checkpoint to go on from, as `resume` says, or None for a new run.

    A run may go on with another number of ranks. If batch_size or gradient_accumulation_steps make up for it, it sees
    the same rows in each step as before.

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
        _check_same_run(config, run_dir, checkpoint, num_ranks)
    return checkpoint


def _check_same_run(config: DistillConfig, run_dir: Path, checkpoint: Path | None, num_ranks: int) -> None:
    before, now = asdict(read_config(run_dir / "config.yaml")), asdict(config)
    if checkpoint is not None:
        rows = config.batch_size * config.gradient_accumulation_steps * num_ranks
        if rows == json.loads((checkpoint / "trainer.json").read_text())["rows_per_step"]:
            before |= {name: now[name] for name in STEP_FIELDS}
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


def describe_resume(checkpoint: Path | None, rows_per_step: int) -> str:
    """A line that says where a run goes on from, and whether its steps have as many rows as before."""
    if checkpoint is None:
        return ""
    before = json.loads((checkpoint / "trainer.json").read_text())["rows_per_step"]
    note = f" (note: {rows_per_step} rows a step, {before} when the checkpoint was written)"
    return f"\nresume   {checkpoint}" + (note if before != rows_per_step else "")


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
    wrappers = re.compile(r"^module\.|_checkpoint_wrapped_module\.|_orig_mod\.")
    once = {wrappers.sub("", name) for name, _ in [*student.named_parameters(), *student.named_buffers()]}
    tensors = {f"model.{name}": value for name, value in model_state.items() if name in once}  # tied weights once
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
        rows = config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        state = {"step": step, "rows_per_step": rows, "num_ranks": accelerator.num_processes}
        (aside / "trainer.json").write_text(json.dumps(state))
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
    state = json.loads((path / "trainer.json").read_text())
    if (
        accelerator.process_index >= state["num_ranks"]
    ):  # more ranks than before: the new ones have their seed's numbers
        tensors = {name: value for name, value in tensors.items() if not name.startswith("rng.")}
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
    random_state = {name.split(".")[-1]: value for name, value in tensors.items() if name.startswith("rng.")}
    if "cpu" in random_state:
        torch.set_rng_state(random_state["cpu"])
    if "cuda" in random_state:
        torch.cuda.set_rng_state(random_state["cuda"])
    return state["step"]


def export(accelerator: Accelerator, student, tokenizer, config: DistillConfig) -> Path:
    """Write final/: the student as a Hugging Face folder that `from_pretrained` loads. Called by all ranks."""
    state = accelerator.get_state_dict(student)  # gathered, on rank 0
    model = accelerator.unwrap_model(student).model
    final, aside = Path(config.output_dir) / "final", Path(config.output_dir) / ".writing_final"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        dtype = getattr(torch, config.export_dtype)
        state = {name.removeprefix("model."): value.to(dtype) for name, value in state.items()}
        if model.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)  # the embedding's: `from_pretrained` ties it again
        model.save_pretrained(aside, state_dict=state)
        model.config.dtype = dtype  # save_pretrained wrote that of the weights in training
        model.config.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(aside, final)
    accelerator.wait_for_everyone()
    return final
