"""Save, resume, keep the last few, export.

A checkpoint is a folder of safetensors files and a small JSON: the student, the optimizer, the state of the random
numbers and the step. No teacher, and nothing that runs code when it is read. It is complete or it is not there: it is
written aside, renamed when it is whole, and only then is the oldest one removed. What happens to it later, its
checksums tell: a checkpoint that is not whole is passed over, and never loaded in part.
"""

import json
import math
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from kdkit.config import FIELDS, DistillConfig, RunStopped, UsageError, read_config
from kdkit.data import Steps
from kdkit.running import files
from kdkit.running.tracking import WANDB_ID

# What these and the number of ranks make together, the rows of a step, may not.
STEP_FIELDS = {"batch_size", "gradient_accumulation_steps"}


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first: complete when they were written."""
    return sorted(Path(output_dir).glob("checkpoints/step_" + 8 * "[0-9]"))


def find_checkpoint(config: DistillConfig, accelerator: Accelerator) -> Path | None:
    """The checkpoint to go on from, as `resume` says, or None for a new run. Called by all ranks.

    One that is not whole any more is passed over, and said so; without a whole one the run does not start over by
    itself. A run may go on with another number of ranks. If batch_size or gradient_accumulation_steps make up for it,
    it sees the same rows in each step as before.

    Raises:
        UsageError: a path that is no checkpoint, none that is whole, or a run of another configuration in the folder.
    """
    if config.resume == "never":
        return None
    if config.resume == "auto":
        run_dir, found = Path(config.output_dir), checkpoints(config.output_dir)[::-1]
    else:
        path = Path(config.resume)
        if not path.is_dir() or not (path / "trainer.json").is_file():
            raise UsageError(
                f"resume is {config.resume!r}, which is no checkpoint: expected auto, never, or a folder "
                "such as runs/demo/checkpoints/step_00000200"
            )
        run_dir, found = path.resolve().parent.parent, [path]
    (found,) = broadcast_object_list([found])  # what rank 0 sees
    whole, broken = None, []
    for path in found:
        why = _why_broken(path, accelerator)
        if not why:
            whole = path
            break
        broken.append(f"{path.name} ({why})")
    if found and whole is None:
        raise UsageError(
            f"no checkpoint to go on from in {found[0].parent} is whole; tried: {'; '.join(broken)}. Put one back, "
            "give the path of another as --resume, or start over with --resume never, which replaces that run"
        )
    if broken:
        accelerator.print(f"note     not whole: {'; '.join(broken)}; going on from {whole.name}, the one before")
    if (run_dir / "config.yaml").is_file():
        _check_same_run(config, run_dir, whole, accelerator.num_processes)
    return whole


def _why_broken(path: Path, accelerator: Accelerator) -> str:
    """Why a checkpoint is not whole, the same on all ranks, or "". Each rank reads its share of the files."""
    needed = {"trainer.json", *(file.name for file in path.glob("*.safetensors"))}
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    return next(filter(None, gather_object([files.why_broken(path, needed, share)])), "")


def _check_same_run(config: DistillConfig, run_dir: Path, checkpoint: Path | None, num_ranks: int) -> None:
    before, now = read_config(run_dir / "config.yaml").as_dict(), config.as_dict()
    if checkpoint is not None:
        rows = config.batch_size * config.gradient_accumulation_steps * num_ranks
        if rows == json.loads((checkpoint / "trainer.json").read_text())["rows_per_step"]:
            before |= {name: now[name] for name in STEP_FIELDS}
    differing = [
        f"{name} was {before[name]!r}, is {now[name]!r}"
        for name in now
        if before[name] != now[name] and not FIELDS[name].metadata.get("may_change")
    ]
    if differing:
        raise UsageError(
            f"{run_dir} holds a run of another configuration: {'; '.join(differing)}. "
            "Choose another --output_dir, or start over with --resume never, which replaces that run"
        )


def describe_resume(checkpoint: Path | None, steps: Steps) -> str:
    """A line that says where a run goes on from, and whether its steps have as many rows as before."""
    if checkpoint is None:
        return ""
    state = json.loads((checkpoint / "trainer.json").read_text())
    line, before = f"\nresume   {checkpoint}", state["rows_per_step"]
    if state["step"] >= len(steps):
        line += ": all steps are done, what is left is to write final/"
    if before != steps.rows_per_step:
        line += f" (note: {steps.rows_per_step} rows a step, {before} when the checkpoint was written)"
    return line


def prepare_output_dir(config: DistillConfig) -> None:
    """Make the run's folder and write config.yaml; with resume = never, the run that was there goes."""
    output_dir = Path(config.output_dir)
    if config.resume == "never":
        for name in ("checkpoints", "final"):
            shutil.rmtree(output_dir / name, ignore_errors=True)
        for name in ("metrics.jsonl", WANDB_ID):
            (output_dir / name).unlink(missing_ok=True)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        files.write_text(output_dir / "config.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False))
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


def save_checkpoint(accelerator: Accelerator, student, optimizer, step: int, config: DistillConfig) -> None:
    """Write checkpoints/step_{step}, complete or not at all, then remove the oldest beyond `keep_checkpoints`.

    Called by all ranks. `student` and `optimizer` are the prepared ones. Checkpoints of later steps go too: they are
    of a run that went on from here once, and were passed over when it was started again.

    Raises:
        RunStopped: it could not be written (a full disk, say).
    """
    root = Path(config.output_dir) / "checkpoints"
    final, aside = root / f"step_{step:08d}", root / f".writing_step_{step:08d}"
    tensors, _, _ = _state(accelerator, student, optimizer.optimizer)
    rank, num_ranks, sums = accelerator.process_index, accelerator.num_processes, {}

    def clean():
        for leftover in [*root.glob(".writing_step_*"), *root.glob(".removing_step_*")]:
            shutil.rmtree(leftover)

    def write():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*assuming the intent is to save in a single process")
            dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(aside), save_distributed=True))
        mine = sorted(aside.glob("*.safetensors"))[rank::num_ranks]
        sums.update({file.name: files.sha256(file) for file in mine})

    def complete():
        rows = config.batch_size * config.gradient_accumulation_steps * num_ranks
        state = {"step": step, "rows_per_step": rows, "num_ranks": num_ranks}
        (aside / "trainer.json").write_text(json.dumps(state))
        files.write_sums(aside, {**all_sums, "trainer.json": files.sha256(aside / "trainer.json")})
        files.sync(root.parent / "metrics.jsonl")  # the lines before this step may not be lost when it is not
        files.publish(aside, final)
        files.sync(root.parent)
        kept = [path for path in checkpoints(config.output_dir) if path <= final][-config.keep_checkpoints :]
        for path in set(checkpoints(config.output_dir)) - set(kept):
            files.remove(path)

    problem = _problem(accelerator, clean, on_main=True) or _problem(accelerator, write)
    all_sums = {name: digest for part in gather_object([sums]) for name, digest in part.items()}
    problem = problem or _problem(accelerator, complete, on_main=True)
    if problem:
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)  # makes room
        newest = next((path.name for path in checkpoints(config.output_dir)[::-1]), "yet to be written")
        message = f"step {step} could not be saved in {root} ({problem}); the newest checkpoint is {newest}"
        raise RunStopped(f"{message}. Make room and start the same command again: it goes on from there")


def _problem(accelerator: Accelerator, work: Callable[[], None], on_main: bool = False) -> str:
    """Do a rank's part of writing; what went wrong with it on any rank, told to all: they stop or go on together."""
    problem = ""
    if accelerator.is_main_process or not on_main:
        try:
            work()
        except (OSError, SafetensorError) as error:
            problem = str(error)
        except CheckpointException as error:  # torch's, raised by all ranks
            causes = [cause for cause, _ in error.failures.values()]
            if not all(isinstance(cause, OSError) for cause in causes):
                raise
            problem = str(causes[0])
    return next(filter(None, gather_object([problem])), "")


def load_checkpoint(accelerator: Accelerator, student, optimizer, path: Path) -> int:
    """Put a checkpoint's state into the prepared student and optimizer, and into the random numbers.

    Returns:
        The step it was written after.

    Raises:
        UsageError: a checkpoint of something else than this student and its optimizer; nothing of it is loaded.
    """
    tensors, model_state, optimizer_state = _state(accelerator, student, optimizer.optimizer)  # filled in place below
    state = json.loads((path / "trainer.json").read_text())
    if (
        accelerator.process_index >= state["num_ranks"]
    ):  # more ranks than before: the new ones have their seed's numbers
        tensors = {name: value for name, value in tensors.items() if not name.startswith("rng.")}
    _check_all_there(path, tensors)
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


def _check_all_there(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Compare names and sizes, for torch leaves alone what no file holds; and parts, which may lack in a whole size."""
    saved = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    beyond = {name for name in saved if not name.startswith("rng.")} - tensors.keys()
    for name in sorted(tensors.keys() | beyond):
        size, entry = tensors[name].size() if name in tensors else None, saved.get(name)
        parts = sum(math.prod(chunk.sizes) for chunk in entry.chunks) if entry else 0
        if entry is None or size != entry.size or parts != math.prod(size):
            raise UsageError(
                f"{path} does not fit the student: {name} is {entry and tuple(entry.size)} ({parts} numbers) in it, "
                f"and should be {size and tuple(size)}; use the student it was made with"
            )


def export(accelerator: Accelerator, student, tokenizer, config: DistillConfig) -> Path:
    """Write final/: the student as a Hugging Face folder that `from_pretrained` loads. Called by all ranks.

    Raises:
        RunStopped: it could not be written.
    """
    state = accelerator.get_state_dict(student)  # gathered, on rank 0
    model = accelerator.unwrap_model(student).model
    final, aside = Path(config.output_dir) / "final", Path(config.output_dir) / ".writing_final"

    def write():
        shutil.rmtree(aside, ignore_errors=True)
        dtype = getattr(torch, config.export_dtype)
        weights = {name.removeprefix("model."): value.to(dtype) for name, value in state.items()}
        if model.config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)  # the embedding's: `from_pretrained` ties it again
        model.save_pretrained(aside, state_dict=weights)
        model.config.dtype = dtype  # save_pretrained wrote that of the weights in training
        model.config.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        files.publish(aside, final)

    if problem := _problem(accelerator, write, on_main=True):
        if accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
        raise RunStopped(
            f"the student could not be written to {final}: {problem}. Make room and start the same command again: "
            "it goes on from the newest checkpoint"
        )
    return final
