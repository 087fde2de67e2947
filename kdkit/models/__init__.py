"""The two models: load them, check that they fit each other, and ask each what the loss relies on."""
# ruff: noqa: F401, I001

from kdkit.models.body_and_head import BodyAndHead, count_parameters, wrap
from kdkit.models.cut import student_from_layers
from kdkit.models.examination import examine
from kdkit.models.load import ASSETS, check_models, load_student, load_teacher, load_tokenizer
from kdkit.models.load import teacher_dtype, teacher_fingerprint
from kdkit.models.pair import Pair, check_export, check_pair
