"""Whether a teacher and a student fit each other, checked before anything is trained.

Shapes: S tokens, H hidden width, V entries of a head.
"""

from typing import NamedTuple

import torch
from torch import nn

from kdkit.config import DistillConfig, UsageError
from kdkit.models.load import load_pretrained

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it raining?"},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "Thanks!"},
]


class Pair(NamedTuple):
    """What `check_pair` found: the entries that both heads have, and lines that tell."""

    vocab_size: int
    report: list[str]


def check_pair(config: DistillConfig, teacher: nn.Module, student: nn.Module, tokenizer) -> Pair:
    """Check, before anything is trained, that the divergence of these two means something.

    Both have to give each token the same id: the maps are compared, not their sizes. Heads may be padded to different
    widths; both are cut to the narrower. A head must be a plain product, hidden @ head^T. Rows must fit into both
    contexts. Other special tokens or another chat template are allowed, and reported.

    Raises:
        UsageError: another tokenizer, a head without a row for each token, a head with more to it than a product, or
            max_length beyond a context.
    """
    from transformers import AutoTokenizer

    other = tokenizer
    if config.student_layers is None and not config.student_random_init and config.student_model != "embedded":
        other = load_pretrained(AutoTokenizer, config.student_model, "student", config)
        _check_same_ids(config, tokenizer.get_vocab(), other.get_vocab())
    models = {"teacher": teacher, "student": student}
    rows = {role: _head_rows(model) for role, model in models.items()}
    entries = max(tokenizer.get_vocab().values()) + 1
    for role, model in models.items():
        if rows[role] < entries:
            raise UsageError(
                f"the {role}'s head has {rows[role]} rows for a tokenizer of {entries} entries: "
                f"call resize_token_embeddings({entries}) on it, or use a {role} made for this tokenizer"
            )
        context = context_of(model)
        if context is not None and config.max_length > context:
            raise UsageError(
                f"max_length is {config.max_length:,}, more than the {role}'s context of {context:,} tokens: lower it"
            )
        empty = any(parameter.is_meta for parameter in model.parameters())  # rank 0 has the weights, and looks
        if not empty and not _is_stored(model):
            _check_plain_head(model, role)
    vocab_size = min(rows.values())
    report = [f"tokenizer: {entries:,} entries, the same for both"]
    if rows["teacher"] != rows["student"]:
        report.append(
            f"heads: {rows['teacher']:,} and {rows['student']:,} rows, both cut to {vocab_size:,} before the softmax"
        )
    contexts = [context_of(model) for model in models.values()]
    report.append(f"context: {' and '.join(f'{c:,}' if c else 'any number of' for c in contexts)} tokens")
    return Pair(
        vocab_size, report + _special_tokens(tokenizer, other) + _templates(tokenizer, other) + _dropout(student)
    )


def _is_stored(model: nn.Module) -> bool:
    """Whether it is a `kdkit.targets.StoredTeacher`: a head without a body, which was looked at when it was stored."""
    return not hasattr(model, "get_output_embeddings")


def _head_rows(model: nn.Module) -> int:
    return len(model.head if _is_stored(model) else model.get_output_embeddings().weight)


def context_of(model: nn.Module) -> int | None:
    if _is_stored(model):
        return model.context
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _special_tokens(ours, theirs) -> list[str]:
    names = ("bos_token", "eos_token", "pad_token")
    lines = ["special tokens: " + ", ".join(f"{name[:3]} {getattr(ours, name)}" for name in names)]
    if ours.pad_token_id == ours.eos_token_id:
        lines[0] += " (padding is told from the end by its place, not by its id)"
    for name in names[:2]:
        if getattr(ours, name) != getattr(theirs, name):
            lines.append(
                f"note: {name} is {getattr(ours, name)} for the teacher and {getattr(theirs, name)} for the student: "
                "the teacher's is used"
            )
    return lines


def _templates(ours, theirs) -> list[str]:
    if ours is theirs or not (ours.chat_template or theirs.chat_template):
        return []
    rendered = []
    for tokenizer in (ours, theirs):
        rendered.append(_render(tokenizer) if tokenizer.chat_template else "none at all")
    if rendered[0] == rendered[1]:
        return ["chat templates: they render alike"]
    at = next((i for i, (a, b) in enumerate(zip(*rendered, strict=False)) if a != b), min(map(len, rendered)))
    shown = " and ".join(repr(text[at : at + 30]) for text in rendered)
    return [f"note: the chat templates differ, at character {at} by {shown}: the teacher's is used, for both"]


def _render(tokenizer) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    except TemplateError:  # some take no system message
        return tokenizer.apply_chat_template(CONVERSATION[1:], tokenize=False)


def _dropout(student: nn.Module) -> list[str]:
    """Dropout in the student is noise between it and the teacher; allowed, and said. The teacher is in eval mode."""
    found = {name: module.p for name, module in student.named_modules() if isinstance(module, nn.Dropout) and module.p}
    fields = {
        name: value
        for name, value in student.config.get_text_config().to_dict().items()
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float) and value > 0
    }
    if not found and not fields:
        return []
    return [f"note: the student has dropout ({', '.join(f'{n} {v:g}' for n, v in (fields or found).items())})"]


def _check_same_ids(config: DistillConfig, ours: dict[str, int], theirs: dict[str, int]) -> None:
    if ours == theirs:
        return
    differing = sorted({t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)}, key=str)
    examples = ", ".join(f"{t!r} ({ours.get(t, 'none')} and {theirs.get(t, 'none')})" for t in differing[:3])
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
