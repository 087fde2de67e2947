"""Save, find and load checkpoints; export the trained student.

A checkpoint is a folder of safetensors files (student, optimizer, random numbers) and trainer.json (step, and the size
of each file). It holds no teacher and nothing that runs code when it is loaded. It is complete when it gets its name;
one that was damaged later (a missing or truncated file, an unreadable header) is skipped. Flipped bits inside the data
of a tensor are not detected: that would take a checksum, and so a second reading, of every checkpoint.
"""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Collection
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError, safe_open

from kdkit.config import FIELDS, DistillConfig, RunStopped, UsageError, read_config
from kdkit.running import files

WRAPPERS = re.compile(r"^module\.|_checkpoint_wrapped_module\.|_orig_mod\.")  # what wrappers add to a parameter's name
# torch.distributed.checkpoint warns about this at each call in a run on one rank
warnings.filterwarnings("ignore", message=".*assuming the intent is to (save|load) in a single process")


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted(Path(output_dir).glob("checkpoints/step_" + 8 * "[0-9]"))


def find_checkpoint(config: DistillConfig, accelerator: Accelerator) -> Path | None:
    """Return the checkpoint to resume from according to `config.resume`, or None for a new run. Called by all ranks.

    Damaged checkpoints are skipped with a message. Raises a UsageError if all are damaged, so that the run does not
    silently start over, and if the folder holds a run of another configuration.
    """
    if config.resume == "never":
        return None
    run_dir, candidates = Path(config.output_dir), checkpoints(config.output_dir)[::-1]
    if config.resume != "auto":
        run_dir, candidates = Path(config.resume).resolve().parent.parent, [Path(config.resume)]
    (reasons,) = broadcast_object_list([{path: _why_damaged(path) for path in candidates}])  # what rank 0 found
    found = next((path for path, reason in reasons.items() if not reason), None)
    damaged = "; ".join(f"{path.name} is damaged ({reason})" for path, reason in reasons.items() if reason)
    if damaged and not found:
        raise UsageError(
            f"resume is {config.resume}, but {damaged}: no checkpoint is left. Restore one, give the path of another, "
            "such as runs/demo/checkpoints/step_00000200, or start over with --resume never, which replaces the run"
        )
    rows = config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    rows_before = found and json.loads((found / "trainer.json").read_text())["rows_per_step"]
    if (run_dir / "config.yaml").is_file():  # a run may be resumed on more ranks with fewer rows on each
        _check_same_run(config, run_dir, ("batch_size", "gradient_accumulation_steps") if rows == rows_before else ())
    if damaged:
        accelerator.print(f"note     {damaged}; resuming from {found.name}")
    if found:
        changed = f" (note: {rows} rows per step, {rows_before} when it was written)" if rows != rows_before else ""
        accelerator.print(f"resume   {found}{changed}")
    return found


def _why_damaged(checkpoint: Path) -> str:
    """Return why a checkpoint is damaged, or "". Reads the size and the header of each file, but not the tensors."""
    name = "trainer.json"
    try:
        sizes = json.loads((checkpoint / name).read_text())["files"]
        for name, size in sizes.items():
            if (found := (checkpoint / name).stat().st_size) != size:
                return f"{name} has {found:,} bytes, expected {size:,}"
            safe_open(checkpoint / name, "pt")
    except Exception as error:  # any: a damaged file may contain anything
        return f"{name} cannot be read: {error}"
    return ""


def _check_same_run(config: DistillConfig, run_dir: Path, may_change: Collection[str]) -> None:
    old, new = read_config(run_dir / "config.yaml").as_dict(), config.as_dict()
    names = [n for n in new if old[n] != new[n] and n not in may_change and not FIELDS[n].metadata.get("may_change")]
    if changes := "; ".join(f"{name} was {old[name]!r}, is {new[name]!r}" for name in names):
        raise UsageError(
            f"{run_dir} holds a run of another configuration: {changes}. "
            "Choose another --output_dir, or start over with --resume never, which replaces that run"
        )


def prepare_output_dir(config: DistillConfig) -> None:
    """Create the folder of the run and write config.yaml; with resume = never, remove the run that was there."""
    output_dir = Path(config.output_dir)
    for pattern in (".writing_*", ".removing_*", "checkpoints/.writing_*", "checkpoints/.removing_*"):
        for leftover in output_dir.glob(pattern):  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if config.resume == "never":
            files.remove(output_dir / "checkpoints")
            files.remove(output_dir / "final")
        files.write_text(output_dir / "config.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False))
    except OSError as error:
        raise UsageError(f"output_dir {output_dir} cannot be written ({error.strerror}): choose another one") from error


def _unique_names(student: torch.nn.Module) -> set[str]:
    """Names of the parameters and buffers, without those that wrappers add; tied weights have one name."""
    return {WRAPPERS.sub("", name) for name, _ in [*student.named_parameters(), *student.named_buffers()]}


def _tensors(accelerator: Accelerator, student, optimizer) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name: not copies, so loading into them loads into student and optimizer."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    for group in optimizer.optimizer.param_groups:
        for parameter in group["params"]:  # one without a gradient yet gets the state that its first one would give it
            if not optimizer.optimizer.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                step = torch.zeros((), device=parameter.device, dtype=torch.float32)
                optimizer.optimizer.state[parameter] = {"step": step, **zeros}
    options, names = StateDictOptions(flatten_optimizer_state_dict=True), _unique_names(student)
    model_state, optimizer_state = get_state_dict(student, optimizer.optimizer, options=options)
    tensors = {f"model.{name}": value for name, value in model_state.items() if name in names}
    tensors |= {f"optimizer.{n}": value for n, value in optimizer_state.items() if isinstance(value, torch.Tensor)}
    tensors[f"rng.{accelerator.process_index}.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors[f"rng.{accelerator.process_index}.cuda"] = torch.cuda.get_rng_state()
    return tensors


def check_inputs(path: Path, config: DistillConfig, inputs: dict[str, str | None]) -> None:
    """Raise a UsageError if a checkpoint was written with other inputs; what one of both does not know may differ."""
    before = json.loads((path / "trainer.json").read_text()).get("inputs", {})
    for name, now in inputs.items():
        if None not in (now, before.get(name)) and now != before[name]:
            raise UsageError(
                f"{name} {getattr(config, name)} has changed since {path} was written: restore it, choose another "
                "--output_dir, or start over with --resume never, which replaces that run"
            )


def save_checkpoint(
    accelerator: Accelerator, student, optimizer, step: int, config: DistillConfig, inputs: dict | None = None
) -> None:
    """Write checkpoints/step_{step}, then remove all but the newest `keep_checkpoints`. Called by all ranks.

    `inputs` are those of `describe_inputs`, which a run that resumes must have, too.
    Checkpoints of later steps are removed, too: they belong to an earlier attempt, before this run was resumed.
    Raises RunStopped if the checkpoint cannot be written (a full disk, for example).
    """
    import torch.distributed.checkpoint as dcp

    output_dir, tensors = Path(config.output_dir), _tensors(accelerator, student, optimizer)

    def write(folder):
        # each rank writes its shards
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
        if accelerator.is_main_process:
            sizes = {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}
            rows = config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes
            content = {"step": step, "rows_per_step": rows, "files": sizes, "inputs": inputs or {}}
            (folder / "trainer.json").write_text(json.dumps(content))
            files.sync(output_dir / "metrics.jsonl")  # steps before the checkpoint are not repeated: keep their lines
            files.sync(output_dir)

    final = output_dir / "checkpoints" / f"step_{step:08d}"
    _write_folder(accelerator, config, f"step {step}", final, write)
    if accelerator.is_main_process:
        up_to_now = [path for path in checkpoints(output_dir) if path <= final]
        for path in set(checkpoints(output_dir)) - set(up_to_now[-config.keep_checkpoints :]):
            files.remove(path)


def _write_folder(accelerator, config, what: str, final: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary folder on all ranks, then rename the folder to `final`; or stop all ranks."""
    from torch.distributed.checkpoint.api import CheckpointException

    temporary, problem = final.with_name(f".writing_{final.name}"), ""
    try:
        write(temporary)
        if accelerator.is_main_process:
            files.publish(temporary, final)
    except (OSError, SafetensorError, CheckpointException) as error:
        # torch raises the errors of all ranks on each rank
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        if not isinstance(cause, (OSError, SafetensorError)):
            raise
        problem = str(cause)
    if problem := next(filter(None, gather_object([problem])), ""):
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)  # frees its space
        raise RunStopped(
            f"{what} could not be saved in {final.parent} ({problem}); the earlier checkpoints are kept. Make room and "
            "run the same command again: it resumes from the newest"
        )


def load_checkpoint(accelerator: Accelerator, student, optimizer, path: Path) -> int:
    """Load the student, the optimizer and the random number generators from a checkpoint, and return its step.

    Raises a UsageError, and loads nothing, if the checkpoint is of another student or optimizer.
    """
    import torch.distributed.checkpoint as dcp

    reader, tensors = dcp.HuggingFaceStorageReader(str(path)), _tensors(accelerator, student, optimizer)
    saved = reader.read_metadata().state_dict_metadata
    # a rank or a device that the checkpoint does not know keeps the random numbers of its seed
    tensors = {name: value for name, value in tensors.items() if name in saved or not name.startswith("rng.")}
    # compared here, since torch silently skips missing chunks and tensors that the student does not have
    expected = {name: (tuple(value.shape), value.numel()) for name, value in tensors.items()}
    found = {name: (tuple(x.size), sum(chunk.sizes.numel() for chunk in x.chunks)) for name, x in saved.items()}
    names = tensors.keys() | {name for name in saved if not name.startswith("rng.")}
    if wrong := min((name for name in names if expected.get(name) != found.get(name)), default=""):
        raise UsageError(
            f"{path} does not fit the student: {wrong} is {found.get(wrong)} in the checkpoint and "
            f"{expected.get(wrong)} in the student (shape, numbers); resume with the student of that run"
        )
    dcp.load(tensors, storage_reader=reader)
    for device, set_state in (("cpu", torch.set_rng_state), ("cuda", torch.cuda.set_rng_state)):
        if (name := f"rng.{accelerator.process_index}.{device}") in tensors:
            set_state(tensors[name])
    return json.loads((path / "trainer.json").read_text())["step"]


def export(accelerator: Accelerator, student, tokenizer, config: DistillConfig) -> Path:
    """Write final/: the student as a Hugging Face folder for `from_pretrained`. Called by all ranks.

    Raises RunStopped if the folder cannot be written.
    """
    state, names = accelerator.get_state_dict(student), _unique_names(student)  # complete tensors, on rank 0
    model = accelerator.unwrap_model(student).model

    def write(folder):
        if accelerator.is_main_process:
            weights = {name.removeprefix("model."): value for name, value in state.items() if name in names}
            model.save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)

    final = Path(config.output_dir) / "final"
    _write_folder(accelerator, config, "the student", final, write)
    return final
