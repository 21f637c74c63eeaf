"""How well SAEs do on rows they were not trained on, over all processes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hf_switch_sae.activations.interface import Activations
from hf_switch_sae.errors import TrainingError
from hf_switch_sae.processes import Reduce
from hf_switch_sae.sae.fvu import WholeBatch, batch_sums
from hf_switch_sae.sae.model import SwitchSAE

_EDGES = tuple(at / 4 for at in range(-24, 1))  # of the density's bins: rates of 1e-6 to 1
_FEW = 256  # rows a batch where it is not known how many there will be


class RowSums:
    """What the figures of one SAE are made of: sums in float64, which add up over processes.

    Args:
        sae: as it is to be used.
        outlier_norm: rows over it are outliers; by default the SAE's own.
    """

    def __init__(self, sae: SwitchSAE, outlier_norm: float | None = None) -> None:
        config, device = sae.config, sae.device
        self.sae, self.outlier_norm = sae, outlier_norm
        self.fired = torch.zeros(config.num_features, dtype=torch.int64, device=device)
        self.error = torch.zeros((), dtype=torch.float64, device=device)
        chosen = config.num_experts if config.num_experts > 1 else 0
        self.batch = self.error.new_zeros(2 + config.hidden_size + chosen)
        self.outliers = self.error.new_zeros(2 + config.hidden_size)
        """`batch_sums` of the rows over the norm."""
        self.outlier_error = self.error.clone()
        self.cosine = self.error.clone()

    def add(self, x: Tensor) -> None:
        """Rows [n, d]."""
        sae = self.sae
        x = x.to(sae.device).float()
        outlier = sae.is_outlier(x)
        if self.outlier_norm is not None:
            outlier |= x.norm(dim=-1) > self.outlier_norm
        self._add_outliers(x[outlier])
        x = x[~outlier]
        if not len(x):
            return
        self.batch = self.batch + sae.batch_sums(x)
        features = sae.encode(x)
        x_hat = sae.decode(features, x).double()
        self.error += (x - x_hat).square().sum()
        self.cosine += torch.cosine_similarity(x.double(), x_hat, eps=1e-30).sum()
        self.fired.index_add_(0, features.ids.flatten(), (features.acts > 0).long().flatten())

    def _add_outliers(self, x: Tensor) -> None:
        if len(x):
            self.outliers = self.outliers + batch_sums(x, None, None, 1)
            x_hat = self.sae.decode(self.sae.encode(x), x)
            self.outlier_error += (x - x_hat).double().square().sum()

    def figures(self, reduce: Reduce) -> dict[str, float]:
        """Of all rows but outliers; `reduce` adds up over processes."""
        config = self.sae.config
        whole = WholeBatch.of(reduce(self.batch), config.hidden_size)
        fired, tokens, error = reduce(self.fired), float(whole.tokens), reduce(self.error)
        found = {
            "fvu": float(error / whole.deviation),
            "mse": float(error) / max(tokens, 1) / config.hidden_size,
            "cosine": float(reduce(self.cosine)) / max(tokens, 1),
            "l0": float(fired.sum()) / max(tokens, 1),
            "dead_share": float((fired == 0).float().mean()),
        }
        if whole.chosen is not None:
            share = whole.chosen / whole.chosen.sum()
            entropy = torch.special.entr(share).sum() / math.log(config.num_experts)
            found["expert_load"] = float(whole.chosen.max() / whole.chosen.mean())
            found["routing_entropy"] = float(entropy)
        return {**found, "tokens": tokens}

    def figures_of_all(self, reduce: Reduce) -> dict[str, float]:
        """fvu_all_tokens, outliers included: they are reconstructed as the decoder's bias, and
        what they deviate by is of the whole; and how many they are."""
        head = 2 + self.sae.config.hidden_size
        outliers = reduce(self.outliers)
        sums = reduce(self.batch)[:head] + outliers
        error = reduce(self.error) + reduce(self.outlier_error)
        deviation = WholeBatch.of(sums, head - 2).deviation
        return {"fvu_all_tokens": float(error / deviation), "outlier_tokens": float(outliers[0])}

    def density(self, reduce: Reduce) -> dict[str, list[float] | list[int] | int]:
        """How many features are active how often: a histogram of log10 of their rates.

        Returns:
            log10_edges: of the bins, the last of which includes its end. counts: features in each;
            rarer ones than the first edge are in the first. never: features in none.
        """
        fired = reduce(self.fired).double().cpu()
        rates = (fired / reduce(self.batch)[0].cpu().clamp_min(1))[fired > 0].log10()
        first, bins = _EDGES[0], len(_EDGES) - 1
        at = ((rates - first) / (_EDGES[1] - first)).floor().long().clamp(0, bins - 1)
        counts = torch.bincount(at, minlength=bins)
        never = int((fired == 0).sum())
        return {"log10_edges": list(_EDGES), "counts": counts.tolist(), "never": never}


@torch.no_grad()
def measure_held_out(
    saes: Mapping[str, SwitchSAE],
    activations: Activations,
    batch_rows: int,
    rank: int,
    world_size: int,
    reduce: Reduce,
    sums: dict[str, RowSums] | None = None,
    outlier_norm: float | None = None,
) -> dict[str, dict[str, float]]:
    """One pass over held-out rows; the activations are left where they were.

    Args:
        saes: by name; each reads at its hookpoint.
        activations: held-out rows; all SAEs see the same ones.
        batch_rows: of each process at a time, at most.
        rank, world_size: which process this is, of how many.
        reduce: adds up over processes.
        sums: is given each SAE's sums, for what else is to be known of these rows.
        outlier_norm: rows over it are left out too.

    Returns:
        For each SAE fvu (about the mean of all rows), mse (of an entry of the stream), cosine (of a
        row and its reconstruction, the mean), l0, dead_share (features active on none of these
        rows), tokens; and with several experts expert_load (largest over mean) and routing_entropy
        (of the experts' shares, over that of equal ones: 1 is even).

    Raises:
        TrainingError: not one batch of rows, or none but outliers.
    """
    before = activations.state_dict()
    sums = {} if sums is None else sums
    sums |= {name: RowSums(sae, outlier_norm) for name, sae in saes.items()}
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
    found = {name: each.figures(reduce) for name, each in sums.items()}
    if not all(figures["tokens"] for figures in found.values()):
        raise TrainingError("there are no held-out rows to evaluate on: give more text.")
    return found


def _batch_rows(rows: int | None, most: int, world_size: int) -> int:
    """Of a process, so that few rows are left over at the end: they are not measured."""
    if rows is None:
        return min(most, _FEW)
    batches = -(-rows // (most * world_size))
    return max(1, rows // (batches * world_size))
