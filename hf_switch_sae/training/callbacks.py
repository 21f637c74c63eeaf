"""What an SAE needs of a step whose optimizer is not its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.sae.optim import SwitchSAEAdam


class UnitRows(TrainerCallback):
    """Keeps decoder rows at length 1 with an optimizer other than `SwitchSAEAdam`, which does."""

    def __init__(self, saes: Mapping[str, SwitchSAE]) -> None:
        self._saes = list(saes.values())

    def on_pre_optimizer_step(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Project the gradient."""
        if not _is_own(optimizer):
            for sae in self._saes:
                sae.project_decoder_grad()

    def on_optimizer_step(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Scale the rows."""
        if not _is_own(optimizer):
            for sae in self._saes:
                sae.normalize_decoder()


def _is_own(optimizer: Any) -> bool:
    return isinstance(getattr(optimizer, "optimizer", optimizer), SwitchSAEAdam)
