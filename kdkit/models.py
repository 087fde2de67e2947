"""Load the teacher and the student, freeze the one, start the other, and check that they fit each other.

Shapes: B rows, S tokens, H hidden width, V entries of a head.
"""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from kdkit.config import DistillConfig, UsageError

ASSETS = Path(__file__).parent / "assets"


class BodyAndHead(nn.Module):
    """A causal language model that hands its last hidden states and its head to a function, and returns the result.

    The loss and the metrics are made from those two, and not from logits, so that nothing of the size of tokens x
    vocabulary has to exist. They are read inside `forward`, since only there do DDP and FSDP see that parameters are
    used, and only there are sharded ones whole. So always call this module, never a part of it.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
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


def _load(auto_class, name: str, role: str, **options):
    """from_pretrained, with what transformers raises for a wrong name turned into one line."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # of reading a file; downloads keep theirs
    try:
        return auto_class.from_pretrained(resolve(name, role), **options)
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"{role}_model {name} could not be loaded: {reason} "
            "(give a model folder, or a hub id with the network up and, for a gated model, after `hf auth login`)"
        ) from error


def model_folder(name: str) -> Path | None:
    """Where the files of a model are on this machine; None where they are not."""
    from huggingface_hub import try_to_load_from_cache

    path = Path(resolve(name, "teacher"))
    if path.is_dir():
        return path
    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def load_tokenizer(config: DistillConfig):
    """The teacher's tokenizer, which is the run's. Padding falls back to the end of text; labels tell them apart."""
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, config.teacher_model, "teacher")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UsageError(f"the tokenizer of {config.teacher_model} has neither a pad nor an eos token: set one")
    return tokenizer


def load_teacher(name: str = "embedded", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The teacher, frozen: in eval mode (dropout in it would be noise in the target) and without gradients.

    Raises:
        UsageError: no such model.
    """
    from transformers import AutoModelForCausalLM

    teacher = _load(AutoModelForCausalLM, name, "teacher", dtype=dtype)
    return teacher.requires_grad_(False).eval()


def load_student_config(config: DistillConfig):
    """The transformers config of `student_model`."""
    from transformers import AutoConfig

    return _load(AutoConfig, config.student_model, "student")


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
            teacher = load_teacher(config.teacher_model, torch.float32)
        return student_from_layers(teacher, config.student_layers).train()
    name = config.student_model
    if config.student_random_init or name == "embedded":
        return AutoModelForCausalLM.from_config(load_student_config(config), dtype=torch.float32).train()
    return _load(AutoModelForCausalLM, name, "student", dtype=torch.float32).train()


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


# --- the pair ------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """What `check_pair` found: the entries that both heads have, and lines that tell."""

    vocab_size: int
    report: list[str]


def check_pair(config: DistillConfig, teacher: nn.Module, student: nn.Module, tokenizer) -> Pair:
    """Check, before anything is trained, that the divergence of these two means something.

    Both have to give each token the same id: the maps are compared, not their sizes. Heads may be padded to different
    widths; both are cut to the narrower. A head must be a plain product, hidden @ head^T.

    Raises:
        UsageError: another tokenizer, a head without a row for each token, or a head with more to it than a product.
    """
    starts_from_weights = config.student_layers is None and not config.student_random_init
    if starts_from_weights and config.student_model != "embedded":
        _check_tokenizers(config, tokenizer)
    stored = isinstance(teacher, BodyAndHead)  # no body: it was looked at when its targets were stored
    teacher_head = teacher.head if stored else teacher.get_output_embeddings().weight
    rows = {"teacher": len(teacher_head), "student": len(student.get_output_embeddings().weight)}
    entries = max(tokenizer.get_vocab().values()) + 1
    for role, model in (("teacher", teacher), ("student", student)):
        if rows[role] < entries:
            raise UsageError(
                f"the {role}'s head has {rows[role]} rows for a tokenizer of {entries} entries: "
                f"call resize_token_embeddings({entries}) on it, or use a {role} made for this tokenizer"
            )
        empty = any(parameter.is_meta for parameter in model.parameters())  # rank 0 has the weights, and looks
        if not empty and not (role == "teacher" and stored):
            _check_plain_head(model, role)
    vocab_size = min(rows.values())
    report = [f"tokenizer: {entries:,} entries, the same for both"]
    if rows["teacher"] != rows["student"]:
        report.append(
            f"heads: {rows['teacher']:,} and {rows['student']:,} rows, both cut to {vocab_size:,} before the softmax"
        )
    return Pair(vocab_size, report)


def _check_tokenizers(config: DistillConfig, tokenizer) -> None:
    from transformers import AutoTokenizer

    other = _load(AutoTokenizer, config.student_model, "student").get_vocab()
    ours = tokenizer.get_vocab()
    if ours == other:
        return
    differing = sorted({t for t in ours.keys() | other.keys() if ours.get(t) != other.get(t)}, key=str)
    examples = ", ".join(f"{t!r} ({ours.get(t, 'none')} and {other.get(t, 'none')})" for t in differing[:3])
    raise UsageError(
        f"teacher {config.teacher_model} and student {config.student_model} have different tokenizers: "
        f"{len(differing):,} tokens differ in their ids, such as {examples}. Their distributions are over different "
        "things; use a pair of one family, or start the student from the teacher with --student_layers"
    )


def _check_plain_head(model: nn.Module, role: str) -> None:
    """Compare the model's own logits with hidden @ head^T on a few tokens: soft caps, scales and biases show."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    with torch.no_grad():
        ids = torch.arange(4, device=device)[None]
        output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
        hidden = output.hidden_states[-1]
        logits = hidden.float() @ model.get_output_embeddings().weight.float().T
        difference = (logits - output.logits.float()).abs().max()
    model.train(was_training)
    if difference > 0.05 * output.logits.float().abs().max() + 1e-3:
        names = ("final_logit_softcapping", "logit_scale", "logits_scaling")
        found = [f"{name} = {getattr(model.config, name)}" for name in names if getattr(model.config, name, None)]
        if getattr(model.get_output_embeddings(), "bias", None) is not None:
            found.append("a bias in the head")
        raise UsageError(
            f"the {role}'s logits are not hidden @ head^T ({', '.join(found) or 'by an unknown step'}), "
            "which the loss does not apply: use a model with a plain head"
        )


def count_parameters(model: nn.Module) -> int:
    """Parameters, shared ones once; of a stored teacher, those it had."""
    if hasattr(model, "num_parameters") and isinstance(model.num_parameters, int):
        return model.num_parameters
    return sum(parameter.numel() for parameter in model.parameters())
