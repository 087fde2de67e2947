"""The two models: load them, and check that they fit each other."""
# ruff: noqa: F401, I001

from kdkit.models.cut import student_from_layers
from kdkit.models.load import (
    ASSETS, BodyAndHead, check_models, count_parameters, describe_inputs, load_student, load_teacher, load_tokenizer,
    record_tying, teacher_dtype, teacher_fingerprint, wrap,
)  # fmt: skip
from kdkit.models.pair import Pair, check_export, check_pair
