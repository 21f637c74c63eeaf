"""Which process this is, of how many, sums over all of them, and whether it shows progress.

How    A launcher (torchrun, `accelerate launch`) sets environment variables in each process it
       starts. torch.distributed knows the same once it has joined the processes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from hf_switch_sae.errors import ConfigError


def rank_and_world() -> tuple[int, int]:
    """This process's rank, counted from 0, and the number of processes; 0 and 1 without a launcher.

    Needs no process group, so it also serves work that processes share without talking.

    Raises:
        ConfigError: RANK and WORLD_SIZE in the environment contradict each other.
    """
    if _are_joined():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    rank, world = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if not 0 <= rank < world:
        raise ConfigError(
            f"RANK={rank} is none of the {world} processes of WORLD_SIZE={world}: "
            "both are a launcher's to set."
        )
    return rank, world


def processes_here() -> int:
    """How many of the processes run on this machine.

    Raises:
        ConfigError: LOCAL_WORLD_SIZE in the environment is not a number.
    """
    return max(1, _number("LOCAL_WORLD_SIZE", 1))


def _are_joined() -> bool:
    distributed = torch.distributed
    # torch can be built without it
    return distributed.is_available() and distributed.is_initialized()


def _number(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    try:
        # set but empty is the same as not set
        return int(value or default)
    except ValueError:
        raise ConfigError(f"{name}={value!r} in the environment is no number: unset it.") from None


def shows_progress(progress: bool | None) -> bool:
    """Whether to show a progress bar: as asked for, or if None, when stderr is a terminal."""
    return sys.stderr.isatty() if progress is None else progress


Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes."""


def alone(tensor: Tensor) -> Tensor:
    """The `Reduce` of a single process, whose sums are already complete."""
    return tensor


def added_up(tensor: Tensor) -> Tensor:
    """The `Reduce` of the processes that torch.distributed joins; all of them must call it."""
    # all_reduce works in place, and the caller's own share must stay as it is
    tensor = tensor.clone()
    torch.distributed.all_reduce(tensor)
    return tensor


def processes(by_itself: bool) -> tuple[int, int, Reduce]:
    """Rank, number of processes and `Reduce`, for work whose results are summed.

    Args:
        by_itself: whether this process works alone, whatever else torch.distributed joins.
    """
    if by_itself or not _are_joined():
        return 0, 1, alone
    return *rank_and_world(), added_up
