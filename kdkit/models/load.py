"""Load the teacher, the student and the tokenizer, from a folder or from the hub."""

import copy
import hashlib
import os
import re
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kdkit.config import DistillConfig, UsageError
from kdkit.models.body_and_head import wrap
from kdkit.running.hub import explain, loading_errors, split_revision

ASSETS = Path(__file__).parent.parent / "assets"


def locate(name: str, role: str) -> tuple[str, str]:
    """Return the folder or hub id, and the revision, of a model name: "embedded", a folder, "id" or "id@revision"."""
    if name == "embedded":
        return str(ASSETS / f"embedded_{role}"), "main"
    path, revision = split_revision(os.path.expanduser(name))
    is_hub_id = path.count("/") < 2 and not path.startswith((".", "/", "~"))
    if not is_hub_id and not Path(path).is_dir():
        raise UsageError(f"{role}_model {name} does not exist: give a model folder, a hub id, or embedded")
    return path, revision


def load_pretrained(auto_class, name: str, role: str, config: DistillConfig, **options):
    """Call auto_class.from_pretrained, and turn its exceptions into a UsageError of one line."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # the one for reading files; downloads still show one
    path, revision = locate(name, role)
    try:
        return auto_class.from_pretrained(
            path, revision=revision, trust_remote_code=config.trust_remote_code, **options
        )
    except loading_errors() as error:
        remedy = "give a model folder with safetensors files, or a hub id"
        raise explain(f"{role}_model", name, error, remedy) from error


def load_model(name: str, role: str, config: DistillConfig, dtype: torch.dtype) -> nn.Module:
    """Load a causal language model and its weights: from safetensors only, as other formats can run code when read."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": dtype, "use_safetensors": True, "attn_implementation": config.attn_implementation}
    return load_pretrained(AutoModelForCausalLM, name, role, config, **options)


def check_models(config: DistillConfig) -> list:
    """Load the transformers configs of the models of a run, which reports wrong names before any data is read."""
    from transformers import AutoConfig

    roles = ("teacher", "student") if config.student_layers is None else ("teacher",)
    return [load_pretrained(AutoConfig, getattr(config, f"{role}_model"), role, config) for role in roles]


def teacher_fingerprint(config: DistillConfig) -> str | None:
    """Hash the teacher's config.json and samples of its weights; None if they are not on this machine.

    Files up to 16 MiB are read completely. Samples suffice for larger ones, since training changes all weights.
    """
    from transformers.utils import cached_file

    path, revision = locate(config.teacher_model, "teacher")
    try:
        config_file = Path(cached_file(path, "config.json", revision=revision, local_files_only=True))
    except OSError:
        return None
    digest, files = hashlib.sha256(config_file.read_bytes()), sorted(config_file.parent.glob("*.safetensors"))
    for file in files:
        content = np.memmap(file, mode="r")  # bytes
        for start in range(0, len(content), max(2**16, len(content) // 256)):
            digest.update(content[start : start + 2**16])
    return digest.hexdigest()[:16] if files else None


def teacher_dtype(config: DistillConfig, mixed_precision: str) -> torch.dtype:
    """Return the dtype of the teacher's weights and hidden states in a run."""
    if config.teacher_dtype != "auto":
        return getattr(torch, config.teacher_dtype)
    return torch.bfloat16 if mixed_precision == "bf16" else torch.float32


def load_tokenizer(config: DistillConfig):
    """Load the teacher's tokenizer, which the run uses for both models.

    Without a pad token it pads with the end-of-text token; labels, not ids, decide what is in the loss.
    """
    from transformers import AutoTokenizer

    tokenizer = load_pretrained(AutoTokenizer, config.teacher_model, "teacher", config)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UsageError(f"the tokenizer of {config.teacher_model} has no pad or eos token: set one in its folder")
    if config.chat_template is not None:
        if not Path(config.chat_template).is_file():
            raise UsageError(f"chat_template {config.chat_template} does not exist: give a file with a Jinja template")
        tokenizer.chat_template = Path(config.chat_template).read_text(encoding="utf-8")
    return tokenizer


def load_teacher(
    name: str = "embedded", dtype: torch.dtype = torch.bfloat16, config: DistillConfig | None = None
) -> nn.Module:
    """Load the teacher in eval mode (its dropout would be noise in the target) and without gradients.

    `name` is "embedded", a folder, a hub id or id@revision. `config` gives the attention and `trust_remote_code`.
    """
    return load_model(name, "teacher", config or DistillConfig(), dtype).requires_grad_(False).eval()


def load_student(config: DistillConfig, teacher) -> nn.Module:
    """Load or make the student in train mode and in fp32: these are the master weights, autocast casts them to bf16.

    With `student_layers` it is cut from the teacher, a transformers model or a teacher of `kdkit.teachers`. Otherwise
    it is `student_model` with its weights, or with random ones (`student_random_init`, and the embedded student).
    """
    from transformers import AutoModelForCausalLM

    if config.student_layers is not None:
        return student_from_layers(wrap(teacher).model, config.student_layers).train()
    if config.student_is_pretrained:
        return load_model(config.student_model, "student", config, torch.float32).train()
    options = {"attn_implementation": config.attn_implementation, "trust_remote_code": config.trust_remote_code}
    student_config = check_models(config)[-1]
    return AutoModelForCausalLM.from_config(student_config, dtype=torch.float32, **options).train()


def student_from_layers(teacher: nn.Module, layers: list[int] | int) -> nn.Module:
    """Copy a transformers causal language model with some of its decoder layers, in fp32.

    `layers` are rising indices, or a number of layers, which are spread evenly with the first and the last kept.
    """
    depth, given = teacher.config.num_hidden_layers, layers
    if isinstance(layers, int):
        layers = [round(i * (depth - 1) / max(layers - 1, 1)) for i in range(layers)]
    if not layers or sorted(set(layers)) != layers or layers[0] < 0 or layers[-1] >= depth:
        raise UsageError(
            f"student_layers is {given}, and the teacher has {depth} layers: give a number from 1 to {depth}, or "
            f"rising indices from 0 to {depth - 1}"
        )
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in layers]
    student, weights = type(teacher)(config).float(), teacher.state_dict()

    def origin(name: str) -> str:  # the first number in the name of a parameter is the index of its layer
        return re.sub(r"\.(\d+)\.", lambda match: f".{layers[int(match[1])]}.", name, count=1)

    student.load_state_dict({name: weights[origin(name)] for name in student.state_dict()})
    return student
