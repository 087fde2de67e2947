"""Load the teacher, the student and the tokenizer, from a folder or from the hub."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import is_fsdp_enabled
from transformers.utils import cached_file, logging

from kdkit.config import DistillConfig, UsageError
from kdkit.models.body_and_head import wrap
from kdkit.models.cut import student_from_layers
from kdkit.running.hub import explained, split_revision

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
    logging.disable_progress_bar()  # the one for reading files; downloads still show one
    path, revision = locate(name, role)
    options |= {"revision": revision, "trust_remote_code": config.trust_remote_code}
    with explained(f"{role}_model", name, "give a model folder with safetensors files, or a hub id"):
        for file in Path(path).glob("*.safetensors"):  # reads the header, which shows a truncated file
            safe_open(file, "pt")
        return auto_class.from_pretrained(path, **options)


def load_model(name: str, role: str, config: DistillConfig, dtype: torch.dtype) -> nn.Module:
    """Load a causal language model and all its weights: from safetensors only, as other formats can run code."""
    options = {"dtype": dtype, "use_safetensors": True, "attn_implementation": config.attn_implementation}
    model, found = load_pretrained(AutoModelForCausalLM, name, role, config, output_loading_info=True, **options)
    missing = sorted(found["missing_keys"])
    if missing and not next(model.parameters()).is_meta:  # meta: FSDP, and not rank 0
        extra = f" (and has {min(found['unexpected_keys'])})" if found["unexpected_keys"] else ""
        what = f"lacks {len(missing):,} of the weights of a {type(model).__name__}, such as {missing[0]}{extra}"
        raise UsageError(f"{role}_model {name} {what}: save it again with save_pretrained, or correct its config.json")
    return record_tying(model)


def record_tying(model: nn.Module) -> nn.Module:
    """Make the config say whether head and embedding are tied in the file: FSDP and `from_pretrained` trust it."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embedding.weight
    if is_fsdp_enabled() and broadcast_object_list([tied]) != [tied]:  # only rank 0 has read the file
        tied = not tied
        head.weight = embedding.weight if tied else nn.Parameter(torch.empty_like(head.weight))
    for model_config in (model.config, model.config.get_text_config()):
        model_config.tie_word_embeddings = tied
    return model


def check_models(config: DistillConfig) -> list:
    """Load the transformers configs of the models of a run, before any data is read: the last one is the student's.

    Raises a UsageError for a wrong name, and for a quantised model whose weights would be those of the student.
    """
    roles = ("teacher", "student") if config.student_layers is None else ("teacher",)
    configs = [load_pretrained(AutoConfig, getattr(config, f"{role}_model"), role, config) for role in roles]
    if getattr(configs[-1], "quantization_config", None):
        name = getattr(config, f"{roles[-1]}_model")
        raise UsageError(f"{roles[-1]}_model {name} is quantised, and cannot be trained: give the original model")
    return configs


def teacher_fingerprint(config: DistillConfig) -> str | None:
    """Hash the teacher's config.json and samples of its weights; None if they are not on this machine."""
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
    default = "bfloat16" if mixed_precision == "bf16" else "float32"
    return getattr(torch, default if config.teacher_dtype == "auto" else config.teacher_dtype)


def load_tokenizer(config: DistillConfig):
    """Load the teacher's tokenizer, which the run uses for both models."""
    tokenizer = load_pretrained(AutoTokenizer, config.teacher_model, "teacher", config)
    if tokenizer.pad_token_id is None:  # labels, not ids, decide what is in the loss
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UsageError(f"the tokenizer of {config.teacher_model} has no pad or eos token: set one in its folder")
    if config.chat_template is not None:
        if not Path(config.chat_template).is_file():
            raise UsageError(f"chat_template {config.chat_template} does not exist: give a file with a Jinja template")
        tokenizer.chat_template = Path(config.chat_template).read_text(encoding="utf-8")
    return tokenizer


def load_teacher(name: str = "embedded", dtype=torch.bfloat16, config: DistillConfig | None = None) -> nn.Module:
    """Load the teacher in eval mode and without gradients; `config` gives the attention and `trust_remote_code`."""
    return load_model(name, "teacher", config or DistillConfig(), dtype).requires_grad_(False).eval()


def load_student(config: DistillConfig, teacher, rows=None) -> nn.Module:
    """Load or make the student in train mode and in fp32: these are the master weights, autocast casts them to bf16.

    `teacher`, which `student_layers` are cut from, is a transformers model or a teacher of `kdkit.teachers`. `rows` of
    the training text are needed if `student_layers_by` is kl.
    """
    if config.student_layers is not None:
        by_kl = config.student_layers_by == "kl"
        assert rows is not None or not by_kl
        return student_from_layers(wrap(teacher).model, config.student_layers, rows if by_kl else None)
    if config.student_is_pretrained:
        return load_model(config.student_model, "student", config, torch.float32).train()
    attention = config.attn_implementation
    return record_tying(from_config(check_models(config)[-1], "student", config, torch.float32, attention)).train()


def from_config(model_config, role: str, config: DistillConfig, dtype: torch.dtype, attention: str | None) -> nn.Module:
    """Make a causal language model with random weights; a UsageError if its config is of another kind of model."""
    options = {"attn_implementation": attention, "trust_remote_code": config.trust_remote_code}
    with explained(f"{role}_model", getattr(config, f"{role}_model"), "give a causal language model"):
        return AutoModelForCausalLM.from_config(model_config, dtype=dtype, **options)
