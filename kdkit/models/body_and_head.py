"""A causal language model as the loss needs it: last hidden states, and a head whose product with them is the logits.

Shapes: B rows, S tokens, H hidden size, V rows of a head (entries of the vocabulary).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import masking_utils

from kdkit.config import UsageError


class BodyAndHead(nn.Module):
    """A causal language model that passes its last hidden states and its head to a function.

    So no tensor of the size tokens x vocabulary has to exist. Always call this module, never a part of it: DDP notices
    the use of a parameter, and FSDP gathers sharded parameters, only in `forward`.

    `examine` finds the attributes `packs`, `logit_scale` and `soft_cap`: logits = soft_cap(hidden @ head^T, cap) for
    the hidden states and the head that the function is given, which contain the scale and the bias, if there are any.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        head = model.get_output_embeddings()
        if getattr(head, "weight", None) is None:
            raise UsageError(f"{type(model).__name__} has no output embedding to compute logits with: use another one")
        self.model = model
        # get_decoder and base_model may return the model itself, or a head of that name
        candidates = (model.get_decoder(), model.base_model, *model.children())
        decoder = next((part for part in candidates if part is not model and hasattr(part, "get_decoder")), model)
        object.__setattr__(self, "decoder", decoder)  # not as a submodule: it is in `model` already
        self.head_rows = len(head.weight)  # V, often more than the tokenizer has entries
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.context = context if context and context > 0 else None  # None: unlimited
        self.num_parameters = count_parameters(model)
        self.training = model.training  # otherwise a new module is in train mode
        self._no_split_modules = model._no_split_modules  # the classes of decoder layers; accelerate reads it
        self.packs = True  # documents that share a row do not see each other
        self.logit_scale, self.soft_cap = 1.0, None

    def tie_weights(self) -> None:
        """Tie embedding and head again: FSDP calls it after it has replaced parameters."""
        self.model.tie_weights()

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, which FSDP shards one by one."""
        names = set(self._no_split_modules or [])
        # FSDP gives a sharded layer a class of its own, whose base is that of the layer
        return [module for module in self.modules() if names & {base.__name__ for base in type(module).__mro__}]

    def compile_layers(self) -> None:
        """Compile each decoder layer in its place: all of them share one compilation, for any number of tokens."""
        if not self.layers:
            raise UsageError(
                f"{type(self.model).__name__} does not name its decoder layers: set compile_models to false"
            )
        for layer in self.layers:
            layer.compile(dynamic=True)

    def recompute_activations(self) -> None:
        """Keep only the input of each decoder layer for the backward pass, which then runs the layer again."""
        if not self.model.supports_gradient_checkpointing:
            raise UsageError(f"{type(self.model).__name__} does not support gradient_checkpointing: set it to false")
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def forward(self, batch: dict[str, Tensor] | None, function: Callable = lambda *both: both, *arguments):
        """Return function(hidden (B, S, H), head (V, H), *arguments), or without a batch function(self, *arguments)."""
        if batch is None:
            return function(self, *arguments)
        return function(*self.with_bias(self.body(batch).last_hidden_state), *arguments)

    def generate(self, **arguments) -> Tensor:
        """Write tokens: see `kdkit.on_policy`."""
        return self.model.generate(**arguments)

    def body(self, batch: dict[str, Tensor]):
        """Return the output of the model without its head."""
        # No attention mask: transformers derives one from the position ids, which keeps packed documents apart. Only
        # flash attention has to be told where documents start, or it takes a batch of several rows as unpacked.
        boundaries = {"position_ids": batch["position_ids"]} if self.packs else {}
        if self.packs and "flash" in self.model.config._attn_implementation:
            for side in ("q", "k"):
                boundaries[f"cu_seq_lens_{side}"] = batch["cu_seq_lens"]
                boundaries[f"max_length_{side}"] = batch["max_length"]
        with _documents_known(batch, self.packs):
            return self.decoder(input_ids=batch["input_ids"], use_cache=False, **boundaries)

    def with_bias(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden states (..., H) and head (V, H) with the scale and the bias of the logits in them.

        The bias is one more column of the head, followed by seven of 0: products are fast if H is a multiple of 8.
        """
        head = self.model.get_output_embeddings()
        weight, bias = head.weight, getattr(head, "bias", None)
        if self.logit_scale != 1:
            hidden = hidden * self.logit_scale
        if bias is not None:
            hidden = F.pad(F.pad(hidden, (0, 1), value=1.0), (0, 7))
            weight = F.pad(torch.cat([weight, bias[:, None]], dim=1), (0, 7))
        return hidden, weight


@contextmanager
def _documents_known(batch: dict, packs: bool) -> Iterator[None]:
    """Tell transformers whether rows have several documents. It would ask the GPU, and the host would wait for that."""
    if "cu_seq_lens" not in batch:  # made by hand: transformers finds out
        yield
        return
    packed = packs and len(batch["cu_seq_lens"]) - 1 > len(batch["input_ids"])  # more documents than rows

    def document_indices(position_ids: Tensor) -> Tensor | None:  # (B, S)
        steps = position_ids.diff(prepend=position_ids[:, :1] - 1)
        return (steps != 1).cumsum(-1) if packed else None

    with mock.patch.object(masking_utils, "find_packed_sequence_indices", document_indices):
        yield


def wrap(model: nn.Module):
    """Return a transformers model as a `BodyAndHead`, and anything else (a `BodyAndHead`, a teacher) unchanged."""
    return BodyAndHead(model) if hasattr(model, "get_output_embeddings") else model


def count_parameters(model: nn.Module) -> int:
    """Count a model's parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
