"""A loss or a gradient that is not finite stops the run before a weight is changed, and is named with its rows."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from kdkit import train as train_module
from kdkit.config import RunStopped
from kdkit.data import Steps, load_rows
from kdkit.fused import fused_kd_loss
from kdkit.losses import DIVERGENCES, kd_loss
from kdkit.models import load_student, load_tokenizer
from kdkit.running.checkpoint import checkpoints
from kdkit.running.tracking import read_metrics
from kdkit.train import train

NAN = float("nan")


@pytest.fixture
def breaks():
    """`breaks(model, after=3)`: a watcher after whose third step the hidden states of that model are not finite."""
    handles = []

    def make(model: str, after: int, value: float = NAN):
        state = {"broken": False, "weights": {}}

        def spoil(module, _, output):
            is_student = any(parameter.requires_grad for parameter in module.parameters())
            if type(module).__name__ == "LlamaModel" and is_student == (model == "student"):
                state["model"] = module
                output.last_hidden_state = output.last_hidden_state * (value if state["broken"] else 1.0)
            return output

        def watch(event):
            state["broken"] = state["broken"] or event.get("train/step", event.get("eval/step")) == after
            state["weights"] = {name: x.clone() for name, x in state["model"].state_dict().items()}

        state["broken"] = after < 0
        watch.state = state
        handles.append(register_module_forward_hook(spoil))
        return watch

    yield make
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    "model, alpha, named",
    [
        ("teacher", 0.3, "loss, KL, gradient"),
        ("student", 1.0, "loss, cross-entropy, gradient"),
        ("student", 0.5, "loss, cross-entropy, KL, gradient"),
    ],
)
def test_step_not_finite_stops_before_a_weight_is_changed_and_resumes(small, breaks, model, alpha, named):
    config = small(save_steps=2, alpha=alpha, gradient_accumulation_steps=2, batch_size=2)
    watch = breaks(model, after=3)
    with pytest.raises(RunStopped, match=rf"step 4 is not finite: {named} \(the losses of rank 0\)"):
        train(config, watch=watch)
    if model == "student":
        after = watch.state["model"].state_dict()
        assert after and all(torch.equal(value, after[name]) for name, value in watch.state["weights"].items())
    tokenizer = load_tokenizer(config)
    step = Steps(load_rows(config, tokenizer)[0], config, tokenizer.pad_token_id)[3]  # from 0
    (file,) = Path(config.output_dir).glob("not_finite_*")
    assert file.name == "not_finite_step_00000004_rank_0.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    expected = [pair for batch in step for pair in zip(batch["row_ids"], batch["input_ids"], strict=True)]
    assert rows == [{"row_id": row_id, "text": tokenizer.decode(ids)} for row_id, ids in expected]
    assert [path.name for path in checkpoints(config.output_dir)] == ["step_00000002"]
    assert read_metrics(Path(config.output_dir) / "metrics.jsonl")[-1]["train/step"] == 3
    watch.state["broken"] = False
    assert train(config)[-1]["eval/step"] == 6


@pytest.mark.parametrize("after, step", [(-1, 0), (0, 6)])
def test_evaluation_not_finite_stops_the_run(small, breaks, after, step):
    """At alpha = 1 the teacher runs in evaluations alone: one that breaks after the first stops the run at the last."""
    config = small(alpha=1.0)
    with pytest.raises(RunStopped, match=rf"evaluation after step {step} is not finite: eval/loss, eval/kl_loss"):
        train(config, watch=breaks("teacher", after))
    assert not [e for e in read_metrics(Path(config.output_dir) / "metrics.jsonl") if e.get("eval/step") == step]


def test_gradient_alone_not_finite_stops_the_run(small, monkeypatch):
    def load(*arguments):
        student = load_student(*arguments)
        student.model.norm.weight.register_hook(lambda gradient: gradient * NAN)
        return student

    monkeypatch.setattr(train_module, "load_student", load)
    with pytest.raises(RunStopped, match=r"step 1 is not finite: gradient\. No weight"):
        train(small())


def test_loss_alone_not_finite_stops_a_step_that_is_not_logged(small, breaks, monkeypatch):
    monkeypatch.setattr(train_module, "clip_gradients", lambda *arguments: torch.tensor(1.0))
    with pytest.raises(RunStopped, match="step 1 is not finite: loss, cross-entropy, KL "):
        train(small(logging_steps=3), watch=breaks("student", after=0))


def test_logits_beyond_bf16_are_named(small, breaks, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(RunStopped, match="step 2 is not finite: loss, cross-entropy, KL, gradient"):
        train(small(alpha=0.5), watch=breaks("student", after=1, value=1e37))  # finite, but not their logits


def test_step_without_a_token_in_the_loss_is_finite(small, monkeypatch):
    config = small(max_steps=3, alpha=0.5)

    def masked(*arguments):
        rows, held_out = load_rows(*arguments)
        rows = [dict(row) for row in rows]
        for index in Steps(rows, config, 2).step_rows(1):
            rows[index]["labels"] = [-100] * len(rows[index]["labels"])
        return rows, held_out

    monkeypatch.setattr(train_module, "load_rows", masked)
    events = [event for event in train(config) if "train/step" in event]
    assert [event["train/loss"] == 0 for event in events] == [False, True, False]
    assert events[1]["train/grad_norm"] == 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("size", [1e3, 1e30])
def test_large_logits_in_bf16_give_the_loss_of_float64(divergence, size):
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
