"""Ask a model, with a few tokens, what the loss relies on; nothing here is read from its config or its name.

- Documents that share a row: does each give what it gives alone? If not, a row may have one document only.
- Batches and padding: does a row give the same beside other rows, with padding on its right?
- Causality: does a token see only those before it?
- The head: which scale, bias and soft cap lead from the last hidden states to the logits?

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

DOCUMENT_TOKENS = 4  # L


@torch.no_grad()
def examine(module: nn.Module, role: str, rows: Sequence[dict], device: torch.device) -> list[str]:
    """Set `packs`, `logit_scale` and `soft_cap` of a `BodyAndHead`, to what the model does on tokens of these rows.

    `module` is the `BodyAndHead`, or what accelerate made of it. With several ranks, each of them calls this. Returns
    lines to print.

    Raises:
        UsageError: the model is not causal, depends on other rows or on padding, or has logits of another form.
    """
    model = getattr(module, "module", module)  # without DDP
    tokens = chain(chain.from_iterable(row["input_ids"] for row in islice(rows, 64)), range(model.head_rows))
    ids = torch.tensor(list(islice(dict.fromkeys(tokens), 3 * DOCUMENT_TOKENS)), device=device)
    was_training = module.training
    module.eval()  # without dropout
    try:
        module(None, _examine, role, ids)
    finally:
        module.train(was_training)
    head = [f"a soft cap of {model.soft_cap:g}"] if model.soft_cap is not None else []
    head += [f"a scale of {model.logit_scale:g}"] if model.logit_scale != 1 else []
    return [f"the {role}'s logits have {' and '.join(head)}: applied in the loss"] if head else []


def _examine(model: BodyAndHead, role: str, ids: Tensor) -> None:
    """`ids`: (3 L,), all different."""
    # flash attention has no fp32: it then runs as in training
    flash = "flash" in str(getattr(model.model.config, "_attn_implementation", ""))
    with torch.autocast(ids.device.type, enabled=flash and torch.is_autocast_enabled(ids.device.type)):
        documents = ids.view(3, -1)  # (3, L)
        error = None
        for model.packs in (True, False):
            try:
                fault = _fault(model, *documents)
            except torch.OutOfMemoryError:
                raise
            except Exception as caught:  # whatever the model's own code raises
                fault, error = f"cannot run on plain token ids ({type(caught).__name__}: {_first_line(caught)})", caught
            if fault is None:
                break
        else:
            name = type(model.model).__name__
            raise UsageError(f"the {role} ({name}) {fault}: use a causal language model of another family") from error
        _find_head(model, role, documents[:1])


def _fault(model: BodyAndHead, first: Tensor, second: Tensor, third: Tensor) -> str | None:
    """Return what is wrong with rows of several documents (`packs`), or of one; None if nothing is.

    The first document runs alone, and in a batch: behind and before another document, which is what padding is, too.
    If it gives the same everywhere, it sees no other document, row, or padding. If it still gives the same, except for
    its last token, when that token and the document before it are replaced, it sees no later token.
    """
    changed = torch.cat([first[:-1], third[:1]])
    rows = [[third, first], [second, changed], [first, second]]
    if not model.packs:
        rows = [[first, second], [changed, third], [first, third]]
    at = slice(len(first), None) if model.packs else slice(len(first))  # where `first` and `changed` are
    positions = torch.arange(len(first), device=first.device)
    alone = _hidden(model, first[None], positions)[0]  # (L, H)
    output = _hidden(model, torch.stack([torch.cat(row) for row in rows]), positions.repeat(2))  # (rows, 2 L, H)
    # The same shapes give the same rounding errors, except in mixtures of experts.
    same_shape, other_shape = (1e-5, 1e-3) if alone.dtype == torch.float32 else (0.02, 0.05)
    if _differ(output[1, at][:-1], output[0, at][:-1], same_shape):
        return "lets a token see a later one" + " or another document" * model.packs
    if _differ(output[0, at], alone, other_shape) or _differ(output[-1, : len(first)], alone, other_shape):
        return "gives other hidden states in a batch or beside padding than alone"
    return None


def _hidden(model: BodyAndHead, ids: Tensor, positions: Tensor) -> Tensor:
    return model.body({"input_ids": ids, "position_ids": positions.expand_as(ids)}).last_hidden_state


def _differ(a: Tensor, b: Tensor, limit: float) -> bool:
    """Whether the distance of two tensors is larger than a fraction of their size. False for NaN: evaluation stops."""
    return bool((a.float() - b.float()).norm() > limit * b.float().norm())


def _find_head(model: BodyAndHead, role: str, ids: Tensor) -> None:
    """Find `logit_scale` and `soft_cap`, by giving hidden states of four sizes to the model's own head: `ids` (1, L).

    Raises:
        UsageError: the logits have another form.
    """
    model.logit_scale, model.soft_cap = 1.0, None
    output = model.body({"input_ids": ids, "position_ids": torch.arange(ids.shape[1], device=ids.device)[None]})
    hidden, name = output.last_hidden_state, type(model.model).__name__  # (1, L, H)
    refusal = UsageError(
        f"the {role}'s logits are not soft_cap(scale * hidden @ head^T + bias): {name} takes another step from the "
        f"last hidden states to the logits, which the loss would not take. Use another {role}"
    )
    if hidden.shape[-1] != model.model.get_output_embeddings().weight.shape[1]:
        raise refusal
    largest = _product(model, hidden).abs().max()
    sizes = torch.stack([torch.ones_like(largest), 1 / largest, 1e4 / largest, 1e5 / largest])
    fed = hidden * sizes[:, None, None].to(hidden.dtype)  # (4, L, H); largest products: as it is, 1, 1e4 and 1e5
    fed_output = dataclasses.replace(output, last_hidden_state=fed)
    with mock.patch.object(model.decoder, "forward", lambda *_, **__: fed_output):
        try:
            logits = model.model(input_ids=ids.expand(4, -1), use_cache=False).logits.float()  # (4, L, V)
        except (RuntimeError, TypeError) as error:  # the head cannot be called with such hidden states
            raise refusal from error
    bias = getattr(model.model.get_output_embeddings(), "bias", None)
    bias = 0 if bias is None else bias.float()
    product = _product(model, fed)
    if logits.shape != product.shape:
        raise refusal
    if logits.isnan().any():  # the first evaluation reports it
        return
    dtypes = {hidden.dtype, model.model.get_output_embeddings().weight.dtype}
    limit, error = (1e-3, 1e-5) if dtypes == {torch.float32} else (0.02, 1e-3)
    highest = logits.abs().amax((1, 2))
    if highest[3] < 2 * highest[2]:  # ten times the hidden state, and not even twice the logits
        model.soft_cap = _round(highest[3], error)
    small = logits[1] if model.soft_cap is None else model.soft_cap * torch.atanh(logits[1] / model.soft_cap)
    product = product[1] - bias
    model.logit_scale = _round(((small - bias) * product).sum() / product.square().sum(), error)
    expected = soft_cap(_product(model, fed), model.soft_cap)
    if not ((expected - logits).abs().amax((1, 2)) <= limit * highest).all():
        raise refusal


def _product(model: BodyAndHead, hidden: Tensor) -> Tensor:
    """The logits (..., V) before the soft cap, in fp32."""
    hidden, head = model.with_bias(hidden)
    return hidden.float() @ head.float().T


def _round(value: Tensor, tolerance: float) -> float:
    """Undo the error of a measurement: the shortest number near it, or 1 over one: 1 for 1.00001, 1 / 6 for 0.1667."""
    value = float(value)
    numbers = (number for digits in range(1, 9) for number in _rounded(value, digits))
    return next((number for number in numbers if abs(number - value) <= tolerance * abs(value)), value)


def _rounded(value: float, digits: int) -> tuple[float, float]:
    return float(f"{value:.{digits}g}"), 1 / float(f"{1 / value:.{digits}g}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")
