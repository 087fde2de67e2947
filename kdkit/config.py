"""The configuration of a run: one dataclass of six groups of fields. `kdkit.command_line` reads it.

How a run is distributed over devices is not configured here but in accelerate's YAML file.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any, Literal


class UsageError(ValueError):
    """A mistake of the user, shown as one line that names the value and the remedy, without a traceback."""


class RunStopped(RuntimeError):
    """A run that cannot continue, for a reason that fits in one line. All ranks raise it together."""


def may_change(default: Any) -> Any:
    """Mark a field that does not change what is computed: a run may be resumed with another value of it."""
    return field(default=default, metadata={"may_change": True})


@dataclass
class ModelFields:
    """models: the teacher and the student"""

    teacher_model: str = "embedded"
    """Hub id (or id@revision) or local folder of the teacher; "embedded" is the one that kdkit ships."""
    student_model: str = "embedded"
    """Hub id (or id@revision) or local folder; "embedded" is a two-layer Llama that starts from random weights."""
    student_layers: list[int] | int | None = None
    """Start from layers of the teacher, not from student_model: a list of indices, or a count."""
    student_layers_by: Literal["spread", "kl"] = "spread"
    """Which layers a count keeps: spread evenly, or those whose absence raises KL(teacher || student) most."""
    student_random_init: bool = False
    """Start the student from random weights; only the config of student_model is read."""
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The dtype of the teacher's weights; auto is bfloat16 with bf16 mixed precision, otherwise float32."""
    attn_implementation: str | None = None
    """The attention of both models: sdpa, eager, flash_attention_2, ...; None is the default of transformers."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a model on the hub. Only for code that you have read."""
    teacher_placement: Literal["auto", "replicate", "shard", "offload"] = may_change("auto")
    """Where the teacher's weights are: a copy on each device, sharded over the ranks, or in CPU memory."""
    targets: Literal["online", "hidden", "top_k"] = "online"
    """The teacher's targets: online runs it on each batch; hidden and top_k read what python -m kdkit.targets stored
    in targets_dir, its last hidden states (exact) or its most likely tokens."""
    targets_dir: str | None = may_change(None)
    """The folder of the stored targets."""
    top_k: int = 64
    """How many of the teacher's most likely tokens are stored for targets top_k; all others share one bucket."""


@dataclass
class DataFields:
    """data: the text to learn from and to evaluate on"""

    dataset: str = "embedded"
    """Hub id (or id@revision), .txt, .jsonl, .json, .parquet or .csv file, folder of such files, or "embedded"."""
    dataset_config: str | None = None
    """The configuration of a hub dataset that has several."""
    dataset_split: str = "train"
    """The split to learn from, in the notation of datasets: train[:1000] works too."""
    streaming: bool = False
    """Read only as much of the dataset, in its order, as max_train_tokens and max_eval_tokens need."""
    text_column: str = "text"
    """The column of texts; used when there are no conversations."""
    messages_column: str | None = "messages"
    """The column of conversations (lists of role and content), used if it exists. Only assistant turns are learned."""
    prompt_column: str | None = "prompt"
    """With completion_column: conversations of one turn; used if both columns exist and there are no messages."""
    completion_column: str | None = "completion"
    """The answers to prompt_column, which are learned."""
    chat_template: str | None = None
    """A Jinja file with the chat template to use, if the tokenizer has none or another one is wanted."""
    chat_template_options: dict | None = None
    """Variables for the chat template, such as {"enable_thinking": false}: a mapping in YAML, JSON as an argument."""
    eval_dataset: str | None = None
    """The dataset to evaluate on, in the notation of dataset; by default the same one."""
    eval_split: str | None = None
    """The split to evaluate on; by default a fraction of dataset_split is held out, or eval_dataset's split is used."""
    eval_fraction: float = 0.08
    """The fraction of the samples that is held out if neither eval_dataset nor eval_split is given."""
    max_train_tokens: int | None = field(default=None, metadata={"training_only": True})
    """Use about this many tokens of the training text: complete samples, in a random order."""
    max_eval_tokens: int | None = 20000
    """Evaluate on about this many held-out tokens, the same ones each time; None is all of them."""
    max_length: int = 256
    """The largest number of tokens of a row."""
    truncation_mode: Literal["split", "keep_start", "keep_end", "drop"] | None = None
    """What is done with a sample longer than max_length; None is split for texts and keep_start for conversations."""
    packing: bool | None = field(default=None, metadata={"training_only": True})
    """Fill rows with several samples. None does so if both models keep them apart, which is tested before training."""
    num_proc: int | None = may_change(None)
    """Processes that tokenise the text; None is one less than the number of CPU cores, and at least 1."""


@dataclass
class LossFields:
    """loss: what the student minimises"""

    alpha: float = 0.0
    """Weight of the cross-entropy: loss = alpha * CE + (1 - alpha) * T^2 * divergence. 0 is pure KL, 1 pure CE."""
    temperature: float = 1.0
    """T: in the divergence, the logits of both models are divided by it."""
    divergence: str = "forward_kl"
    """forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl, total_variation, neg_log_acceptance, or one of your own:
    a key of DIVERGENCES in kdkit/losses.py."""
    beta: float = 0.5
    """Weight of the teacher in the mixture of the jsd divergence, in (0, 1)."""
    skew: float = 0.1
    """The skew of skew_kl and skew_reverse_kl, in [0, 1)."""
    fused_loss: bool = may_change(True)
    """Compute the loss in chunks, so that not all logits are in memory at once; false is the plain reference."""
    compile_loss: bool | None = may_change(None)
    """Compile the fused loss with torch.compile. None decides by the size of the run, and prints what it chose."""


@dataclass
class OnPolicyFields:
    """on-policy: learning on text that the student writes itself"""

    on_policy: float = 0.0
    """The share of steps on the student's own text, which continues the prompts of the data: from 0 (none) to 1."""
    max_new_tokens: int = 128
    """The largest number of tokens that the student writes after a prompt."""
    eval_own_text: bool | None = None
    """Evaluate on the student's own text, too: eval/own_kl. None does so if on_policy is above 0."""


@dataclass
class OptimizationFields:
    """optimization: batches, steps and the learning rate"""

    batch_size: int = 8
    """Rows of a micro-batch on each device."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of an optimizer step on each device."""
    gradient_checkpointing: bool = may_change(False)
    """Compute the student's activations again in the backward pass: much less memory, a fourth to a third slower."""
    compile_models: bool = may_change(False)
    """Compile the decoder layers of both models with torch.compile: faster steps, after up to a minute at the start."""
    num_epochs: float = 3.0
    """Passes over the training text; max_steps, if given, decides instead."""
    max_steps: int | None = None
    """Optimizer steps of the complete run."""
    learning_rate: float | None = None
    """The peak of AdamW's learning rate. None is 2e-3 for a student from random weights, 2e-4 for layers
    of the teacher, 2e-5 for a pretrained student."""
    weight_decay: float = 0.1
    """AdamW's weight decay, applied to matrices only."""
    warmup_ratio: float = 0.05
    """The fraction of the steps in which the learning rate rises to its peak, before it falls to 0 along a cosine."""
    max_grad_norm: float = 1.0
    """A gradient with a larger norm is scaled down to this norm."""
    seed: int = 0
    """The seed of the student's random weights, of the order of the rows and of dropout."""


@dataclass
class RunFields:
    """run: the output folder, logging and checkpoints"""

    output_dir: str = may_change("runs/default")
    """The folder of the run: config.yaml, metrics.jsonl, checkpoints/ and final/."""
    logging_steps: int = may_change(10)
    """Steps between two lines of training metrics."""
    eval_steps: int | None = may_change(100)
    """Steps between two evaluations; None evaluates at the start and at the end only."""
    save_steps: int | None = may_change(100)
    """Steps between two checkpoints; None saves at the end only."""
    keep_checkpoints: int = may_change(3)
    """How many of the newest checkpoints are kept."""
    resume: str = may_change("auto")
    """auto resumes from the newest complete checkpoint; never replaces the run; or the path of a checkpoint."""
    use_wandb: bool = may_change(True)
    """Log to Weights & Biases too, if it is installed and usable."""
    wandb_project: str = may_change("slm-distillation")
    """The project at Weights & Biases."""
    wandb_entity: str | None = may_change(None)
    """The user or team at Weights & Biases; None is your default."""
    wandb_run_name: str | None = may_change(None)
    """The run's name at Weights & Biases; None makes one from the settings."""


@dataclass
class DistillConfig(RunFields, OptimizationFields, OnPolicyFields, LossFields, DataFields, ModelFields):
    """Distil a large causal language model (the teacher) into a small one (the student)."""

    def __post_init__(self):
        def check(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise UsageError(f"{name} is {getattr(self, name)!r}, expected {expected}")

        for name in PATHS:
            setattr(self, name, getattr(self, name) and os.path.expanduser(getattr(self, name)))
        check(0 <= self.alpha <= 1, "alpha", "0 <= alpha <= 1 (0 is pure KL, 1 is pure cross-entropy)")
        check(0 < self.temperature < float("inf"), "temperature", "a number above 0 (1 leaves the softmax as it is)")
        check(0 < self.beta < 1, "beta", "0 < beta < 1; for the ends use forward_kl or reverse_kl")
        check(0 <= self.skew < 1, "skew", "0 <= skew < 1 (0.1 is usual)")
        check(0 < self.eval_fraction < 1, "eval_fraction", "a fraction between 0 and 1")
        for name in ("warmup_ratio", "on_policy"):
            check(0 <= getattr(self, name) <= 1, name, "a fraction from 0 to 1")
        check(self.weight_decay >= 0, "weight_decay", "0 or more")
        check(self.max_grad_norm > 0, "max_grad_norm", "a number above 0 (inf switches clipping off)")
        check(self.num_epochs > 0, "num_epochs", "a number above 0")
        check(self.learning_rate is None or self.learning_rate > 0, "learning_rate", "a number above 0, or null")
        check(self.max_length >= 2, "max_length", "at least 2")
        check(self.targets == "online" or self.targets_dir, "targets_dir", f"a folder, as targets is {self.targets}")
        for name in ("student_model", "student_random_init"):
            alone = self.student_layers is None or getattr(self, name) == getattr(DistillConfig, name)
            check(alone, "student_layers", f"null with {name} {getattr(self, name)}: a student has one start")
        counted = self.student_layers_by == "spread" or isinstance(self.student_layers, int)
        check(counted, "student_layers", "a count with student_layers_by kl")
        replaces = os.path.abspath(self.student_model) == os.path.abspath(f"{self.output_dir}/final")
        check(not replaces, "output_dir", "another folder: the final/ in this one is student_model")
        if self.writes_own_text:
            check(self.targets == "online", "targets", "online with own text, which is written during the run")
            check(self.packing is not True, "packing", "false or null with own text, since a row is one prompt")
            longest = self.max_length - 1
            check(1 <= self.max_new_tokens <= longest, "max_new_tokens", f"1 to {longest}, less than max_length")
        if self.on_policy > 0:
            check(self.alpha == 0, "alpha", "0 with on_policy: own text has no labels that are worth learning")
        for name in ("batch_size", "gradient_accumulation_steps", "logging_steps", "keep_checkpoints", "top_k"):
            check(getattr(self, name) >= 1, name, "at least 1")
        for name in ("max_steps", "eval_steps", "save_steps", "max_train_tokens", "max_eval_tokens", "num_proc"):
            check(getattr(self, name) is None or getattr(self, name) >= 1, name, "at least 1, or null")
        if self.streaming:
            for name in ("max_train_tokens", "max_eval_tokens"):
                check(getattr(self, name) is not None, name, "a number with streaming: it limits what is read")

    @property
    def writes_own_text(self) -> bool:
        """Whether the student writes text in this run: to learn or to be evaluated on."""
        return self.on_policy > 0 or bool(self.eval_own_text)

    @property
    def student_is_pretrained(self) -> bool:
        """Whether the student starts from trained weights: its own, or layers of the teacher."""
        return self.student_layers is not None or not (self.student_random_init or self.student_model == "embedded")

    @property
    def peak_learning_rate(self) -> float:
        """learning_rate, or a default that depends on where the student starts."""
        default = 2e-5 if self.student_is_pretrained else 2e-3
        return self.learning_rate or (default if self.student_layers is None else 2e-4)

    @property
    def divergence_options(self) -> dict[str, float]:
        """The option that the divergence takes, if any: `beta` or `skew`."""
        options = {"jsd": {"beta": self.beta}, "skew_kl": {"skew": self.skew}, "skew_reverse_kl": {"skew": self.skew}}
        return options.get(self.divergence, {})

    @property
    def loss_formula(self) -> str:
        """The formula of the loss with the values of this configuration, without parts of weight 0."""
        options = "".join(f", {name}={value:g}" for name, value in self.divergence_options.items())
        square = "" if self.temperature == 1 else f"{self.temperature:g}^2 * "
        divergence = f"{square}{self.divergence}(teacher, student; T={self.temperature:g}{options})"
        if self.alpha in (0, 1):
            return "loss = CE" if self.alpha else f"loss = {divergence}"
        return f"loss = {self.alpha:g} * CE + {1 - self.alpha:g} * {divergence}"

    def as_dict(self) -> dict[str, Any]:
        """All fields, with the defaults that depend on other fields filled in: the content of config.yaml."""
        return {**dataclasses.asdict(self), "learning_rate": self.peak_learning_rate}


GROUPS = DistillConfig.__mro__[1:-1][::-1]  # the classes above, in their order
FIELDS = {field.name: field for field in dataclasses.fields(DistillConfig)}
PATHS = {
    "teacher_model", "student_model", "targets_dir", "dataset", "chat_template", "eval_dataset", "output_dir", "resume"
}  # fmt: skip
