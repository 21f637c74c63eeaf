"""What a run logs: sums since the last log, over all processes, and the mean of them when asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_switch_sae.processes import Reduce
from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.training.saes import MEASURED


class Monitor:
    """Measures of the steps since the last log; each process has those of its own rows.

    Args:
        saes: by name.
    """

    def __init__(self, saes: Mapping[str, SwitchSAE]) -> None:
        self._saes = dict(saes)
        self._steps = 0
        self._sums = [
            torch.zeros(len(MEASURED) + _experts(sae), dtype=torch.float64)
            for sae in self._saes.values()
        ]

    def add(self, measures: Sequence[Tensor]) -> None:
        """Add a part of a step."""
        for at, measure in enumerate(measures):
            if self._sums[at].device != measure.device:
                self._sums[at] = self._sums[at].to(measure.device)
            self._sums[at] += measure

    def end_step(self) -> None:
        """All parts of a step have been added."""
        self._steps += 1

    def take(self, reduce: Reduce) -> dict[str, float]:
        """Means over the steps since the last time, of all processes; {} if there were none.

        Of several SAEs each figure but the loss is `<name>/<figure>`.
        """
        if not self._steps:
            return {}
        logs: dict[str, float] = {"loss": 0.0}
        for at, (name, sae) in enumerate(self._saes.items()):
            sums = reduce(self._sums[at]).tolist()
            found = dict(zip(MEASURED, sums, strict=False))
            logs["loss"] += found["loss"] / self._steps
            figures = {
                "fvu": found["fvu"] / self._steps,
                "l0": found["active"] / max(found["tokens"], 1),
                "dead_share": float(sae.dead_features().float().mean()),
            }
            if chosen := sums[len(MEASURED) :]:
                figures["balance"] = found["balance"] / self._steps
                figures["expert_load"] = max(chosen) * len(chosen) / max(sum(chosen), 1)
                figures["router_entropy"] = found["entropy"] / max(found["tokens"], 1)
            prefix = "" if len(self._saes) == 1 else f"{name}/"
            logs.update({f"{prefix}{figure}": value for figure, value in figures.items()})
        self._steps = 0
        for each in self._sums:
            each.zero_()
        return logs

    def state_dict(self) -> dict[str, Any]:
        """The sums of this process."""
        return {"steps": self._steps, "sums": [each.cpu() for each in self._sums]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken."""
        self._steps = state["steps"]
        self._sums = [each.clone() for each in state["sums"]]


@torch.no_grad()
def count_over_parts(
    sae: SwitchSAE, before: Tensor, sums: Tensor, fired: Tensor, reduce: Reduce
) -> None:
    """Set `num_tokens_since_fired` as if a batch had come as a whole.

    Args:
        sae: its counters are replaced.
        before: they, before the batch.
        sums: the whole's `batch_sums`.
        fired: [F] bool, which features fired in this process's parts.
        reduce: adds up over processes.
    """
    experts = sae.config.num_experts
    seen = sums[-experts:] if experts > 1 else sums[:1]
    since = before.view(experts, -1) + seen.to(before.dtype)[:, None]
    anywhere = reduce(fired.to(torch.int32)) > 0
    sae.num_tokens_since_fired.copy_(since.flatten().masked_fill(anywhere, 0))


def _experts(sae: SwitchSAE) -> int:
    return sae.config.num_experts if sae.config.num_experts > 1 else 0
