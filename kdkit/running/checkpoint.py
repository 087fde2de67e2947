"""Save, find and load checkpoints; export the trained student.

A checkpoint is a folder of safetensors files (student, optimizer, random numbers) and trainer.json (step, files, inputs
of the run). It holds no teacher and nothing that runs code when it is loaded. It is complete when it gets its name; one
that was damaged later (a missing or truncated file, an unreadable header) is skipped. Flipped bits are not detected.
"""

import json
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
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from kdkit.command_line import read_config
from kdkit.config import FIELDS, DistillConfig, RunStopped, UsageError
from kdkit.running import files

WRAPPERS = re.compile(r"^module\.|_checkpoint_wrapped_module\.|_orig_mod\.")  # what wrappers add to a name
NO_OTHER_START = {"student_layers": "null", "student_random_init": "false"}
REMEDY = "or start over with --resume never, which replaces that run"
# torch.distributed.checkpoint warns about this at each call in a run on one rank
warnings.filterwarnings("ignore", message=".*assuming the intent is to (save|load) in a single process")


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted(Path(output_dir).glob("checkpoints/step_" + 8 * "[0-9]"))


def _trainer_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "trainer.json").read_text())


def find_checkpoint(config: DistillConfig, accelerator: Accelerator) -> Path | None:
    """Return the newest undamaged checkpoint that `config.resume` allows; None for a new run. Called by all ranks.

    Raises a UsageError if all are damaged (no run silently starts over), or for a run of another configuration.
    """
    if config.resume == "never":
        return None
    run_dir, candidates = Path(config.output_dir), checkpoints(config.output_dir)[::-1]
    if config.resume != "auto":
        run_dir, candidates = Path(config.resume).resolve().parent.parent, [Path(config.resume)]
    (reasons,) = broadcast_object_list([{path: _why_damaged(path) for path in candidates}])  # what rank 0 found
    found = next((path for path in reasons if not reasons[path]), None)
    damaged = "; ".join(f"{path.name} is damaged ({reason})" for path, reason in reasons.items() if reason)
    if damaged and not found:
        raise UsageError(f"resume is {config.resume}, but {damaged}: restore one, give the path of another, {REMEDY}")
    rows = config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    rows_before = found and _trainer_state(found)["rows_per_step"]
    if (run_dir / "config.yaml").is_file():
        old, new = read_config(run_dir / "config.yaml").as_dict(), config.as_dict()
        free = {name for name in new if FIELDS[name].metadata.get("may_change")}
        if rows == rows_before:  # on more ranks, for example, with fewer rows on each
            free |= {"batch_size", "gradient_accumulation_steps"}
        changes = [f"{n} was {old[n]!r}, is {new[n]!r}" for n in new if old[n] != new[n] and n not in free]
        if changes:
            what, train_on = f"{run_dir} holds a run of another configuration: {'; '.join(changes)}", ""
            if (run_dir / "final").is_dir():  # no value here may keep the new run from starting with its weights
                unset = "".join(f" --{name} {value}" for name, value in NO_OTHER_START.items() if new[name])
                train_on = f" (to train its student on, add --student_model {run_dir}/final{unset})"
            raise UsageError(f"{what}. Choose another --output_dir{train_on}, {REMEDY}")
    if damaged:
        accelerator.print(f"note     {damaged}; resuming from {found.name}")
    if found:
        changed = f" (note: {rows} rows per step, {rows_before} when it was written)" if rows != rows_before else ""
        accelerator.print(f"resume   {found}{changed}")
    return found


def _why_damaged(checkpoint: Path) -> str:
    """Return why a checkpoint is damaged, or "". Reads the header of each file, which says how long it has to be."""
    name = "trainer.json"
    try:
        for name in _trainer_state(checkpoint)["files"]:
            safe_open(checkpoint / name, "pt")
    except Exception as error:  # any: a damaged file may contain anything
        return f"{name} cannot be read: {error}"
    return ""


def check_inputs(checkpoint: Path, config: DistillConfig, inputs: dict[str, str | None]) -> None:
    """Raise a UsageError if a checkpoint was written with other inputs; what one of both does not know may differ."""
    before = _trainer_state(checkpoint).get("inputs", {})
    for name, now in inputs.items():
        if None not in (now, before.get(name)) and now != before[name]:
            what = f"{name} {getattr(config, name)} has changed since {checkpoint} was written"
            raise UsageError(f"{what}: restore it, choose another --output_dir, {REMEDY}")


def prepare_output_dir(config: DistillConfig) -> None:
    """Create the folder of the run and write config.yaml; with resume = never, remove the run that was there."""
    output_dir = Path(config.output_dir)
    for leftover in [*output_dir.glob(".[rw]*ing_*"), *output_dir.glob("checkpoints/.[rw]*ing_*")]:
        shutil.rmtree(leftover, ignore_errors=True)  # of a run that was killed
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if config.resume == "never":
            files.remove(output_dir / "checkpoints")
            files.remove(output_dir / "final")
        files.write(output_dir / "config.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False))
    except OSError as error:
        raise UsageError(f"output_dir {output_dir} cannot be written ({error.strerror}): choose another one") from error


def _unique_names(student: torch.nn.Module) -> set[str]:
    """Return the names of parameters and buffers, without what wrappers add; tied weights have one name."""
    return {WRAPPERS.sub("", name) for name, _ in [*student.named_parameters(), *student.named_buffers()]}


def _tensors(accelerator: Accelerator, student, optimizer) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name: not copies, so loading into them loads into student and optimizer."""
    # An optimizer without any state gets it from get_state_dict, which takes a step with gradients and a rate of zero.
    # A parameter that had no gradient so far gets zeros, of the shapes that another one has.
    if known := next(((parameter, state) for parameter, state in optimizer.state.items() if state), None):
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        for parameter in (parameter for parameter in parameters if not optimizer.state[parameter]):
            for name, value in known[1].items():
                like = parameter if value.shape == known[0].shape else value
                optimizer.state[parameter][name] = torch.zeros_like(like)
    options, names = StateDictOptions(flatten_optimizer_state_dict=True), _unique_names(student)
    model_state, optimizer_state = get_state_dict(student, optimizer.optimizer, options=options)
    tensors = {f"model.{name}": value for name, value in model_state.items() if name in names}
    if others := [name for name, x in optimizer_state.items() if name.startswith("state.") and not torch.is_tensor(x)]:
        raise RunStopped(f"the optimizer has {others[0]}, expected a tensor: a checkpoint holds nothing else")
    tensors |= {f"optimizer.{name}": value for name, value in optimizer_state.items() if isinstance(value, Tensor)}
    tensors[f"rng.{accelerator.process_index}.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors[f"rng.{accelerator.process_index}.cuda"] = torch.cuda.get_rng_state()
    return tensors


def save_checkpoint(
    accelerator: Accelerator, student, optimizer, step: int, config: DistillConfig, inputs: dict | None = None
) -> None:
    """Write checkpoints/step_{step}, then remove all but the newest `keep_checkpoints`. Called by all ranks.

    Later checkpoints are of an earlier attempt, before this run was resumed, and are removed. `inputs` are those of
    `describe_inputs`. Raises RunStopped if the checkpoint cannot be written (a full disk, for example).
    """
    output_dir, tensors = Path(config.output_dir), _tensors(accelerator, student, optimizer)

    def write(folder: Path) -> None:
        # each rank writes its shards
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
        if accelerator.is_main_process:
            rows = config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes
            names = sorted(file.name for file in folder.glob("*.safetensors"))
            state = {"step": step, "rows_per_step": rows, "files": names, "inputs": inputs or {}}
            (folder / "trainer.json").write_text(json.dumps(state))
            files.sync(output_dir / "metrics.jsonl")  # steps before the checkpoint are not repeated: keep their lines
            files.sync(output_dir)

    final = output_dir / "checkpoints" / f"step_{step:08d}"
    _write_folder(accelerator, f"step {step}", final, write)
    kept = [path for path in checkpoints(output_dir) if path <= final][-config.keep_checkpoints :]
    for path in checkpoints(output_dir) if accelerator.is_main_process else []:
        if path not in kept:
            files.remove(path)


def _write_folder(accelerator: Accelerator, what: str, final: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary folder on all ranks, then rename the folder to `final`; or stop all ranks."""
    temporary, problem = final.with_name(f".writing_{final.name}"), ""
    try:
        write(temporary)
        if accelerator.is_main_process:
            files.publish(temporary, final)
    except (OSError, SafetensorError, CheckpointException) as error:
        # torch raises the errors of all ranks on each rank
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        if not isinstance(cause, (OSError, SafetensorError)):
            raise cause from error  # such as the KeyboardInterrupt of Ctrl-C
        problem = str(cause)
    if problem := next(filter(None, gather_object([problem])), ""):
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)  # frees its space
        remedy = "Make room and run the same command again: it resumes from the newest checkpoint, which is kept"
        raise RunStopped(f"{what} could not be saved in {final.parent} ({problem}). {remedy}")


def load_checkpoint(accelerator: Accelerator, student, optimizer, checkpoint: Path) -> int:
    """Load the student, the optimizer and the random number generators from a checkpoint, and return its step.

    Raises a UsageError, and loads nothing, if the checkpoint is of another student or optimizer.
    """
    reader, tensors = dcp.HuggingFaceStorageReader(str(checkpoint)), _tensors(accelerator, student, optimizer)
    saved = reader.read_metadata().state_dict_metadata
    # a rank or a device that the checkpoint does not know keeps the random numbers of its seed
    tensors = {name: value for name, value in tensors.items() if name in saved or not name.startswith("rng.")}
    # compared here, since torch silently skips missing chunks and tensors that the student does not have
    expected = {name: (tuple(value.shape), value.numel()) for name, value in tensors.items()}
    found = {name: (tuple(x.size), sum(chunk.sizes.numel() for chunk in x.chunks)) for name, x in saved.items()}
    names = tensors.keys() | {name for name in saved if not name.startswith("rng.")}
    if wrong := min((name for name in names if expected.get(name) != found.get(name)), default=""):
        what = f"{wrong} is {found.get(wrong)} in the checkpoint and {expected.get(wrong)} in the student"
        raise UsageError(f"{checkpoint} does not fit the student: {what}; resume with the student of that run")
    dcp.load(tensors, storage_reader=reader)
    for device, module in (("cpu", torch), ("cuda", torch.cuda)):
        if (name := f"rng.{accelerator.process_index}.{device}") in tensors:
            module.set_rng_state(tensors[name])
    return _trainer_state(checkpoint)["step"]


def export(accelerator: Accelerator, student, tokenizer, config: DistillConfig) -> Path:
    """Write final/, a folder for `from_pretrained`, or raise RunStopped. Called by all ranks."""
    state, names = accelerator.get_state_dict(student), _unique_names(student)  # complete tensors, on rank 0
    model = accelerator.unwrap_model(student).model

    def write(folder: Path) -> None:
        if accelerator.is_main_process:
            weights = {name.removeprefix("model."): value for name, value in state.items() if name in names}
            for name in model._keys_to_ignore_on_save or ():  # constants, which are made anew
                weights.pop(name, None)
            model.save_pretrained(folder, state_dict=dict(weights))
            tokenizer.save_pretrained(folder)
            opened = [safe_open(file, "pt") for file in folder.glob("*.safetensors")]
            written = {name: file.get_tensor(name) for file in opened for name in file.keys()}  # noqa: SIM118
            # not all names are in both, since some experts are saved one by one
            pairs = [(weights[name].flatten(), written[name].flatten()) for name in weights.keys() & written.keys()]
            same = all(torch.equal(ours[::4099].cpu(), theirs[::4099]) for ours, theirs in pairs)
            if not same or sum(map(Tensor.numel, written.values())) != sum(map(Tensor.numel, weights.values())):
                raise OSError("what was written is not what is in memory")

    final = Path(config.output_dir) / "final"
    _write_folder(accelerator, "the student", final, write)
    return final
