"""What a run logs: figures summed over steps and processes, and their means since the last log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_switch_sae.processes import Reduce
from hf_switch_sae.sae.model import SwitchSAE
from hf_switch_sae.training.saes import MEASURED


class Monitor:
    """Sums of the measures since the last log, of this process's own rows.

    Args:
        saes: the SAEs by name.
    """

    def __init__(self, saes: Mapping[str, SwitchSAE]) -> None:
        self._saes = dict(saes)
        self._steps = 0
        self._sums = [
            # float32 counts tokens exactly only up to 2**24
            torch.zeros(len(MEASURED) + _experts(sae), dtype=torch.float64, device="cpu")
            for sae in self._saes.values()
        ]

    def add(self, measures: Sequence[Tensor]) -> None:
        """Add the measures of one part of a step, a tensor for each SAE."""
        # summed where they are computed, without waiting for a GPU
        for at, measure in enumerate(measures):
            if self._sums[at].device != measure.device:
                self._sums[at] = self._sums[at].to(measure.device)
            self._sums[at] += measure

    def end_step(self) -> None:
        """Count a step, all parts of which have been added."""
        self._steps += 1

    def take(self, reduce: Reduce) -> dict[str, float]:
        """Means over the steps since the last call, of all processes; {} if there were none.

        If there are several SAEs, each figure but the loss is named `<SAE>/<figure>`.
        """
        if not self._steps:
            return {}
        logs: dict[str, float] = {"loss": 0.0}
        for at, (name, sae) in enumerate(self._saes.items()):
            sums = reduce(self._sums[at]).tolist()
            # not strict: the experts' counts come after the named figures
            found = dict(zip(MEASURED, sums, strict=False))
            logs["loss"] += found["loss"] / self._steps
            figures = {
                "fvu": found["fvu"] / self._steps,
                "l0": found["active"] / max(found["tokens"], 1),
                "dead_share": float(sae.dead_features().float().mean()),
            }
            # an SAE with a single expert has no router to report on
            if chosen := sums[len(MEASURED) :]:
                figures["balance"] = found["balance"] / self._steps
                # the busiest expert over the mean, so 1 is an even load
                figures["expert_load"] = max(chosen) * len(chosen) / max(sum(chosen), 1)
                figures["router_entropy"] = found["entropy"] / max(found["tokens"], 1)
            prefix = "" if len(self._saes) == 1 else f"{name}/"
            logs.update({f"{prefix}{figure}": value for figure, value in figures.items()})
        self._steps = 0
        for each in self._sums:
            each.zero_()
        return logs

    def state_dict(self) -> dict[str, Any]:
        """This process's sums, for a checkpoint."""
        return {"steps": self._steps, "sums": [each.cpu() for each in self._sums]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was taken."""
        self._steps = state["steps"]
        self._sums = [each.clone() for each in state["sums"]]


@torch.no_grad()
def count_over_parts(
    sae: SwitchSAE, before: Tensor, sums: Tensor, fired: Tensor, reduce: Reduce
) -> None:
    """Set `num_tokens_since_fired` to what it would be had the batch come in one piece.

    Args:
        sae: its counters are replaced.
        before: [num_features], the counters before the batch.
        sums: the `batch_sums` of the whole batch.
        fired: [num_features] bool, which features fired in this process's parts.
        reduce: adds up over processes.
    """
    # a feature has seen the tokens of its own expert only
    experts = sae.config.num_experts
    seen = sums[-experts:] if experts > 1 else sums[:1]
    since = before.view(experts, -1) + seen.to(before.dtype)[:, None]
    anywhere = reduce(fired.to(torch.int32)) > 0
    sae.num_tokens_since_fired.copy_(since.flatten().masked_fill(anywhere, 0))


def _experts(sae: SwitchSAE) -> int:
    return sae.config.num_experts if sae.config.num_experts > 1 else 0
