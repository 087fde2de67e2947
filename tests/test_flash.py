"""Flash attention on a CPU: transformers' own code up to the kernels, which a few lines of torch replace.

Which kernel is called, and with which boundaries of documents, is transformers' doing, from what kdkit hands it.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, modeling_flash_attention_utils

from kdkit.config import UsageError
from kdkit.models import BodyAndHead
from kdkit.train import train


@pytest.fixture
def flash(monkeypatch):
    """Replace the kernels; returns the list of those that are called."""
    called = []

    def attend(q, k, v, scale):  # causal, (B, S, heads, size)
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)

    def dense(q, k, v, *_, softmax_scale=None, **__):
        called.append("dense")
        return attend(q, k, v, softmax_scale)

    def variable_length(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale=None, **__):
        called.append("variable length")
        assert cu_seqlens_q[0] == 0 and cu_seqlens_q[-1] == len(q) and torch.equal(cu_seqlens_q, cu_seqlens_k)
        parts = itertools.pairwise(cu_seqlens_q.tolist())
        return torch.cat([attend(*(x[None, start:end] for x in (q, k, v)), softmax_scale)[0] for start, end in parts])

    def keep(**arguments):
        return {"softmax_scale": arguments.get("softmax_scale")}

    functions = (dense, variable_length, None, None, None), (keep, keep)
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda *_, **__: functions)
    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", lambda self, name, *_, **__: name)
    return called


@pytest.mark.parametrize("packing", [True, False])
def test_run_with_flash_attention_equals_the_run_with_sdpa(small, flash, packing):
    runs = {}
    for attention in ("sdpa", "flash_attention_2"):
        config = small(attn_implementation=attention, packing=packing, output_dir=f"{small().output_dir}{attention}")
        runs[attention] = train(config)
    assert set(flash) == {"variable length"}
    for event, other in zip(*runs.values(), strict=True):
        for key in ("train/loss", "train/grad_norm", "eval/kl_t1", "eval/ce_loss"):
            if key in event:
                assert event[key] == pytest.approx(other[key], rel=1e-4), key


def test_flash_attention_without_the_boundaries_is_found_before_training(small, flash, monkeypatch):
    """Without them, transformers takes a batch of several rows as unpacked: that is what the examination is for."""
    monkeypatch.setattr(
        BodyAndHead, "body", lambda self, batch: self.decoder(input_ids=batch["input_ids"], use_cache=False,
                                                              position_ids=batch["position_ids"])
    )  # fmt: skip
    with pytest.raises(UsageError, match="packing is on, but in the teacher and the student the samples"):
        train(small(attn_implementation="flash_attention_2", packing=True))
