"""Load the teacher, the student and the tokenizer, from a folder or from the hub.

Shapes: B rows, S tokens, H hidden size, V rows of a head (entries of the vocabulary).
"""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from kdkit.config import DistillConfig, UsageError
from kdkit.running.hub import explain, loading_errors, split_revision

ASSETS = Path(__file__).parent.parent / "assets"


class BodyAndHead(nn.Module):
    """A causal language model that passes its last hidden states and its head to a function.

    The loss and the metrics are computed from hidden states and head, chunk by chunk, so that no tensor of the size
    tokens x vocabulary has to exist. Both are read inside `forward`: only there do DDP and FSDP see that a parameter
    is used, and only there are sharded parameters gathered. So always call this module, never a part of it.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.training = model.training  # a new module is in train mode, whatever it holds
        self._no_split_modules = model._no_split_modules  # FSDP shards each of these (the decoder layers) separately

    def tie_weights(self) -> None:
        """Tie embedding and head again if the model ties them. FSDP calls it after it has replaced parameters."""
        self.model.tie_weights()

    def forward(self, batch: dict[str, Tensor], function: Callable = lambda *both: both, *arguments):
        """Return function(hidden (B, S, H), head (V, H), *arguments) for the `input_ids` and `position_ids` (B, S)."""
        # No attention mask: transformers derives one from the position ids, which keeps packed samples apart.
        output = self.model.base_model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        )
        return function(output.last_hidden_state, self.model.get_output_embeddings().weight, *arguments)

    @property
    def head_rows(self) -> int:
        """V, the number of rows of the head: at least the number of tokens, often padded to a rounder number."""
        return len(self.model.get_output_embeddings().weight)

    @property
    def context(self) -> int | None:
        """The largest number of positions of the model, or None if it has no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def num_parameters(self) -> int:
        """The number of parameters, tied ones counted once."""
        return count_parameters(self.model)

    @torch.no_grad()
    def extra_head_step(self) -> str | None:
        """What the model does to its logits beyond hidden @ head^T, or None if nothing.

        Compares both on a few tokens, which shows soft caps, scales and biases. Call it before the model is sharded.
        """
        head = self.model.get_output_embeddings()
        if head.weight.is_meta:  # with FSDP only rank 0 loads the weights, and makes this comparison
            return None
        was_training = self.model.training
        self.model.eval()
        ids = torch.arange(4, device=head.weight.device)[None]
        output = self.model(input_ids=ids, output_hidden_states=True, use_cache=False)
        self.model.train(was_training)
        logits = output.logits.float()
        difference = (output.hidden_states[-1].float() @ head.weight.float().T - logits).abs().max()
        if not difference > 0.05 * logits.abs().max() + 1e-3:  # NaN is a fault of the weights, found in evaluation
            return None
        names = ("final_logit_softcapping", "logit_scale", "logits_scaling")
        settings = {name: getattr(self.model.config, name, None) for name in names}
        found = [f"{name} = {value}" for name, value in settings.items() if value]
        found += ["a bias in the head"] if getattr(head, "bias", None) is not None else []
        return ", ".join(found) or "an unknown step"


def wrap(model: nn.Module):
    """Return a transformers model as a `BodyAndHead`, and anything else (a `BodyAndHead`, a teacher) unchanged."""
    return BodyAndHead(model) if hasattr(model, "get_output_embeddings") else model


def count_parameters(model: nn.Module) -> int:
    """Count a model's parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


# --- loading -------------------------------------------------------------------------------------------------


def locate(name: str, role: str) -> tuple[str, str]:
    """Return the folder or hub id, and the revision, of a model name: "embedded", a folder, "id" or "id@revision".

    Raises:
        UsageError: the name can only be a path, and there is no model folder at that path.
    """
    if name == "embedded":
        return str(ASSETS / f"embedded_{role}"), "main"
    hub_id, revision = split_revision(name)
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise UsageError(
            f"{role}_model {name} is a folder without a config.json: give a folder that save_pretrained wrote"
        )
    if path.is_dir():
        return str(path), revision
    if path.is_absolute() or name.startswith((".", "~")) or hub_id.count("/") > 1:
        raise UsageError(f"{role}_model {name} does not exist: give a model folder, a hub id, or embedded")
    return hub_id, revision


def load_pretrained(auto_class, name: str, role: str, config: DistillConfig, **options):
    """Call auto_class.from_pretrained and turn its exceptions into one line.

    Raises:
        UsageError: the model could not be loaded.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # for reading files; downloads keep theirs
    path, revision = locate(name, role)
    try:
        return auto_class.from_pretrained(
            path, revision=revision, trust_remote_code=config.trust_remote_code, **options
        )
    except loading_errors() as error:
        remedy = "give a Hugging Face model folder with safetensors files, or a hub id"
        raise explain(f"{role}_model", name, error, remedy) from error


def load_model(name: str, role: str, config: DistillConfig, dtype: torch.dtype) -> nn.Module:
    """Load a causal language model and its weights: from safetensors only, as other formats can run code when read."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": dtype, "use_safetensors": True, "attn_implementation": config.attn_implementation}
    return load_pretrained(AutoModelForCausalLM, name, role, config, **options)


def check_models(config: DistillConfig) -> None:
    """Check, before any data is read, that both models have a config and that local weights are complete.

    Raises:
        UsageError: there is no such model, or it has no safetensors file, or a truncated one.
    """
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig

    from_layers = config.student_layers is not None
    reads_weights = {"teacher": config.targets == "online" or from_layers, "student": config.student_is_pretrained}
    for role in ("teacher",) if from_layers else ("teacher", "student"):
        name = getattr(config, f"{role}_model")
        load_pretrained(AutoConfig, name, role, config)
        folder = Path(locate(name, role)[0])
        if not reads_weights[role] or not folder.is_dir():
            continue
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UsageError(
                f"{role}_model {name} has no *.safetensors file, the only format of weights that kdkit reads: "
                "load it with transformers and save it with save_pretrained"
            )
        for file in files:
            try:
                safe_open(file, framework="pt").__enter__()  # reads the header, which gives the size
            except (SafetensorError, OSError) as error:
                raise UsageError(
                    f"{role}_model {name}: {file.name} is truncated or not a safetensors file ({error}): "
                    "download or copy it again"
                ) from error


def teacher_folder(config: DistillConfig) -> Path | None:
    """Return the folder of the teacher's files, in the hub's cache for a hub id; None if it is not on this machine."""
    from huggingface_hub import try_to_load_from_cache

    path, revision = locate(config.teacher_model, "teacher")
    if Path(path).is_dir():
        return Path(path)
    found = try_to_load_from_cache(path, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def teacher_dtype(config: DistillConfig, mixed_precision: str) -> torch.dtype:
    """Return the dtype of the teacher's weights and hidden states in a run."""
    if config.teacher_dtype != "auto":
        return getattr(torch, config.teacher_dtype)
    return torch.bfloat16 if mixed_precision == "bf16" else torch.float32


def load_tokenizer(config: DistillConfig):
    """Load the teacher's tokenizer, which the run uses for both models.

    Without a pad token it pads with the end-of-text token; labels, not ids, decide what is in the loss.

    Raises:
        UsageError: there is no such model, no token to pad with, or no file at `chat_template`.
    """
    from transformers import AutoTokenizer

    tokenizer = load_pretrained(AutoTokenizer, config.teacher_model, "teacher", config)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UsageError(
            f"the tokenizer of {config.teacher_model} has neither a pad nor an eos token: set one in its folder"
        )
    if config.chat_template is not None:
        if not Path(config.chat_template).is_file():
            raise UsageError(f"chat_template {config.chat_template} does not exist: give a file with a Jinja template")
        tokenizer.chat_template = Path(config.chat_template).read_text(encoding="utf-8")
    return tokenizer


def load_teacher(
    name: str = "embedded", dtype: torch.dtype = torch.bfloat16, config: DistillConfig | None = None
) -> nn.Module:
    """Load the teacher in eval mode (its dropout would be noise in the target) and without gradients.

    Args:
        name: "embedded", a folder, a hub id or id@revision.
        dtype: of its weights, if `teacher_dtype` of the configuration is auto.
        config: for `teacher_dtype`, `attn_implementation` and `trust_remote_code`.

    Raises:
        UsageError: the model could not be loaded.
    """
    config = config or DistillConfig()
    dtype = dtype if config.teacher_dtype == "auto" else getattr(torch, config.teacher_dtype)
    return load_model(name, "teacher", config, dtype).requires_grad_(False).eval()


def load_student_config(config: DistillConfig):
    """Load the transformers config of `student_model`."""
    from transformers import AutoConfig

    return load_pretrained(AutoConfig, config.student_model, "student", config)


def load_student(config: DistillConfig, teacher) -> nn.Module:
    """Load or make the student in train mode and in fp32: these are the master weights, autocast casts them to bf16.

    Args:
        config: with `student_layers` the student is cut from the teacher; otherwise it is `student_model` with its
            weights, or with random ones if `student_random_init` is set or it is the embedded student.
        teacher: a transformers model or a teacher of `kdkit.teachers`; only used with `student_layers`.

    Raises:
        UsageError: the model could not be loaded, or the teacher does not have these layers.
    """
    from transformers import AutoModelForCausalLM

    if config.student_layers is not None:
        return student_from_layers(wrap(teacher).model, config.student_layers).train()
    if config.student_is_pretrained:
        return load_model(config.student_model, "student", config, torch.float32).train()
    options = {"attn_implementation": config.attn_implementation, "trust_remote_code": config.trust_remote_code}
    return AutoModelForCausalLM.from_config(load_student_config(config), dtype=torch.float32, **options).train()


def student_from_layers(teacher: nn.Module, layers: list[int] | int) -> nn.Module:
    """Copy a model with some of its decoder layers, in fp32.

    Args:
        teacher: a transformers causal language model.
        layers: rising indices, or a number of layers, which are spread evenly with the first and the last kept.

    Raises:
        UsageError: the teacher does not have these layers, or there are none.
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
    student = type(teacher)(config).float()
    source = teacher.state_dict()
    # The first number in the name of a parameter is the index of its layer.
    origins = {
        name: re.sub(r"\.(\d+)\.", lambda match: f".{layers[int(match[1])]}.", name, count=1)
        for name in student.state_dict()
    }
    student.load_state_dict({name: source[origin] for name, origin in origins.items()})
    return student
