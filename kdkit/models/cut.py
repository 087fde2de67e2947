"""Cut a student from its teacher: some of its decoder layers, with its embedding, norm and head."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from kdkit.config import UsageError
from kdkit.losses import IGNORE_INDEX, forward_kl
from kdkit.running.hub import first_line

ROWS, CHUNK = 4, 256  # rows of the training text that layers are chosen on; tokens whose KL is computed at once


def student_from_layers(teacher: nn.Module, layers: list[int] | int, rows: Sequence[dict] | None = None) -> nn.Module:
    """Copy a transformers causal language model with some of its decoder layers, in fp32. Called by all ranks.

    `layers` are rising indices, or a number of layers, which are spread evenly with the first and the last kept, or
    with the `rows` of the training text chosen by `layers_by_kl`.
    Raises a UsageError unless the student computes what the teacher does when its other layers are skipped.
    """
    depth, given = teacher.config.get_text_config().num_hidden_layers, layers
    if isinstance(layers, int):
        layers = [round(i * (depth - 1) / max(layers - 1, 1)) for i in range(layers)]
    if not layers or sorted(set(layers)) != layers or layers[0] < 0 or layers[-1] >= depth:
        raise UsageError(f"student_layers is {given}: give a number from 1 to {depth}, or rising indices below {depth}")
    if any(parameter.element_size() < 2 for parameter in teacher.parameters()):
        raise UsageError("student_layers needs a teacher that is not quantised: give its original as --teacher_model")
    if rows is not None:
        chosen, state = [layers], PartialState()
        if state.is_main_process:  # with FSDP the only one with weights; ranks on other devices might choose others
            chosen = [layers_by_kl(teacher, len(layers), rows[:ROWS], state.device)]
        (layers,) = broadcast_object_list(chosen)
        state.print(f"layers   {', '.join(map(str, layers))} of the teacher: without one of them, the KL rises most")
    try:
        student = _cut(teacher, layers, teacher.dtype)
        if not teacher.get_output_embeddings().weight.is_meta:
            _compare(student, teacher, layers)
        if student.dtype != torch.float32:  # built anew: casting would keep what was computed in the other dtype
            student = _cut(teacher, layers, torch.float32)
    except Exception as error:  # any: the code of a model may do anything with a config that it was not written for
        what = f"student_layers cannot cut a {type(teacher).__name__} to the layers {layers} ({first_line(error)})"
        raise UsageError(f"{what}: keep others, or give a model of this family as --student_model") from error
    return student.train()


@torch.no_grad()
def layers_by_kl(teacher: nn.Module, count: int, rows: Sequence[dict], device: torch.device) -> list[int]:
    """Return the `count` layers whose absence alone raises KL(teacher || teacher without it) most, in their order.

    The KL is summed over the tokens in the loss of `rows`. The teacher runs on `device` as often as it has layers.
    """
    depth, home = teacher.config.get_text_config().num_hidden_layers, teacher.device
    blocks = next(part for part in teacher.modules() if isinstance(part, nn.ModuleList) and len(part) == depth)
    teacher.to(device)
    rises = torch.zeros(depth, dtype=torch.float64)
    for row in rows:
        ids, labels = (torch.tensor(row[key], device=device) for key in ("input_ids", "labels"))
        expected = teacher(input_ids=ids[None], use_cache=False).logits[0, labels != IGNORE_INDEX].split(CHUNK)
        for index, block in enumerate(blocks):
            with _without([block]):
                logits = teacher(input_ids=ids[None], use_cache=False).logits[0, labels != IGNORE_INDEX].split(CHUNK)
            rises[index] += sum(float(forward_kl(*both).sum()) for both in zip(logits, expected, strict=True))
    teacher.to(home)
    return sorted(rises.topk(count).indices.tolist())


@contextmanager
def _without(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Let each of these layers return its input."""

    def skip(module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    hooks = [block.register_forward_hook(skip, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _cut(teacher: nn.Module, layers: list[int], dtype: torch.dtype) -> nn.Module:
    config, attention = _cut_config(teacher, layers), teacher.config._attn_implementation
    student = type(teacher)._from_config(config, dtype=dtype, attn_implementation=attention)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    if teacher.get_output_embeddings().weight.is_meta:  # with FSDP only rank 0 has the weights
        return student
    weights = teacher.state_dict()
    for prefix in _layer_lists(student, teacher, layers):
        weights = {name: value for name, value in weights.items() if not name.startswith(f"{prefix}.")}
        for index, layer in enumerate(layers):
            weights |= teacher.get_submodule(f"{prefix}.{layer}").state_dict(prefix=f"{prefix}.{index}.")
    student.load_state_dict(weights)
    return student


def _cut_config(teacher: nn.Module, layers: list[int]):
    """Return the config of the student, read as from a file: a field that contradicts another one shows up here."""
    config = copy.deepcopy(teacher.config)
    text = config.get_text_config()
    content, depth = text.to_dict(), text.num_hidden_layers
    for name, value in content.items():
        if name == "first_k_dense_replace":  # the number of dense layers before those with experts
            content[name] = sum(layer < value for layer in layers)
        elif isinstance(value, list) and len(value) == depth and "token" not in name:  # one entry per layer
            content[name] = [value[layer] for layer in layers]
        elif isinstance(value, list) and "layer" in name and set(map(str, value)) <= set(map(str, range(depth))):
            content[name] = [layers.index(layer) for layer in value if layer in layers]  # indices of layers
    content[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(layers)
    parts = [name for name in config.sub_configs if getattr(config, name) is text]
    for name in parts:
        setattr(config, name, type(text).from_dict(content))
    return config if parts else type(text).from_dict(content)


def _layer_lists(student: nn.Module, teacher: nn.Module, layers: list[int]) -> list[str]:
    """Return the names of the lists of modules, one per layer, that the student has with fewer entries."""
    depth, ours = teacher.config.get_text_config().num_hidden_layers, dict(student.named_modules())
    theirs = {name: len(part) for name, part in teacher.named_modules() if isinstance(part, nn.ModuleList)}
    return [name for name, size in theirs.items() if size == depth and len(ours.get(name, ())) == len(layers)]


@torch.no_grad()
def _compare(student: nn.Module, teacher: nn.Module, layers: list[int]) -> None:
    """Raise a ValueError if settings of a layer, or logits of some tokens, are not the teacher's without the others."""
    name = _layer_lists(student, teacher, layers)[0]
    blocks, kept = teacher.get_submodule(name), student.eval().get_submodule(name)
    for index, layer in enumerate(layers):
        before, after = _settings(blocks[layer]), _settings(kept[index])
        both = before.keys() & after.keys()  # what only one has is the state of a teacher that has run
        changed = {key: (before[key], after[key]) for key in both if before[key] != after[key]}
        if wrong := [key for key, values in changed.items() if values != (layer, index)]:  # it may know its index
            raise ValueError(f"layer {layer} of the teacher would have another {min(wrong)}")

    skipped = [blocks[index] for index in range(len(blocks)) if index not in layers]
    training, rows = teacher.training, len(teacher.get_output_embeddings().weight)
    ids = torch.linspace(0, rows - 1, 16, device=teacher.device).long()[None]
    try:
        with _without(skipped):
            both = [model.eval()(input_ids=ids, use_cache=False).logits.float() for model in (teacher, student)]
    finally:
        teacher.train(training)
    expected, logits = both
    if (difference := (logits - expected).abs().max()) > 1e-3 * expected.abs().max():  # False for NaN
        raise ValueError(f"its logits would differ by {difference:.2g} from the teacher's without the other layers")


def _settings(block: nn.Module) -> dict:
    """Return the numbers, strings and flags of all modules of a layer, without those that transformers keeps."""
    items = ((f"{name}.{key}", value) for name, part in block.named_modules() for key, value in vars(part).items())
    return {key: x for key, x in items if isinstance(x, (bool, int, float, str, type(None))) and "._" not in key}
