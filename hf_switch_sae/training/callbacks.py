"""What an SAE needs at each step if its optimizer is not `SwitchSAEAdam`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.sae.optim import SwitchSAEAdam


class UnitRows(TrainerCallback):
    """Keeps decoder rows at length 1 under optimizers that don't; `SwitchSAEAdam` does."""

    def __init__(self, saes: Mapping[str, SwitchSAE]) -> None:
        self._saes = list(saes.values())

    def on_pre_optimizer_step(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Remove the part of the gradient that would change the rows' lengths."""
        if not isinstance(unwrapped(optimizer), SwitchSAEAdam):
            for sae in self._saes:
                # else moments would fill up with what normalizing takes away again
                sae.project_decoder_grad()

    def on_optimizer_step(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Scale the rows to length 1."""
        if not isinstance(unwrapped(optimizer), SwitchSAEAdam):
            for sae in self._saes:
                # a step along the sphere's tangent still makes a row a little longer
                sae.normalize_decoder()


def unwrapped(optimizer: Any) -> Any:
    """The optimizer itself, out of the wrapper that accelerate puts around it."""
    return getattr(optimizer, "optimizer", optimizer)
