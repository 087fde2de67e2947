"""A teacher that runs on each batch: frozen, and kept on each device, sharded over the ranks, or in CPU memory."""

import warnings

import torch
from accelerate import Accelerator, cpu_offload
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from transformers.integrations import is_fsdp_enabled

from kdkit.config import UsageError
from kdkit.models import BodyAndHead, examine

PLACEMENTS = {"replicate": "a copy on each device", "shard": "sharded over {} ranks", "offload": "in CPU memory"}


class OnlineTeacher(BodyAndHead):
    """A frozen causal language model: teacher(batch) -> (hidden (B, S, H), head (V, H))."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.requires_grad_(False).eval()

    def examine(self, rows, device: torch.device) -> list[str]:
        return examine(self, "teacher", rows, device)

    def place(self, accelerator: Accelerator, placement: str) -> None:
        """Move the weights to where `placement` says. With FSDP call this after accelerator.prepare.

        With `shard`, a layer is gathered while it runs; with `offload`, it is copied to the device. `auto` chooses.
        """
        several, device = accelerator.num_processes > 1, accelerator.device
        if placement == "auto":
            placement = self._choose(accelerator)
        if placement == "shard" and not several:
            raise UsageError("teacher_placement is shard, but there is one process: use replicate, offload or auto")
        offload = placement == "offload"
        self.placement = f"{PLACEMENTS[placement].format(accelerator.num_processes)} ({placement})"
        from_rank_0 = bool(is_fsdp_enabled())  # then transformers may load the weights on rank 0 only
        weights = self.state_dict() if from_rank_0 and accelerator.is_main_process else {}
        if from_rank_0:
            self._replace_parameters(device if placement == "replicate" else torch.device("meta"))
        if placement == "replicate":
            self.to(device)
        elif several:
            # not accelerate's fsdp2_prepare_model: it would apply the student's mixed precision and offloading
            policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
            for module in [*self.layers, self]:  # each decoder layer alone, then embedding, norm and head together
                fully_shard(module, offload_policy=policy)
        else:
            # Hooks copy a layer to the device when its forward is called. The head's is never called: it stays there.
            self.model.get_output_embeddings().to(device)
            cpu_offload(self.decoder, device)
        if from_rank_0:
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=offload)
            # torch warns about its own calls here
            warnings.filterwarnings("ignore", message=".*(_get_pg_default_device|Multiple backends)")
            set_model_state_dict(self, weights, options=options)
            self.tie_weights()

    def _choose(self, accelerator: Accelerator) -> str:
        if accelerator.distributed_type == DistributedType.FSDP:
            return "shard"
        if accelerator.device.type != "cuda":
            return "replicate"
        free = torch.tensor(torch.cuda.mem_get_info(accelerator.device)[0], device=accelerator.device)
        free = accelerator.gather(free).min().item()  # ranks that chose differently would wait for each other forever
        if sum(parameter.nbytes for parameter in self.parameters()) < 0.4 * free:
            return "replicate"
        return "shard" if accelerator.num_processes > 1 else "offload"

    def _replace_parameters(self, device: torch.device) -> None:
        """Replace all parameters by empty ones; each rank has computed the buffers."""
        for module in self.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device=device), False)
        self.tie_weights()
