"""Ask a model, with a few tokens, what the loss relies on; nothing here is read from its config or its name.

- Does a document give the same in a row with others as alone? If not, a row may have one document only.
- Does a row give the same beside other rows and padding? Does a token see only those before it?
- Which scale, bias and soft cap lead from the last hidden states to the logits?

Shapes: L tokens of a document, H hidden size, V rows of the head.
"""

import dataclasses
from collections.abc import Sequence
from itertools import chain, islice
from unittest import mock

import torch
from torch import Tensor, nn

from kdkit.config import UsageError
from kdkit.losses import soft_cap
from kdkit.models.body_and_head import BodyAndHead
from kdkit.running.hub import first_line

DOCUMENT_TOKENS = 4  # L
OTHER_HEAD = "has logits that are not soft_cap(scale * hidden @ head^T + bias), as the loss expects"


@torch.no_grad()
def examine(module: nn.Module, role: str, rows: Sequence[dict], device: torch.device) -> list[str]:
    """Set `packs`, `logit_scale` and `soft_cap` of a `BodyAndHead`, to what the model does on tokens of these rows.

    `module` is the `BodyAndHead`, or what accelerate made of it. Called by all ranks. Returns lines to print. Raises a
    UsageError if the model is not causal, depends on other rows or on padding, or has logits of another form.
    """
    model = getattr(module, "module", module)  # without DDP
    tokens = chain(chain.from_iterable(row["input_ids"] for row in islice(rows, 64)), range(model.head_rows))
    ids = torch.tensor(list(islice(dict.fromkeys(tokens), 3 * DOCUMENT_TOKENS)), device=device)
    was_training = module.training
    module.eval()(None, _examine, role, ids)  # without dropout
    module.train(was_training)
    notes = [f"the {role}'s logits have a soft cap of {model.soft_cap:g}"] if model.soft_cap is not None else []
    return notes + ([f"the {role}'s logits are scaled by {model.logit_scale:g}"] if model.logit_scale != 1 else [])


def _examine(model: BodyAndHead, role: str, ids: Tensor) -> None:
    """`ids`: (3 L,), all different."""
    first, second, third = ids.view(3, -1)  # documents of L tokens
    # flash attention has no fp32: it then runs as in training
    flash = "flash" in model.model.config._attn_implementation
    with torch.autocast(ids.device.type, enabled=flash and torch.is_autocast_enabled(ids.device.type)):
        for model.packs in (True, False):
            error = None
            try:
                alone = _body(model, first[None])
                fault = _fault(model, alone.last_hidden_state[0], first, second, third)
                fault = fault or _find_head(model, first[None], alone)
            except torch.OutOfMemoryError:
                raise
            except Exception as caught:  # whatever the model's own code raises
                fault = f"cannot run on plain token ids ({type(caught).__name__}: {first_line(caught)})"
                error = caught
            if fault is None:
                return
    raise UsageError(f"the {role} ({type(model.model).__name__}) {fault}: use a model of another family") from error


def _fault(model: BodyAndHead, alone: Tensor, first: Tensor, second: Tensor, third: Tensor) -> str | None:
    """Return what is wrong with rows of several documents (`packs`), or of one; None if nothing is.

    The first document, which gave `alone` (L, H), now runs in a batch, behind and before another document, which is
    what padding is, too. If it gives the same everywhere, it sees no other document, row, or padding. If its earlier
    tokens give the same when its last one and the document before it are replaced, it sees no later token.
    """
    changed = torch.cat([first[:-1], third[:1]])
    rows = [[third, first], [second, changed], [first, second]]
    if not model.packs:
        rows = [[first, second], [changed, third], [first, third]]
    at = slice(len(first), None) if model.packs else slice(len(first))  # where `first` and `changed` are
    output = _body(model, torch.stack([torch.cat(row) for row in rows]), len(first)).last_hidden_state  # (3, 2 L, H)
    # the same shapes give the same rounding errors, except in mixtures of experts
    same_shape, other_shape = (1e-5, 1e-3) if alone.dtype == torch.float32 else (0.02, 0.05)
    if _differ(output[1, at][:-1], output[0, at][:-1], same_shape):
        return "lets a token see a later one" + " or another document" * model.packs
    if _differ(output[0, at], alone, other_shape) or _differ(output[2, : len(first)], alone, other_shape):
        return "gives other hidden states in a batch or beside padding than alone"
    return None


def _body(model: BodyAndHead, ids: Tensor, length: int | None = None):
    """Run the model without its head on rows of documents of `length` tokens (None: of one document)."""
    length = length or ids.shape[1]
    positions = (torch.arange(ids.shape[1], device=ids.device) % length).expand_as(ids)
    starts = torch.arange(0, ids.numel() + 1, length, dtype=torch.int32, device=ids.device)
    return model.body({"input_ids": ids, "position_ids": positions, "cu_seq_lens": starts, "max_length": length})


def _differ(a: Tensor, b: Tensor, limit: float) -> bool:
    """Whether the distance of two tensors is larger than a fraction of their size. False for NaN: evaluation stops."""
    return bool((a.float() - b.float()).norm() > limit * b.float().norm())


def _find_head(model: BodyAndHead, ids: Tensor, output) -> str | None:
    """Find `logit_scale` and `soft_cap`, by giving hidden states of four sizes to the model's own head.

    `ids` is (1, L), and `output` what the body gives for them. Returns what is wrong if the logits have another form.
    """
    head, hidden = model.model.get_output_embeddings(), output.last_hidden_state  # (1, L, H)
    if hidden.shape[-1] != head.weight.shape[1]:
        return OTHER_HEAD
    bias = 0 if getattr(head, "bias", None) is None else head.bias.float()
    product = hidden.float() @ head.weight.float().T  # (1, L, V)
    # as it is, and so that the largest product is about 1, 1e4 and 1e5; powers of 2 cause no rounding
    sizes = (torch.tensor([1, 1e4, 1e5], device=ids.device) / product.abs().max()).log2().round().exp2()
    sizes = torch.cat([torch.ones_like(sizes[:1]), sizes])[:, None, None]  # (4, 1, 1)
    fed = dataclasses.replace(output, last_hidden_state=hidden * sizes.to(hidden.dtype))
    with mock.patch.object(model.decoder, "forward", lambda *_, **__: fed):
        logits = model.model(input_ids=ids.expand(4, -1), use_cache=False).logits.float()  # (4, L, V)
    if logits.isnan().any():  # the first evaluation reports it
        return None
    if logits.shape != (4, *product.shape[1:]):
        return OTHER_HEAD
    exact = {hidden.dtype, head.weight.dtype} == {torch.float32}
    limit, error = (1e-3, 1e-5) if exact else (0.02, 1e-3)
    highest = logits.abs().amax((1, 2))
    model.soft_cap, small = None, logits[1]
    if highest[3] < 2 * highest[2]:  # ten times the hidden state, and not even twice the logits
        model.soft_cap = _round(highest[3], error)
        small = model.soft_cap * torch.atanh(small / model.soft_cap)
    expected = (product * sizes)[1]
    model.logit_scale = _round(((small - bias) * expected).sum() / expected.square().sum(), error)
    expected = soft_cap(model.logit_scale * product * sizes + bias, model.soft_cap)
    return None if ((expected - logits).abs().amax((1, 2)) <= limit * highest).all() else OTHER_HEAD


def _round(value: Tensor, tolerance: float) -> float:
    """Undo the error of a measurement: the shortest number near it, or 1 over one: 1 for 1.00001, 1 / 6 for 0.1667."""
    value = float(value)
    for digits in range(1, 9):
        for number in (float(f"{value:.{digits}g}"), 1 / float(f"{1 / value:.{digits}g}")):
            if abs(number - value) <= tolerance * abs(value):
                return number
    return value
