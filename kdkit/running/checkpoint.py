"""Save, find and load checkpoints; export the trained student.

A checkpoint is a folder of safetensors files (student, optimizer, random numbers) and trainer.json (step, and the size
of each file). It holds no teacher and nothing that runs code when it is loaded. It is written under a temporary name
and renamed when all of it is on the disk, so a folder named step_* was complete when it was written. A checkpoint that
was damaged later (a missing or truncated file, an unreadable header) is skipped, and never loaded in part. Flipped bits
inside the data of a tensor are not detected: that would take a checksum, and so a second reading, of every checkpoint.
"""

import json
import math
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open

from kdkit.config import FIELDS, DistillConfig, RunStopped, UsageError, read_config
from kdkit.running import files
from kdkit.running.tracking import WANDB_ID

WRAPPERS = re.compile(r"^module\.|_checkpoint_wrapped_module\.|_orig_mod\.")  # what wrappers add to a parameter's name


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(Path(output_dir).glob("checkpoints/step_" + 8 * "[0-9]"))


def find_checkpoint(config: DistillConfig, accelerator: Accelerator) -> Path | None:
    """The checkpoint to resume from according to `config.resume`, or None for a new run. Called by all ranks.

    Damaged checkpoints are skipped with a message. If all are damaged, the run does not silently start over.

    Raises:
        UsageError: a path that is not a checkpoint, only damaged checkpoints, or a run of another configuration.
    """
    if config.resume == "never":
        return None
    run_dir, candidates = Path(config.output_dir), checkpoints(config.output_dir)[::-1]
    if config.resume != "auto":
        path = Path(config.resume)
        run_dir, candidates = path.resolve().parent.parent, [path]
        if not (path / "trainer.json").is_file():
            raise UsageError(
                f"resume is {config.resume!r}, which is not a checkpoint: expected auto, never, or a folder such as "
                "runs/demo/checkpoints/step_00000200"
            )
    found, damaged = None, []
    for path in candidates if accelerator.is_main_process else []:
        if not (reason := _why_damaged(path)):
            found = path
            break
        damaged.append(f"{path.name} is damaged ({reason})")
    found, damaged = broadcast_object_list([found, "; ".join(damaged)])
    if damaged and not found:
        raise UsageError(
            f"{damaged}: no checkpoint is left to resume from. Restore one, give the path of another one as --resume, "
            "or start over with --resume never, which replaces the run"
        )
    rows, rows_before = _rows_per_step(config, accelerator.num_processes), found and _read_state(found)["rows_per_step"]
    if (run_dir / "config.yaml").is_file():
        _check_same_run(config, run_dir, same_rows=rows == rows_before)
    if damaged:
        accelerator.print(f"note     {damaged}; resuming from {found.name}")
    if found:
        changed = f" (note: {rows} rows per step, {rows_before} when it was written)" if rows != rows_before else ""
        accelerator.print(f"resume   {found}{changed}")
    return found


def _why_damaged(checkpoint: Path) -> str:
    """Why a checkpoint is damaged, or "". Reads the size and the header of each file, but not the tensors."""
    name = "trainer.json"
    try:
        for name, size in _read_state(checkpoint)["files"].items():
            if (found := (checkpoint / name).stat().st_size) != size:
                return f"{name} has {found:,} bytes, expected {size:,}"
            safe_open(checkpoint / name, "pt")
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{name} cannot be read: {error}"
    return ""


def _read_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "trainer.json").read_text())


def _rows_per_step(config: DistillConfig, num_ranks: int) -> int:
    return config.batch_size * config.gradient_accumulation_steps * num_ranks


def _check_same_run(config: DistillConfig, run_dir: Path, same_rows: bool) -> None:
    before = read_config(run_dir / "config.yaml")
    if same_rows:  # a run may be resumed on more ranks with fewer rows on each
        before.batch_size, before.gradient_accumulation_steps = config.batch_size, config.gradient_accumulation_steps
    old, new = before.as_dict(), config.as_dict()
    changes = [
        f"{name} was {old[name]!r}, is {new[name]!r}"
        for name in new
        if old[name] != new[name] and not FIELDS[name].metadata.get("may_change")
    ]
    if changes:
        raise UsageError(
            f"{run_dir} holds a run of another configuration: {'; '.join(changes)}. "
            "Choose another --output_dir, or start over with --resume never, which replaces that run"
        )


def prepare_output_dir(config: DistillConfig) -> None:
    """Create the folder of the run and write config.yaml. With resume = never, remove the run that was there.

    Temporary folders that a killed run left are removed, too.
    """
    output_dir = Path(config.output_dir)
    for parent in (output_dir, output_dir / "checkpoints"):
        files.remove_leftovers(parent)
    if config.resume == "never":
        for name in ("checkpoints", "final"):
            shutil.rmtree(output_dir / name, ignore_errors=True)
        for name in ("metrics.jsonl", WANDB_ID):
            (output_dir / name).unlink(missing_ok=True)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        files.write_text(output_dir / "config.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False))
    except OSError as error:
        raise UsageError(f"output_dir {output_dir} cannot be written ({error.strerror}): choose another one") from error


def _unique_names(student: torch.nn.Module) -> set[str]:
    """Names of the parameters and buffers, without those that wrappers add; tied weights have one name."""
    return {WRAPPERS.sub("", name) for name, _ in [*student.named_parameters(), *student.named_buffers()]}


def _tensors(accelerator: Accelerator, student, optimizer) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name: not copies, so loading into them loads into student and optimizer."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options, names = StateDictOptions(flatten_optimizer_state_dict=True), _unique_names(student)
    model_state, optimizer_state = get_state_dict(student, optimizer.optimizer, options=options)
    random_state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_state["cuda"] = torch.cuda.get_rng_state()
    tensors = {f"model.{name}": value for name, value in model_state.items() if name in names}
    tensors |= {f"optimizer.{n}": value for n, value in optimizer_state.items() if isinstance(value, torch.Tensor)}
    return tensors | {f"rng.{accelerator.process_index}.{name}": value for name, value in random_state.items()}


def save_checkpoint(accelerator: Accelerator, student, optimizer, step: int, config: DistillConfig) -> None:
    """Write checkpoints/step_{step}, then remove all but the newest `keep_checkpoints`. Called by all ranks.

    `student` and `optimizer` are the prepared ones. Checkpoints of later steps are removed, too: they belong to an
    earlier attempt, which was resumed from before them.

    Raises:
        RunStopped: the checkpoint could not be written (a full disk, for example).
    """
    import torch.distributed.checkpoint as dcp

    root = Path(config.output_dir) / "checkpoints"
    final, temporary = root / f"step_{step:08d}", root / f".writing_step_{step:08d}"
    tensors = _tensors(accelerator, student, optimizer)

    def write():  # each rank writes its shards
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*assuming the intent is to save in a single process")
            dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True))

    def complete():
        num_ranks = accelerator.num_processes
        state = {"step": step, "rows_per_step": _rows_per_step(config, num_ranks), "num_ranks": num_ranks}
        state["files"] = {file.name: file.stat().st_size for file in sorted(temporary.glob("*.safetensors"))}
        (temporary / "trainer.json").write_text(json.dumps(state))
        files.sync(root.parent / "metrics.jsonl")  # steps before the checkpoint are not repeated: keep their lines
        files.publish(temporary, final)
        files.sync(root.parent)
        up_to_now = [path for path in checkpoints(config.output_dir) if path <= final]
        for path in set(checkpoints(config.output_dir)) - set(up_to_now[-config.keep_checkpoints :]):
            files.remove(path)

    _run_together(accelerator, config, f"step {step}", write, temporary, on_main=False)
    _run_together(accelerator, config, f"step {step}", complete, temporary)


def _run_together(accelerator, config, what: str, work: Callable[[], None], temporary: Path, on_main=True) -> None:
    """Run `work` on rank 0 or on all ranks. If it fails on any, remove the temporary folder and stop all ranks."""
    from torch.distributed.checkpoint.api import CheckpointException

    problem = ""
    if accelerator.is_main_process or not on_main:
        try:
            work()
        except (OSError, SafetensorError) as error:
            problem = str(error)
        except CheckpointException as error:  # raised by torch on all ranks, with the errors of each
            causes = [cause for cause, _ in error.failures.values()]
            if not all(isinstance(cause, OSError) for cause in causes):
                raise
            problem = str(causes[0])
    if problem := next(filter(None, gather_object([problem])), ""):
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)  # frees its space
        newest = next((path.name for path in checkpoints(config.output_dir)[::-1]), "not written yet")
        raise RunStopped(
            f"{what} could not be saved in {temporary.parent} ({problem}); the newest checkpoint is {newest}. Make "
            "room and run the same command again: it resumes from there"
        )


def load_checkpoint(accelerator: Accelerator, student, optimizer, path: Path) -> int:
    """Load a checkpoint into the prepared student and optimizer and into the random number generators.

    Returns:
        The step after which the checkpoint was written.

    Raises:
        UsageError: the checkpoint is of another student or optimizer; nothing is loaded then.
    """
    import torch.distributed.checkpoint as dcp

    tensors, state = _tensors(accelerator, student, optimizer), _read_state(path)
    if accelerator.process_index >= state["num_ranks"]:  # a rank that is new keeps the random numbers of its seed
        tensors = {name: value for name, value in tensors.items() if not name.startswith("rng.")}
    reader = dcp.HuggingFaceStorageReader(str(path))
    _check_all_there(path, reader, tensors)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process")
        dcp.load(tensors, storage_reader=reader)
    for device, set_state in (("cpu", torch.set_rng_state), ("cuda", torch.cuda.set_rng_state)):
        if (name := f"rng.{accelerator.process_index}.{device}") in tensors:
            set_state(tensors[name])
    return state["step"]


def _check_all_there(path: Path, reader, tensors: dict[str, torch.Tensor]) -> None:
    """Compare names and shapes before anything is loaded: torch silently skips tensors and chunks that are missing."""
    saved = reader.read_metadata().state_dict_metadata
    unexpected = {name for name in saved if not name.startswith("rng.")} - tensors.keys()
    for name in sorted(tensors.keys() | unexpected):
        shape, entry = tensors[name].size() if name in tensors else None, saved.get(name)
        numbers = sum(math.prod(chunk.sizes) for chunk in entry.chunks) if entry else 0
        if entry is None or shape != entry.size or numbers != math.prod(shape):
            raise UsageError(
                f"{path} does not fit the student: the shape of {name} is {entry and tuple(entry.size)} in the "
                f"checkpoint ({numbers} numbers) and {shape and tuple(shape)} in the student; resume with the student "
                "of that run"
            )


def export(accelerator: Accelerator, student, tokenizer, config: DistillConfig) -> Path:
    """Write final/: the student as a Hugging Face folder for `from_pretrained`. Called by all ranks.

    Raises:
        RunStopped: the folder could not be written.
    """
    state, names = accelerator.get_state_dict(student), _unique_names(student)  # complete tensors, on rank 0
    model, dtype = accelerator.unwrap_model(student).model, getattr(torch, config.export_dtype)
    final, temporary = Path(config.output_dir) / "final", Path(config.output_dir) / ".writing_final"

    def write():
        weights = {n.removeprefix("model."): value.to(dtype) for n, value in state.items() if n in names}
        model.save_pretrained(temporary, state_dict=weights)
        model.config.dtype = dtype  # save_pretrained wrote the dtype of training
        model.config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        files.publish(temporary, final)

    _run_together(accelerator, config, "the student", write, temporary)
    return final
