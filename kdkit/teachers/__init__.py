"""Where the soft targets come from: a teacher that runs on each batch, or one whose outputs were stored before.

The rest of the kit does not ask which of the two it has. A teacher has

    teacher(batch)                   the targets, without gradients: (hidden (B, S, H), head (V, H)) or (TopK, None)
    head_rows, context               V, and the largest number of positions (None: unlimited)
    num_parameters                   of the model, tied ones counted once
    place(accelerator, placement)    moves, shards or offloads it, after the student is prepared
    placement                        a line to print: where it is kept
    examine(rows, device)            asks it, where it runs, what the loss relies on: see kdkit.models.examination
    packs, soft_cap                  what it answered
    compile_layers()                 compiles the model, if it runs
    model                            the transformers model, for a student that is cut from its layers
"""

from kdkit.data import rows_digest
from kdkit.models import load_teacher, teacher_dtype, teacher_fingerprint
from kdkit.teachers.online import OnlineTeacher
from kdkit.teachers.stored import StoredTeacher


def open_teacher(config, mixed_precision: str, train_rows, eval_rows) -> OnlineTeacher | StoredTeacher:
    """Load the teacher of a run, or open its stored targets, as the field `targets` says."""
    dtype = teacher_dtype(config, mixed_precision)
    if config.targets == "online":
        return OnlineTeacher(load_teacher(config.teacher_model, dtype, config))
    return StoredTeacher(config, train_rows, eval_rows, dtype)


def describe_inputs(config, *splits) -> dict[str, str | None]:
    """Return hashes of what a run learns from: its rows, and its teacher (None if that is not on this machine)."""
    return {"dataset": " ".join(map(rows_digest, splits)), "teacher_model": teacher_fingerprint(config)}
