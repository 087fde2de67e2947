"""Load the teacher and the student, freeze the one and start the other. Whether they fit is checked in `kdkit.models.pair`.

Shapes: B rows, S tokens, H hidden width, V entries of a head.
"""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from kdkit.config import DistillConfig, UsageError
from kdkit.running.hub import explain, loading_errors, split_revision

ASSETS = Path(__file__).parent.parent / "assets"


class BodyAndHead(nn.Module):
    """A causal language model that hands its last hidden states and its head to a function, and returns the result.

    The loss and the metrics are made from those two, and not from logits, so that nothing of the size of tokens x
    vocabulary has to exist. They are read inside `forward`, since only there do DDP and FSDP see that parameters are
    used, and only there are sharded ones whole. So always call this module, never a part of it.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.training = model.training  # a new module is in train mode, whatever it holds
        self._no_split_modules = model._no_split_modules  # FSDP's units: the decoder layers

    def tie_weights(self) -> None:
        """Make one of an embedding and a head that share their weights; FSDP asks for it when it has replaced them."""
        self.model.tie_weights()

    def forward(self, batch: dict[str, torch.Tensor], use: Callable, *arguments):
        """use(hidden (B, S, H), head (V, H), *arguments) on a batch of `input_ids` and `position_ids`, both (B, S)."""
        # no attention mask: transformers makes the one that keeps packed documents apart from the positions
        output = self.model.base_model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        )
        return use(output.last_hidden_state, self.model.get_output_embeddings().weight, *arguments)


# --- loading -------------------------------------------------------------------------------------------------


def resolve(name: str, role: str) -> str:
    """The folder of "embedded", and any other name as it is.

    Raises:
        UsageError: a name that can only be a folder, and is not one with a model in it.
    """
    if name == "embedded":
        return str(ASSETS / f"embedded_{role}")
    path = Path(name).expanduser()
    looks_like_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1
    if path.is_dir() and not (path / "config.json").is_file():
        raise UsageError(f"{role}_model {name} is a folder without a config.json: give a Hugging Face model folder")
    if looks_like_path and not path.is_dir() and "/" in name:
        raise UsageError(f"{role}_model {name} does not exist: give a model folder, a hub id, or embedded")
    return str(path) if path.is_dir() else name


def load_pretrained(auto_class, name: str, role: str, config: DistillConfig | None = None, **options):
    """from_pretrained, with what transformers raises for a wrong name turned into one line."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # of reading a file; downloads keep theirs
    path = resolve(name, role)
    options["trust_remote_code"] = config is not None and config.trust_remote_code
    if config is not None and name != "embedded":
        path, options["revision"] = split_revision(path)
    try:
        return auto_class.from_pretrained(path, **options)
    except loading_errors() as error:
        remedy = "give a Hugging Face model folder with safetensors files, or a hub id"
        raise explain(f"{role}_model", name, error, remedy) from error


def _model_options(config: DistillConfig | None) -> dict:
    """What both models are loaded with: weights that run no code when they are read, and the attention asked for."""
    options = {"use_safetensors": True}
    if config is not None and config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    return options


def check_models(config: DistillConfig) -> None:
    """Look at both models before the data is read and the weights are: their configs, and local weights' files.

    Raises:
        UsageError: no such model, a folder that is none, no safetensors file in it, or a truncated one.
    """
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig

    names = {"teacher": config.teacher_model}
    if config.student_layers is None:
        names["student"] = config.student_model
    for role, name in names.items():
        load_pretrained(AutoConfig, name, role, config)
        folder = Path(resolve(name, role))
        from_config = role == "student" and (config.student_random_init or name == "embedded")
        stored = role == "teacher" and config.targets != "online" and config.student_layers is None
        if from_config or stored or not folder.is_dir():
            continue
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UsageError(
                f"{role}_model {name} has no *.safetensors file, the only kind of weights that kdkit reads: load it "
                "with transformers and save_pretrained it"
            )
        for file in files:
            try:
                safe_open(file, framework="pt").__enter__()
            except (SafetensorError, OSError) as error:
                raise UsageError(
                    f"{role}_model {name}: {file.name} is truncated or no safetensors file ({error}): "
                    "download or copy it again"
                ) from error


def teacher_folder(config: DistillConfig) -> Path | None:
    """Where the teacher's files are on this machine; None where they are not."""
    from huggingface_hub import try_to_load_from_cache

    path = Path(resolve(config.teacher_model, "teacher"))
    if path.is_dir():
        return path
    name, revision = split_revision(config.teacher_model)
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def teacher_dtype(config: DistillConfig, mixed_precision: str) -> torch.dtype:
    """The type of the teacher's weights and hidden states in a run."""
    if config.teacher_dtype != "auto":
        return getattr(torch, config.teacher_dtype)
    return torch.bfloat16 if mixed_precision == "bf16" else torch.float32


def load_tokenizer(config: DistillConfig):
    """The teacher's tokenizer, which is the run's. Padding falls back to the end of text; labels tell them apart.

    Raises:
        UsageError: no such model, nothing to pad with, or a chat_template that is no file.
    """
    from transformers import AutoTokenizer

    tokenizer = load_pretrained(AutoTokenizer, config.teacher_model, "teacher", config)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UsageError(f"the tokenizer of {config.teacher_model} has neither a pad nor an eos token: set one")
    if config.chat_template is not None:
        if not Path(config.chat_template).is_file():
            raise UsageError(f"chat_template {config.chat_template} does not exist: give a file with a Jinja template")
        tokenizer.chat_template = Path(config.chat_template).read_text(encoding="utf-8")
    return tokenizer


def load_teacher(
    name: str = "embedded", dtype: torch.dtype = torch.bfloat16, config: DistillConfig | None = None
) -> nn.Module:
    """The teacher, frozen: in eval mode (dropout in it would be noise in the target) and without gradients.

    Args:
        name: "embedded", a folder or a hub id.
        dtype: of its weights, where the configuration leaves it open.
        config: for the revision, the type, the attention and remote code.

    Raises:
        UsageError: no such model.
    """
    from transformers import AutoModelForCausalLM

    if config is not None and config.teacher_dtype != "auto":
        dtype = getattr(torch, config.teacher_dtype)
    teacher = load_pretrained(AutoModelForCausalLM, name, "teacher", config, dtype=dtype, **_model_options(config))
    return teacher.requires_grad_(False).eval()


def load_student_config(config: DistillConfig):
    """The transformers config of `student_model`."""
    from transformers import AutoConfig

    return load_pretrained(AutoConfig, config.student_model, "student", config)


def load_student(config: DistillConfig, teacher: nn.Module) -> nn.Module:
    """The student, in fp32 (the master weights; autocast makes bf16 of them), in train mode.

    From the teacher's layers where `student_layers` is given, else from `student_model`: its weights, or its config
    alone where `student_random_init` is set or the student is the embedded one, which has no weights.

    Raises:
        UsageError: no such model, or layers that the teacher does not have.
    """
    from transformers import AutoModelForCausalLM

    if config.student_layers is not None:
        if isinstance(teacher, BodyAndHead):  # its targets alone: it is read once, for its layers
            teacher = load_teacher(config.teacher_model, torch.float32, config)
        return student_from_layers(teacher, config.student_layers).train()
    name, options = config.student_model, _model_options(config)
    if config.student_random_init or name == "embedded":
        options.pop("use_safetensors")
        options["trust_remote_code"] = config.trust_remote_code
        return AutoModelForCausalLM.from_config(load_student_config(config), dtype=torch.float32, **options).train()
    return load_pretrained(AutoModelForCausalLM, name, "student", config, dtype=torch.float32, **options).train()


def student_from_layers(teacher: nn.Module, layers: list[int] | int) -> nn.Module:
    """A copy of the teacher with some of its decoder layers, in fp32.

    Args:
        teacher: a transformers causal language model.
        layers: their indices in order, or a count, spread evenly with the first and the last kept.

    Raises:
        UsageError: layers that the teacher does not have, or none.
    """
    depth = teacher.config.num_hidden_layers
    if isinstance(layers, int):
        count = layers
        if not 1 <= count <= depth:
            raise UsageError(f"student_layers is {count}, expected 1 to {depth}, the layers of the teacher")
        layers = [round(i * (depth - 1) / max(count - 1, 1)) for i in range(count)]
    if not layers or sorted(set(layers)) != layers or layers[0] < 0 or layers[-1] >= depth:
        raise UsageError(
            f"student_layers is {layers}, expected rising indices from 0 to {depth - 1}, the layers of the teacher"
        )
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in layers]
    student = type(teacher)(config).float()
    source = teacher.state_dict()
    # the first number in a parameter's name is that of its layer
    names = {
        name: re.sub(r"\.(\d+)\.", lambda match: f".{layers[int(match[1])]}.", name, count=1)
        for name in student.state_dict()
    }
    student.load_state_dict({name: source[origin] for name, origin in names.items()})
    return student


def count_parameters(model: nn.Module) -> int:
    """Parameters, shared ones once; of a stored teacher, those it had."""
    if hasattr(model, "num_parameters") and isinstance(model.num_parameters, int):
        return model.num_parameters
    return sum(parameter.numel() for parameter in model.parameters())
