"""What a launcher (torchrun, `accelerate launch`) tells a process of the others, by environment."""

from __future__ import annotations

import os

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
