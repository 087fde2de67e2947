"""Check, before anything is trained, that two models fit each other and that the student can be saved."""

import tempfile
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig

from kdkit.config import DistillConfig, UsageError
from kdkit.models.body_and_head import wrap
from kdkit.models.load import load_pretrained, locate
from kdkit.running.hub import first_line


class Pair(NamedTuple):
    """The result of `check_pair`: the number of entries that both heads have, and lines to print."""

    vocab_size: int
    report: list[str]


def check_pair(config: DistillConfig, teacher, student, tokenizer) -> Pair:
    """Check that the divergence between these two models is meaningful, or raise a UsageError.

    Both must give each token the same id: the maps from tokens to ids are compared, not their sizes. Heads may be
    padded to different numbers of rows, and are cut to the smaller one. Other special tokens and chat templates are
    reported. The models are transformers models, teachers of `kdkit.teachers`, or of the class `BodyAndHead`.
    """
    other = tokenizer
    if config.student_layers is None and config.student_is_pretrained:
        other = load_pretrained(AutoTokenizer, config.student_model, "student", config)
    entries, renamed = max(tokenizer.get_vocab().values()) + 1, _check_same_ids(config, tokenizer, other)
    teacher, student = wrap(teacher), wrap(student)
    for role, model in (("teacher", teacher), ("student", student)):
        if model.head_rows < entries:
            what = f"the {role}'s head has {model.head_rows} rows for a tokenizer of {entries} entries"
            raise UsageError(f"{what}: call resize_token_embeddings({entries}) on it, or use another {role}")
        if model.context is not None and config.max_length > model.context:
            expected = f"expected at most {model.context:,}, the context of the {role}"
            raise UsageError(f"max_length is {config.max_length:,}, {expected}")
    vocab_size = min(teacher.head_rows, student.head_rows)
    reserved = f" but for {renamed:,} names of reserved tokens, which are in no text" if renamed else ""
    report = [f"tokenizer: {entries:,} entries, the same for both{reserved}"]
    if teacher.head_rows != student.head_rows:
        report.append(f"heads: {teacher.head_rows:,} and {student.head_rows:,} rows, both cut to {vocab_size:,}")
    return Pair(vocab_size, report + _notes(tokenizer, other, student.model))


def _check_same_ids(config: DistillConfig, tokenizer, other) -> int:
    """Raise a UsageError if a text has other ids for the student; return how many reserved tokens have another name.

    Reserved are special tokens without a purpose: neither a role of the teacher, such as eos, nor in its chat template.
    """
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    names = {token for token in ours | theirs if ours.get(token) != theirs.get(token)}
    added = [*tokenizer.added_tokens_decoder.values(), *other.added_tokens_decoder.values()]
    roles = [role for role in tokenizer.special_tokens_map.values() if isinstance(role, str)]
    reserved = {token.content for token in added if token.special and token.content not in roles}
    if differing := sorted(token for token in names if token not in reserved or token in str(tokenizer.chat_template)):
        examples = ", ".join(f"{token!r} ({ours.get(token)} and {theirs.get(token)})" for token in differing[:3])
        raise UsageError(
            f"{config.teacher_model} and {config.student_model} have different tokenizers: {len(differing):,} tokens "
            f"have different ids, such as {examples}: use models of one family, or --student_layers"
        )
    return len(names)


def _notes(ours, theirs, student: nn.Module) -> list[str]:
    """Report the special tokens, and differences that are allowed but may surprise."""
    notes = [f"special tokens: bos {ours.bos_token}, eos {ours.eos_token}, pad {ours.pad_token}"]
    if ours.pad_token_id == ours.eos_token_id:
        notes[0] += " (pad and eos share an id; padding is masked by position, so eos is still learned)"
    for name in ("bos_token", "eos_token"):
        first, second = getattr(ours, name), getattr(theirs, name)
        if first != second:
            notes.append(f"note: {name} is {first} for the teacher and {second} for the student: the teacher's is used")
    if ours.chat_template != theirs.chat_template:
        notes.append("note: the chat templates differ: the teacher's is used for both")
    if any(name.endswith("experts") for name, _ in student.named_modules()):
        notes.append("note: the student has experts: the loss has no term that balances their load")
    for name, value in student.config.get_text_config().to_dict().items():
        if "drop" in name and isinstance(value, float) and value:
            notes.append(f"note: the student has {name} {value:g}, which adds noise to the divergence")
    return notes


def check_export(student, tokenizer, config: DistillConfig) -> None:
    """Set the ids that end a text in the student's configs, then write and read final/ once, without its weights."""
    model, (path, revision) = student.model, locate(config.teacher_model, "teacher")
    ids = [tokenizer.eos_token_id]
    with suppress(OSError):  # the teacher has no such file
        given = GenerationConfig.from_pretrained(path, revision=revision).eos_token_id
        ids += given if isinstance(given, list) else [given]
    ids = [number for number in dict.fromkeys(ids) if number is not None]
    generation = [model.generation_config] if model.can_generate() else []
    for settings in (model.config, model.config.get_text_config(), *generation):
        settings.eos_token_id = ids if len(ids) > 1 else next(iter(ids), None)
    for settings in generation:
        try:
            settings.validate(strict=True)
        except ValueError:  # a temperature without do_sample, which transformers does not save
            settings.do_sample = True
    try:
        with tempfile.TemporaryDirectory() as folder:
            for part in (model.config, *generation, tokenizer):  # model.save_pretrained writes on rank 0 only
                part.save_pretrained(folder)
            with torch.device("meta"):
                again = type(model)(type(model.config).from_pretrained(folder))
        read, expected = ({(name, p.shape) for name, p in m.named_parameters()} for m in (again, model))
        if read != expected:
            raise ValueError(f"it would be read with another {min(read ^ expected)[0]}")
    except Exception as error:  # any: the code of a model and its configs may fail in any way
        what = f"the student could not be saved as {config.output_dir}/final ({first_line(error)})"
        raise UsageError(f"{what}: correct its config.json and generation_config.json, or choose another") from error
