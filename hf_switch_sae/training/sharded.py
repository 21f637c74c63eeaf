"""SAEs whose weights are sharded over processes (FSDP2): made whole to be read, saved and loaded.

How    Only the module that holds all SAEs is sharded, as a whole. So each step gathers all
       weights, and the memory saved is that of Adam's moments, which is the larger part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from hf_switch_sae.errors import TrainingError
from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.training.arguments import SwitchSAETrainingArguments
from hf_switch_sae.training.callbacks import unwrapped


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """While open, the weights of a sharded model are whole on every process, to be read."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()  # what a forward does by itself, but here methods are called
    try:
        yield
    finally:
        model.reshard()


def whole_state(model: Any) -> dict[str, Any]:
    """The whole state of a sharded model, on the CPU; {} on all processes but the first."""
    # on the CPU, as a GPU that holds a shard may have no room for the whole
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(get_model_state_dict(model, options=options))


def load_whole_state(model: Any, state: dict[str, Any]) -> None:
    """Load a whole state, which every process has read, into a sharded model."""
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))


def own_share(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state; of sharded weights, only the part that this process holds."""
    state = optimizer.state_dict()
    state["state"] = {
        number: {
            name: value.to_local() if isinstance(value, DTensor) else value
            for name, value in each.items()
        }
        for number, each in state["state"].items()
    }
    return state


def load_own_share(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `own_share` gave, on the same rank of equally many processes."""
    # in the order in which `state_dict` numbers them
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, each in state["state"].items():
        weight = weights[number]
        for name in ("exp_avg", "exp_avg_sq"):
            # the optimizer computes with weight and moment together, so both must be DTensors
            if isinstance(weight, DTensor) and name in each:
                each[name] = DTensor.from_local(
                    each[name].to(weight.device),
                    weight.device_mesh,
                    weight.placements,
                    shape=weight.shape,
                    stride=weight.stride(),
                )
    optimizer.load_state_dict(state)


class Sharding(Trainer):
    """What `SwitchSAETrainer` does differently with FSDP."""

    args: SwitchSAETrainingArguments
    saes: dict[str, SwitchSAE]

    def create_accelerator_and_postprocess(self) -> None:
        """As `Trainer`'s own, and with FSDP on CPUs too, which accelerate leaves out."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and self.args.world_size > 1 and not self.is_fsdp_enabled:
            state: Any = self.accelerator.state
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def _plain_saes(self) -> dict[str, SwitchSAE]:
        """The SAEs with whole weights; all processes must call this, and the first gets them."""
        if not self.is_fsdp_enabled:
            return self.saes
        # gathering takes all processes, so it comes before asking who saves
        state, found = whole_state(self.model), {}
        if self.args.should_save:
            for at, (name, sae) in enumerate(self.saes.items()):
                start = f"saes.{at}."
                found[name] = SwitchSAE(sae.config)
                found[name].load_state_dict(
                    {key[len(start) :]: v for key, v in state.items() if key.startswith(start)}
                )
        return found

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # a file of each process, so that the moments are never gathered in one place
        name = f"optimizer_{self.args.process_index}.pt"
        torch.save(own_share(unwrapped(self.optimizer)), Path(output_dir) / name)
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        path = Path(checkpoint) / f"optimizer_{self.args.process_index}.pt"
        if not path.exists():
            raise TrainingError(f"{path} is not there: go on with as many processes, sharded.")
        state = torch.load(path, map_location="cpu", weights_only=True)
        load_own_share(unwrapped(self.optimizer), state)
        schedule = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
        scheduler: Any = self.lr_scheduler
        scheduler.load_state_dict(schedule)
