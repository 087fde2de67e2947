"""The method without abstractions computes what the training loop computes."""

import json

import pytest

from kdkit.minimal import TEXTS, distil
from kdkit.train import train


@pytest.mark.parametrize("alpha, temperature", [(0.0, 1.0), (0.1, 2.0), (1.0, 1.0)])
def test_first_five_losses_of_minimal_equal_those_of_train(small, tmp_path, alpha, temperature):
    for name, texts in (("train", TEXTS), ("eval", ["A text to evaluate on."])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    history = train(small(
        dataset=str(tmp_path / "train.jsonl"), eval_dataset=str(tmp_path / "eval.jsonl"), max_train_tokens=None,
        packing=False, batch_size=len(TEXTS), max_steps=5, warmup_ratio=0.0, weight_decay=0.0, learning_rate=2e-3,
        alpha=alpha, temperature=temperature,
    ))  # fmt: skip
    losses = [event["train/loss"] for event in history if "train/step" in event]
    assert losses == pytest.approx(list(distil(TEXTS, 5, alpha, temperature)), rel=1e-5)
