"""SAEs and held-out rows -> reconstruction, sparsity and use of experts, over all processes."""

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

_EDGES = tuple(at / 4 for at in range(-24, 1))  # of the density's bins: rates from 1e-6 to 1
_FEW = 256  # rows per batch if their number is not known: the last batch is dropped if not full


class RowSums:
    """The sums that one SAE's figures are made of, in float64; they add up over processes.

    Args:
        sae: in the mode it is to be measured in.
        outlier_norm: rows with a larger norm are outliers, besides those that the SAE itself takes
            for outliers.
    """

    def __init__(self, sae: SwitchSAE, outlier_norm: float | None = None) -> None:
        config, device = sae.config, sae.device
        self.sae, self.outlier_norm = sae, outlier_norm
        self.fired = torch.zeros(config.num_features, dtype=torch.int64, device=device)
        self.error = torch.zeros((), dtype=torch.float64, device=device)
        chosen = config.num_experts if config.num_experts > 1 else 0
        # laid out as by `batch_sums`: tokens, squares, a sum per column, choices per expert
        self.batch = self.error.new_zeros(2 + config.hidden_size + chosen)
        self.outliers = self.error.new_zeros(2 + config.hidden_size)
        """`batch_sums` of the outliers."""
        self.outlier_error = self.error.clone()
        self.cosine = self.error.clone()

    def add(self, x: Tensor) -> None:
        """Add rows [n, d]."""
        sae = self.sae
        x = x.to(sae.device).float()
        # what the SAE leaves alone, or another one that is measured on the same rows
        outlier = sae.is_outlier(x)
        if self.outlier_norm is not None:
            outlier |= x.norm(dim=-1) > self.outlier_norm
        self._add_outliers(x[outlier])
        x = x[~outlier]
        if not len(x):
            return
        self.batch = self.batch + sae.batch_sums(x)
        features = sae.encode(x)
        x_hat = sae.decode(features, x).double()  # the error of a good SAE is a small difference
        self.error += (x - x_hat).square().sum()
        self.cosine += torch.cosine_similarity(x.double(), x_hat, eps=1e-30).sum()
        self.fired.index_add_(0, features.ids.flatten(), (features.acts > 0).long().flatten())

    def _add_outliers(self, x: Tensor) -> None:
        if len(x):
            self.outliers = self.outliers + batch_sums(x, None, None, 1)
            x_hat = self.sae.decode(self.sae.encode(x), x)
            self.outlier_error += (x - x_hat).double().square().sum()

    def figures(self, reduce: Reduce) -> dict[str, float]:
        """The figures that `measure_held_out` returns, over all rows but outliers."""
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
            share = whole.chosen / whole.chosen.sum()  # of tokens, per expert
            entropy = torch.special.entr(share).sum() / math.log(config.num_experts)
            found["expert_load"] = float(whole.chosen.max() / whole.chosen.mean())
            found["routing_entropy"] = float(entropy)
        return {**found, "tokens": tokens}

    def figures_of_all(self, reduce: Reduce) -> dict[str, float]:
        """fvu_all_tokens, outliers included, and outlier_tokens, how many those are.

        An outlier is reconstructed as the decoder's bias, and adds to the variance like any row.
        """
        # of `batch_sums` only the tokens and deviations: no expert is chosen for an outlier
        head = 2 + self.sae.config.hidden_size
        outliers = reduce(self.outliers)
        sums = reduce(self.batch)[:head] + outliers
        error = reduce(self.error) + reduce(self.outlier_error)
        deviation = WholeBatch.of(sums, head - 2).deviation
        return {"fvu_all_tokens": float(error / deviation), "outlier_tokens": float(outliers[0])}

    def density(self, reduce: Reduce) -> dict[str, list[float] | list[int] | int]:
        """How many features are active how often: a histogram of the log10 of their rates.

        Returns:
            log10_edges: edges of the bins; the last bin includes its upper edge. counts: features
            per bin; rates below the first edge are in the first. never: features never active.
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
    """Measure SAEs in one pass over held-out rows; the activations' cursor is put back.

    Args:
        saes: by name; each reads at its hookpoint.
        activations: held-out rows, the same for all SAEs.
        batch_rows: rows per batch of each process, at most.
        rank, world_size: which of how many processes this is.
        reduce: adds up over processes.
        sums: a dict to put each SAE's `RowSums` into, for further figures.
        outlier_norm: rows with a larger norm are left out too.

    Returns:
        For each SAE fvu (about the mean of all rows), mse (per entry of the stream), cosine (mean
        over rows, of each with its reconstruction), l0, dead_share (share of features that are
        active on none of these rows), tokens. With several experts also expert_load (largest over
        mean) and routing_entropy (of the experts' shares, 1 if they are equal).

    Raises:
        TrainingError: there is not one batch of rows, or all rows are outliers.
    """
    before = activations.state_dict()
    sums = {} if sums is None else sums
    sums |= {name: RowSums(sae, outlier_norm) for name, sae in saes.items()}
    modes = {name: sae.training for name, sae in saes.items()}
    try:
        for sae in saes.values():
            # a batch_topk SAE without a threshold yet is measured by the rule of training
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
    """Rows per batch of a process, chosen so that few are left over: those are not measured."""
    if rows is None:
        return min(most, _FEW)
    batches = -(-rows // (most * world_size))
    return max(1, rows // (batches * world_size))
