"""What a launcher (torchrun, `accelerate launch`) tells a process of the others, by environment."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

from hf_switch_sae.errors import ConfigError


def rank_and_world() -> tuple[int, int]:
    """This process's number, from 0, and how many there are; 0 and 1 without a launcher.

    Raises:
        ConfigError: RANK and WORLD_SIZE say what can't be.
    """
    rank, world = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if not 0 <= rank < world:
        raise ConfigError(
            f"RANK={rank} is none of the {world} processes of WORLD_SIZE={world}: "
            "both are a launcher's to set."
        )
    return rank, world


def processes_here() -> int:
    """How many there are on this machine.

    Raises:
        ConfigError: LOCAL_WORLD_SIZE says what can't be.
    """
    return max(1, _number("LOCAL_WORLD_SIZE", 1))


def _number(name: str, default: int) -> int:
    said = os.environ.get(name, "")
    try:
        return int(said or default)
    except ValueError:
        raise ConfigError(f"{name}={said!r} in the environment is no number: unset it.") from None


Reduce = Callable[[Tensor], Tensor]
"""Adds up a tensor over processes."""


def alone(tensor: Tensor) -> Tensor:
    """The `Reduce` of one process: its sums are those of all."""
    return tensor


def added_up(tensor: Tensor) -> Tensor:
    """The `Reduce` of the processes that torch.distributed joins: each of them calls it."""
    tensor = tensor.clone()
    torch.distributed.all_reduce(tensor)
    return tensor


def processes(by_itself: bool) -> tuple[int, int, Reduce]:
    """Which process this is, of how many that torch.distributed joins, and their sum."""
    distributed = torch.distributed
    if not by_itself and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size(), added_up
    return 0, 1, alone
