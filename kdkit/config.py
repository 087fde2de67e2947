"""The configuration of a run: one flat dataclass, read from YAML and the command line.

    python -m kdkit.train --config recipes/demo.yaml --alpha 0.5

How a run is spread over devices is not in here: that is accelerate's YAML.
"""

import dataclasses
import difflib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from kdkit.files import write_text


class UsageError(ValueError):
    """A mistake of the user's: shown as one line that names the value and the remedy, without a traceback."""


class RunStopped(RuntimeError):
    """A run that cannot go on, for a reason that one line can tell; raised by all ranks alike."""


@dataclass
class DistillConfig:
    """Distil a large causal language model (the teacher) into a small one (the student)."""

    teacher_model: str = "embedded"
    """Hub id or local folder of the teacher; "embedded" is the one that kdkit carries."""
    student_model: str = "embedded"
    """Hub id or local folder of the student; "embedded" is a two-layer Llama that starts at random."""
    student_layers: list[int] | int | None = None
    """Start the student from these layers of the teacher instead: a list, or a count spread evenly, first and last
    kept. student_model is then not used."""
    student_random_init: bool = False
    """Start the student at random, from the config of student_model alone."""
    teacher_revision: str | None = None
    """The teacher's branch, tag or commit on the hub; None is its main branch."""
    student_revision: str | None = None
    """The student's branch, tag or commit on the hub; None is its main branch."""
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The type of the teacher's weights; auto is bfloat16 in bf16 mixed precision, else float32. The student's are
    float32."""
    attn_implementation: str | None = None
    """The attention of both models: sdpa, eager, flash_attention_2 ...; None is transformers' choice (sdpa)."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a model on the hub. Only for code that you have read."""
    chat_template: str | None = None
    """A Jinja file with the chat template to use, where the tokenizer has none or another one is wanted."""

    teacher_placement: Literal["auto", "replicate", "shard", "offload"] = "auto"
    """Where the teacher's weights are: whole on each device, sharded over the ranks, or with the CPU; auto says what
    it chose."""
    targets: Literal["online", "hidden", "top_k"] = "online"
    """Where the teacher's targets come from: online runs the teacher on each batch; hidden and top_k read what
    python -m kdkit.targets has stored in targets_dir, its last hidden states (exact), or its likeliest tokens."""
    targets_dir: str | None = None
    """The folder of stored targets."""
    top_k: int = 64
    """How many of the teacher's likeliest tokens are stored for targets top_k; all others are one bucket."""
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    """The type of the weights in final/."""

    dataset: str = "embedded"
    """What to learn from: a hub id, a .txt, .jsonl, .json, .parquet or .csv file, or a folder of such files;
    "embedded" is Python's documentation."""
    dataset_config: str | None = None
    """The configuration of a hub dataset that has several."""
    dataset_split: str = "train"
    """The split to learn from; as datasets writes them, so that train[:1000] works too."""
    dataset_revision: str | None = None
    """The branch, tag or commit of a hub dataset; None is its main branch."""
    streaming: bool = False
    """Read no more of the dataset than max_train_tokens and max_eval_tokens need, in its order, instead of all."""
    text_column: str = "text"
    """The column of texts; used when there are no conversations."""
    messages_column: str | None = "messages"
    """The column of conversations (lists of role and content); used where it exists. The assistant's turns are in the
    loss, the rest is not."""
    prompt_column: str | None = "prompt"
    """With completion_column, the columns of conversations of one turn; used where both exist and messages do not."""
    completion_column: str | None = "completion"
    """The answers to prompt_column, which are in the loss."""
    eval_dataset: str | None = None
    """What to evaluate on, given as dataset is; by default it is dataset."""
    eval_split: str | None = None
    """The split to evaluate on; by default a part of dataset_split is held out, or dataset_split of eval_dataset is
    used."""
    eval_fraction: float = 0.08
    """The share of the samples that is held out when neither eval_dataset nor eval_split is given."""
    max_train_tokens: int | None = None
    """Use about this many tokens of the training text, taken by whole documents in a random order."""
    max_eval_tokens: int | None = 20000
    """Evaluate on about this many held-out tokens (the same ones each time); None is all of them."""
    max_length: int = 256
    """Tokens of a row."""
    truncation_mode: Literal["split", "keep_start", "keep_end", "drop"] | None = None
    """What is done with a sample longer than max_length: split into rows, cut, or left out; None is split for texts and
    keep_start for conversations."""
    packing: bool = True
    """Fill rows with several samples, which do not see each other; otherwise one sample a row."""
    group_by_length: bool = False
    """Make steps of rows of similar length, so that little is padding: the alternative to packing."""

    batch_size: int = 8
    """Rows of a micro-batch on each device."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of an optimizer step on each device."""
    num_epochs: float = 3.0
    """Passes over the training text; max_steps, where given, decides instead."""
    max_steps: int | None = None
    """Optimizer steps of the whole run."""
    learning_rate: float = 2e-3
    """The peak of AdamW's rate. The default suits a small student from scratch; a pretrained one wants 1e-5 to 1e-4."""
    weight_decay: float = 0.1
    """AdamW's decay, on matrices only."""
    warmup_ratio: float = 0.05
    """The share of the steps in which the rate rises to its peak, before it falls to 0 along a cosine."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm where it exceeds it."""

    alpha: float = 0.0
    """Weight of the cross-entropy: loss = alpha * CE + (1 - alpha) * T^2 * divergence. 0 is pure KL, 1 pure CE."""
    temperature: float = 1.0
    """T: both models' logits are divided by it in the divergence."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation"] = (
        "forward_kl"
    )
    """Which divergence of teacher and student: see kdkit/losses.py."""
    beta: float = 0.5
    """Weight of the teacher in the mixture of the jsd divergence, in (0, 1)."""
    skew: float = 0.1
    """The skew of skew_kl and skew_reverse_kl, in [0, 1)."""
    fused_loss: bool = True
    """Compute the loss without ever holding all the logits; false is the plain reference, which holds them."""

    seed: int = 0
    """Decides the student's random start, the order of the rows and dropout."""
    output_dir: str = "runs/default"
    """The folder of the run: config.yaml, metrics.jsonl, checkpoints/ and final/."""
    logging_steps: int = 10
    """Steps between two lines of training metrics."""
    eval_steps: int | None = 100
    """Steps between two evaluations; None is at the start and at the end only."""
    save_steps: int | None = 100
    """Steps between two checkpoints; None is at the end only."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints are kept."""
    on_failed_save: Literal["stop", "continue"] = "stop"
    """What happens when a checkpoint cannot be written (a full disk): stop with an error, or go on without it. Those
    before are kept in either case."""
    resume: str = "auto"
    """auto: go on from the newest whole checkpoint of output_dir, if there is one; never: start over, which replaces
    the run in output_dir; or the path of a checkpoint."""
    use_wandb: bool = True
    """Log to Weights & Biases too, where it is installed and usable."""
    wandb_project: str = "slm-distillation"
    """The project at Weights & Biases."""
    wandb_entity: str | None = None
    """The user or team at Weights & Biases; None is your default."""
    wandb_run_name: str | None = None
    """The run's name at Weights & Biases; None makes one from the settings."""

    def __post_init__(self):
        def check(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise UsageError(f"{name} is {getattr(self, name)!r}, expected {expected}")

        check(0 <= self.alpha <= 1, "alpha", "0 <= alpha <= 1 (0 is pure KL, 1 is pure cross-entropy)")
        check(0 < self.temperature < float("inf"), "temperature", "a number above 0 (1 leaves the softmax as it is)")
        check(0 < self.beta < 1, "beta", "0 < beta < 1; for the ends use forward_kl or reverse_kl")
        check(0 <= self.skew < 1, "skew", "0 <= skew < 1 (0.1 is usual)")
        check(0 < self.eval_fraction < 1, "eval_fraction", "a share between 0 and 1")
        check(0 <= self.warmup_ratio <= 1, "warmup_ratio", "a share between 0 and 1")
        check(self.learning_rate > 0, "learning_rate", "a number above 0")
        check(self.weight_decay >= 0, "weight_decay", "0 or more")
        check(self.max_grad_norm > 0, "max_grad_norm", "a number above 0 (inf switches clipping off)")
        check(self.num_epochs > 0, "num_epochs", "a number above 0")
        check(self.max_length >= 2, "max_length", "at least 2")
        check(bool(self.output_dir), "output_dir", "a folder")
        stored = self.targets != "online"
        check(
            not stored or self.targets_dir,
            "targets_dir",
            f"the folder of stored targets, since targets is {self.targets}",
        )
        for name in ("batch_size", "gradient_accumulation_steps", "logging_steps", "keep_checkpoints", "top_k"):
            check(getattr(self, name) >= 1, name, "at least 1")
        for name in ("max_steps", "eval_steps", "save_steps", "max_train_tokens", "max_eval_tokens"):
            check(getattr(self, name) is None or getattr(self, name) >= 1, name, "at least 1, or null")
        check(not (self.packing and self.group_by_length), "group_by_length", "false with packing, whose rows are full")
        if self.streaming:
            for name in ("max_train_tokens", "max_eval_tokens"):
                check(getattr(self, name) is not None, name, "a number with streaming, which reads until it has them")

    @property
    def divergence_options(self) -> dict[str, float]:
        """The option that the divergence has, if any: `beta` or `skew`."""
        if self.divergence == "jsd":
            return {"beta": self.beta}
        return {"skew": self.skew} if self.divergence.startswith("skew") else {}

    @property
    def loss_formula(self) -> str:
        """The loss with its values, as shown wherever alpha is."""
        option = "".join(f", {name}={value:g}" for name, value in self.divergence_options.items())
        return (
            f"loss = {self.alpha:g} * CE + {1 - self.alpha:g} * {self.temperature:g}^2 * "
            f"{self.divergence}(teacher, student; T={self.temperature:g}{option})"
        )

    @property
    def run_name(self) -> str:
        """wandb_run_name, or one made from the settings."""
        if self.wandb_run_name:
            return self.wandb_run_name
        teacher = Path(self.teacher_model).name
        student = Path(self.student_model).name if self.student_layers is None else f"{teacher}-layers"
        what = "ce" if self.alpha == 1 else f"{self.divergence}-alpha{self.alpha:g}-T{self.temperature:g}"
        return f"{teacher}-to-{student}-{what}-seed{self.seed}"

    def save(self, path: Path) -> None:
        """Write the configuration as YAML, every field of it."""
        write_text(path, yaml.safe_dump(dataclasses.asdict(self), sort_keys=False))


FIELDS = {field.name: field for field in dataclasses.fields(DistillConfig)}


def load_config(argv: list[str] | None = None, command: str = "python -m kdkit.train") -> DistillConfig:
    """Read a configuration from a command line: `[--config recipe.yaml] [--field value ...]`.

    A field on the command line beats the YAML wherever it stands; what neither names has its default.

    Args:
        argv: the arguments; None takes those of the process.
        command: what --help calls it.

    Raises:
        UsageError (a ValueError): an unknown field (with the nearest name), or a value of the wrong type or range.
        SystemExit: after --help.
    """
    import jsonargparse

    argv = list(sys.argv[1:] if argv is None else argv)
    path, argv = _take_config(argv)
    for argument in argv:
        if argument.startswith("--"):
            _check_name(argument[2:].split("=")[0], "the command line", "--", extra=["config", "help"])
    if path is not None:
        _check_yaml(path)

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog=command, description=DistillConfig.__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config", help="A YAML file of fields.")
    parser.add_class_arguments(DistillConfig)
    try:
        # the file first, so that the command line, which comes after, has the last word
        values = parser.parse_args((["--config", str(path)] if path else []) + argv)
    except jsonargparse.ArgumentError as error:
        raise UsageError(_first_lines(error)) from None
    return DistillConfig(**{name: values[name] for name in FIELDS})


def read_config(path: Path) -> DistillConfig:
    """Read back what `DistillConfig.save` wrote, or any YAML of fields."""
    return load_config(["--config", str(path)])


def _take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """Split `--config FILE` (or `--config=FILE`) off the arguments."""
    path, rest, position = None, [], 0
    while position < len(argv):
        argument = argv[position]
        if argument == "--config":
            if position + 1 == len(argv):
                raise UsageError("--config is the last argument, expected the path of a YAML file after it")
            path, position = argv[position + 1], position + 1
        elif argument.startswith("--config="):
            path = argument.removeprefix("--config=")
        else:
            rest.append(argument)
        position += 1
    return path, rest


def _check_yaml(path: str) -> None:
    if not Path(path).is_file():
        raise UsageError(f"--config {path}: there is no such file")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {_first_lines(error)}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds a {type(values).__name__}, expected lines of `field: value`")
    for name in values:
        _check_name(str(name), path)


def _check_name(name: str, where: str, prefix: str = "", extra: list[str] | None = None) -> None:
    if name in FIELDS or name in (extra or []):
        return
    nearest = difflib.get_close_matches(name.replace("-", "_"), FIELDS, n=1, cutoff=0.5)
    hint = f"did you mean {prefix}{nearest[0]}?" if nearest else "python -m kdkit.train --help lists the fields"
    raise UsageError(f"{where} has an unknown field {prefix}{name}: {hint}")


def _first_lines(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
