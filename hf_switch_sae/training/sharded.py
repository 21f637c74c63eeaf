"""SAEs whose weights are sharded over processes (FSDP2): made whole to be read, saved and loaded.

Only the module that holds all SAEs is sharded, so a step gathers all weights and the shares of the
optimizer are what is saved: memory goes to Adam's moments first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """While open, the weights of a sharded model are whole on every process, to be read."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def whole_state(model: Any) -> dict[str, Any]:
    """The state of a sharded model, whole and on the CPU; {} on all processes but the first."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(get_model_state_dict(model, options=options))


def load_whole_state(model: Any, state: dict[str, Any]) -> None:
    """Load a whole state into a sharded model; every process has read it."""
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))


def own_share(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state, of sharded weights the part that this process holds."""
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
    """Load what `own_share` gave on the same process of as many."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, each in state["state"].items():
        weight = weights[number]
        for name in ("exp_avg", "exp_avg_sq"):
            if isinstance(weight, DTensor) and name in each:
                each[name] = DTensor.from_local(
                    each[name].to(weight.device),
                    weight.device_mesh,
                    weight.placements,
                    shape=weight.shape,
                    stride=weight.stride(),
                )
    optimizer.load_state_dict(state)
