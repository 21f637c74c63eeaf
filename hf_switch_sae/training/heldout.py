"""How well SAEs do on rows they were not trained on, over all processes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_switch_sae.errors import TrainingError
from hf_switch_sae.losses import WholeBatch
from hf_switch_sae.model import SwitchSAE
from hf_switch_sae.training.activations import Activations
from hf_switch_sae.training.monitor import Reduce

_FEW = 256  # rows a batch where it is not known how many there will be


class RowSums:
    """What fvu, l0, dead_share and expert_load of one SAE are made of, in float64."""

    def __init__(self, sae: SwitchSAE) -> None:
        config, device = sae.config, sae.device
        self.sae = sae
        self.batch: Tensor | None = None
        self.fired = torch.zeros(config.num_features, dtype=torch.int64, device=device)
        self.error = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Rows [n, d]; outliers among them are left out."""
        sae = self.sae
        x = x.to(sae.device).float()
        x = x[~sae.is_outlier(x)]
        found = sae.batch_sums(x)
        self.batch = found if self.batch is None else self.batch + found
        features = sae.encode(x)
        self.error += (x - sae.decode(features, x)).double().square().sum()
        self.fired.index_add_(0, features.ids.flatten(), (features.acts > 0).long().flatten())

    def figures(self, reduce: Reduce) -> dict[str, float]:
        """Of all rows; `reduce` adds up over processes."""
        config = self.sae.config
        assert self.batch is not None
        whole = WholeBatch.of(reduce(self.batch), config.hidden_size)
        fired, tokens = reduce(self.fired), float(whole.tokens)
        found = {
            "fvu": float(reduce(self.error) / whole.deviation),
            "l0": float(fired.sum()) / max(tokens, 1),
            "dead_share": float((fired == 0).float().mean()),
        }
        if whole.chosen is not None:
            found["expert_load"] = float(whole.chosen.max() / whole.chosen.mean())
        return {**found, "tokens": tokens}


@torch.no_grad()
def measure_held_out(
    saes: Mapping[str, SwitchSAE],
    activations: Activations,
    batch_rows: int,
    rank: int,
    world_size: int,
    reduce: Reduce,
) -> dict[str, dict[str, float]]:
    """One pass over held-out rows; the activations are left where they were.

    Returns:
        For each SAE fvu (about the mean of all rows), l0, dead_share (features active on none of
        these rows), expert_load (largest over mean; not with one expert), tokens.

    Raises:
        TrainingError: not one batch of rows.
    """
    before = activations.state_dict()
    sums = {name: RowSums(sae) for name, sae in saes.items()}
    modes = {name: sae.training for name, sae in saes.items()}
    try:
        for sae in saes.values():
            # of a batch_topk SAE whose threshold is not known yet, the rule of training is used
            sae.train(sae.config.activation == "batch_topk" and bool((sae.threshold < 0).any()))
        size = _batch_rows(activations.num_rows, batch_rows, world_size)
        for streams in activations.batches(size, rank, world_size, epochs=1):
            for name, sae in saes.items():
                sums[name].add(streams[str(sae.config.hookpoint)])
    finally:
        for name, sae in saes.items():
            sae.train(modes[name])
        activations.load_state_dict(before)
    if any(each.batch is None for each in sums.values()):
        raise TrainingError("there are no held-out rows to evaluate on: give more text.")
    return {name: each.figures(reduce) for name, each in sums.items()}


def _batch_rows(rows: int | None, most: int, world_size: int) -> int:
    """Of a process, so that few rows are left over at the end: they are not measured."""
    if rows is None:
        return min(most, _FEW)
    batches = -(-rows // (most * world_size))
    return max(1, rows // (batches * world_size))
