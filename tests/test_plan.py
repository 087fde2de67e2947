"""The plan of a run: its memory against that of a real step, and what changes it."""

import json
import time
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from kdkit import plan, train
from kdkit.config import UsageError
from kdkit.models import BodyAndHead
from kdkit.plan import GB, Launch, measure

CPU = Launch(precision="no", on_cpu=True)


@pytest.fixture
def pair(tmp_path):
    """Return the fields of a pair that is larger than the embedded one, from two config.json without weights."""
    return {"teacher_model": write_llama(tmp_path / "t", 4, 192), "student_model": write_llama(tmp_path / "s", 2, 128)}


def write_llama(folder, layers: int, hidden: int, **changes) -> str:
    folder.mkdir()
    content = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers, "vocab_size": 4096,
        "hidden_size": hidden, "intermediate_size": 3 * hidden, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 131072, "tie_word_embeddings": True, **changes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


class Storages(TorchDispatchMode):
    """The bytes of all storages that operators have returned and that are still alive, and their maximum."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        if storage.data_ptr() not in self.alive and storage.nbytes():
            self.alive[storage.data_ptr()] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, storage.data_ptr())
            self.peak = max(self.peak, sum(self.alive.values()))


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("fused_loss", [True, False])
def test_peak_is_that_of_a_real_step_within_5_percent(small, monkeypatch, fused_loss, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    config = small(
        fused_loss=fused_loss, alpha=0.3, batch_size=16, gradient_accumulation_steps=2, max_length=128, max_steps=2,
        max_train_tokens=16 * 2 * 128 * 2, packing=True,
    )  # fmt: skip
    live, step, peaks = Storages(), train.train_step, []

    def measured(student, teacher, *arguments):
        for module in (student, teacher):
            for tensor in [*module.parameters(), *module.buffers()]:
                live.add(tensor.untyped_storage())
        for state in optimizers[0].state.values():
            for tensor in state.values():
                live.add(tensor.untyped_storage())
        live.peak = 0
        with live:
            result = step(student, teacher, *arguments)
        peaks.append(live.peak)
        return result

    optimizers, make = [], train.make_optimizer
    monkeypatch.setattr(train, "make_optimizer", lambda *x: optimizers.append(make(*x)) or optimizers[-1])
    monkeypatch.setattr(train, "train_step", measured)
    train.train(config)
    parts, *_ = measure(config, CPU._replace(precision=precision))
    assert sum(parts.values()) == pytest.approx(peaks[-1], rel=0.05)
