"""A number that is not finite stops the run, with the step, the rank, the part, the model and the rows."""

import json
from pathlib import Path

import pytest
import torch

from kdkit import train as train_module
from kdkit.config import RunStopped
from kdkit.data import load_rows
from kdkit.fused import fused_kd_loss
from kdkit.losses import DIVERGENCES, kd_loss
from kdkit.models import load_student, load_teacher, load_tokenizer
from kdkit.running.checkpoint import checkpoints
from kdkit.running.tracking import read_metrics
from kdkit.train import train

NAN = float("nan")


class Switch:
    """Turned on by the run itself, after a step."""

    on = False

    def after(self, step):
        def watch(event):
            self.on = self.on or event.get("train/step", event.get("eval/step")) == step

        return watch


def break_model(monkeypatch, name, load, switch, token=None, value=NAN):
    """The model's hidden states become `value` in rows that hold a token (in all, by default)."""

    def spoil(module, arguments, options, output):
        if switch.on:
            assert torch.isfinite(output.last_hidden_state * (value if value == value else 1)).all()
            rows = (options["input_ids"] == token).any(1) if token is not None else slice(None)
            output.last_hidden_state[rows] = output.last_hidden_state[rows] * value
        return output

    def broken(*arguments, **options):
        model = load(*arguments, **options)
        model.base_model.register_forward_hook(spoil, with_kwargs=True)
        return model

    monkeypatch.setattr(name if "." in name else f"kdkit.train.{name}", broken)


def aside(config):
    """The rows that were written aside, by rank."""
    files = sorted(Path(config.output_dir).glob("not_finite_*.jsonl"))
    return {file.name: [json.loads(line) for line in file.read_text().splitlines()] for file in files}


@pytest.mark.parametrize("fused", [True, False])
def test_a_teacher_that_gives_nan_is_named_with_its_rows(small, monkeypatch, fused):
    config = small(save_steps=2, alpha=0.3, gradient_accumulation_steps=2, batch_size=2, fused_loss=fused)
    tokenizer = load_tokenizer(config)
    rows, _ = load_rows(config, tokenizer)
    step = train_module.Steps(rows, config, tokenizer.pad_token_id)[3]  # from 0: the fourth
    token = int(step[1]["input_ids"][0, 5])
    guilty = [(m, r) for m, batch in enumerate(step) for r in range(2) if token in batch["input_ids"][r].tolist()]
    switch = Switch()
    break_model(monkeypatch, "kdkit.teachers.load_teacher", load_teacher, switch, token)
    with pytest.raises(RunStopped) as error:
        train(config, watch=switch.after(3))
    words = f"of step 4 is not finite (rank 0: divergence (teacher) in {len(guilty)} of 4 rows)"
    assert words in str(error.value)
    ((name, written),) = aside(config).items()
    assert name == "not_finite_step_00000004_rank_0.jsonl"
    assert [(row["micro_batch"], row["row"]) for row in written] == guilty
    for row in written:
        assert token in row["input_ids"] and row["text"] == tokenizer.decode(row["input_ids"])
    assert [path.name for path in checkpoints(config.output_dir)] == ["step_00000002"]
    assert read_metrics(Path(config.output_dir) / "metrics.jsonl")[-1]["train/step"] == 3
    switch.on = False
    assert train(config)[-1]["eval/step"] == 6  # what was wrong is right again, and the run goes on


@pytest.mark.parametrize(
    "alpha, parts",
    [(1.0, "cross-entropy"), (0.0, "cross-entropy and divergence"), (0.5, "cross-entropy and divergence")],
)
def test_a_student_that_gives_nan_is_named(small, monkeypatch, alpha, parts):
    switch = Switch()
    break_model(monkeypatch, "load_student", load_student, switch)
    with pytest.raises(RunStopped, match=rf"of step 2 is not finite \(rank 0: {parts} \(student\) in 4 of 4 rows\)"):
        train(small(alpha=alpha), watch=switch.after(1))


def test_an_evaluation_names_it_too(small, monkeypatch):
    switch = Switch()
    switch.on = True
    break_model(monkeypatch, "kdkit.teachers.load_teacher", load_teacher, switch)
    config = small(alpha=1.0)
    with pytest.raises(RunStopped, match=r"evaluation of step 0 is not finite \(rank 0: divergence \(teacher\)"):
        train(config)
    assert read_metrics(Path(config.output_dir) / "metrics.jsonl") == []


def test_a_teacher_that_is_not_used_is_not_at_fault(small, monkeypatch):
    switch = Switch()
    break_model(monkeypatch, "kdkit.teachers.load_teacher", load_teacher, switch)
    config = small(alpha=1.0)
    with pytest.raises(RunStopped, match="evaluation of step 6"):  # only there is it run
        train(config, watch=switch.after(0))


def test_no_weight_is_touched(small, monkeypatch):
    students, switch = [], Switch()
    keep = lambda *arguments: students.append(load_student(*arguments)) or students[-1]  # noqa: E731
    break_model(monkeypatch, "load_student", keep, switch)
    before = {}

    def watch(event):
        switch.after(2)(event)
        before.update({name: value.clone() for name, value in students[0].state_dict().items()})

    with pytest.raises(RunStopped):
        train(small(), watch=watch)
    assert all(torch.equal(value, before[name]) for name, value in students[0].state_dict().items())


def test_a_gradient_alone_is_enough(small, monkeypatch):
    """Every loss is finite, and the backward pass of the student's body is not: all rows are written."""

    def load(*arguments):
        student = load_student(*arguments)
        student.model.norm.weight.register_hook(lambda gradient: gradient * NAN)
        return student

    monkeypatch.setattr(train_module, "load_student", load)
    config = small()
    with pytest.raises(RunStopped, match=r"of step 1 is not finite \(every loss is: the backward pass is not\)"):
        train(config)
    assert [len(rows) for rows in aside(config).values()] == [4]


def test_a_loss_alone_is_enough(small, monkeypatch):
    """As when a label's logit overflows to minus infinity: the cross-entropy is infinite, its gradient is not."""
    switch = Switch()
    break_model(monkeypatch, "load_student", load_student, switch)
    monkeypatch.setattr(train_module, "clip_gradients", lambda *arguments: torch.tensor(1.0))
    with pytest.raises(RunStopped, match="of step 1 is not finite"):  # in a step that is not logged, too
        train(small(logging_steps=3), watch=switch.after(0))


def test_a_step_without_a_token_in_the_loss_is_no_fault(small, monkeypatch):
    config = small(max_steps=3, alpha=0.5)

    def masked(*arguments):
        rows, held_out = map(list, load_rows(*arguments))
        steps = train_module.Steps(rows, config, 2)
        for index in steps.step_rows(1):
            rows[index]["labels"] = [-100] * len(rows[index]["labels"])
        return rows, held_out

    monkeypatch.setattr(train_module, "load_rows", masked)
    events = [event for event in train(config) if "train/step" in event]
    assert [event["train/loss"] == 0 for event in events] == [False, True, False]
    assert events[1]["train/grad_norm"] == 0


# --- large logits in bf16


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("size", [1e3, 1e30])
def test_large_logits_do_not_overflow_in_bf16(divergence, size):
    """Far beyond what exp can take: the loss is that of float64, and it and its gradient are finite."""
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 8, 16).bfloat16(), torch.randn(2, 32, 16).bfloat16()
    hidden[0] *= size
    labels = torch.randint(0, 32, (8,))
    fields = dict(alpha=0.5, temperature=0.5, divergence=divergence)
    exact = [x.double() for x in (hidden[0], head[0], hidden[1], head[1])]
    reference = kd_loss(exact[0] @ exact[1].T, exact[2] @ exact[3].T, labels, **fields)
    student = hidden[0].clone().requires_grad_()
    result = fused_kd_loss(student, head[0], hidden[1], head[1], labels, **fields)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(reference.loss.item(), rel=1e-3)
    assert torch.isfinite(student.grad).all()


def test_logits_beyond_bf16_are_named(small, monkeypatch):
    """Hidden states of 1e37 are finite (`break_model` looks), their logits are not."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    switch = Switch()
    break_model(monkeypatch, "load_student", load_student, switch, value=1e37)
    with pytest.raises(RunStopped, match=r"of step 2 is not finite \(rank 0: cross-entropy and divergence \(student\)"):
        train(small(alpha=0.5), watch=switch.after(1))
