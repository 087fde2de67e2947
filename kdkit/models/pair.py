"""Check, before anything is trained, that a teacher and a student fit each other."""

from typing import NamedTuple

from torch import nn

from kdkit.config import DistillConfig, UsageError
from kdkit.models.load import load_pretrained, wrap

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it raining?"},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "Thanks!"},
]


class Pair(NamedTuple):
    """The result of `check_pair`: the number of entries that both heads have, and lines to print."""

    vocab_size: int
    report: list[str]


def check_pair(config: DistillConfig, teacher, student, tokenizer) -> Pair:
    """Check that the divergence between these two models is meaningful.

    Both models must give each token the same id: the maps from tokens to ids are compared, not their sizes. Heads may
    be padded to different numbers of rows; both are cut to the smaller number. Different special tokens and chat
    templates are allowed, and reported.

    Args:
        teacher, student: transformers models, or a teacher of `kdkit.teachers` and a `BodyAndHead`.
        tokenizer: the teacher's.

    Raises:
        UsageError: the tokenizers differ, a head has fewer rows than there are tokens or is not a plain product, or
            max_length is larger than a context.
    """
    from transformers import AutoTokenizer

    other = tokenizer
    if config.student_layers is None and config.student_is_pretrained:
        other = load_pretrained(AutoTokenizer, config.student_model, "student", config)
        _check_same_ids(config, tokenizer.get_vocab(), other.get_vocab())
    models = {"teacher": wrap(teacher), "student": wrap(student)}
    entries = max(tokenizer.get_vocab().values()) + 1
    for role, model in models.items():
        if model.head_rows < entries:
            raise UsageError(
                f"the {role}'s head has {model.head_rows} rows for a tokenizer of {entries} entries: "
                f"call resize_token_embeddings({entries}) on it, or use a {role} made for this tokenizer"
            )
        if model.context is not None and config.max_length > model.context:
            raise UsageError(
                f"max_length is {config.max_length:,}, more than the {role}'s context of {model.context:,} tokens: "
                "lower it"
            )
        check_head(model, role)
    rows, contexts = zip(*((model.head_rows, model.context) for model in models.values()), strict=True)
    report = [f"tokenizer: {entries:,} entries, the same for both"]
    if rows[0] != rows[1]:
        report.append(f"heads: {rows[0]:,} and {rows[1]:,} rows, both cut to {min(rows):,} before the softmax")
    report.append(f"context: {' and '.join(f'{c:,}' if c else 'unlimited' for c in contexts)} tokens")
    report += [*_special_tokens(tokenizer, other), *_templates(tokenizer, other), *_dropout(models["student"].model)]
    return Pair(min(rows), report)


def check_head(model, role: str) -> None:
    """Raise a UsageError if the logits of a `BodyAndHead` or a teacher are not hidden @ head^T."""
    if step := model.extra_head_step():
        raise UsageError(
            f"the {role}'s logits are not hidden @ head^T ({step}). The loss would not apply that step: use a model "
            "with a plain head"
        )


def _check_same_ids(config: DistillConfig, ours: dict[str, int], theirs: dict[str, int]) -> None:
    if ours == theirs:
        return
    differing = sorted({t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)}, key=str)
    examples = ", ".join(f"{t!r} ({ours.get(t, 'none')} and {theirs.get(t, 'none')})" for t in differing[:3])
    raise UsageError(
        f"teacher {config.teacher_model} and student {config.student_model} have different tokenizers: "
        f"{len(differing):,} tokens have different ids, such as {examples}. Their distributions cannot be compared: "
        "use two models of one family, or cut the student from the teacher with --student_layers"
    )


def _special_tokens(ours, theirs) -> list[str]:
    names = ("bos_token", "eos_token", "pad_token")
    lines = ["special tokens: " + ", ".join(f"{name[:3]} {getattr(ours, name)}" for name in names)]
    if ours.pad_token_id == ours.eos_token_id:
        lines[0] += " (pad and eos share an id; padding is masked by position, so eos is still learned)"
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
    first, second = (_render(tokenizer) if tokenizer.chat_template else "no template" for tokenizer in (ours, theirs))
    if first == second:
        return ["chat templates: both render the same text"]
    at = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    return [
        f"note: the chat templates differ from character {at} on ({first[at : at + 30]!r} and "
        f"{second[at : at + 30]!r}): the teacher's is used for both"
    ]


def _render(tokenizer) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    except TemplateError:  # some templates do not accept a system message
        return tokenizer.apply_chat_template(CONVERSATION[1:], tokenize=False)


def _dropout(student: nn.Module) -> list[str]:
    """Report dropout in the student: it is allowed, but adds noise to the divergence from the teacher."""
    values = student.config.get_text_config().to_dict().items()
    found = {n: v for n, v in values if ("dropout" in n or n.endswith("pdrop")) and isinstance(v, float) and v > 0}
    found = found or {n: m.p for n, m in student.named_modules() if isinstance(m, nn.Dropout) and m.p}
    return [f"note: the student has dropout ({', '.join(f'{n} {v:g}' for n, v in found.items())})"] if found else []
