"""Load the teacher, the student and the tokenizer, from a folder or from the hub."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from torch import nn

from kdkit.config import DistillConfig, UsageError
from kdkit.models.body_and_head import wrap
from kdkit.running.hub import explain, loading_errors, split_revision

ASSETS = Path(__file__).parent.parent / "assets"
MODEL_REMEDY = "give a model folder with safetensors files, or a hub id"


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
        raise explain(f"{role}_model", name, error, MODEL_REMEDY) from error


def load_model(name: str, role: str, config: DistillConfig, dtype: torch.dtype) -> nn.Module:
    """Load a causal language model and its weights: from safetensors only, as other formats can run code when read."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": dtype, "use_safetensors": True, "attn_implementation": config.attn_implementation}
    model, found = load_pretrained(AutoModelForCausalLM, name, role, config, output_loading_info=True, **options)
    missing = sorted(found["missing_keys"])
    if missing and not next(model.parameters()).is_meta:  # meta: FSDP, and not rank 0
        extra = f" (and has {min(found['unexpected_keys'])})" if found["unexpected_keys"] else ""
        raise UsageError(
            f"{role}_model {name} lacks {len(missing):,} of the weights of a {type(model).__name__}, such as "
            f"{missing[0]}{extra}: they would be random. Save it again with save_pretrained, or correct its config.json"
        )
    return record_tying(model)


def shares_head(model: nn.Module) -> bool:
    """Return whether the head and the embedding of a model are one tensor."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def record_tying(model: nn.Module) -> nn.Module:
    """Make the config say whether head and embedding are tied, since FSDP and `from_pretrained` tie what it says.

    transformers leaves them untied, whatever the config says, if the file has two different tensors.
    """
    from transformers.integrations import is_fsdp_enabled

    tied = shares_head(model)
    if is_fsdp_enabled() and broadcast_object_list([tied]) != [tied]:  # only rank 0 has read the file
        head, tied = model.get_output_embeddings(), not tied
        head.weight = model.get_input_embeddings().weight if tied else nn.Parameter(torch.empty_like(head.weight))
    for model_config in (model.config, model.config.get_text_config()):
        model_config.tie_word_embeddings = tied
    return model


def check_models(config: DistillConfig) -> list:
    """Load the transformers configs of the models of a run, and look at their other files, before any data is read.

    Raises:
        UsageError: a wrong name, a missing or truncated file of weights, a student without a tokenizer, a quantised
            student or a quantised teacher that a student is cut from.
    """
    from transformers import AutoConfig, AutoTokenizer

    roles, configs = ("teacher", "student") if config.student_layers is None else ("teacher",), []
    for role in roles:
        name, trained = getattr(config, f"{role}_model"), role == "student" or config.student_layers is not None
        configs.append(load_pretrained(AutoConfig, name, role, config))
        if trained and getattr(configs[-1], "quantization_config", None):
            raise UsageError(
                f"{role}_model {name} is quantised, and its weights would be those of the student, which cannot be "
                "trained: give the folder or hub id of the original, or quantise the student after the run"
            )
        if config.student_is_pretrained if role == "student" else config.targets == "online":
            _check_weights(name, role)
    if config.student_layers is None and config.student_is_pretrained:
        load_pretrained(AutoTokenizer, config.student_model, "student", config)
    return configs


def _check_weights(name: str, role: str) -> None:
    """Raise a UsageError if a file of weights in a local folder is missing, or shorter than its header says."""
    folder = Path(locate(name, role)[0])
    files, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    try:
        if index.is_file() and not (folder / files[0]).is_file():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        for file in files if folder.is_dir() else []:  # the hub's files are checked when they are downloaded
            safe_open(folder / file, "pt")
    except (OSError, SafetensorError, ValueError) as error:
        raise explain(f"{role}_model", name, error, MODEL_REMEDY) from error


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
        from kdkit.models.cut import student_from_layers

        return student_from_layers(wrap(teacher).model, config.student_layers).train()
    if config.student_is_pretrained:
        return load_model(config.student_model, "student", config, torch.float32).train()
    options = {"attn_implementation": config.attn_implementation, "trust_remote_code": config.trust_remote_code}
    student_config = check_models(config)[-1]
    return record_tying(AutoModelForCausalLM.from_config(student_config, dtype=torch.float32, **options)).train()
