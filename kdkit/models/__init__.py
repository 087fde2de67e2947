"""The two models: loaded, and checked against each other."""

from kdkit.models.load import (
    ASSETS,
    BodyAndHead,
    check_models,
    count_parameters,
    load_student,
    load_student_config,
    load_teacher,
    load_tokenizer,
    resolve,
    student_from_layers,
    teacher_dtype,
    teacher_folder,
)
from kdkit.models.pair import Pair, check_pair, context_of

__all__ = [
    "ASSETS", "BodyAndHead", "Pair", "check_models", "check_pair", "context_of", "count_parameters", "load_student",
    "load_student_config", "load_teacher", "load_tokenizer", "resolve", "student_from_layers", "teacher_dtype",
    "teacher_folder",
]  # fmt: skip
